"""Learned rounding: its gradient against autograd and finite differences, its whole loop against a plain twin."""

from dataclasses import replace

import pytest
import torch

import smidgen.quant.solvers.aespa as aespa
from smidgen.errors import UserError
from smidgen.grid import Grid, expand
from smidgen.quant.solvers import AESPA, GPTQ
from smidgen.quant.solvers.aespa import annealed, gradient, learn
from smidgen.quant.stats import Stats

GRID = Grid(3, scale_dtype="float64")
FAST = AESPA(steps=0, zfold=False)
COUPLED = pytest.mark.parametrize("coupled", [False, True], ids=["rows alone", "rows of heads"])


def soft(b):
    """h(B) of the paper."""
    return (1.2 * torch.sigmoid(b) - 0.1).clamp(0, 1)


def plain_loss(b, floor, w, h, h_out, grid, scale, zero, beta, pull):
    """What is learned, as the paper writes it; every second moment is there twice ours."""
    e = scale * ((floor + soft(b)).clamp(0, grid.top) - zero) - w
    total = pull * (1 - (2 * soft(b) - 1).abs() ** beta).sum()
    for i in range(len(w)):
        form = e[i] @ (2 * h[i % len(h)]) @ e[i].T
        total = total + (form if h_out is None else 2 * h_out[i] @ form).trace()
    return total


@pytest.fixture
def problem(normal, moments, generator):
    """(heads, rows, columns, coupled, shared) -> the arguments of `gradient`, with levels beyond the grid and sigmoids beyond 0..1."""

    def draw(heads, rows, columns, coupled, shared=False):
        w = normal(heads, rows, columns)
        scale, zero = (expand(t, columns) for t in GRID.fit(w))
        floor = torch.randint(-3, GRID.top + 3, w.shape, generator=generator).double()
        h_out = moments(heads, rows) if coupled else None
        beta, pull = (torch.tensor([x], dtype=torch.float64) for x in (3.7, 0.8))
        return 2.5 * normal(heads, rows, columns), floor, w, moments(1 if shared else heads, columns), h_out, GRID, scale, zero, beta, pull

    return draw


@pytest.fixture
def learned(monkeypatch):
    """B as learning left it, call by call."""
    seen = []
    original = aespa.repeat

    def recording(step, times, state, optimizer):
        original(step, times, state, optimizer)
        seen.append(state[0].clone())

    monkeypatch.setattr(aespa, "repeat", recording)
    return seen


def prepared(w, stats, grid, solver):
    """What `learn` starts from: weights by head, those compensated, the damped Hessian, scales and zeros of every weight."""
    h = stats.h_in + solver.damp * stats.h_in.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(w.shape[1])
    w = w.unflatten(0, (stats.heads(), -1))
    codes, scale, zero, updated = solver.rounded(w, h, grid)
    return w, updated, h, expand(scale, w.shape[-1]), expand(zero, w.shape[-1]), codes


# --- without learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"scales": "hessian"}, {"damp": 0.1}, {"passes": 1}], ids=str)
@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_steps_give_gptq(symmetric, group, options, normal, moments):
    w, grid = normal(12, 20), replace(GRID, group=group, symmetric=symmetric)
    for h_in in (moments(1, 20), moments(3, 20)):
        expected = GPTQ(**options)(w, Stats(h_in), grid)
        q = replace(FAST, **options)(w, Stats(h_in), grid)
        assert torch.equal(q.codes, expected.codes) and torch.equal(q.scale, expected.scale) and torch.equal(q.zero, expected.zero)


@pytest.mark.parametrize("group", [None, 5])
def test_no_steps_give_gptq_on_h_in_where_rows_interact(group, normal, moments):
    w, h_in, h_out, grid = normal(12, 20), moments(1, 20), moments(3, 4), replace(GRID, group=group)
    expected, q = GPTQ()(w, Stats(h_in), grid), FAST(w, Stats(h_in, h_out), grid)
    assert torch.equal(q.codes, expected.codes) and torch.equal(q.scale, expected.scale) and torch.equal(q.zero, expected.zero)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_start_rounded_hard_is_the_nearest_to_the_compensated_weights(bits, normal, moments):
    grid = replace(GRID, bits=bits)
    w, updated, h, scale, zero, codes = prepared(normal(12, 20), Stats(moments(3, 20)), grid, FAST)
    start = learn(w, updated, h, None, grid, scale, zero, FAST, 1.0)
    assert torch.equal(start, grid.encode(updated, scale, zero)) and torch.equal(start, codes)
    assert not torch.equal(start, grid.encode(w, scale, zero))


def test_learning_starts_at_the_compensated_weights_themselves(normal, moments, learned):
    w, updated, h, scale, zero, _ = prepared(normal(12, 20), Stats(moments(3, 20)), GRID, FAST)
    learn(w, updated, h, None, GRID, scale, zero, FAST, 1.0)
    torch.testing.assert_close(scale * (torch.floor(updated / scale) + soft(learned[0])), updated)


# --- the gradient ----------------------------------------------------------------------------------------------------


@COUPLED
@pytest.mark.parametrize("shared", [False, True], ids=["h_in per head", "h_in shared"])
def test_gradient_is_that_of_autograd(shared, coupled, problem):
    b, floor, *rest = problem(3, 8, 10, coupled, shared)
    variable = b.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain_loss(variable, floor, *rest), variable)
    torch.testing.assert_close(gradient(b, floor, *rest), expected, rtol=1e-10, atol=1e-10)


@COUPLED
def test_gradient_is_that_of_central_differences(coupled, problem):
    b, *rest = problem(2, 3, 6, coupled)
    found = gradient(b, *rest)
    for at in torch.cartesian_prod(*map(torch.arange, b.shape)):
        step = torch.zeros_like(b)
        step[tuple(at)] = 1e-5
        slope = (plain_loss(b + step, *rest) - plain_loss(b - step, *rest)) / 2e-5
        assert found[tuple(at)].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-6)


@COUPLED
def test_gradient_is_zero_where_nothing_moves(coupled, problem):
    b, floor, *rest, pull = problem(3, 8, 10, coupled)
    clipped = (soft(b) == 0) | (soft(b) == 1)
    levels = floor + soft(b)
    outside = (levels < 0) | (levels > GRID.top)
    found = gradient(b, floor, *rest, pull)
    assert clipped.any() and not found[clipped].any()
    assert (outside & ~clipped).any() and (~outside & ~clipped).any() and (found[~clipped] != 0).all()
    without = gradient(b, floor, *rest, torch.zeros_like(pull))
    assert not without[outside].any() and (without[~outside & ~clipped] != 0).all()


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_the_regulariser_pushes_to_the_nearer_end_and_rests_there(beta, problem):
    b, floor, w, h, _, *rest, _, _ = problem(3, 8, 10, False)
    b[0, 0, :2] = torch.tensor([torch.inf, -torch.inf])  # h = 1 and 0
    b[0, 1, 0] = 0  # between the two
    slopes = gradient(b, floor, w, torch.zeros_like(h), None, *rest, torch.tensor([beta]).double(), torch.tensor([1.0]).double())
    free = (soft(b) > 0) & (soft(b) < 1)
    assert slopes[0, 1, 0].item() == pytest.approx(0, abs=1e-12)
    free[0, 1, 0] = False
    assert free.any() and torch.equal(slopes[free].sign(), -b[free].sign())
    assert (~free).sum() > 3 and not slopes[(soft(b) == 0) | (soft(b) == 1)].any()


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm_up"), [(100, 0.2), (50, 0.0), (7, 0.5), (1, 0.2), (10, 1.0)])
def test_nothing_pulls_during_warm_up_then_beta_falls_from_20_to_2(steps, warm_up):
    start = int(steps * warm_up)
    schedule = annealed(AESPA(steps=steps, warm_up=warm_up), 1.5)
    assert schedule.shape == (steps, 2)
    for i, (beta, pull) in enumerate(schedule.tolist()):
        assert pull == (0.0 if i < start else 1.5)
        assert beta == pytest.approx(20 - 18 * max(0, i - start) / max(1, steps - start))


# --- the whole loop --------------------------------------------------------------------------------------------------


@COUPLED
def test_learning_is_adam_on_the_plain_loss(coupled, normal, moments, learned):
    solver = AESPA(steps=60, zfold=False, pull=0.7, learning_rate=0.03)
    stats = Stats(moments(1, 10), moments(3, 4)) if coupled else Stats(moments(3, 10))
    w, updated, h, scale, zero, _ = prepared(normal(12, 10), stats, GRID, solver)
    floor = torch.floor(updated / scale)
    b = torch.logit((updated / scale - floor + 0.1) / 1.2).requires_grad_()
    adam = torch.optim.Adam([b], lr=0.03)
    for i in range(60):
        # attention is pulled one and a half times as much, and not during the first fifth
        beta, pull = 20 - 18 * max(0, i - 12) / 48, 0.0 if i < 12 else 1.5 * 0.7
        adam.zero_grad()
        plain_loss(b, floor + zero, w, h, stats.h_out, GRID, scale, zero, beta, pull).backward()
        adam.step()
    solver(w.flatten(0, 1), stats, GRID)
    codes = learn(w, updated, h, stats.h_out, GRID, scale, zero, solver, 1.5 * 0.7).flatten(0, 1).byte()
    torch.testing.assert_close(learned[0], b.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(codes, (floor + zero + (b >= 0)).clamp(0, GRID.top).flatten(0, 1).byte())
    assert not torch.equal(codes, FAST(w.flatten(0, 1), stats, GRID).codes)


def test_layers_outside_attention_are_pulled_less(normal, moments, monkeypatch):
    pulls = []
    monkeypatch.setattr(aespa, "learn", lambda *args: pulls.append(args[-1]) or args[0])
    for stats in (Stats(moments(1, 10)), Stats(moments(3, 10)), Stats(moments(1, 10), moments(3, 4))):
        AESPA(pull=2.0)(normal(12, 10).clamp(0, 1), stats, GRID)
    assert pulls == [2.0, 3.0, 3.0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_levels_of_the_grid_next_to_the_compensated_weights(symmetric, bits, normal, moments):
    grid, solver, stats = Grid(bits, None, symmetric), AESPA(steps=100, learning_rate=0.1), Stats(moments(1, 20), moments(3, 4))
    w, updated, h, scale, zero, _ = prepared(normal(12, 20), stats, grid, solver)
    codes = learn(w, updated, h, stats.h_out, grid, scale, zero, solver, 1.5)
    assert set(codes.unique().tolist()) <= set(range(grid.top + 1))
    levels = (updated / scale + zero).clamp(0, grid.top)
    assert ((codes - levels).abs() <= 1).all() and ((codes - levels).abs() > 0.5).any()
    kept = solver(w.flatten(0, 1), stats, grid).codes.view(codes.shape)
    fast = replace(solver, steps=0)(w.flatten(0, 1), stats, grid).codes.view(codes.shape)
    for head in range(len(codes)):  # the learned codes of a head, or GPTQ's where those lose less
        error = [(grid.decode(c, scale[head], zero[head]) - w[head]) for c in (codes[head], fast[head].float())]
        new, old = ((stats.h_out[head].to(e) @ e @ h[0] * e).sum() for e in error)
        assert torch.equal(kept[head], codes[head].byte() if new < old else fast[head])


@pytest.fixture
def activations(normal):
    """(heads, d) -> second moments of mildly correlated inputs of unit variance, as a norm leaves them: L is then small beside lambda."""

    def draw(heads, d):
        x = normal(heads, 4 * d, d) @ (torch.eye(d) + 0.1 * normal(heads, d, d))
        h = x.mT @ x
        return (h / h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]).float()

    return draw


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["layer", "values", "queries"])
def test_correlated_inputs_make_learning_better_than_gptq(kind, bits, normal, activations):
    w, grid = 0.1 * normal(64, 64).float(), Grid(bits)
    stats = Stats(activations(4 if kind == "values" else 1, 64), activations(4, 16) if kind == "queries" else None)
    before, after = (stats.loss(w - s(w, stats, grid).dequantize()) for s in (GPTQ(), AESPA(steps=400)))
    assert before > 1.05 * after


def test_in_the_end_nearly_every_weight_has_chosen(normal, activations, learned):
    w, stats, grid = 0.1 * normal(64, 32).float(), Stats(activations(1, 32)), Grid(3)
    q = AESPA(steps=400)(w, stats, grid)
    h = soft(learned[0])
    assert ((h < 0.01) | (h > 0.99)).float().mean() > 0.95
    _, updated, _, scale, zero, _ = prepared(w, stats, grid, FAST)
    values = grid.decode((torch.floor(updated / scale) + zero + h).clamp(0, grid.top), scale, zero)[0]
    assert stats.loss(w - q.dequantize()) == pytest.approx(stats.loss(w - values), rel=0.05)


def test_the_same_problem_has_the_same_solution(normal, moments):
    w, stats = normal(12, 20).float(), Stats(moments(1, 20), moments(3, 4))
    given = w.clone(), stats.h_in.clone(), stats.h_out.clone()
    one, two = (AESPA(steps=50)(w, stats, Grid(3)) for _ in range(2))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)
    assert torch.equal(w, given[0]) and torch.equal(stats.h_in, given[1]) and torch.equal(stats.h_out, given[2])


def test_a_dead_column_takes_the_zero_point(normal, moments):
    w, h_in = normal(12, 20), moments(1, 20)
    h_in[:, 7], h_in[:, :, 7] = 0, 0
    q = AESPA(steps=50)(w, Stats(h_in), GRID)
    assert torch.equal(q.codes[:, 7:8], q.zero.byte())


def test_a_replayed_graph_gives_the_codes_of_the_plain_loop(device, normal, moments, monkeypatch):
    w, stats = normal(64, 32).float().to(device), Stats(moments(1, 32).float().to(device), moments(4, 16).float().to(device))
    calls = []
    monkeypatch.setattr(aespa, "gradient", lambda *args: calls.append(1) or gradient(*args))
    found = AESPA(steps=300)(w, stats, Grid(3)).codes
    assert len(calls) == (4 if device.type == "cuda" else 300)  # three trial runs and the one captured

    def plain(step, times, state, optimizer):
        for _ in range(times):
            step()

    monkeypatch.setattr(aespa, "repeat", plain)
    expected = AESPA(steps=300)(w, stats, Grid(3)).codes
    assert (found == expected).float().mean() >= 0.99
    assert (expected == GPTQ()(w, stats, Grid(3)).codes).float().mean() < 0.97


# --- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "passes"])
def test_negative_numbers_of_rounds_are_refused(name):
    with pytest.raises(UserError, match=f"{name} must not be negative, got -1"):
        AESPA(**{name: -1})


@pytest.mark.parametrize("option", [{"learning_rate": 0.0}, {"pull": -1.0}, {"warm_up": 1.1}, {"damp": torch.nan}, {"damp": -0.1}], ids=str)
def test_options_out_of_their_range_are_refused(option):
    with pytest.raises(UserError, match=next(iter(option))):
        AESPA(**option)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_are_refused(bad, normal, moments):
    w, h_in, h_out = normal(12, 20), moments(1, 20), moments(3, 4)
    broken = h_out.clone()
    broken[1, 2, 2] = bad
    with pytest.raises(UserError, match="second moments of the heads contain NaN"):
        AESPA(steps=1)(w, Stats(h_in, broken), GRID)
    with pytest.raises(UserError, match="weights contain NaN"):
        AESPA(steps=1)(w * bad, Stats(h_in, h_out), GRID)
