"""Detectors: closed cases, cleanlab as an oracle, planted errors and duplicates found, and nothing found where nothing is."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from smidgen.errors import UserError
from smidgen.refine.detectors import DETECTORS, Ensemble, HiddenLabel, LabelQuality, Outliers, Votes
from smidgen.refine.detectors.duplicates import digest, find_duplicates, group_numbers, perceptual_signs, small_pictures
from smidgen.refine.detectors.ensemble import plant, pool, regression, stacking, with_mean
from smidgen.refine.detectors.mislabeled import confident_joint, flagged, flipping, guesses, label_quality, thresholds
from smidgen.refine.detectors.noise import confusions, explained
from smidgen.refine.detectors.quality import picture_quality
from smidgen.refine.evidence import Evidence
from smidgen.refine.kernel import KernelMachine
from smidgen.refine.neighbours import nearest
from smidgen.refine.proportions import planted_share, two_normals
from smidgen.refine.valuation import KNNShapley

QUALITIES = {
    "self-confidence": "self_confidence", "normalised-margin": "normalized_margin", "weighted-entropy": "confidence_weighted_entropy",
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    """Every third picture of 8 x 8 handwritten digits, from scikit-learn: features, labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return torch.tensor(data.data[::3], dtype=torch.float32), torch.tensor(data.target[::3])


@pytest.fixture(scope="module")
def patches():
    """Squares of two photographs, from scikit-learn: pixels (n, 32, 32, 3). Patches of plain sky among them."""
    datasets = pytest.importorskip("sklearn.datasets")
    squares = []
    for photo in datasets.load_sample_images().images:
        squares += [photo[i : i + 32, j : j + 32] for i in range(0, 390, 32) for j in range(0, 605, 50)]
    return torch.from_numpy(np.stack(squares))


def flipped(y, rate, seed=7):
    """Labels with a share moved to any other class, and which are wrong; not by seed 0, by which the ensemble plants."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=generator)[: round(rate * len(y))]] = True
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10, y), wrong


def average_precision(suspicion, wrong):
    hits = wrong[suspicion.argsort(descending=True, stable=True)].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


def noisy(n=4000, classes=4, rate=0.2, sharp=3.0, seed=0):
    """Calibrated probabilities p, true labels drawn from them, and given labels with symmetric noise."""
    generator = torch.Generator().manual_seed(seed)
    p = (sharp * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)
    true = torch.multinomial(p, 1, generator=generator)[:, 0]
    wrong = torch.rand(n, generator=generator) < rate
    return p, torch.where(wrong, (true + torch.randint(1, classes, (n,), generator=generator)) % classes, true), true


# --- label quality and confident learning ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUALITIES)
def test_label_quality_is_cleanlabs(kind):
    rank = pytest.importorskip("cleanlab.rank")
    p, y, _ = noisy(500)
    wanted = rank.get_label_quality_scores(y.numpy(), p.numpy(), method=QUALITIES[kind])
    assert np.allclose(label_quality(p, y, kind), wanted, atol=1e-6)


def test_label_quality_of_a_sure_model():
    p, y = F.one_hot(torch.tensor([0, 1]), 2).double(), torch.tensor([0, 0])
    for kind in ("self-confidence", "normalised-margin"):
        good, bad = label_quality(p, y, kind).tolist()
        assert good > 0.99 and bad < good, kind


def test_perfect_probabilities_give_the_true_confusions():
    _, y, true = noisy(2000)
    p = F.one_hot(true, 4).double()
    counts = torch.zeros(4, 4, dtype=torch.float64).index_put_((y, true), torch.ones(2000, dtype=torch.float64), accumulate=True)
    assert torch.allclose(confident_joint(p, y), counts)
    for rule in ("confident", "by-class", "by-noise-rate", "both"):
        assert torch.equal(flagged(p, y, rule), y != true), rule


def test_the_joint_is_calibrated_and_finds_the_noise_rate():
    p, y, _ = noisy(20_000, sharp=40.0)
    joint = confident_joint(p, y)
    assert torch.allclose(joint.sum(1), y.bincount().double())
    assert abs(float(joint.trace() / joint.sum()) - 0.8) < 0.02
    assert torch.allclose(flipping(joint).sum(0), torch.ones(4, dtype=torch.float64))


def test_the_guess_is_among_the_classes_that_passed():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    y = torch.tensor([0, 0, 1, 1, 2])
    assert torch.allclose(thresholds(p, y), torch.tensor([0.9, 0.3, 0.8]))
    assert guesses(p, y).tolist() == [0, 0, 1, 1, 2]  # cleanlab's argmax would call the third a 0
    assert guesses(torch.tensor([[0.6, 0.4], [0.5, 0.5]]), torch.tensor([0, 0])).tolist() == [0, -1]


def test_flags_leave_some_of_every_class():
    p, y = torch.tensor([[0.1, 0.9]] * 6), torch.tensor([0, 0, 0, 1, 1, 1])
    assert not flagged(p, y, "both", least=3).any()


# --- hidden labels ---------------------------------------------------------------------------------------------------


def test_the_posterior_by_hand():
    t = torch.tensor([[0.9, 0.5], [0.1, 0.5]])
    assert torch.allclose(explained(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), t), torch.tensor([[9 / 14, 5 / 14]]))
    q = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]])
    assert torch.allclose(confusions(q, torch.tensor([0, 1, 1])), torch.tensor([[2 / 3, 0], [1 / 3, 1]]))


def test_given_probabilities_stay_and_the_confusions_are_learned():
    p, _, true = noisy(4000)
    y = torch.where((true == 0) & (torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.5), 1, true)
    evidence = Evidence(torch.zeros(4000, 1), y, 4, probabilities=p)
    q = HiddenLabel(rounds=20).posterior(evidence)
    assert abs(float(1 - q.gather(1, y[:, None]).mean()) - float((y != true).double().mean())) < 0.02
    right = q.gather(1, y[:, None])[:, 0]
    for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):  # calibrated
        here = (right >= low) & (right <= high)
        assert abs(float(right[here].mean()) - float((y == true)[here].double().mean())) < 0.06
    own = label_quality(p, y)
    assert average_precision(-right, y != true) > average_precision(-own, y != true) + 0.05


# --- the kernel machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("landmarks", [1500, 25])
def test_leaving_out_in_closed_form_is_training_without(monkeypatch, landmarks):
    monkeypatch.setattr("smidgen.refine.kernel.LANDMARKS", landmarks)
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(60, 5, generator=generator), torch.rand(60, 3, generator=generator)
    groups = torch.tensor([*range(57), 3, 3, 8])
    machine, ridge = KernelMachine(x, groups), 0.5
    said = machine.without(targets, ridge)
    for left in ([0], [3, 57, 58], [8, 59], [20]):
        others = [i for i in range(60) if i not in left]
        p = machine.p[others].double()
        w = torch.linalg.solve(p.mT @ p + ridge * torch.eye(p.shape[1]), p.mT @ targets[others].double())
        assert torch.allclose(machine.p[left].double() @ w, said[left].double(), atol=1e-3)


def test_all_landmarks_give_the_kernel_itself():
    x = F.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    machine, squared = KernelMachine(x), torch.cdist(x, x) ** 2
    assert torch.allclose(machine.p @ machine.p.mT, torch.exp(-squared / squared.median()), atol=1e-3)


# --- neighbours, outsiders, pictures ---------------------------------------------------------------------------------


def test_neighbours_by_brute_force(monkeypatch):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    s = F.cosine_similarity(x[:, None], x[None], dim=-1).fill_diagonal_(-2)
    wanted = s.topk(3)
    for entries in (2**24, 100):
        monkeypatch.setattr("smidgen.refine.neighbours.ENTRIES", entries)
        found = nearest(x, 3)
        assert torch.equal(found[1], wanted.indices) and torch.allclose(found[0], wanted.values, atol=1e-6)
    groups = torch.arange(40) // 2
    _, places = nearest(x, 3, groups)
    assert not (places // 2 == groups[:, None]).any()


def test_duplicates_do_not_vouch_for_each_other():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 8, generator=generator) + 4 * F.one_hot(y, 8)
    x[58], x[59], y[58:] = x[0], x[0], 1  # a picture of class 0 three times, twice called 1
    alone, known = Votes(2)(Evidence(x, y, 2)), Votes(2)(Evidence(x, y, 2, groups=torch.tensor([*range(58), 0, 0])))
    assert float(alone.score[59]) > 0.4 and float(known.score[59]) < 0.01


def test_outsiders_are_found_and_none_among_others():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(500) % 5
    x = 3 * F.one_hot(y, 32) + torch.randn(500, 32, generator=generator) * 0.3
    assert int(Outliers().flagged(Evidence(x, y, 5)).sum()) == 0
    x[7:10] = 3 * torch.randn(3, 32, generator=generator)
    evidence = Evidence(x, y, 5)
    assert Outliers().flagged(evidence).nonzero()[:, 0].tolist() == [7, 8, 9]
    found = Outliers()(evidence)
    assert set(found.score.argsort()[:3].tolist()) == {7, 8, 9} and float(found.score.min()) >= 0 and float(found.score.max()) <= 1


def test_blank_and_blurred_pictures(patches):
    odd = patches[:200].clone()
    plain = picture_quality(odd).blank
    first, second = (~plain).nonzero()[[10, 60], 0].tolist()
    odd[first] = 200
    smooth = F.avg_pool2d(odd[second].movedim(-1, 0)[None].float(), 9, 1, 4)[0].movedim(0, -1)
    odd[second] = smooth.byte()
    before, after = picture_quality(patches[:200]), picture_quality(odd)
    assert (after.blank & ~plain).nonzero()[:, 0].tolist() == [first] and float(after.score()[first]) == 0
    assert float(after.sharpness[second]) < float(before.sharpness[second]) / 2


# --- duplicates ------------------------------------------------------------------------------------------------------


def saved(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(file)).copy())


def test_planted_duplicates_are_all_found_and_none_besides(patches):
    assert find_duplicates(patches, torch.zeros(len(patches), dtype=torch.int64)) == []
    patches = patches[~picture_quality(patches).blank]  # plain sky is nobody's likeness
    brighter = (patches[30].float() * 1.15 + 8).clamp(0, 255).byte()
    planted = {10: patches[10], 20: saved(patches[20], 75), 30: brighter, 40: patches[40].roll(0)}
    n = len(patches)
    pixels = torch.cat([patches, torch.stack(list(planted.values()))])
    y = torch.zeros(len(pixels), dtype=torch.int64)
    y[n] = 1  # of the first pair the copy has another label
    validation = torch.arange(len(pixels)) == n + 3
    found = find_duplicates(pixels, y, validation=validation)
    assert [g.members for g in found] == [(40, n + 3), (10, n), (20, n + 1), (30, n + 2)]  # the leak first
    assert [g.kind for g in found] == ["exact", "exact", "perceptual", "perceptual"]
    leak, torn, plain, _ = found
    assert leak.leak and leak.keep == n + 3 and leak.surplus == (40,)
    assert torn.disagree and not torn.leak and torn.surplus == ()
    assert plain.keep == 20 and plain.surplus == (n + 1,)
    assert group_numbers(found, len(pixels))[[10, n, 20, n + 1, 5]].tolist() == [10, 10, 20, 20, 5]
    better = torch.zeros(len(pixels))
    better[n + 1] = 1
    assert find_duplicates(pixels, y, quality=better)[1].keep == n + 1


def test_a_moved_picture_is_found_by_its_embedding(patches):
    padded = F.pad(patches[100].movedim(-1, 0)[None].float(), (2, 2, 2, 2), mode="reflect")[0].movedim(0, -1).byte()
    pixels = torch.cat([patches, padded[None, 4:, 1:33]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(pixels), 16, generator=generator)
    x[-1] = x[100] + 0.01
    x[201] = x[200] + 0.01  # a network's mistake, which the pictures do not confirm
    y = torch.zeros(len(pixels), dtype=torch.int64)
    assert [(g.members, g.kind) for g in find_duplicates(pixels, y, x)] == [((100, len(patches)), "embedding")]


def test_groups_are_what_pairs_connect():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6, 32, 32, 1), generator=generator, dtype=torch.uint8)
    pixels[4], pixels[2] = pixels[0], pixels[4]
    pixels[5] = (pixels[2].float() * 0.9).byte()
    pixels[4] = pixels[0]
    pixels[2] = pixels[0]
    pixels[5] = (pixels[0].float() * 0.9).byte()
    (group,) = find_duplicates(pixels, torch.zeros(6, dtype=torch.int64))
    assert group.members == (0, 2, 4, 5) and group.kind == "perceptual"


def test_digests_are_of_pixels_and_shape():
    a = np.zeros((2, 3, 1), np.uint8)
    assert digest(a) == digest(a.copy()) != digest(a.reshape(3, 2, 1))
    with pytest.raises(ValueError, match="1 digests for 2 images"):
        find_duplicates(torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), digests=[b""])


def test_perceptual_bits_by_the_definition(patches):
    from scipy.fft import dctn

    small = small_pictures(patches[:5])
    for picture, signs in zip(small, perceptual_signs(small), strict=True):
        low = dctn(picture.double().numpy(), type=2)[:8, :8].ravel()  # rows and columns of the transform differ by factors
        scale = np.ones((8, 8))
        assert np.array_equal(np.sign(low * scale.ravel() - np.sort(low[1:])[31]) > 0, signs.numpy() > 0)


# --- how many, and all together --------------------------------------------------------------------------------------


def test_a_mixture_of_two_is_told_from_one():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2000, generator=generator)
    assert not two_normals(one).distinct and float(two_normals(one).low(one).sum()) == 0
    two = torch.cat([one[:1700], one[1700:] * 0.5 - 6])
    fitted = two_normals(two)
    assert fitted.distinct and abs(fitted.weight - 0.15) < 0.01 and abs(fitted.means[0] + 6) < 0.1
    low = fitted.low(two) > 0.5
    assert bool(low[1700:].all()) and int(low[:1700].sum()) < 5
    assert float(fitted.low(torch.tensor([-50.0]))) > 0.99 and float(fitted.low(torch.tensor([50.0]))) == 0


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_the_share_of_planted_likes(share):
    generator = torch.Generator().manual_seed(0)
    met = torch.randn(4000, generator=generator)
    met[: round(share * 4000)] -= 4
    planted = torch.randn(800, generator=generator) - 4
    assert share - 0.005 <= planted_share(met, planted) < share + 0.04
    with pytest.raises(UserError, match="20 or more"):
        planted_share(met, planted[:5])


def test_planting_changes_what_it_says():
    y = torch.arange(3000) % 3
    new, planted = plant(y, 3, 0.2)
    assert int(planted.sum()) == 600 and torch.equal(new != y, planted) and set(new.tolist()) == {0, 1, 2}
    assert torch.equal(new, plant(y, 3, 0.2)[0]) and not torch.equal(new, plant(y, 3, 0.2, seed=1)[0])


def test_stacking_finds_the_pool_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    logs = 2 * torch.randn(3, 20_000, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial(pool(logs, torch.tensor([0.8, 0.3, 0.0], dtype=torch.float64)), 1, generator=generator)[:, 0]
    assert torch.allclose(stacking(logs, y), torch.tensor([0.8, 0.3, 0.0], dtype=torch.float64), atol=0.03)
    against = torch.cat([logs[:2], -logs[:1]])  # who says the opposite is not listened to, nor turned round
    weights = stacking(against, y)
    assert float(weights.min()) >= 0 and float(weights[0] - weights[2]) > 0.7


def test_the_slope_of_a_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    s = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    planted = torch.rand(20_000, generator=generator) < torch.sigmoid(1.5 * s - 1)
    assert abs(float(regression(s, planted)) - 1.5) < 0.08
    assert 1 < float(regression(s, s > 0)) < 1000 and float(regression(s, s < 0)) == 0  # separable; the wrong way round


def test_probabilities_get_the_mean_wanted_and_keep_their_order():
    odds = 5 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.001, 0.2, 0.9):
        p = with_mean(odds, share)
        assert abs(float(p.mean()) - share) < 1e-6 and torch.equal(p.argsort(), odds.argsort())


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
def test_planted_noise_is_ranked_above_cleanlabs_ranking(digits, rate):
    rank = pytest.importorskip("cleanlab.rank")
    x, true = digits
    y, wrong = flipped(true, rate)
    evidence = Evidence(x, y, 10)
    found = Ensemble()(evidence)
    default = rank.get_label_quality_scores(y.numpy(), evidence.out_of_fold.double().numpy())
    theirs, ours = average_precision(-torch.from_numpy(default), wrong), average_precision(found.wrong, wrong)
    assert ours > theirs + 0.005, (ours, theirs)
    flags = found.wrong > 0.5
    assert float(wrong[flags].float().mean()) > 0.9 and float(flags[wrong].float().mean()) > 0.85
    assert abs(found.share - rate) < 0.05
    assert float((found.proposed == true)[flags].float().mean()) > 0.85
    sure = found.confidence > 0.8
    assert int(sure.sum()) > 0.15 * int(wrong.sum()), int(sure.sum())
    assert float((found.proposed == true)[sure].double().mean()) > 0.9


def test_nothing_planted_nothing_found(digits):
    found = Ensemble()(Evidence(*digits, 10))
    assert int((found.wrong > 0.5).sum()) < 0.01 * len(found.wrong)
    assert found.share < 0.03


def test_all_members_score_in_0_to_1_and_repeat_themselves(digits):
    x, y = digits[0][:200], digits[1][:200]
    for method in (KNNShapley(), *(m() for m in DETECTORS.values()), LabelQuality("normalised-margin")):
        first, second = method(Evidence(x, y, 10)), method(Evidence(x, y, 10))
        assert torch.equal(first.score, second.score) and float(first.score.min()) >= 0 and float(first.score.max()) <= 1
