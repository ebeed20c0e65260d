"""seq2grid: grids worked by hand, sums over all action sequences, three forms that agree, and what its weights must obey."""

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from smidgen.symbolic.networks import MLP, Embedding
from smidgen.symbolic.seq2grid import Seq2Grid, Walk, cells, entropy, hard_layouts, place, unroll, walk_steps, weights, write
from smidgen.symbolic.tasks import NLP, NOOP, TLU

SIZES = [(3, 7, 3, 4, 5), (2, 12, 2, 3, 4), (4, 1, 3, 25, 2), (2, 9, 1, 1, 3), (2, 6, 4, 1, 3), (1, 8, 9, 9, 2)]  # batch, time, H, W, C


def drawn(sizes, normal):
    batch, time, _, _, dim = sizes
    return normal(batch, time, 3).softmax(-1), normal(batch, time, dim)


def written(tokens: str, actions: list[int], rows: int, columns: int) -> list[str]:
    """The hard grid as text, a row each, newest slot first, empty cells as dots."""
    cell = cells(torch.tensor([actions]), rows, columns)
    codes = place(cell, torch.tensor([[[float(ord(c))] for c in tokens]]), rows, columns)[0, ..., 0].int().tolist()
    return ["".join(chr(c) if c else "." for c in row) for row in codes]


def test_the_toy_addition_is_aligned_by_its_units():
    assert written("582 13$", [NLP if c == "1" else TLU for c in "582 13$"], 3, 4) == ["$31.", " 285", "...."]


def test_words_are_skipped_by_no_ops():
    text = "What is 12 plus 345?$"
    actions = [NOOP] * len(text)
    for i in (text.index("12"), text.index("12") + 1, text.index("345") + 1, text.index("345") + 2):
        actions[i] = TLU
    actions[text.index("345")] = NLP
    assert written(text, actions, 2, 3) == ["543", "21."]


@pytest.mark.parametrize("action, expected", [(TLU, ["edc", "...", "..."]), (NLP, ["e..", "d..", "c.."]), (NOOP, ["...", "...", "..."])])
def test_one_action_alone(action, expected):
    assert written("abcde", [action] * 5, 3, 3) == expected


def test_weights_worked_by_hand():
    actions = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2]]], dtype=torch.float64)
    m = weights(actions, 2, 3)[0]
    expected = [[[0.03, 0.135, 0.105], [0.42, 0.015, 0]], [[0.16, 0.56, 0], [0.08, 0, 0]], [[0.8, 0, 0], [0, 0, 0]]]
    torch.testing.assert_close(m, torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(m.sum((1, 2)), torch.tensor([0.705, 0.8, 0.8], dtype=torch.float64))


def test_uniform_actions_count_paths():
    m = 27 * weights(torch.full((1, 3, 3), 1 / 3, dtype=torch.float64), 2, 2)[0]
    assert m.round().long().tolist() == [[[2, 4], [6, 2]], [[6, 6], [6, 0]], [[18, 0], [0, 0]]]
    torch.testing.assert_close(m, m.round())


@pytest.mark.parametrize("rows, columns", [(3, 4), (2, 2), (6, 6)])
def test_the_soft_grid_is_the_mean_over_all_hard_ones(normal, rows, columns):
    """Every one of 3^5 action sequences, weighed by its probability."""
    actions, x = drawn((1, 5, rows, columns, 3), normal)
    mean = torch.zeros(rows, columns, 3, dtype=torch.float64)
    for sequence in itertools.product(range(3), repeat=5):
        probability = torch.stack([actions[0, t, a] for t, a in enumerate(sequence)]).prod()
        mean += probability * place(cells(torch.tensor([sequence]), rows, columns), x, rows, columns)[0]
    for grid in (unroll(actions, x, rows, columns), write(weights(actions, rows, columns), x)):
        torch.testing.assert_close(grid[0], mean, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_closed_form_is_the_definition_and_so_is_its_gradient(sizes, normal):
    rows, columns = sizes[2:4]
    actions, x = (t.requires_grad_() for t in drawn(sizes, normal))
    grids = unroll(actions, x, rows, columns), write(weights(actions, rows, columns), x)
    torch.testing.assert_close(*grids, atol=1e-12, rtol=0)
    way = normal(*grids[0].shape)
    slow, fast = (torch.autograd.grad((grid * way).sum(), (actions, x)) for grid in grids)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", SIZES)
def test_counters_are_the_definition_for_certain_actions(sizes, normal, generator):
    batch, time, rows, columns, _ = sizes
    _, x = drawn(sizes, normal)
    for _ in range(20):
        action = torch.randint(0, 3, (batch, time), generator=generator)
        counted = place(cells(action, rows, columns), x, rows, columns)
        assert torch.equal(counted, unroll(one_hot(action, 3).double(), x, rows, columns))


def test_gradients_of_the_actions(normal):
    logits, x = normal(2, 6, 3).requires_grad_(), normal(2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits, x: write(weights(logits.softmax(-1), 2, 3), x), (logits, x))


def test_the_walks_derivative_and_its_derivative(normal):
    a, c, v = (t.requires_grad_() for t in (normal(4, 2, 1, 5), normal(4, 2, 1, 5), normal(5, 2, 3, 5)))
    assert torch.autograd.gradcheck(Walk.apply, (a, c, v))
    assert torch.autograd.gradgradcheck(Walk.apply, (a, c, v))


def test_masses_and_occupancy(normal):
    """Nothing falls off a grid larger than the text: token i has mass 1 - n_i. Cells are never more than full."""
    actions, _ = drawn((3, 9, 0, 0, 1), normal)
    u, p, n = actions.unbind(-1)
    torch.testing.assert_close(weights(actions, 10, 9).sum((2, 3)), 1 - n, atol=1e-12, rtol=0)
    small = weights(actions, 2, 3)
    assert bool((small.sum((2, 3)) <= u + p + 1e-12).all())
    occupancy = small.sum(1)
    assert 0 <= occupancy.min() and occupancy.max() <= 1
    torch.testing.assert_close(occupancy[:, 0, 0], 1 - n.prod(1), atol=1e-12, rtol=0)


def test_the_top_row_is_a_polynomial(normal):
    """Row 0 of token i: the coefficients of prod_{s > i} (n_s + u_s z)."""
    actions, _ = drawn((1, 6, 0, 0, 1), normal)
    u, p, n = actions[0].unbind(-1)
    product = torch.ones(1, dtype=torch.float64)
    for i in reversed(range(6)):
        top = weights(actions, 1, 6)[0, i, 0]
        torch.testing.assert_close(top[: len(product)], (u[i] + p[i]) * product, atol=1e-14, rtol=0)
        product = torch.cat([n[i] * product, product.new_zeros(1)]) + torch.cat([product.new_zeros(1), u[i] * product])


def test_gradients_reach_the_first_of_200_tokens(normal):
    actions = torch.zeros(1, 200, 3, dtype=torch.float64)
    actions[..., 0], actions[..., 2] = 0.1, 0.9
    actions = actions.requires_grad_()
    weights(actions, 3, 25)[0, 0].sum().backward()
    assert actions.grad is not None and 0 < float(actions.grad.abs().max()) < 1e3


def test_what_is_never_written_has_no_gradient_but_its_actions_have(normal):
    x = normal(1, 4, 2).requires_grad_()
    actions = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(1, 4, 3).clone().requires_grad_()
    (write(weights(actions, 2, 3), x) * normal(1, 2, 3, 2)).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) == 0
    assert actions.grad is not None and float(actions.grad.abs().min(1).values.max()) > 0


@pytest.fixture
def module() -> Seq2Grid:
    torch.manual_seed(0)
    return Seq2Grid(8, 3, 5)


def questions(generator, lengths, dim=8):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, 20, mask.shape, generator=generator) * mask
    return Embedding(20, dim)(tokens, mask).detach(), mask


def test_padding_changes_nothing(module, generator):
    x, mask = questions(generator, [4, 9, 6])
    together = module(x, mask)
    for i, length in enumerate([4, 9, 6]):
        torch.testing.assert_close(module(x[i : i + 1, :length], mask[i : i + 1, :length])[0], together[i])
    wide = torch.nn.functional.pad(x, (0, 0, 0, 30)), torch.nn.functional.pad(mask, (0, 30))
    torch.testing.assert_close(module(*wide), together)
    layout = module.layout(*wide)
    assert bool((layout.weights[~wide[1]] == 0).all()) and bool((layout.actions[~wide[1]][:, 2] == 1).all())


def test_the_embeddings_are_written_not_the_states(module, generator):
    x, mask = questions(generator, [7, 7])
    layout = module.layout(x, mask)
    torch.testing.assert_close(layout.grid, torch.einsum("bthw,btc->bhwc", layout.weights, x))
    torch.testing.assert_close(module(x, mask), layout.grid)


def test_hard_mode_takes_the_most_probable_action(module, generator):
    x, mask = questions(generator, [7, 5])
    with torch.no_grad():
        module.action.weight.mul_(50)
        soft = module(x, mask)
        with hard_layouts(module):
            layout = module.layout(x, mask)
            expected = unroll(one_hot(layout.actions.argmax(-1), 3).float(), x, 3, 5)
            assert torch.equal(module(x, mask), expected) and torch.allclose(layout.grid, expected)
        assert torch.equal(module(x, mask), soft) and not torch.equal(soft, expected)


def test_given_actions_and_a_grid_of_another_size(module, generator):
    x, mask = questions(generator, [7, 5])
    given = torch.randint(0, 3, (2, 7), generator=generator)
    module.rows, module.columns = 2, 9
    expected = unroll(one_hot(torch.where(mask, given, NOOP), 3).float(), x, 2, 9)
    torch.testing.assert_close(module(x, mask, given), expected)
    module.mode = "hard"
    assert torch.equal(module(x, torch.ones_like(mask), given), unroll(one_hot(given, 3).float(), x, 2, 9))


def test_without_leak_every_token_is_written(generator):
    torch.manual_seed(0)
    x, mask = questions(generator, [6, 4])
    layout = Seq2Grid(8, 7, 7, no_leak=True).layout(x, mask)
    assert bool((layout.actions[mask][:, NOOP] == 0).all())
    torch.testing.assert_close(layout.weights.sum((2, 3)), mask.float())


def test_entropy_counts_real_tokens_alone(generator):
    mask = torch.tensor([[True, True, False]])
    actions = torch.tensor([[[1 / 3] * 3, [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], requires_grad=True)
    found = entropy(actions, mask)
    assert found.item() == pytest.approx(torch.tensor(3.0).log().item() / 2)
    found.backward()
    assert actions.grad is not None and bool(actions.grad.isfinite().all())


def test_it_learns_an_alignment_from_the_grid_alone():
    """Tokens 1 .. 9 are to lie where updates at even and pushes at odd tokens put them; the encoder sees a token at a time."""
    torch.manual_seed(0)
    table = torch.randn(10, 16)
    module = Seq2Grid(16, 3, 4, MLP(16, 2))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for step in range(150):
        tokens = torch.randint(1, 10, (32, 6), generator=torch.Generator().manual_seed(step))
        wanted = place(cells(torch.where(tokens % 2 == 0, TLU, NLP), 3, 4), table[tokens], 3, 4)
        loss = (module(table[tokens], tokens > 0) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = module.layout(table[None, 1:], torch.ones(1, 9, dtype=torch.bool)).actions[0]
    assert chosen.argmax(-1).tolist() == [NLP, TLU] * 4 + [NLP] and chosen.amax(-1).min() > 0.9


@pytest.mark.gpu
def test_the_kernel_is_the_loop():
    from smidgen.symbolic.walk_triton import walk_triton

    for steps, batch, rows, places in [(100, 64, 3, 28), (1, 2, 4, 12), (9, 1, 1, 2)]:
        a, c = (torch.rand(steps, batch, 1, places, device="cuda", dtype=torch.float64) / 2 for _ in range(2))
        v = torch.randn(steps + 1, batch, rows, places, device="cuda", dtype=torch.float64)
        torch.testing.assert_close(walk_triton(a, c, v), walk_steps(a, c, v), atol=1e-12, rtol=1e-12)


@pytest.mark.gpu
def test_the_closed_form_is_the_definition_on_a_gpu(normal):
    actions, x = (t.cuda().requires_grad_() for t in drawn((8, 60, 3, 25, 16), normal))
    grids = unroll(actions, x, 3, 25), write(weights(actions, 3, 25), x)
    torch.testing.assert_close(*grids, atol=1e-12, rtol=0)
    way = normal(*grids[0].shape).cuda()
    for a, b in zip(*(torch.autograd.grad((grid * way).sum(), (actions, x)) for grid in grids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
