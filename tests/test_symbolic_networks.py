"""The grid networks: sizes, brute force, what a slot can see, and what shifts with the grid."""

import math

import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.models import MODELS, Sizes, make
from smidgen.symbolic.networks import GRU, OUTSIDE, Blocks, Embedding, LocalAttention, TextCNN, TopList, Transformer, neighbours, sinusoids


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def settled(network: nn.Module) -> nn.Module:
    """In evaluation mode, in float64, with statistics that batch norm cannot ignore."""
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None and m.running_var is not None
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return network.double().eval()


def test_the_papers_parameter_counts():
    model = make("s2g-cnn", Sizes(258, 258, 25), {})
    assert isinstance(model, GridModel)
    parts = (model.embedding, model.module.encoder, model.module.action, model.network, model.readout)
    assert [count(part) for part in parts] == [33_024, 296_064, 387, 1_383_936, 132_354]
    assert isinstance(model.network, Blocks)
    assert [count(block) for block in model.network] == [297_472, 543_232, 543_232]
    assert count(model) == 1_845_765
    acnn = make("s2g-acnn", Sizes(258, 258, 25), {})
    assert isinstance(acnn, GridModel)
    assert (count(acnn), count(acnn.network)) == (1_552_005, 1_090_176)


def test_the_gru_has_one_bias_a_gate_and_follows_its_equations(normal):
    torch.manual_seed(0)
    gru = GRU(4, 2).double()
    x = normal(3, 5, 4)
    y = x
    for layer in range(2):
        names = (f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}")
        w, v, b, none = (p for name in names for n, p in gru.rnn.named_parameters() if n == name)
        assert b.tolist() == [1.0] * 8 + [0.0] * 4 and not none.requires_grad and not none.any()
        h, states = x.new_zeros(3, 4), []
        for t in range(5):
            (r, z, c), (hr, hz, hc) = (y[:, t] @ w.T + b).chunk(3, 1), (h @ v.T).chunk(3, 1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            h = z * h + (1 - z) * (c + r * hc).tanh()
            states.append(h)
        y = torch.stack(states, 1)
    torch.testing.assert_close(gru(x, torch.ones(3, 5, dtype=torch.bool)), y)


def test_local_attention_by_brute_force(normal):
    torch.manual_seed(0)
    attention = LocalAttention(4).double()
    x = normal(2, 4, 3, 5)
    q, k, v = (layer(x) for layer in (attention.query, attention.key, attention.value))
    expected = torch.zeros_like(v)
    for b in range(2):
        for r in range(3):
            for c in range(5):
                scores, values = [], []
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        inside = 0 <= r + i < 3 and 0 <= c + j < 5
                        place = torch.cat([attention.row[i + 1], attention.column[j + 1]])
                        here = q[b, :, r, c]
                        scores.append(here @ k[b, :, r + i, c + j] / 2 + here @ place if inside else torch.tensor(OUTSIDE).double())
                        values.append(v[b, :, r + i, c + j] if inside else torch.zeros(4).double())
                expected[b, :, r, c] = torch.stack(scores).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(attention(x), expected)


def test_neighbours_in_reading_order():
    x = torch.arange(1.0, 7).view(1, 1, 2, 3)
    assert neighbours(x)[0, :, 0, 0, 1].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["cnn", "acnn"])
def test_shifting_the_grid_shifts_what_is_inside(kind, normal):
    torch.manual_seed(0)
    network = settled(Blocks(3, 4, 2, kind))
    grid = torch.zeros(1, 3, 14, 3, dtype=torch.float64)
    grid[:, :, 4:9] = normal(1, 3, 5, 3)
    torch.testing.assert_close(network(grid)[:, :, 2:11], network(grid.roll(1, 2))[:, :, 3:12])


@pytest.mark.parametrize("kind", ["cnn", "acnn"])
def test_a_wider_grid_changes_the_last_slots_alone(kind, normal):
    """Three blocks: the border is felt three slots away, and no further."""
    torch.manual_seed(0)
    network = settled(Blocks(3, 4, 3, kind))
    grid = normal(1, 3, 10, 3)
    wide = network(torch.nn.functional.pad(grid, (0, 0, 0, 4)))
    narrow = network(grid)
    torch.testing.assert_close(narrow[:, :, :7], wide[:, :, :7])
    assert not torch.allclose(narrow[:, :, 7:], wide[:, :, 7:10])


@pytest.mark.parametrize("carry, reach", [(False, 4), (True, 12)])
def test_how_far_a_slot_sees(carry, reach, normal):
    """Three blocks see three slots to each side; a readout that carries sees all."""
    torch.manual_seed(0)
    network, readout = settled(Blocks(3, 4, 3, "cnn")), TopList(16, 5, carry, width=4).double()
    grid = normal(1, 3, 12, 3).requires_grad_()
    readout(network(grid))[0, 0].sum().backward()
    assert grid.grad is not None
    assert (grid.grad.abs().sum((0, 1, 3)) > 0).tolist() == [slot < reach for slot in range(12)]


def test_channels_last_is_how_the_grid_lies(normal):
    assert normal(2, 3, 5, 4).movedim(-1, 1).is_contiguous(memory_format=torch.channels_last)


def test_textcnn_by_brute_force(normal):
    torch.manual_seed(0)
    network = TextCNN(3, 2, dropout=0.9).double().eval()
    grid = normal(2, 4, 8, 3)
    found = network(grid)
    assert found.shape == (2, 6) == (2, network.features)
    for part, k in zip(network.convolutions, (2, 3, 4), strict=True):
        w, b = (p for _, p in part.named_parameters())
        assert b.tolist() == pytest.approx([0.1, 0.1]) and w.abs().max() <= 0.2
        windows = [grid[:, r : r + k, c : c + k] for r in range(5 - k) for c in range(9 - k)]
        scores = torch.stack([torch.einsum("brcd,fdrc->bf", window, w) + b for window in windows])
        torch.testing.assert_close(found[:, 2 * (k - 2) : 2 * (k - 1)], scores.amax(0).relu())


def test_embeddings_of_padding_are_empty_cells():
    torch.manual_seed(0)
    embedding = Embedding(1000, 64)
    tokens = torch.arange(1000)[None]
    x = embedding(tokens, tokens > 0)
    assert not x[0, 0].any() and x[0, 1:].std().item() == pytest.approx(1, abs=0.02)


def test_the_transformer_knows_order_and_ignores_padding(normal):
    torch.manual_seed(0)
    encoder = Transformer(8, 1).double().eval()
    x, mask = normal(1, 6, 8), torch.tensor([[True, True, True, True, False, False]])
    y = encoder(x, mask)[:, :4]
    torch.testing.assert_close(encoder(x[:, :4], mask[:, :4]), y)
    assert not torch.allclose(encoder(x[:, [1, 0, 2, 3]], mask[:, :4])[:, 2], y[:, 2])


def test_sinusoids():
    like = torch.zeros(8, dtype=torch.float64)
    assert sinusoids(3, like)[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert sinusoids(3, like)[2, 0].item() == pytest.approx(math.sin(2), abs=1e-6)
    assert sinusoids(3, like)[2, 7].item() == pytest.approx(math.cos(2 / 10_000), abs=1e-6)


@pytest.mark.parametrize(
    "name, sizes, options, message",
    [
        ("s2g", Sizes(5, 5, 9), {}, "no model 's2g'; there are s2g-cnn"),
        ("s2g-cnn", Sizes(5, 5, None), {}, "the task wants labels: take s2g-textcnn"),
        ("s2g-textcnn", Sizes(5, 5, 9), {}, "the task wants sequences: take s2g-cnn"),
        ("s2g-cnn", Sizes(5, 5, 30), {}, "the grid 25 slots: add --option.columns 30"),
        ("s2g-cnn", Sizes(5, 5, 9), {"size": 3}, "no such option; it has dim, rows"),
        ("s2g-cnn", Sizes(5, 5, 9), {"dim": 1.5}, "not a value like the default, 128"),
        ("s2g-cnn", Sizes(5, 5, 9), {"rows": 0}, "--option.rows must be positive, got 0"),
        ("s2g-cnn", Sizes(5, 5, 9), {"encoder": "rnn"}, "one of gru, lstm, transformer, mlp, got rnn"),
        ("s2g-textcnn", Sizes(5, 5, None), {"rows": 3}, "reach over 4 x 4 cells, the grid has 3 x 8"),
        ("transformer", Sizes(5, 5, 9), {"width": 20}, "a multiple of 8"),
    ],
)
def test_refusals(name, sizes, options, message):
    with pytest.raises(UserError) as refused:
        make(name, sizes, options)
    assert message in str(refused.value)


def test_every_model_has_an_encoder_of_each_kind_where_it_lays_out():
    for name in ("s2g-cnn", "s2g-acnn", "s2g-textcnn"):
        assert name in MODELS
        for encoder in ("gru", "lstm", "transformer", "mlp"):
            slots = None if name == "s2g-textcnn" else 9
            model = make(name, Sizes(7, 5, slots), {"dim": 8, "encoder": encoder, "layers": 1})
            tokens = torch.tensor([[2, 3, 4, 1], [5, 1, 0, 0]])
            assert model(tokens, tokens > 0).shape == ((2, 25, 5) if slots else (2, 5))
