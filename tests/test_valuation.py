"""Values of images: brute force over all subsets in exact fractions, axioms, closed cases, reductions, and who must win."""

import os
import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product
from math import comb, factorial, inf
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import smidgen
from smidgen.errors import UserError
from smidgen.refine.dynamics import epochs, margins
from smidgen.refine.evidence import Evidence, ranked
from smidgen.refine.heads import Compression, Heads, folds, predictions
from smidgen.refine.valuation import (
    AUM,
    EL2N,
    VALUATIONS,
    Banzhaf,
    BetaShapley,
    DataOOB,
    Forgetting,
    Influence,
    KNNShapley,
    LeaveOneOut,
    TMCShapley,
)
from smidgen.refine.valuation.banzhaf import reused
from smidgen.refine.valuation.beta_shapley import place_weights, weighted
from smidgen.refine.valuation.data_oob import drawn
from smidgen.refine.valuation.influence import hessian, removal, self_influence
from smidgen.refine.valuation.tmc_shapley import gains

X, Y = [0, 1, 2, 3.5, 5, 6], [0, 0, 1, 0, 1, 1]
X_VAL, Y_VAL = [2.6, 0.2, 5.3], [1, 0, 1]
N = len(X)


def six():
    """Six points, as columns of features in float64."""
    column = lambda numbers: torch.tensor(numbers, dtype=torch.float64)[:, None]  # noqa: E731
    return column(X), torch.tensor(Y), column(X_VAL), torch.tensor(Y_VAL)


def votes(k, form="hard", points=range(3)):
    """{subset: U} in fractions: a vote of the k nearest of a subset, over some validation points."""

    def vote(subset, v):
        nearest = sorted(subset, key=lambda i: (abs(X[i] - X_VAL[v]), i))[:k]
        matches = sum(Y[i] == Y_VAL[v] for i in nearest)
        if form == "hard":
            return Fraction(matches, k)
        return Fraction(matches, len(nearest)) if nearest else Fraction(1, 2)

    subsets = [tuple(i for i in range(N) if mask[i]) for mask in product([0, 1], repeat=N)]
    return {s: sum((vote(s, v) for v in points), Fraction(0)) / len(points) for s in subsets}


def semivalue(game, weight):
    """sum over r of weight(r) times the sum of gains over subsets of size r, by enumeration."""
    values = []
    for i in range(N):
        total = Fraction(0)
        for s, u in game.items():
            if i not in s:
                total += weight(len(s)) * (game[tuple(sorted((*s, i)))] - u)
        values.append(total)
    return values


def shapley(r):
    return Fraction(factorial(r) * factorial(N - 1 - r), factorial(N))


def beta(a, b):
    """B(r + b, n - 1 - r + a) / B(a, b), for whole a and b."""
    B = lambda p, q: Fraction(factorial(p - 1) * factorial(q - 1), factorial(p + q - 1))  # noqa: E731, N806
    return lambda r: B(r + b, N - 1 - r + a) / B(a, b)


def utility_of(game):
    """The game as the samplers ask it, float64."""
    return lambda masks: torch.tensor([float(game[tuple(m.nonzero()[:, 0].tolist())]) for m in masks], dtype=torch.float64)


def close(found, wanted, tolerance=1e-12):
    return torch.allclose(found.double(), torch.tensor([float(w) for w in wanted], dtype=torch.float64), atol=tolerance, rtol=0)


def blobs(n=300, classes=3, width=8, apart=3.0, seed=0, wrong=0.0):
    """Gaussian classes of unit noise, a share of the labels moved to the next class; features, labels given, labels true."""
    generator = torch.Generator().manual_seed(seed)
    means = apart * torch.eye(classes, width)
    true = torch.arange(n) % classes
    x = means[true] + torch.randn(n, width, generator=generator)
    y = true.clone()
    chosen = torch.randperm(n, generator=generator)[: round(wrong * n)]
    y[chosen] = (y[chosen] + 1) % classes
    return x, y, true


def average_precision(suspicion, wrong):
    order = suspicion.argsort(descending=True)
    hits = wrong[order].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


# --- KNN-Shapley -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("k", range(1, 9))
def test_knn_shapley_is_the_shapley_value_of_the_vote(k, form):
    wanted = semivalue(votes(k, form), shapley)
    found = KNNShapley(k, form, "euclidean").values(*six(), 2)
    assert close(found, wanted)


def test_knn_shapley_of_the_notes():
    rows = [(-1, 30), (-7, 60), (13, 60), (-7, 60), (13, 60), (1, 6)]
    x, y, x_val, y_val = six()
    assert close(KNNShapley(3, metric="euclidean").values(x, y, x_val[:1], y_val[:1], 2), [Fraction(*r) for r in rows])
    mean = [Fraction(13, 180), Fraction(2, 45), Fraction(23, 180), Fraction(1, 60), Fraction(7, 45), Fraction(5, 36)]
    found = KNNShapley(3, metric="euclidean").values(x, y, x_val, y_val, 2)
    assert close(found, mean) and abs(float(found.sum()) - 5 / 9) < 1e-12
    soft = [Fraction(-7, 180), Fraction(-1, 15), Fraction(13, 180), Fraction(-17, 180), Fraction(1, 10), Fraction(1, 12)]
    assert close(KNNShapley(3, "soft", "euclidean").values(x, y, x_val, y_val, 2), soft)


def test_the_example_of_the_description():
    s = KNNShapley(1).game_values(torch.tensor([[True, False, True]]), 2)
    assert close(s[0], [Fraction(5, 6), Fraction(-1, 6), Fraction(1, 3)])


def test_null_players_where_everybody_votes():
    x, y, x_val, y_val = six()
    found = KNNShapley(8, metric="euclidean").values(x, y, x_val[1:2], y_val[1:2], 2)
    assert close(found, [Fraction(int(label == 0), 8) for label in Y])


def test_validation_points_stream(monkeypatch):
    x, y, _ = blobs(60, wrong=0.2)
    whole = KNNShapley().values(x, y, x[:20], y[:20], 3)
    monkeypatch.setattr("smidgen.refine.valuation.knn_shapley.ENTRIES", 150)
    assert torch.allclose(KNNShapley().values(x, y, x[:20], y[:20], 3), whole)


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_without_validation_every_point_leaves_its_own_list(form):
    x, y, _ = blobs(12, wrong=0.2)
    method = KNNShapley(3, form)
    wanted = torch.zeros(12, dtype=torch.float64)
    for j in range(12):
        others = torch.arange(12) != j
        wanted[others] += method.values(x[others], y[others], x[j : j + 1], y[j : j + 1], 3).double() / 11
    assert torch.allclose(method(Evidence(x, y, 3)).value.double(), wanted, atol=1e-6)


# --- games -----------------------------------------------------------------------------------------------------------


def test_all_orders_give_the_shapley_value_exactly():
    game = votes(3)
    ends = torch.tensor([0, 5 / 9], dtype=torch.float64)
    credits = [gains(utility_of(game), torch.tensor(order), ends, 0.0) for order in permutations(range(N))]
    assert all(abs(float(c.sum()) - 5 / 9) < 1e-12 for c in credits)  # efficiency, of every single order
    assert close(sum(credits) / len(credits), semivalue(game, shapley))


@pytest.mark.parametrize(("a", "b", "wanted"), [
    (4, 1, [0.102646, 0.099471, 0.207407, 0.096296, 0.210582, 0.205820]),
    (16, 1, [0.110551, 0.110436, 0.221433, 0.110322, 0.221547, 0.221272]),
    (1, 4, [0.037037, -0.026455, 0.021164, -0.089947, 0.084656, 0.060847]),
    (1, 1, [13 / 180, 2 / 45, 23 / 180, 1 / 60, 7 / 45, 5 / 36]),
])  # fmt: skip
def test_all_orders_give_the_beta_values_of_the_notes(a, b, wanted):
    game, weights = votes(3), place_weights(N, float(a), float(b))
    ends = torch.tensor([0, 5 / 9], dtype=torch.float64)
    orders = [torch.tensor(order) for order in permutations(range(N))]
    found = sum(weighted(gains(utility_of(game), order, ends, 0.0), order, weights) for order in orders) / len(orders)
    assert close(found, semivalue(game, beta(a, b))) and close(found, wanted, 1e-6)
    assert abs(float(weights.mean()) - 1) < 1e-12
    assert close(weights, [N * comb(N - 1, r) * beta(a, b)(r) for r in range(N)])


def test_all_subsets_give_the_banzhaf_values_of_the_notes():
    game = votes(3)
    masks = torch.tensor(list(product([False, True], repeat=N)))
    found = reused(masks, utility_of(game)(masks))
    wanted = [Fraction(11, 144), Fraction(1, 16), Fraction(23, 144), Fraction(7, 144), Fraction(25, 144), Fraction(11, 72)]
    assert close(found, wanted) and close(found, semivalue(game, lambda r: Fraction(1, 2 ** (N - 1))))


def test_leave_one_out_of_the_notes():
    found = LeaveOneOut().values(utility_of(votes(3)), N)
    assert close(found, [0, Fraction(-1, 9), Fraction(-1, 9), Fraction(-2, 9), 0, 0])


def test_sampled_values_approach_the_exact_ones():
    game = utility_of(votes(3))
    exact = semivalue(votes(3), shapley)
    assert close(TMCShapley(1000, settled=0.0).values(game, N, 0.0), exact, 0.02)
    assert close(BetaShapley(16.0, 1.0, 0.0, 1000, settled=0.0).values(game, N), semivalue(votes(3), beta(16, 1)), 0.02)
    assert close(Banzhaf(4000).values(game, N), semivalue(votes(3), lambda r: Fraction(1, 32)), 0.02)
    assert torch.allclose(TMCShapley(200, settled=0.0).values(game, N, 0.0), BetaShapley(1.0, 1.0, 0.0, 200, settled=0.0).values(game, N))


@pytest.mark.parametrize("method", [TMCShapley(300, settled=0.0), BetaShapley(tail=0.0, permutations=300, settled=0.0), Banzhaf(3000)])
def test_axioms_on_six_players(method):
    """Players 0 and 1 are alike, 5 adds nothing; the game is linear in what it pays."""

    def pays(masks):
        m = masks.double()
        return (m[:, 0] + m[:, 1]).clamp(max=1) * 0.5 + 0.3 * m[:, 2] * m[:, 3] + 0.1 * m[:, 4]

    value = (lambda u: method.values(u, N, 0.0)) if isinstance(method, TMCShapley) else (lambda u: method.values(u, N))
    found = value(pays)
    assert abs(float(found[0] - found[1])) < 0.06
    assert float(found[5]) == 0 if not isinstance(method, Banzhaf) else abs(float(found[5])) < 0.03
    assert torch.allclose(value(lambda masks: 2 * pays(masks)), 2 * found)
    if isinstance(method, TMCShapley):
        assert abs(float(found.sum()) - 0.9) < 1e-12
        assert abs(float(found[4]) - 0.1) < 1e-12


def test_truncation_credits_the_rest_nothing():
    asked = []

    def enough(masks):
        asked.append(len(masks))
        return (masks.sum(1) >= 3).double()

    credit = gains(enough, torch.arange(100), torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5)
    assert credit.nonzero()[:, 0].tolist() == [2] and float(credit[2]) == 1
    assert sum(asked) == 32  # one block of a hundred
    late = gains(enough, torch.arange(100).flip(0), torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0)
    assert float(late.sum()) == 1 and late[97] == 1


def test_sampling_stops_when_values_have_settled():
    asked = []

    def even(masks):
        asked.append(len(masks))
        return masks.sum(1).double()

    found = TMCShapley(1000, every=10).values(even, 4, 0.0)
    assert close(found, [1, 1, 1, 1]) and sum(asked) == 2 + 20 * 4  # the second look finds no change


@pytest.mark.parametrize("method", [TMCShapley(8, settled=0.0), BetaShapley(permutations=8, settled=0.0), Banzhaf(200), LeaveOneOut()])
def test_processes_change_nothing(method):
    from dataclasses import replace

    pytest.importorskip("joblib")
    x, y, _ = blobs(40, wrong=0.2)
    evidence = Evidence(x, y, 3, validation=blobs(60, seed=1)[:2])
    one, two = method(evidence), replace(method, processes=2)(evidence)
    assert torch.equal(one.value, two.value)


def test_torchrun_gives_what_one_process_gives(tmp_path):
    script = tmp_path / "banzhaf.py"
    script.write_text(
        "import torch\nfrom smidgen.refine.valuation import Banzhaf\n"
        "value = Banzhaf(300).values(lambda masks: masks.double() @ torch.arange(6).double(), 6)\n"
        "import os\nopen(f\"value-{os.environ['RANK']}\", 'w').write(str(value.tolist()))\n"
        "import torch.distributed as d\nd.destroy_process_group()\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", str(script)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(smidgen.__file__).parents[1])},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    wanted = str(Banzhaf(300).values(lambda masks: masks.double() @ torch.arange(6).double(), 6).tolist())
    assert [(tmp_path / f"value-{r}").read_text() for r in range(2)] == [wanted, wanted]


def compressed(x):
    return Compression(x)(x)


def train(x, targets, weights, decay, steps=50):
    return Heads(x, weights, decay).fit(targets, steps).w


# --- heads -----------------------------------------------------------------------------------------------------------


def test_heads_trained_at_once_are_the_minimisers():
    x, y, _ = blobs(80, wrong=0.2)
    x, targets = compressed(x), F.one_hot(y, 3).float()
    weights = torch.rand(80, 3, generator=torch.Generator().manual_seed(1)) * (torch.arange(80) % 3)[:, None]
    decays = torch.tensor([1e-2, 1e-3, 1e-4])
    found = train(x, targets, weights, decays, 400)
    for h in range(3):
        w = found[h].double().requires_grad_()
        share = (weights[:, h] / weights[:, h].sum()).double()
        rows = torch.ones(x.shape[1], 1, dtype=torch.float64)
        rows[-1] = 0
        loss = -(share[:, None] * targets * (x.double() @ w).log_softmax(1)).sum() + ((decays[h] * rows + 1e-6) * w**2).sum() / 2
        (gradient,) = torch.autograd.grad(loss, w)
        assert float(gradient.abs().max()) < 2e-5


def test_a_head_does_not_see_rows_of_weight_0_nor_other_heads():
    x, y, _ = blobs(80)
    x, targets = compressed(x), F.one_hot(y, 3).float()
    weights = torch.ones(80, 2)
    weights[40:, 0] = 0
    pair = train(x, targets, weights, 1e-3)
    assert torch.allclose(pair[0], train(x[:40], targets[:40], torch.ones(40, 1), 1e-3)[0], atol=1e-4)
    assert torch.allclose(pair[1], train(x, targets, torch.ones(80, 1), 1e-3)[0], atol=1e-4)


def test_compressed_features_keep_distances_and_scale():
    x, *_ = blobs(50)
    small = compressed(x)
    assert small.shape == (50, 9) and torch.allclose(small[:, :-1].square().sum(1).mean(), torch.tensor(1.0))
    ratio = torch.cdist(small, small)[0, 1:] / torch.cdist(x, x)[0, 1:]
    assert torch.allclose(ratio, ratio[:1].expand(49), rtol=1e-4)
    wide = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Compression(wide)(wide).square()[:, :-1].sum(1).mean(), torch.tensor(1.0))


def test_folds_are_stratified_and_keep_duplicates_together():
    x, y, _ = blobs(90)
    groups = torch.arange(90)
    groups[60:] = torch.arange(30)
    inside = folds(y, 5, 2)
    assert inside.shape == (90, 10) and not torch.equal(inside[:, :5], inside[:, 5:])
    assert all(((~inside[y == c]).sum(0) == 6).all() for c in range(3)) and bool(((~inside).sum(1) == 2).all())
    grouped = folds(y, 5, groups=groups)
    assert torch.equal(grouped[60:], grouped[:30])
    assert torch.equal(Evidence(x, y, 3, groups=groups).inside[:, :5], grouped)


def test_out_of_fold_probabilities_do_not_know_the_label():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 30, generator=generator), torch.randint(2, (100,), generator=generator)
    p = Evidence(x, y, 2).out_of_fold
    assert torch.allclose(p.sum(1), torch.ones(100), atol=1e-5)
    assert float((p.argmax(1) == y).float().mean()) < 0.62  # in sample a head with 30 features knows more than 0.65
    inside = next(predictions(compressed(x), F.one_hot(y, 2).float(), torch.ones(100, 1), 1e-4))[1][:, 0]
    assert float((inside.argmax(1) == y).float().mean()) > 0.65


# --- the others ------------------------------------------------------------------------------------------------------


def test_the_mean_of_data_oob_is_the_out_of_bag_score():
    x, y, _ = blobs(60, wrong=0.1)
    evidence = Evidence(x, y, 3)
    found = DataOOB(50)(evidence)
    counts = drawn(60, 50, 0)
    small, targets = compressed(x), F.one_hot(y, 3).float()
    right = torch.stack(
        [(small @ train(small, targets, counts[:, b : b + 1].float(), evidence.decay, 20)[0]).argmax(1) == y for b in range(50)], 1
    )
    outside = counts == 0
    assert torch.allclose(found.value, ((right & outside).sum(1) / outside.sum(1)).float())
    assert abs(float(outside.float().mean()) - (1 - 1 / 60) ** 60) < 0.02


@pytest.mark.parametrize("method", [DataOOB(50), DataOOB(50, "probability"), KNNShapley(5), AUM(), EL2N(), Influence()])
def test_one_wrong_label_is_last(method):
    x, y, _ = blobs(150, apart=6)
    y[7] = (y[7] + 1) % 3
    assert int(method(Evidence(x, y, 3)).score.argmin()) == 7


def test_aum_is_negative_for_wrong_labels_and_positive_for_right_ones():
    x, y, true = blobs(300, apart=6, wrong=0.05)
    value = AUM()(Evidence(x, y, 3)).value
    assert bool((value[y == true] > 0).all()) and bool((value[y != true] < 0).all())


def test_a_false_class_finds_the_cut():
    x, y, true = blobs(600, apart=5, wrong=0.1)
    suspects, wrong = AUM().suspects(Evidence(x, y, 3)), y != true
    assert float(suspects[wrong].float().mean()) > 0.95 and float(suspects[~wrong].float().mean()) < 0.1


def test_forgetting_by_hand():
    right = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    logits = torch.stack([right, 1 - right], -1).transpose(0, 1).float()  # label 0 is right where its logit is larger
    found = Forgetting().values(logits, torch.zeros(3, dtype=torch.int64))
    assert found.value.tolist() == [-2, -inf, 0] and found.score.tolist() == [0.5, 0, 1]


def test_el2n_lies_between_0_and_the_root_of_2():
    logits = torch.tensor([[[50.0, 0], [0, 50.0], [0, 0]]])
    x, y = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1])
    logits = torch.cat([logits, torch.zeros(1, 1, 2)], 1)
    found = EL2N(1)(Evidence(x, y, 2, dynamics=logits))
    assert torch.allclose(found.value, -torch.tensor([0, 2**0.5, 0.5**0.5, 0.5**0.5]), atol=1e-6)
    assert torch.allclose(found.score, torch.tensor([1, 0, 0.5, 0.5]), atol=1e-6)


def test_margins_and_dynamics():
    x, y, _ = blobs(200, apart=6)
    small = compressed(x)
    first, *_, last = (margins(z[0], y) for z in epochs(small, y[None], 3, 20))
    assert float(last.mean()) > float(first.mean()) > 0
    pair = next(epochs(small, torch.stack([y, (y + 1) % 3]), 3, 1, seed=3))
    assert pair.shape == (2, 200, 3) and float((pair[1].argmax(1) == (y + 1) % 3).float().mean()) > 0.95


def test_influence_is_what_leaving_one_out_does():
    """Against real retraining of the convex head."""
    x, y, _ = blobs(60, apart=1.5, wrong=0.1)
    x_val, y_val, _ = blobs(100, apart=1.5, seed=1)
    compression = Compression(x)
    x, x_val = compression(x).double(), compression(x_val).double()
    targets, wanted = F.one_hot(y, 3).double(), F.one_hot(y_val, 3).double()
    decay = 1e-2
    w = train(x, targets, torch.ones(60, 1).double(), decay, 500)[0]
    factor = torch.linalg.cholesky(hessian(x, w, decay))
    found = removal(x, targets, w, factor, x_val, wanted)
    without = train(x, targets, (1 - torch.eye(60)).double(), decay, 500)
    losses = torch.stack([-(wanted * (x_val @ head).log_softmax(1)).sum(1).mean() for head in [w, *without]])
    real = losses[1:] - losses[0]
    assert float(torch.corrcoef(torch.stack([found, real]))[0, 1]) > 0.97
    assert 0.8 < float((found * real).sum() / (real * real).sum()) < 1.2
    gradient = (x[:, :, None] * ((x @ w).softmax(1) - targets)[:, None]).flatten(1)
    by_hand = (gradient @ torch.linalg.inv(hessian(x, w, decay)) * gradient).sum(1)
    assert torch.allclose(self_influence(x, targets, w, factor), by_hand) and bool((by_hand >= 0).all())


def test_the_hessian_is_that_of_autograd():
    x, y, _ = blobs(20, width=3)
    x = compressed(x).double()
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(flat):
        z = (x @ flat.view(4, 3)).log_softmax(1)
        rows = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)[:, None]
        return -z.gather(1, y[:, None]).mean() + ((0.01 * rows + 1e-6) * flat.view(4, 3) ** 2).sum() / 2

    assert torch.allclose(hessian(x, w, 0.01), torch.autograd.functional.hessian(loss, w.flatten()))


@pytest.mark.parametrize("name", sorted(VALUATIONS))
def test_every_valuation_finds_wrong_labels_and_repeats_itself(name):
    x, y, true = blobs(120, apart=4, wrong=0.15)
    quick = {
        "tmc-shapley": TMCShapley(20, tolerance=0.0), "beta-shapley": BetaShapley(permutations=30), "banzhaf": Banzhaf(1500),
    }  # fmt: skip
    method = quick.get(name) or VALUATIONS[name]()
    validation = blobs(200, apart=4, seed=1)[:2] if "validation" in method.needs else None
    evidence = Evidence(x, y, 3, validation=validation)
    found = method(evidence)
    assert found.score.shape == (120,) and float(found.score.min()) >= 0 and float(found.score.max()) <= 1
    assert torch.equal(found.score, method(evidence).score)
    by_value = average_precision(-found.value.nan_to_num(neginf=-1e9), y != true)
    assert by_value > {"loo": 0.15, "banzhaf": 0.35, "forgetting": 0.5}.get(name, 0.8), by_value


@pytest.mark.parametrize("name", ["tmc-shapley", "beta-shapley", "banzhaf", "loo"])
def test_what_needs_a_validation_set_says_so(name):
    x, y, _ = blobs(30)
    assert VALUATIONS[name].needs == ("validation",)
    with pytest.raises(UserError, match="validation set; give one"):
        VALUATIONS[name]()(Evidence(x, y, 3))


def test_bad_evidence_is_refused():
    x, y, _ = blobs(30)
    for bad, message in [
        (lambda: Evidence(x, y, 1), "with 1 class"),
        (lambda: Evidence(x, y, 2), "labels are 0 to 2, but there are 2 classes"),
        (lambda: Evidence(x * torch.nan, y, 3), "NaN"),
        (lambda: Evidence(x[:4], y[:4], 3), "too few"),
        (lambda: Evidence(x, y, 3, validation=(x, y + 9)), "validation labels are 9 to 11"),
        (lambda: KNNShapley(0)(Evidence(x, y, 3)), "at least one neighbour"),
        (lambda: DataOOB(0)(Evidence(x, y, 3)), "at least one bag"),
        (lambda: Banzhaf(1).values(lambda m: m.sum(1).double(), 3), "at least 2"),
        (lambda: BetaShapley(0.0).values(lambda m: m.sum(1).double(), 3), "must be positive"),
        (lambda: TMCShapley(0).values(lambda m: m.sum(1).double(), 3, 0.0), "must be positive"),
    ]:
        with pytest.raises(UserError, match=message):
            bad()


def test_ranks_share_their_places():
    assert ranked(torch.tensor([0.3, -2.0, 0.3, 9.0])).tolist() == [0.5, 0.0, 0.5, 1.0]
    assert ranked(torch.tensor([-inf, 1.0])).tolist() == [0, 1]
