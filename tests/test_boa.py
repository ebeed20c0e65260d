from dataclasses import replace

import pytest
import torch
import transformers

import smidgen.quant.solvers.boa as boa
from smidgen.errors import UserError
from smidgen.grid import Grid, expand
from smidgen.quant.collect import collect
from smidgen.quant.solvers import BOA, GPTQ, RTN
from smidgen.quant.solvers.boa import solve_wavefront
from smidgen.quant.stats import Stats

GRID = Grid(3, scale_dtype="float64")
PLAIN = BOA(act_order=False, row_order=False, scales="minmax")
# heads, rows of a head, columns; STEPS = 128 anti-diagonals are applied at once, so some shapes need two or three rounds
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 8, 1), (2, 5, 7), (3, 12, 4), (1, 20, 150), (1, 140, 3), (2, 1, 300), (1, 64, 65), (1, 64, 66)]


def damp(h):
    return h + 0.01 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype)


def upper(h):
    """U with h^-1 = U^T U, by the definition."""
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def row_loop(w, u, r, grid, scale, zero):
    """BoA of one head as in the paper: GPTQ along row after row, each compensated by the rows below."""
    w, codes = w.clone(), torch.zeros_like(w)
    for i in range(w.shape[0]):
        row = w[i].clone()
        for c in range(w.shape[1]):
            codes[i, c] = grid.encode(row[c : c + 1], scale[i, c : c + 1], zero[i, c : c + 1])
            row[c:] -= (row[c] - grid.decode(codes[i, c], scale[i, c], zero[i, c])) / u[c, c] * u[c, c:]
        error = w[i] - grid.decode(codes[i], scale[i], zero[i])
        w[i + 1 :] -= (r[i, i + 1 :] / r[i, i])[:, None] * error
    return codes


def dense_surgeon(w, hessian, grid, scale, zero):
    """Optimal brain surgeon on all weights of a head, row after row: no factor, no structure."""
    rest, inverse, codes = w.flatten().clone(), torch.linalg.inv(hessian), []
    for p, (s, z) in enumerate(zip(scale.flatten(), zero.flatten(), strict=True)):
        codes.append(grid.encode(rest[p : p + 1], s, z))
        rest -= (rest[p] - grid.decode(codes[-1], s, z)) / inverse[p, p] * inverse[p]
        inverse -= inverse[:, p, None] * inverse[p] / inverse[p, p]
    return torch.cat(codes).view_as(w)


@pytest.fixture
def problem(normal, moments):
    """(heads, rows, columns, shared) -> weights, both damped factors, scale and zero of every weight."""

    def draw(heads, rows, columns, shared=False):
        w = normal(heads, rows, columns)
        fit = [expand(t, columns) for t in GRID.fit(w)]
        return w, damp(moments(1 if shared else heads, columns)), damp(moments(heads, rows)), *fit

    return draw


# --- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["h_in per head", "h_in shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_wavefront_gives_the_codes_of_the_row_loop(shape, shared, problem):
    w, h_in, h_out, scale, zero = problem(*shape, shared)
    u, r = upper(h_in), upper(h_out)
    expected = [row_loop(w[i], u[0 if shared else i], r[i], GRID, scale[i], zero[i]) for i in range(shape[0])]
    assert torch.equal(solve_wavefront(w, u, r, GRID, scale, zero), torch.stack(expected))


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 8, 1), (2, 5, 7), (2, 9, 4), (1, 5, 130)])
def test_wavefront_gives_the_codes_of_the_dense_surgeon(shape, problem):
    w, h_in, h_out, scale, zero = problem(*shape)
    expected = [dense_surgeon(w[i], torch.kron(h_out[i], h_in[i]), GRID, scale[i], zero[i]) for i in range(shape[0])]
    assert torch.equal(solve_wavefront(w, upper(h_in), upper(h_out), GRID, scale, zero), torch.stack(expected))


def test_rows_and_columns_are_interchangeable(problem):
    w, h_in, h_out, _, _ = problem(2, 9, 14)
    scale, zero = (torch.full_like(w, value) for value in (0.6, 3.0))
    upright = solve_wavefront(w, upper(h_in), upper(h_out), GRID, scale, zero)
    lying = solve_wavefront(w.mT.contiguous(), upper(h_out), upper(h_in), GRID, scale.mT.contiguous(), zero.mT.contiguous())
    assert torch.equal(upright, lying.mT)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_as_many_as_anti_diagonals(shape, problem):
    calls = []

    class Counting(Grid):
        def encode(self, w, scale, zero):
            calls.append(w.shape)
            return super().encode(w, scale, zero)

    w, h_in, h_out, scale, zero = problem(*shape)
    solve_wavefront(w, upper(h_in), upper(h_out), Counting(3), scale, zero)
    heads, rows, columns = shape
    assert calls == [(heads, rows)] * (rows + columns - 1)


@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_steps_applied_at_once_change_nothing(steps, problem, monkeypatch):
    w, h_in, h_out, scale, zero = problem(2, 9, 40)
    arguments = w, upper(h_in), upper(h_out), GRID, scale, zero
    expected = solve_wavefront(*arguments)
    monkeypatch.setattr(boa, "STEPS", steps)
    assert torch.equal(solve_wavefront(*arguments), expected)


def test_the_damped_loss_is_the_sum_of_squared_scaled_errors(problem):
    w, h_in, h_out, scale, zero = problem(1, 10, 25)
    u, r = upper(h_in)[0], upper(h_out)[0]
    values = GRID.decode(solve_wavefront(w, upper(h_in), upper(h_out), GRID, scale, zero), scale, zero)[0]
    pre, e = w[0].clone(), torch.zeros_like(w[0])
    for i in range(10):
        e[i] = (pre[i] - values[i]) @ torch.linalg.inv(u)
        pre[i + 1 :] -= (r[i, i + 1 :] / r[i, i])[:, None] * (pre[i] - values[i])
    loss = Stats(h_in, h_out).loss(w[0] - values)
    assert loss == pytest.approx((e / r.diagonal()[:, None]).square().sum().item())
    # every scaled error is that of one rounding, at most half a step where nothing is clipped
    inside = (e * u.diagonal()).abs() <= 0.5 * scale[0] + 1e-9
    assert inside.double().mean() > 0.8


# --- through the solver ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("row_order", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_orders_are_permutations_put_back(shared, act_order, row_order, group, normal, moments):
    heads, rows, columns = 3, 8, 24
    w, h_in, h_out = normal(heads * rows, columns), moments(1 if shared else heads, columns), moments(heads, rows)
    grid = replace(GRID, group=group)
    q = BOA(act_order=act_order, row_order=row_order, scales="minmax")(w, Stats(h_in, h_out), grid)
    scale, zero = (expand(t, columns) for t in grid.fit(w))
    for i in range(heads):
        h, v = damp(h_in)[0 if shared else i], damp(h_out)[i]
        c = sorted(range(columns), key=lambda j: -h[j, j] if act_order else j)
        r = sorted(range(rows), key=lambda j: -v[j, j] if row_order else j)
        own = slice(i * rows, (i + 1) * rows)
        part = [t[own][r][:, c] for t in (w, scale, zero)]
        codes = row_loop(part[0], upper(h[c][:, c]), upper(v[r][:, r]), grid, *part[1:])
        assert torch.equal(q.codes[own][r][:, c], codes.byte())
    assert torch.equal(expand(q.scale, columns), scale) and torch.equal(expand(q.zero, columns), zero)


@pytest.mark.parametrize("row_order", [False, True])
@pytest.mark.parametrize("scales", ["minmax", "hessian", "compensated"])
def test_rows_that_do_not_interact_give_gptq(scales, row_order, normal, moments):
    w, h_in = normal(12, 30), moments(1, 30)
    expected = GPTQ(scales=scales)(w, Stats(h_in), GRID)
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    for h_out in (None, identity, 7 * identity, normal(3, 4).square().add(0.1).diag_embed()):
        q = BOA(row_order=row_order, scales=scales)(w, Stats(h_in, h_out), GRID)
        assert torch.equal(q.codes, expected.codes) and torch.equal(q.scale, expected.scale)


def test_neither_rows_nor_columns_interacting_gives_rounding_to_nearest(normal):
    w = normal(12, 30)
    stats = Stats(normal(1, 30).square().add(0.1).diag_embed(), normal(3, 4).square().add(0.1).diag_embed())
    assert torch.equal(BOA(scales="minmax")(w, stats, GRID).codes, RTN()(w, None, GRID).codes)


def test_scaling_a_factor_changes_nothing(normal, moments):
    w, h_in, h_out = normal(12, 30), moments(1, 30), moments(3, 4)
    expected = BOA()(w, Stats(h_in, h_out), GRID).codes
    for a, b in ((3.0, 1.0), (1.0, 3.0), (1e9, 1e-9)):
        assert torch.equal(BOA()(w, Stats(a * h_in, b * h_out), GRID).codes, expected)


def test_heads_are_solved_apart(normal, moments):
    w, h_in, h_out = normal(12, 30), moments(1, 30), moments(3, 4)
    together = BOA()(w, Stats(h_in, h_out), GRID)
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        assert torch.equal(together.codes[rows], BOA()(w[rows], Stats(h_in, h_out[i : i + 1]), GRID).codes)


def test_nothing_passed_in_is_changed(normal, moments):
    given = normal(12, 30), moments(1, 30), moments(3, 4)
    before = [t.clone() for t in given]
    BOA()(given[0], Stats(*given[1:]), GRID)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_dead_column_takes_the_zero_point(normal, moments):
    w, h_in, h_out = normal(12, 30), moments(1, 30), moments(3, 4)
    h_in[:, 7], h_in[:, :, 7] = 0, 0
    q = BOA()(w, Stats(h_in, h_out), GRID)
    assert torch.equal(q.codes[:, 7:8], q.zero.byte())


def test_the_device_changes_nothing(device, normal, moments):
    w, h_in, h_out = normal(12, 30), moments(1, 30), moments(3, 4)
    for solver in (RTN(), GPTQ(), BOA()):
        q = solver(w.to(device), Stats(h_in.to(device), h_out.to(device)), GRID)
        assert q.codes.device.type == device.type
        assert torch.equal(q.codes.cpu(), solver(w, Stats(h_in, h_out), GRID).codes)


def test_bad_numbers_are_refused(normal, moments):
    w, h_in, h_out = normal(12, 30), moments(1, 30), moments(3, 4)
    h_out[1, 2, 2] = torch.nan
    with pytest.raises(UserError, match="second moments of the heads contain NaN"):
        BOA()(w, Stats(h_in, h_out), GRID)
    with pytest.raises(UserError, match="weights contain NaN"):
        BOA()(w * torch.inf, Stats(h_in), GRID)


# --- who must win ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["minmax", "hessian", "compensated"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_interacting_rows_make_boa_better_than_gptq(bits, scales, normal, moments):
    w, stats, grid = normal(8 * 16, 32), Stats(moments(1, 32), moments(8, 16)), Grid(bits)
    rtn, gptq, both = (stats.loss(w - s(w, stats, grid).dequantize()) for s in (RTN(), GPTQ(scales=scales), BOA(scales=scales)))
    assert both < 0.8 * gptq < 0.8 * rtn


@pytest.mark.parametrize("bits", [2, 3])
def test_trained_attention_layers_lose_least_with_boa_and_most_with_rounding(bits, tiny_model, train_tokens, blocks_of):
    loss = dict.fromkeys((RTN(), GPTQ(), BOA()), 0.0)
    for block in blocks_of(tiny_model, train_tokens[:64]):
        stats = collect(block, BOA().needs)
        for matrix in block.matrices():
            if matrix.role in ("query", "key"):
                for solver in loss:
                    w = matrix.weight().detach()
                    loss[solver] += stats[matrix.name].loss(w - solver(w, stats[matrix.name], Grid(bits)).dequantize())
    assert loss[BOA()] < 0.98 * loss[GPTQ()] and loss[GPTQ()] < 0.6 * loss[RTN()]


def test_perplexity_of_a_trained_model_is_float_then_boa_and_gptq_then_rounding(
    tiny_model, train_tokens, test_tokens, quantized, perplexity
):
    grid, calibration = Grid(2), train_tokens[:64]
    before = perplexity(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), test_tokens)
    rtn, gptq, both = (perplexity(quantized(tiny_model, calibration, s, grid), test_tokens) for s in (RTN(), GPTQ(), BOA()))
    assert before < 50  # trained: a model that knows nothing has 384
    assert before < min(gptq, both)
    assert max(gptq, both) - before < 0.6 * (rtn - before)
