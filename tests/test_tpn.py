"""TPN: its sizes, its gradients, its reductions to label propagation, and that learning the graph pays."""

import math

import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, accuracy
from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation, nodes, spread
from smidgen.fewshot.methods.prototypes import cross_entropy
from smidgen.fewshot.methods.tpn import FLOOR, TPN, ConvGraph, FlatGraph, graph_for
from smidgen.networks import Conv4


def images(generator, tasks=2, size=28, shots=1, queries=3, ways=3):
    y = [torch.arange(ways).repeat_interleave(n).expand(tasks, -1) for n in (shots, queries)]
    x = [torch.rand(*labels.shape, 1, size, size, generator=generator) for labels in y]
    return Episode(x[0], y[0], x[1], y[1], ways)


def nuisance(tasks, seed, ways=3, queries=8):
    """Classes differ in 2 of 12 features, the others are noise, louder in sum."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(tasks, ways, 2, generator=generator)
    y = [torch.arange(ways).repeat_interleave(n).expand(tasks, -1) for n in (1, queries)]

    def features(labels):
        signal = means.gather(1, labels[..., None].expand(-1, -1, 2)) + 0.3 * torch.randn(*labels.shape, 2, generator=generator)
        return torch.cat([signal, torch.randn(*labels.shape, 10, generator=generator)], -1)

    return Episode(features(y[0]), y[0], features(y[1]), y[1], ways)


def trained(model, steps, rate=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(nuisance(8, 1000 + step)).backward()
        optimizer.step()
    return model.eval()


def test_the_papers_parameter_counts():
    backbone = Conv4(3, 64)
    shape = backbone(torch.zeros(2, 3, 84, 84)).shape[1:]
    assert shape == (64, 5, 5)
    assert [sum(p.numel() for p in m.parameters()) for m in (backbone, ConvGraph(shape))] == [113088, 37684]
    assert ConvGraph(shape)[9].in_features == 4


@pytest.mark.parametrize("size, left", [(84, 4), (32, 1), (28, 1), (100, 4), (160, 9)])
def test_the_graph_module_fits_the_map(size, left):
    maps = Conv4(1, 4)(torch.zeros(2, 1, size, size))
    graph = ConvGraph(maps.shape[1:])
    assert graph[9].in_features == left and graph(maps).shape == (2, 1)


def test_a_constant_sigma_is_label_propagation():
    graph = FlatGraph(12, scale=0.7)  # as it starts
    episode = nuisance(2, 0)
    plain = LabelPropagation(nn.Identity(), 0.7)
    torch.testing.assert_close(TPN(nn.Identity(), graph).scores(episode), plain.scores(episode))
    torch.testing.assert_close(TPN(nn.Identity(), graph).loss(episode), plain.loss(episode))


def test_the_loss_is_the_mean_over_support_and_queries(generator):
    torch.manual_seed(0)
    model = TPN(Conv4(1, 4), graph_for((4, 1, 1)), guard=True).eval()
    episode = images(generator)
    f = model.scores(episode)
    labels = torch.cat([episode.support_y, episode.query_y], 1)
    expected = nn.functional.cross_entropy(f.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.loss(episode), expected)
    torch.testing.assert_close(model.predict(episode), f[:, 3:].softmax(-1))
    more = torch.rand(2, 4, 1, 28, 28, generator=generator)
    assert model.scores(episode, more).shape == f.shape and not torch.allclose(model.scores(episode, more), f)


def test_gradients_of_features_and_sigma(normal):
    y = torch.zeros(2, 8, 2, dtype=torch.float64)
    y[:, 0, 0] = y[:, 1, 1] = 1
    x, sigma = normal(2, 8, 3).requires_grad_(), (1 + 0.1 * normal(2, 8)).requires_grad_()
    labels, real = torch.tensor([[0, 1] * 4] * 2), torch.ones(2, 8, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x, s: cross_entropy(Propagation(4)(x, s, y, real), labels), (x, sigma), eps=1e-6, atol=1e-5)


def test_every_parameter_learns_and_gradients_are_finite_with_padding(generator):
    torch.manual_seed(0)
    model = TPN(Conv4(1, 4), graph_for((4, 1, 1)), guard=True).double()
    episode = images(generator, queries=5)
    hidden = episode.query_y.clone()
    hidden[1, -2:] = -1
    model.loss(Episode(episode.support_x.double(), episode.support_y, episode.query_x.double(), hidden, 3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.graph[0].weight.grad.abs().sum() + model.graph[11].bias.grad.abs().sum() > 0


def test_padding_changes_nothing_in_evaluation(generator):
    torch.manual_seed(0)
    model = TPN(Conv4(1, 4), graph_for((4, 1, 1)), guard=True).eval()
    episode = images(generator)
    more = Episode(
        torch.cat([episode.support_x, torch.ones(2, 2, 1, 28, 28)], 1),
        nn.functional.pad(episode.support_y, (0, 2), value=-1),
        torch.cat([episode.query_x, torch.ones(2, 3, 1, 28, 28)], 1),
        nn.functional.pad(episode.query_y, (0, 3), value=-1),
        3,
    )
    torch.testing.assert_close(model.predict(more)[:, :9], model.predict(episode), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.loss(more), model.loss(episode), rtol=1e-4, atol=1e-5)


def test_the_guard_and_a_sign():
    episode = nuisance(1, 0)
    graph = FlatGraph(12)
    nn.init.constant_(graph.layers[2].bias, -5.0)
    maps, y, real = nodes(nn.Identity(), episode)
    free, guarded = (TPN(nn.Identity(), graph, guard=g).sigma(maps, real) for g in (False, True))
    assert (free == -5).all()
    torch.testing.assert_close(guarded, torch.full_like(guarded, math.log1p(math.exp(-5)) + FLOOR))
    flipped = TPN(nn.Identity(), graph).head(maps, y, real)  # all signs flipped: the same graph as with 5
    torch.testing.assert_close(flipped, Propagation()(maps, -free, y, real))


def test_learning_the_embedding_and_the_graph_beats_a_fixed_graph():
    torch.manual_seed(0)
    test = nuisance(200, 1)
    plain = max(accuracy(LabelPropagation(nn.Identity(), s).predict(test), test).mean().item() for s in (0.2, 0.3, 0.5, 1.0))
    model = trained(TPN(nn.Linear(12, 6), FlatGraph(6, 0.3)), 200)
    learned = accuracy(model.predict(test), test).mean().item()
    assert learned > plain + 0.2  # 0.62 -> 0.92


def test_sigma_alone_learns_something():
    torch.manual_seed(0)
    test = nuisance(200, 1)
    scale = 0.3 * spread(test.query_x, test.query_y >= 0).mean().item()
    model = TPN(nn.Identity(), FlatGraph(12, scale))
    before = model.loss(test).item()
    assert trained(model, 60).loss(test).item() < before - 0.01


def test_a_flat_backbone_gets_a_perceptron_and_odd_maps_are_refused():
    assert isinstance(graph_for((1280,), 0.1), FlatGraph) and isinstance(graph_for((64, 5, 5)), ConvGraph)
    with pytest.raises(UserError, match="FlatGraph"):
        ConvGraph((64,))
