"""Refitted scales against brute-force least squares, descent over the codes against a loop over single weights."""

from dataclasses import replace

import pytest
import torch

import smidgen.quant.solvers.descent as descent
from smidgen.errors import UserError
from smidgen.grid import Grid, expand
from smidgen.quant.solvers import BOA, GPTQ, RTN
from smidgen.quant.solvers.descent import descend, losses, refine, refit
from smidgen.quant.solvers.hessian import damped
from smidgen.quant.stats import Stats

GRID = Grid(3, scale_dtype="float64")
# heads, rows of a head, columns, columns of a group
SHAPES = [(1, 1, 6, None), (1, 5, 12, None), (3, 4, 12, None), (2, 5, 12, 4), (1, 3, 20, 5)]


@pytest.fixture
def problem(normal, moments):
    """(heads, rows, columns, group, coupled, shared) -> weights, both factors, codes of rounding to nearest, scales, zeros, the grid."""

    def draw(heads, rows, columns, group=None, coupled=False, shared=False):
        grid = replace(GRID, group=group)
        w = normal(heads, rows, columns)
        scale, zero = grid.fit(w)
        codes = grid.encode(w, expand(scale, columns), expand(zero, columns))
        return w, moments(1 if shared else heads, columns), moments(heads, rows) if coupled else None, codes, scale, zero, grid

    return draw


def by_weight(scale, zero, columns):
    return expand(scale, columns), expand(zero, columns)


def brute_force_scales(w, h, h_out, codes, zero, groups):
    """Least squares on the design matrix of one head: vec(W_hat) = D s, errors measured by (chol(H_out) (x) chol(H_in))^T."""
    rows, columns = w.shape
    levels = codes - expand(zero, columns)
    design = torch.zeros(rows, columns, rows, groups, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            design[r, c, r, c // (columns // groups)] = levels[r, c]
    root = torch.kron(torch.linalg.cholesky(h_out), torch.linalg.cholesky(h)).T
    found = torch.linalg.lstsq(root @ design.flatten(0, 1).flatten(1), (root @ w.flatten())[:, None], driver="gelsd")
    return found.solution.view(rows, groups)


# --- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [False, True], ids=["rows alone", "rows of heads"])
@pytest.mark.parametrize("shared", [False, True], ids=["h_in per head", "h_in shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_refitted_scales_are_those_of_least_squares(shape, shared, coupled, problem):
    w, h, h_out, codes, scale, zero, grid = problem(*shape, coupled, shared)
    heads, rows, groups = scale.shape
    coupling = torch.eye(rows, dtype=torch.float64).expand(heads, -1, -1) if h_out is None else h_out
    best = torch.stack([brute_force_scales(w[i], h[i % len(h)], coupling[i], codes[i], zero[i], groups) for i in range(heads)])
    assert (best > 0).all() and (best - scale).abs().max() > 0.01  # there is something to find
    found = refit(w, h, h_out, codes, scale, zero, grid)
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)
    least, reached = (losses(w, h, h_out, codes, s, zero, grid) for s in (best, found))
    torch.testing.assert_close(reached, least, rtol=1e-8, atol=0)


def test_rows_without_interaction_are_refitted_alike_with_and_without_h_out(problem):
    w, h, _, codes, scale, zero, grid = problem(3, 4, 12, 4)
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    rows, heads = (refit(w, h, h_out, codes, scale, zero, grid) for h_out in (None, identity))
    torch.testing.assert_close(rows, heads)


def test_coordinate_descent_over_the_scales_ends_where_refit_does(problem):
    """TurboBoA's F3: s_j += [L (H (W - W_hat)^T) H_out]_jj / ([L H L^T]_jj [H_out]_jj)."""
    w, h, h_out, codes, scale, zero, grid = problem(2, 5, 12, coupled=True)
    levels = codes - expand(zero, 12)
    for i in range(2):
        s = scale[i].clone()
        for _ in range(1000):
            for j in range(5):
                slope = (levels[i] @ h[i] @ (w[i] - s * levels[i]).T @ h_out[i])[j, j]
                s[j] += slope / ((levels[i] @ h[i] @ levels[i].T)[j, j] * h_out[i, j, j])
        found = refit(w, h, h_out, codes, scale, zero, grid)[i]
        torch.testing.assert_close(found, s, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, scale[i], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [None, 3])
def test_refitted_scales_can_be_stored_and_never_raise_the_loss(group, dtype, coupled, problem):
    w, h, h_out, codes, scale, zero, grid = problem(4, 3, 12, group, coupled)
    grid = replace(grid, scale_dtype=dtype)
    for _ in range(3):
        new = refit(w, h, h_out, codes, scale, zero, grid)
        stored = new.to(getattr(torch, dtype)).double()
        assert torch.equal(stored[new != scale], new[new != scale])
        before, after = (losses(w, h, h_out, codes, s, zero, grid) for s in (scale, new))
        assert (after <= before * (1 + 1e-12)).all()
        scale = new
    # at the optimum only rounding for storage is left
    assert (refit(w, h, h_out, codes, scale, zero, grid) - scale).abs().max() <= 0.01 * scale.max()


@pytest.mark.parametrize("coupled", [False, True])
def test_rounding_for_storage_undoes_no_gain(coupled, problem):
    """Where scales are stored roughly, the best of the stored neighbours is not the nearest to the optimum."""
    w, h, h_out, codes, scale, zero, grid = problem(6, 1 if coupled else 4, 16, 4, coupled)
    grid = replace(grid, scale_dtype="bfloat16")
    near = refit(w, h, h_out, codes, scale, zero, replace(grid, scale_dtype="float64")).bfloat16().double()
    best = near.clone()
    for steps in torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * 4):
        other = (near * (1 + steps / 256)).bfloat16().double()
        better = row_losses(w, h, codes, other, zero, grid) < row_losses(w, h, codes, best, zero, grid)
        best = torch.where(better[..., None], other, best)
    assert (best != near).any()
    assert torch.equal(refit(w, h, h_out, codes, best, zero, grid), best)


def row_losses(w, h, codes, scale, zero, grid):
    e = grid.decode(codes, *by_weight(scale, zero, w.shape[-1])) - w
    return (e @ h * e).sum(-1)


@pytest.mark.parametrize("coupled", [False, True])
def test_scales_already_best_stay(coupled, problem):
    w, h, h_out, codes, scale, zero, grid = problem(2, 4, 12, 4, coupled)
    exact = grid.decode(codes, *by_weight(scale, zero, 12))
    torch.testing.assert_close(refit(exact, h, h_out, codes, scale, zero, grid), scale)
    torch.testing.assert_close(refit(exact, h, h_out, codes, 0.7 * scale, zero, grid), scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("group", [None, 12])
def test_a_scale_no_weight_depends_on_stays(group, coupled, problem):
    w, h, h_out, codes, scale, zero, grid = problem(2, 4, 24, group, coupled)
    codes[1, 2] = expand(zero, 24)[1, 2]  # every weight of the row is 0
    codes[0, 1, :12] = expand(zero, 24)[0, 1, :12]  # those of a group, where there are groups
    found = refit(w, h, h_out, codes, scale, zero, grid)
    untouched = torch.zeros(scale.shape, dtype=torch.bool)
    untouched[1, 2] = True
    if group:
        untouched[0, 1, 0] = True
    assert torch.equal(found[untouched], scale[untouched])
    assert (found != scale)[~untouched].all()


@pytest.mark.parametrize("coupled", [False, True])
def test_a_scale_that_would_have_to_be_negative_stays(coupled, problem):
    w, h, h_out, codes, scale, zero, grid = problem(1, 4, 12, None, coupled)
    w = grid.decode(codes, *by_weight(scale, zero, 12))
    w[0, 2] *= -1
    found = refit(w, h, h_out, codes, 1.1 * scale, zero, grid)
    assert found[0, 2] == 1.1 * scale[0, 2]
    assert (found > 0).all()
    before, after = (losses(w, h, h_out, codes, s, zero, grid) for s in (1.1 * scale, found))
    assert (after <= before).all()
    if not coupled:
        torch.testing.assert_close(found[0, [0, 1, 3]], scale[0, [0, 1, 3]], rtol=1e-3, atol=0)


# --- codes -----------------------------------------------------------------------------------------------------------


def one_weight_at_a_time(w, h, codes, scale, zero, grid):
    """A pass of coordinate descent: every weight moves to its best code while all others stay."""
    codes = codes.clone()
    for i in range(w.shape[0]):
        for r in range(w.shape[1]):
            for c in range(w.shape[2]):
                values = grid.decode(codes[i, r], scale[i, r], zero[i, r])
                best = values[c] - (values - w[i, r]) @ h[i % len(h)][:, c] / h[i % len(h), c, c]
                codes[i, r, c] = grid.encode(best, scale[i, r, c], zero[i, r, c])
    return codes


@pytest.mark.parametrize("shared", [False, True], ids=["h_in per head", "h_in shared"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (2, 5, 1), (3, 4, 20), (1, 2, 150)])
def test_a_pass_gives_the_codes_of_one_weight_at_a_time(shape, shared, problem):
    w, h, _, codes, scale, zero, grid = problem(*shape, shared=shared)
    steps = by_weight(scale, zero, shape[-1])
    found = descend(w, h, codes, *steps, grid)
    assert torch.equal(found, one_weight_at_a_time(w, h, codes, *steps, grid))
    assert shape[-1] < 9 or not torch.equal(found, codes)


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_columns_done_at_once_change_nothing(block, problem, monkeypatch):
    w, h, _, codes, scale, zero, grid = problem(2, 5, 40, 10)
    steps = by_weight(scale, zero, 40)
    expected = descend(w, h, codes, *steps, grid)
    monkeypatch.setattr(descent, "BLOCK", block)
    assert torch.equal(descend(w, h, codes, *steps, grid), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_passes_lower_the_loss_until_no_single_weight_can(bits, problem):
    w, h, _, codes, scale, zero, _ = problem(2, 5, 20)
    grid = replace(GRID, bits=bits)
    scale, zero = grid.fit(w)
    codes = grid.encode(w, *by_weight(scale, zero, 20))
    loss = losses(w, h, None, codes, scale, zero, grid)
    passes = 0
    while not torch.equal(new := descend(w, h, codes, *by_weight(scale, zero, 20), grid), codes):
        lower = losses(w, h, None, new, scale, zero, grid)
        assert (lower <= loss * (1 + 1e-12)).all()
        codes, loss, passes = new, lower, passes + 1
    assert passes > 1
    for place in torch.cartesian_prod(*map(torch.arange, codes.shape)):
        for code in range(grid.top + 1):
            other = codes.clone()
            other[tuple(place)] = code
            assert (losses(w, h, None, other, scale, zero, grid) >= loss * (1 - 1e-12)).all()


def test_uncorrelated_inputs_leave_nothing_to_descend(problem, normal):
    w, _, _, codes, scale, zero, grid = problem(2, 5, 20)
    h = normal(2, 20).square().add(0.1).diag_embed()
    assert torch.equal(descend(w, h, codes, *by_weight(scale, zero, 20), grid), codes)


# --- both in turn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 5])
@pytest.mark.parametrize("coupled", [False, True])
def test_more_rounds_never_raise_the_loss(coupled, group, problem, generator):
    w, h, h_out, codes, scale, zero, grid = problem(4, 5, 20, group, coupled)
    start = losses(w, h, h_out, codes, scale, zero, grid)

    def again(scale):  # sometimes better, mostly worse
        noise = torch.randint(-1, 2, codes.shape, generator=torch.Generator().manual_seed(int(1e6 * scale[0, 0, 0])))
        return (codes + noise * (torch.arange(4)[:, None, None] > 1)).clamp(0, grid.top)

    loss = start
    for passes in range(5):
        found = refine(w, h, h_out, codes, scale, zero, grid, passes, again)
        lower = losses(w, h, h_out, *found, zero, grid)
        assert (lower <= loss * (1 + 1e-12)).all()
        loss = lower
    assert (loss < start).all()


def test_a_head_rounded_again_is_kept_where_it_is_better(problem):
    w, h, h_out, codes, scale, zero, grid = problem(3, 4, 12, None, True)
    bad = (codes + 3) % (grid.top + 1)
    mixed = torch.stack([codes[0], bad[1], codes[2]])
    asked = []

    def again(scale):
        asked.append(scale)
        return torch.stack([bad[0], codes[1], bad[2]])

    found, new = refine(w, h, h_out, mixed, scale, zero, grid, 1, again)
    assert torch.equal(found, codes)
    assert len(asked) == 1 and torch.equal(asked[0], refit(w, h, h_out, mixed, scale, zero, grid))
    assert torch.equal(new, refit(w, h, h_out, codes, asked[0], zero, grid))


def test_without_another_rounding_heads_keep_their_codes(problem):
    w, h, h_out, codes, scale, zero, grid = problem(3, 4, 12, None, True)
    found, new = refine(w, h, h_out, codes, scale, zero, grid, 3)
    assert torch.equal(found, codes)
    torch.testing.assert_close(new, refit(w, h, h_out, codes, scale, zero, grid), rtol=1e-4, atol=0)


# --- through the solvers ---------------------------------------------------------------------------------------------


def damped_loss(w, q, stats):
    """The loss that solvers minimise."""
    h_out = None if stats.h_out is None else damped(stats.h_out, 0.01)
    return Stats(damped(stats.h_in, 0.01), h_out).loss(w - q.dequantize())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("scales", ["minmax", "compensated"])
@pytest.mark.parametrize("bits", [2, 4])
def test_passes_never_make_gptq_worse(bits, scales, group, heads, normal, moments):
    w, stats, grid = normal(24, 32), Stats(moments(heads, 32)), Grid(bits, group, scale_dtype="float64")
    loss = [damped_loss(w, GPTQ(scales=scales, passes=n)(w, stats, grid), stats) for n in (0, 1, 2)]
    assert loss[0] > loss[1] >= loss[2]


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("scales", ["minmax", "compensated"])
@pytest.mark.parametrize("bits", [2, 4])
def test_passes_never_make_boa_worse(bits, scales, group, normal, moments):
    w, stats, grid = normal(24, 32), Stats(moments(1, 32), moments(3, 8)), Grid(bits, group, scale_dtype="float64")
    loss = [damped_loss(w, BOA(scales=scales, passes=n)(w, stats, grid), stats) for n in (0, 1, 2)]
    assert loss[0] > loss[1] >= loss[2]


def test_boa_rounds_its_heads_anew_on_the_refitted_scales(normal, moments):
    w, stats, grid = normal(3 * 16, 32), Stats(moments(1, 32), moments(3, 16)), Grid(2, scale_dtype="float64")
    one, two = (BOA(scales="minmax", passes=n)(w, stats, grid) for n in (0, 1))
    assert not torch.equal(one.codes, two.codes)
    assert damped_loss(w, two, stats) < 0.95 * damped_loss(w, one, stats)


def test_descent_wins_much_after_rounding_and_something_after_gptq(normal, moments):
    w, stats, grid = normal(1, 64, 64), Stats(moments(1, 64)), Grid(2, scale_dtype="float64")
    h = damped(stats.h_in, 0.01)
    for solver, factor in ((RTN(), 0.8), (GPTQ(), 0.95)):
        q = solver(w[0], stats, grid)
        before = losses(w, h, None, q.codes[None].double(), q.scale[None], q.zero[None], grid)
        codes = descend(w, h, q.codes[None].double(), *(t[None] for t in q.expanded()), grid)
        after = losses(w, h, None, codes, q.scale[None], q.zero[None], grid)
        assert after < factor * before


def test_negative_passes_are_refused():
    with pytest.raises(UserError, match="passes must not be negative"):
        GPTQ(passes=-1)
