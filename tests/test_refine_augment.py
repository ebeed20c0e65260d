"""Transforms, what may be done to which class, how many new images and which."""

import numpy as np
import pytest
import torch
from drawings import drawing
from PIL import Image

from smidgen.refine.augment import Originals, allocate, augment, candidates, rarity
from smidgen.refine.classifier import Judge, Recipe, Small
from smidgen.refine.folder import Copy, View, untouched
from smidgen.refine.operators import FLIPS, OPERATORS, Transform
from smidgen.refine.safety import Policy, label_map, learn
from smidgen.run import Run

SIDE = 16


def picture(mode: str = "L", size: tuple[int, int] = (60, 40)) -> Image.Image:
    return drawing("left", np.random.default_rng(3), size).convert(mode)


def strongest(name: str) -> float:
    return OPERATORS[name].strengths[-1]


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_strength_0_is_the_image_and_a_seed_the_same_bytes(name, mode):
    image = picture(mode)
    assert Transform(((name, 0.0),))(image).tobytes() == image.tobytes()
    moved = Transform(((name, strongest(name)),), seed=5)
    again = moved(image)
    assert again.tobytes() == moved(image).tobytes() and again.size == image.size and again.mode == mode
    assert again.tobytes() != image.tobytes()
    if OPERATORS[name].signed and name != "shift":
        assert Transform(((name, -strongest(name)),), seed=5)(image).tobytes() != again.tobytes()


@pytest.mark.parametrize("name", FLIPS)
def test_flips_are_involutions(name):
    image = picture("RGB")
    assert Transform(((name, 1.0), (name, 1.0)))(image).tobytes() == image.tobytes()


def test_what_transforms_do_to_a_dot():
    """A dark square right of the centre: where it goes, and that the ground has the border's colour."""
    image = Image.new("L", (40, 40), 200)
    image.paste(10, (28, 18, 32, 22))

    def place(*steps: tuple[str, float]) -> tuple[float, float]:
        pixels = 200.0 - np.asarray(Transform(steps)(image))
        y, x = np.mgrid[:40, :40] + 0.5
        return float((x * pixels).sum() / pixels.sum()), float((y * pixels).sum() / pixels.sum())

    assert place() == pytest.approx((30, 20), abs=0.01)
    assert place(("rotate", 90.0)) == pytest.approx((20, 10), abs=0.1), "counter-clockwise"
    assert place(("scale", 0.5)) == pytest.approx((35, 20), abs=0.2)
    assert place(("shear_y", 0.5)) == pytest.approx((30, 25), abs=0.2)
    assert place(("flip_x", 1.0)) == pytest.approx((10, 20), abs=0.01)
    assert place(("tighten", 1.0)) == pytest.approx((20, 20), abs=0.3), "the square fills the image"
    assert np.asarray(Transform((("scale", -0.3),))(image))[0, 0] == 200
    assert (
        np.asarray(Transform((("thick", 0.05),))(image)).mean()
        < np.asarray(image).mean()
        < np.asarray(Transform((("thin", 0.05),))(image)).mean()
    )


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("noise", "sharpen")])
def test_a_small_copy_is_changed_like_the_original(name):
    """What is judged on small copies is done to originals: a transform and a reduction can change places."""
    large = drawing("left", np.random.default_rng(1), (60, 50)).resize((240, 200))
    transform = Transform(((name, OPERATORS[name].strengths[0]),), seed=2)
    a = np.asarray(transform(large).resize((60, 50)), float).ravel()
    b = np.asarray(transform(large.resize((60, 50))), float).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.97


# --- which transforms keep the label ---------------------------------------------------------------------------------


class Rule(Small):
    """Knows the truth of pictures with a dark spot: left, right or middle third."""

    def probabilities(self, x):
        ink = 255 - x.float().mean((1, 2))
        thirds = torch.stack([ink[:, :5].mean(1), ink[:, 11:].mean(1), ink[:, 6:10].mean(1)], 1)
        return torch.nn.functional.one_hot(thirds.argmax(1), 3).float()


def spots(each: int = 20) -> tuple[View, list[Copy]]:
    """Classes left, right, middle."""
    generator = np.random.default_rng(0)
    small = []
    for c in range(3):
        for _ in range(each):
            image = Image.new("L", (32, 32), 230)
            x, y = (4, 24, 14)[c] + int(generator.integers(-1, 2)), 14 + int(generator.integers(-1, 2))
            image.paste(20, (x, y, x + 5, y + 5))
            small.append(image)
    labels = [c for c in range(3) for _ in range(each)]
    return View(tuple(small), 1, SIDE), untouched(range(3 * each), labels)


def knowing(n: int) -> Judge:
    return Judge((Rule(1, 3, Recipe(side=SIDE, width=4)),), torch.zeros(n, dtype=torch.int64))


@pytest.fixture
def run(tmp_path):
    with Run("refine", Recipe(), tmp_path / "run") as opened:
        opened.console.quiet = True
        yield opened


def test_a_mirror_is_legal_for_some_classes_and_a_map_between_others(run):
    view, originals = spots()
    policy = learn(knowing(60), view, originals, 3, run, seed=0)
    assert policy.accuracy.tolist() == [1, 1, 1]
    assert policy.limits["flip_x"] == (0, 0, 1) and policy.maps["flip_x"] == (1, 0, -1)
    assert policy.limits["flip_y"] == (1, 1, 1) and policy.maps["flip_y"] == (-1, -1, -1)
    assert all(limit == strongest("brightness") for limit in policy.limits["brightness"])
    assert policy.limits["shift"][2] < strongest("shift"), "the middle has to stay in the middle"


def test_classes_nobody_knows_are_allowed_what_all_others_are(run):
    view, originals = spots()
    mixed = [Copy(c.row, 1 - c.label if c.label < 2 and c.row % 20 < 12 else c.label, c.transform) for c in originals]
    policy = learn(knowing(60), view, mixed, 3, run, seed=0)
    assert (policy.accuracy < 0.5).tolist() == [True, True, False]
    for name, limits in policy.limits.items():
        assert limits[0] == limits[1] == (0 if name in FLIPS else limits[2])
    assert policy.maps["flip_x"] == (-1, -1, -1)
    nobody = [Copy(c.row, (c.label + 1) % 3, c.transform) for c in originals]
    assert not any(learn(knowing(60), view, nobody, 3, run, seed=0).allowed(c) for c in range(3))


def test_label_maps_go_both_ways():
    sure, among = np.ones(3), np.ones(3, bool)
    assert label_map(np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]), sure, among) == (1, 0, -1)
    assert label_map(np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]), sure, among) == (-1, -1, -1), "a circle is no mirror"
    assert label_map(np.array([[0.2, 0.8, 0], [1, 0, 0], [0, 0, 1]]), sure, among) == (-1, -1, -1), "not surely"
    assert label_map(np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]), sure, np.array([True, False, True])) == (-1, -1, -1)


# --- how many, and which ---------------------------------------------------------------------------------------------


def test_allocation_is_exact_and_throws_nothing_away():
    generator = np.random.default_rng(0)
    for _ in range(200):
        counts = generator.integers(1, 60, 5)
        error, budget, usable = generator.random(5), int(generator.integers(1, 400)), generator.random(5) < 0.8
        target = allocate(counts, error, budget, usable)
        assert (target >= counts).all() and (target[~usable] == counts[~usable]).all()
        grown = target > counts
        assert target.sum() == (max(budget, counts.sum()) if grown.any() else counts.sum())
        assert not usable.any() or budget <= counts.sum() or grown.any()
        ratio = target[grown] / (1 + error[grown])
        assert not grown.any() or np.ptp(target[grown] - ratio.mean() * (1 + error[grown])) < 3, "shares in proportion"


def originals(labels: list[int], trusted: list[bool] | None = None, wrong: list[bool] | None = None) -> Originals:
    n = len(labels)
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    given = (np.ones(n, bool) if trusted is None else np.array(trusted)), (np.zeros(n, bool) if wrong is None else np.array(wrong))
    return Originals(np.arange(n), np.array(labels), *given, features)


def free(maps: dict[str, tuple[int, ...]] | None = None, classes: int = 3) -> Policy:
    limits = {name: tuple(0.0 if name in FLIPS else strongest(name) for _ in range(classes)) for name in OPERATORS}
    return Policy(limits, maps or {name: (-1,) * classes for name in FLIPS}, np.ones(classes))


def test_originals_are_drawn_by_weight_and_untrusted_ones_never():
    given = originals([0] * 8 + [1, 2], trusted=[True] * 6 + [False] * 4)
    weights = np.array([0.5, 1, 1, 1, 1, 1.5, 9, 9, 9, 9])
    made = candidates(given, weights, free(), 0, 60, np.random.default_rng(0))
    drawn = np.bincount([copy.row for copy in made], minlength=10)
    assert np.abs(drawn[:6] - 60 * weights[:6] / 6).max() <= 1 and drawn[6:].sum() == 0 and len(made) == 60
    assert all(copy.label == 0 and copy.transform.steps for copy in made)
    assert len({copy.transform.seed for copy in made}) == 60


def test_a_label_map_makes_images_of_the_other_class():
    policy = free({"flip_x": (1, 0, -1), "flip_y": (-1, -1, -1)})
    made = candidates(originals([0, 0, 0, 1, 2]), np.ones(5), policy, 1, 40, np.random.default_rng(0))
    for copy in made:
        assert copy.label == 1
        assert (copy.transform.steps[0] == ("flip_x", 1.0)) == (copy.row < 3), "what was of class 0 is mirrored first"
    assert {copy.row for copy in made} == {0, 1, 2, 3}


def test_strengths_stay_within_limits():
    policy = free()
    policy.limits["rotate"] = (5.0, 0.0, 30.0)
    for label, largest in ((0, 5.0), (1, 0.0), (2, 30.0)):
        made = candidates(originals([label] * 3), np.ones(3), policy, label, 200, np.random.default_rng(1))
        turned = [abs(strength) for copy in made for name, strength in copy.transform.steps if name == "rotate"]
        assert max(turned, default=0.0) <= largest and (not turned or max(turned) > 0.8 * largest)


def test_rarity_is_relative_to_the_class_and_bounded():
    x = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] + [[1.0, 1.0], [1.0, 1.2]])
    x = x + 0.01 * torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    given = Originals(np.arange(9), np.array([0] * 7 + [1, 1]), np.ones(9, bool), np.zeros(9, bool), x)
    weights = rarity(given)
    assert weights[6] == 2.0 and weights[:6].max() < 2.0 and weights.min() >= 0.5 and weights[7] == weights[8] == 1.0


def test_the_budget_is_filled_exactly_from_images_the_judges_accept(run):
    """The judge knows the truth, and a shift may spoil the label: what is chosen is right far more often than what was drawn."""
    view, copies = spots()
    given = Originals(np.arange(60), np.array([c.label for c in copies]), np.ones(60, bool), np.zeros(60, bool), torch.randn(60, 4))
    policy = free()
    policy.limits.update({name: (0.0,) * 3 for name in OPERATORS if name != "shift"})
    policy.limits["shift"] = (0.3,) * 3
    judge = knowing(60)
    chosen = augment(given, policy, judge, view, 151, run, seed=0)
    assert len(chosen) == 91 and np.bincount([c.label for c in chosen]).tolist() == [31, 30, 30]
    assert chosen == augment(given, policy, judge, view, 151, run, seed=0)
    right = judge.probabilities(view(chosen), [c.row for c in chosen])[range(91), [c.label for c in chosen]].mean()
    pool = candidates(given, np.ones(60), policy, 2, 200, np.random.default_rng(0))
    before = judge.probabilities(view(pool), [c.row for c in pool])[:, 2].mean()
    assert before < 0.9 < right, f"{before:.2f} of the candidates were right, {right:.2f} of the chosen"
    assert augment(given, policy, judge, view, 40, run, seed=0) == [], "a budget below what is there adds nothing"


def test_out_of_fold_judges_speak_only_of_what_they_did_not_see():
    class Constant(Small):
        def probabilities(self, x):
            return torch.full((len(x), 3), self.answer)

    models = tuple(Constant(1, 3, Recipe(side=SIDE, width=4)) for _ in range(2))
    models[0].answer, models[1].answer = 0.25, 0.75
    judge = Judge(models, torch.tensor([0, 1, -1]))
    x = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.uint8)
    assert judge.probabilities(x, [1, 0, 2, 1])[:, 0].tolist() == [0.75, 0.25, 0.5, 0.75]
