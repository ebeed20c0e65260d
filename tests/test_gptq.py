from dataclasses import replace

import pytest
import torch

import smidgen.quant.solvers.gptq as gptq
from smidgen.errors import UserError
from smidgen.grid import Grid, expand
from smidgen.quant.solvers import GPTQ, RTN
from smidgen.quant.solvers.gptq import solve_block, solve_columns
from smidgen.quant.solvers.hessian import inverse_factor
from smidgen.quant.stats import Stats

GRID = Grid(3, scale_dtype="float64")
PLAIN = GPTQ(act_order=False, scales="minmax")


def damp(h, fraction=0.01):
    return h + fraction * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def upper(h):
    """U with h^-1 = U^T U, by the definition."""
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def column_loop(w, h, grid, scale, zero):
    """GPTQ as in the paper; codes and scaled errors E."""
    w, u, codes, errors = w.clone(), upper(h), torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = grid.encode(w[:, j], scale[:, j], zero[:, j])
        errors[:, j] = (w[:, j] - grid.decode(codes[:, j], scale[:, j], zero[:, j])) / u[j, j]
        w[:, j:] -= errors[:, j : j + 1] * u[j, j:]
    return codes, errors


def columns_of(grid, w, *metric):
    return [expand(t, w.shape[1]) for t in grid.fit(w, *metric)]


# --- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (16, 40), (3, 300)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_the_plain_column_loop(shape, symmetric, normal, moments):
    w, h, grid = normal(*shape), moments(1, shape[1]), replace(GRID, symmetric=symmetric)
    codes, _ = column_loop(w, damp(h[0]), grid, *columns_of(grid, w))
    assert torch.equal(PLAIN(w, Stats(h), grid).codes, codes.byte())


def test_columns_are_taken_by_descending_second_moment(normal, moments):
    w, h = normal(8, 20), moments(1, 20)
    order = sorted(range(20), key=lambda j: -h[0, j, j])
    scale, zero = columns_of(GRID, w)
    expected = torch.zeros(8, 20)
    expected[:, order] = column_loop(w[:, order], damp(h[0])[order][:, order], GRID, scale, zero)[0].float()
    assert torch.equal(replace(PLAIN, act_order=True)(w, Stats(h), GRID).codes, expected.byte())
    assert not torch.equal(PLAIN(w, Stats(h), GRID).codes, expected.byte())


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_lazy_blocks_change_nothing(block, normal, moments, monkeypatch):
    w, stats = normal(6, 40), Stats(moments(1, 40))
    expected = GPTQ()(w, stats, GRID).codes
    monkeypatch.setattr(gptq, "BLOCK", block)
    assert torch.equal(GPTQ()(w, stats, GRID).codes, expected)


def test_the_error_is_e_times_u_and_the_damped_loss_its_square(normal, moments):
    w, h = normal(1, 10, 25), moments(1, 25)
    u = inverse_factor(h, torch.float64)
    scale, zero = (t.expand_as(w) for t in GRID.fit(w))
    codes, e = solve_block(w, u, GRID, scale, zero)
    dw = w - GRID.decode(codes, scale, zero)
    torch.testing.assert_close(dw, e @ u)
    assert Stats(h).loss(dw[0]) == pytest.approx(e.square().sum().item())
    assert Stats(h).loss(dw[0]) < 0.8 * Stats(h).loss((w - GRID.nearest(w, scale, zero))[0])


def test_inverse_factor_is_the_upper_factor_of_the_inverse(moments):
    h = moments(3, 12)
    u = inverse_factor(h, torch.float64)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.mT @ u, torch.linalg.inv(h))
    torch.testing.assert_close(u[1], upper(h[1]))


# --- what must not matter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_give_rounding_to_nearest(act_order, normal):
    w, solver = normal(9, 30), replace(PLAIN, act_order=act_order)
    for h in (torch.eye(30), normal(30).square().add(0.1).diag()):
        assert torch.equal(solver(w, Stats(h[None]), GRID).codes, RTN()(w, None, GRID).codes)


@pytest.mark.parametrize("scales", ["minmax", "hessian", "compensated"])
def test_scaling_the_hessian_changes_nothing(scales, normal, moments):
    w, h, solver = normal(9, 30), moments(1, 30), GPTQ(scales=scales)
    expected = solver(w, Stats(h), GRID)
    for factor in (3.0, 1e-9, 1e12):
        found = solver(w, Stats(factor * h), GRID)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("scales", ["minmax", "compensated"])
def test_permuted_columns_give_permuted_codes(scales, normal, moments, generator):
    w, h, solver = normal(9, 30), moments(1, 30), GPTQ(scales=scales)
    p = torch.randperm(30, generator=generator)
    assert torch.equal(solver(w[:, p], Stats(h[:, p][:, :, p]), GRID).codes, solver(w, Stats(h), GRID).codes[:, p])


def test_row_blocks_with_their_own_hessian_are_solved_apart(normal, moments):
    w, h = normal(12, 20), moments(3, 20)
    together = GPTQ()(w, Stats(h), GRID)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        alone = GPTQ()(w[rows], Stats(h[i : i + 1]), GRID)
        assert torch.equal(together.codes[rows], alone.codes) and torch.equal(together.scale[rows], alone.scale)


def test_quantized_weights_come_back_as_they_are(normal, moments):
    w, u = normal(1, 10, 25), inverse_factor(moments(1, 25), torch.float64)
    scale, zero = (t.expand_as(w) for t in GRID.fit(w))
    codes, _ = solve_columns(w.clone(), u, GRID, scale, zero)
    again, _ = solve_columns(GRID.decode(codes, scale, zero), u, GRID, scale, zero)
    assert torch.equal(again, codes)


def test_nothing_passed_in_is_changed(normal, moments):
    w, h = normal(6, 20), moments(1, 20)
    h[:, 3], h[:, :, 3] = 0, 0
    before = w.clone(), h.clone()
    GPTQ()(w, Stats(h), GRID)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


# --- scales and groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 5])
def test_scales_come_from_the_metric_they_name(group, normal, moments):
    w, h, grid = normal(9, 20), moments(1, 20), replace(GRID, group=group)
    order = sorted(range(20), key=lambda j: -h[0, j, j])
    ordered = damp(h[0])[order][:, order]
    # U_jj^-2 is the variance a column keeps when all later ones are known
    remaining = torch.stack([1 / torch.linalg.inv(ordered[j:, j:])[0, 0] for j in range(20)])
    metrics = {
        "minmax": None,
        "hessian": damp(h[0]),
        "compensated": torch.empty(20, dtype=torch.float64).scatter(0, torch.tensor(order), remaining),
    }
    for name, metric in metrics.items():
        q = GPTQ(scales=name)(w, Stats(h), grid)
        scale, zero = grid.fit(w, metric)
        assert torch.equal(q.scale, scale) and torch.equal(q.zero, zero), name


@pytest.mark.parametrize("scales", ["minmax", "hessian"])
def test_dynamic_groups_are_fitted_to_compensated_weights(scales, normal, moments):
    w, (h,), grid = normal(6, 24), moments(1, 24), replace(GRID, group=8)
    q = GPTQ(act_order=False, static_groups=False, scales=scales)(w, Stats(h[None]), grid)
    h = damp(h)
    u, current = upper(h), w.clone()
    for j in range(24):
        if j % 8 == 0:
            part = slice(j, j + 8)
            scale, zero = Grid(3, scale_dtype="float64").fit(current[:, part], h[part, part] if scales == "hessian" else None)
            torch.testing.assert_close(q.scale[:, j // 8 : j // 8 + 1], scale)
            assert torch.equal(q.zero[:, j // 8 : j // 8 + 1], zero)
        code = grid.encode(current[:, j : j + 1], scale, zero)
        assert torch.equal(q.codes[:, j : j + 1], code.byte())
        current[:, j:] -= (current[:, j : j + 1] - grid.decode(code, scale, zero)) / u[j, j] * u[j, j:]


def test_static_groups_keep_their_columns_under_act_order(normal, moments):
    w, h, grid = normal(6, 24), moments(1, 24), replace(GRID, group=8)
    order = sorted(range(24), key=lambda j: -h[0, j, j])
    scale, zero = columns_of(grid, w)
    codes, _ = column_loop(w[:, order], damp(h[0])[order][:, order], grid, scale[:, order], zero[:, order])
    q = replace(PLAIN, act_order=True)(w, Stats(h), grid)
    assert torch.equal(q.codes[:, order], codes.byte())
    assert torch.equal(expand(q.scale, 24), scale)


def test_act_order_needs_static_groups():
    with pytest.raises(UserError, match="static_groups"):
        GPTQ(act_order=True, static_groups=False)


# --- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_column_takes_the_zero_point_and_touches_no_other(act_order, normal, moments):
    w, h, solver = normal(6, 20), moments(1, 20), GPTQ(damp=0.0, act_order=act_order)
    h[:, 7], h[:, :, 7] = 0, 0
    q = solver(w, Stats(h), GRID)
    assert torch.equal(q.codes[:, 7:8], q.zero.byte())
    assert torch.equal(q.dequantize()[:, 7], torch.zeros(6, dtype=torch.float64))
    rest = [j for j in range(20) if j != 7]
    without = solver(w[:, rest], Stats(h[:, rest][:, :, rest]), GRID)
    assert torch.equal(q.codes[:, rest], without.codes) and torch.equal(q.scale, without.scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_are_refused(bad, normal, moments):
    w, h = normal(6, 20), moments(1, 20)
    broken = w.clone(), h.clone()
    broken[0][2, 3], broken[1][0, 4, 4] = bad, bad
    with pytest.raises(UserError, match="weights contain NaN"):
        GPTQ()(broken[0], Stats(h), GRID)
    with pytest.raises(UserError, match="second moments of the inputs contain NaN"):
        GPTQ()(w, Stats(broken[1]), GRID)


def test_a_singular_hessian_needs_damping(normal):
    x = normal(5, 20)  # fewer tokens than inputs
    w, stats = normal(6, 20), Stats((x.T @ x / 5)[None])
    with pytest.raises(UserError, match="raise the damping"):
        GPTQ(damp=0.0)(w, Stats(stats.h_in - 1e-6 * torch.eye(20)), GRID)
    assert stats.loss(w - GPTQ()(w, stats, GRID).dequantize()) < stats.loss(w - RTN()(w, None, GRID).dequantize())


# --- who must win ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_inputs_make_gptq_better_than_rounding(bits, normal, moments):
    w, stats, grid = normal(64, 32), Stats(moments(1, 32)), Grid(bits)
    rounding = stats.loss(w - RTN()(w, None, grid).dequantize())
    for solver in (PLAIN, GPTQ(scales="minmax"), GPTQ(scales="hessian"), GPTQ()):
        assert stats.loss(w - solver(w, stats, grid).dequantize()) < 0.7 * rounding


def test_bfloat16_weights_are_solved_in_float32(normal, moments):
    w, stats = normal(6, 20).bfloat16(), Stats(moments(1, 20).float())
    q = GPTQ()(w, stats, Grid(4))
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.codes, GPTQ()(w.float(), stats, Grid(4)).codes)
