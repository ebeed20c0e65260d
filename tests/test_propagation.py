"""Prototypes, SimpleShot and label propagation: golden cases, brute force in float64, invariances, and who must win."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, accuracy
from smidgen.fewshot.methods.propagation import (
    LabelPropagation,
    Propagation,
    affinity,
    cholesky,
    iterated,
    normalized,
    rebalanced,
    sparse,
    spread,
)  # fmt: skip
from smidgen.fewshot.methods.prototypes import ProtoNet, choose, cross_entropy, embedded, nearest_mean, one_hot
from smidgen.fewshot.methods.simpleshot import SimpleShot, base_mean
from smidgen.networks import Conv4

POINTS = [0, 1, 2.5, 4.3, 5, 6.2]
SPARSE = [
    [20.138925, 11.538821], [19.747212, 12.719798], [15.426064, 12.545138],
    [13.876495, 18.283595], [13.739147, 19.622411], [11.538821, 18.645456],
]  # fmt: skip
DENSE = [
    [19.568249, 11.829457], [19.136402, 13.058190], [15.083340, 13.001761],
    [14.097948, 17.848399], [14.257140, 19.175482], [11.829457, 18.153446],
]  # fmt: skip
SIGMAS = [
    [22.756700, 10.163887], [22.316193, 10.917330], [16.021090, 10.265090],
    [10.984116, 23.650122], [10.750811, 24.175109], [10.163887, 24.054545],
]  # fmt: skip


def gaussians(tasks, shots, width, apart, dirichlet=False, seed=0, ways=5, queries=15):
    """Tasks of Gaussian classes with unit noise; episodes of features."""
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    means = apart * torch.randn(tasks, ways, width, generator=generator)
    support_y = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    counts = [
        random.multinomial(ways * queries, random.dirichlet(np.full(ways, 2.0))) if dirichlet else [queries] * ways for _ in range(tasks)
    ]
    query_y = torch.stack([torch.arange(ways).repeat_interleave(torch.tensor(c)) for c in counts])

    def features(y):
        return torch.stack([m[labels] for m, labels in zip(means, y, strict=True)]) + torch.randn(*y.shape, width, generator=generator)

    return Episode(features(support_y), support_y, features(query_y), query_y, ways)


def padded(episode, support, queries):
    """The same tasks with rows of rubbish labelled -1."""
    rubbish = torch.full((len(episode.support_y), 1, *episode.support_x.shape[2:]), 7.0)
    return Episode(
        torch.cat([episode.support_x, rubbish.repeat(1, support, *[1] * (rubbish.ndim - 2))], 1),
        nn.functional.pad(episode.support_y, (0, support), value=-1),
        torch.cat([episode.query_x, rubbish.repeat(1, queries, *[1] * (rubbish.ndim - 2))], 1),
        nn.functional.pad(episode.query_y, (0, queries), value=-1),
        episode.ways,
    )


def slow(x, sigma, y, k, alpha):
    """F* of one task, one entry at a time."""
    n = len(x)
    w = np.array([[math.exp(-0.5 * np.mean((x[i] / sigma[i] - x[j] / sigma[j]) ** 2)) for j in range(n)] for i in range(n)])
    among = np.zeros((n, n), bool)
    for i in range(n):
        among[i, sorted(range(n), key=lambda j: -w[i, j])[:k]] = True
    w = np.where(among | among.T, w, 0)
    s = w / np.sqrt(np.outer(w.sum(1), w.sum(0)))
    return np.linalg.inv(np.eye(n) - alpha * s) @ y


@pytest.fixture
def golden():
    x = torch.tensor(POINTS, dtype=torch.float64)[None, :, None]
    y = torch.zeros(1, 6, 2, dtype=torch.float64)
    y[0, 0, 0] = y[0, 5, 1] = 1
    return x, y, torch.ones(1, 6, dtype=torch.bool)


@pytest.fixture
def task(normal):
    """x, sigma, one-hot y, real of 3 tasks with 24 nodes, 6 of them labelled."""
    y = torch.zeros(3, 24, 3, dtype=torch.float64)
    y[:, range(6), [0, 0, 1, 1, 2, 2]] = 1
    return normal(3, 24, 5), 1 + 0.2 * normal(3, 24).abs(), y, torch.ones(3, 24, dtype=torch.bool)


@pytest.mark.parametrize(
    "sigma, k, expected",
    [([1.0] * 6, 3, SPARSE), ([1.0] * 6, 20, DENSE), ([1, 1.2, 1, 0.9, 1, 1.1], 3, SIGMAS)],
    ids=["k 3", "dense", "sigmas"],
)
def test_the_golden_cases(golden, sigma, k, expected):
    x, y, real = golden
    f = Propagation(k)(x, torch.tensor([sigma], dtype=torch.float64), y, real)
    torch.testing.assert_close(f[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_edges_and_loss_of_the_golden_case(golden):
    x, y, real = golden
    w = sparse(affinity(x, torch.ones(1, 6, dtype=torch.float64), real), 3)
    assert (w > 0).sum() == 20
    loss = cross_entropy(Propagation(3)(x, torch.ones(1, 6, dtype=torch.float64), y, real), torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert loss.item() == pytest.approx(0.0118926, abs=1e-7)


def test_the_docstrings_example():
    x = torch.zeros(1, 2, 1)
    f = Propagation(2, 0.5)(x, torch.ones(1, 2), torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert f.flatten().tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize("k", [1, 4, 20, 100])
def test_batches_agree_with_a_loop_over_tasks_and_entries(task, k):
    x, sigma, y, real = task
    f = Propagation(k)(x, sigma, y, real)
    for i in range(len(x)):
        np.testing.assert_allclose(f[i].numpy(), slow(x[i].numpy(), sigma[i].numpy(), y[i].numpy(), k, 0.99), rtol=1e-8, atol=1e-10)


def test_iterating_converges_to_the_closed_form(task):
    """Starting from Y, at alpha times the second eigenvalue: the first one's component is right from the start. From 0, at alpha."""
    x, sigma, y, real = task
    s = normalized(sparse(affinity(x, sigma, real), 5))
    limit = (1 - 0.99) * cholesky(s, y, 0.99)
    assert (iterated(s, y, 0.99, 4000) - limit).abs().max() < 1e-10
    second = torch.linalg.eigvalsh(s).abs().sort(-1).values[:, -2]
    errors = [(iterated(s, y, 0.99, steps) - limit).norm(dim=(1, 2)) for steps in (60, 61)]
    torch.testing.assert_close(errors[1] / errors[0], 0.99 * second, rtol=0, atol=5e-3)
    from_zero = [(torch.linalg.matrix_power(0.99 * s, steps) @ limit).norm() for steps in (500, 501)]
    assert (from_zero[1] / from_zero[0]).item() == pytest.approx(0.99, abs=1e-9)


def test_spectrum_and_signs(task):
    x, sigma, y, real = task
    w = sparse(affinity(x, sigma, real), 5)
    s = normalized(w)
    v = w.sum(-1).sqrt()[..., None]
    torch.testing.assert_close(s @ v, v, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(s).max().item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(w, w.mT) and torch.allclose(s, s.mT, rtol=0, atol=1e-15)
    assert ((w > 0).sum(-1) >= 5).all() and (w.diagonal(dim1=1, dim2=2) == 1).all()
    assert (cholesky(s, y, 0.99) >= 0).all()
    assert torch.equal(Propagation(5, 0.0)(x, sigma, y, real), y)


def test_a_component_without_support_knows_nothing(golden):
    x = torch.tensor([0, 0.1, 0.2, 1000, 1000.1], dtype=torch.float64)[None, :, None]
    y = torch.zeros(1, 5, 2, dtype=torch.float64)
    y[0, 0, 0] = y[0, 2, 1] = 1
    for balance in (0.0, 0.5):
        f = Propagation(3, balance=balance)(x, torch.ones(1, 5, dtype=torch.float64), y, torch.ones(1, 5, dtype=torch.bool))
        assert (f[0, 3:] == 0).all() and (f[0, 1] > 0).any()
        assert cross_entropy(f[:, 3:], torch.tensor([[0, 1]])).item() == pytest.approx(math.log(2))


def test_permutations_and_units(task):
    x, sigma, y, real = task
    f = Propagation(5)(x, sigma, y, real)
    nodes, classes = torch.randperm(24, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0, 1])
    torch.testing.assert_close(Propagation(5)(x[:, nodes], sigma[:, nodes], y[:, nodes], real), f[:, nodes])
    torch.testing.assert_close(Propagation(5)(x, sigma, y[..., classes], real), f[..., classes])
    torch.testing.assert_close(Propagation(5)(8 * x, 8 * sigma, y, real), f)
    assert not torch.allclose(Propagation(5)(8 * x, sigma, y, real), f)  # sigma does matter


def test_features_far_from_the_origin_lose_nothing(task):
    x, _, y, real = task
    one = torch.ones(3, 24)
    near, far = (Propagation(100)(x.float() + shift, one, y.float(), real) for shift in (0, 300))
    torch.testing.assert_close(near, far, rtol=2e-3, atol=2e-3)


def test_padding_changes_nothing():
    episode = gaussians(3, 2, 6, 1.0)
    torch.manual_seed(0)
    methods = [ProtoNet(nn.Identity()), SimpleShot(nn.Identity(), torch.ones(6)), LabelPropagation(nn.Identity(), 0.4)]
    methods += [LabelPropagation(nn.Identity()), LabelPropagation(nn.Identity(), 0.4, Propagation(balance=0.5))]
    for method in methods:
        more = padded(episode, 4, 9)
        torch.testing.assert_close(method.predict(more)[:, :75], method.predict(episode), msg=str(method))
        torch.testing.assert_close(method.loss(more), method.loss(episode))


def test_padding_does_not_reach_batch_norm(generator):
    x = torch.rand(2, 15, 1, 16, 16, generator=generator)
    y = torch.arange(5).repeat(2, 1)
    episode = Episode(x[:, :5], y, x[:, 5:], y.repeat(1, 2), 5)
    a, b = Conv4(1, 4), Conv4(1, 4)
    b.load_state_dict(a.state_dict())
    for part, other in zip(embedded(a, episode), embedded(b, padded(episode, 3, 2)), strict=True):
        torch.testing.assert_close(other[:, : part.shape[1]], part)
        assert (other[:, part.shape[1] :] == 0).all()
    for name, state in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], state)


def test_labels_of_queries_are_not_read(normal):
    episode = gaussians(2, 1, 6, 1.0)
    blind = Episode(episode.support_x, episode.support_y, episode.query_x, torch.zeros_like(episode.query_y), 5)
    for method in (ProtoNet(nn.Identity()), LabelPropagation(nn.Identity(), 0.4, Propagation(balance=0.5))):
        assert torch.equal(method.predict(episode), method.predict(blind))


def test_prototypes_by_hand():
    support, y = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.tensor([[0, 0, 1]])
    assert nearest_mean(support, one_hot(y, 2), torch.tensor([[[2.0]]])).flatten().tolist() == [-1, -9]
    assert ProtoNet(nn.Identity()).predict(Episode(support, y, torch.tensor([[[2.0]]]), y[:, :1], 3))[0, 0, 2] == 0  # no support


def test_simpleshot_is_the_nearest_mean_of_centred_unit_features(normal):
    episode = gaussians(2, 3, 6, 1.0)
    mean = base_mean(nn.Identity(), [episode.query_x[0], episode.query_x[1][:20]])
    torch.testing.assert_close(mean, torch.cat([episode.query_x[0], episode.query_x[1][:20]]).mean(0))

    def unit(x):
        return nn.functional.normalize(x - mean, dim=-1)

    plain = ProtoNet(nn.Identity()).predict(episode.with_features(unit(episode.support_x), unit(episode.query_x)))
    torch.testing.assert_close(SimpleShot(nn.Identity(), mean).predict(episode), plain)
    with pytest.raises(UserError, match="at least one image"):
        base_mean(nn.Identity(), [])


def test_unlabelled_nodes_carry_labels_and_alone_means_without_the_others():
    episode = gaussians(2, 1, 6, 1.0)
    method = LabelPropagation(nn.Identity(), 0.4)
    single = Episode(episode.support_x, episode.support_y, episode.query_x[:, :1], episode.query_y[:, :1], 5)
    rest = episode.query_x[:, 1:]
    torch.testing.assert_close(method.predict(single, rest), method.predict(episode)[:, :1])
    torch.testing.assert_close(method.predict(episode, alone=True)[:, :1], method.predict(single))
    torch.testing.assert_close(method.predict(episode, rest, alone=True)[:, :1], method.predict(single, rest))
    assert not torch.allclose(method.predict(single), method.predict(episode)[:, :1])


def test_spread_is_the_root_of_the_mean_squared_distance(normal):
    x = normal(1, 7, 3)
    distances = [((x[0, i] - x[0, j]) ** 2).mean() for i in range(7) for j in range(i)]
    real = torch.tensor([[True] * 7 + [False] * 2])
    assert spread(nn.functional.pad(x, (0, 0, 0, 2), value=50.0), real).item() == pytest.approx(np.sqrt(np.mean(distances)))


def test_queries_inform_each_other_where_classes_are_clusters():
    episode = gaussians(100, 1, 16, 0.9)
    sigma = 0.2 * math.sqrt(2 * (1 + 0.9**2))
    plain = accuracy(ProtoNet(nn.Identity()).predict(episode), episode).mean()
    together = accuracy(LabelPropagation(nn.Identity(), sigma).predict(episode), episode).mean()
    alone = accuracy(LabelPropagation(nn.Identity(), sigma).predict(episode, alone=True), episode).mean()
    assert together > plain + 0.07  # 0.71 -> 0.82
    assert together > alone + 0.07


def test_the_gap_closes_with_shots():
    def gain(shots):
        episode = gaussians(60, shots, 16, 0.9)
        method = LabelPropagation(nn.Identity(), 0.2 * math.sqrt(2 * (1 + 0.9**2)))
        return (accuracy(method.predict(episode), episode) - accuracy(ProtoNet(nn.Identity()).predict(episode), episode)).mean()

    assert gain(1) > gain(5) + 0.05


@pytest.mark.parametrize(
    "shots, width, apart, propagation, left", [(5, 16, 0.9, (10, 0.8), 0.5), (1, 64, 0.5, (5, 0.8), 0.75)], ids=["5s", "1s"]
)
def test_the_correction_wins_back_what_unbalanced_queries_cost(shots, width, apart, propagation, left):
    """More than half with 5 shots; with 1, where shares are estimated from worse votes, a third."""
    sigma = 0.5 * math.sqrt(2 * (1 + apart**2))

    def method(strength):
        return LabelPropagation(nn.Identity(), sigma, Propagation(*propagation, balance=strength))

    strength = choose(method, [0.0, 0.25, 0.5, 0.75], [gaussians(100, shots, width, apart, dirichlet=True, seed=7)])
    balanced, unbalanced = (gaussians(200, shots, width, apart, dirichlet=d, seed=1) for d in (False, True))
    plain, corrected = ([accuracy(method(s).predict(e), e).mean().item() for e in (balanced, unbalanced)] for s in (0.0, strength))
    assert plain[0] - plain[1] > 0.015
    assert plain[0] - corrected[1] < left * (plain[0] - plain[1])


def test_strength_0_is_plain_and_the_shares_are_found():
    f = torch.tensor([[[9.0, 1], [1, 9], [9, 1], [8, 1], [7, 1], [6, 1], [1, 5]]])
    asked = torch.tensor([[False, False, True, True, True, True, True]])
    new = rebalanced(f, asked, 1.0)
    evidence = f / f.sum(1, keepdim=True)
    evidence = evidence - evidence.amin(-1, keepdim=True)
    shares = torch.tensor([0.9 * 4 / 5 + 0.05, 0.9 / 5 + 0.05])
    torch.testing.assert_close(new, evidence * 2 * shares * f.sum(1, keepdim=True).mean(-1, keepdim=True))
    x = torch.rand(1, 7, 2)
    y = torch.zeros(1, 7, 2)
    y[0, 0, 0] = y[0, 1, 1] = 1
    real, sigma = torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 7)
    assert torch.equal(Propagation(balance=0.0)(x, sigma, y, real), Propagation()(x, sigma, y, real))


def test_choose_takes_the_most_accurate():
    episode = gaussians(20, 1, 16, 0.9)
    assert choose(lambda s: LabelPropagation(nn.Identity(), s), [20.0, 0.5, 10.0], [episode]) == 0.5
    with pytest.raises(UserError, match="candidates"):
        choose(lambda s: LabelPropagation(nn.Identity(), s), [], [episode])


@pytest.mark.parametrize("options", [{"k": 0}, {"alpha": 1.0}, {"alpha": -0.1}, {"balance": 2.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match="got"):
        Propagation(**options)
    with pytest.raises(UserError, match="positive"):
        LabelPropagation(nn.Identity(), 0.0)
