import doctest

import pytest
import torch

import smidgen.grid
from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand


def test_examples_in_docstrings_are_right():
    tests = [t for t in doctest.DocTestFinder().find(smidgen.grid) if t.examples]
    results = [doctest.DocTestRunner().run(t) for t in tests]
    assert {t.name for t in tests} >= {"smidgen.grid", "smidgen.grid.Grid"}
    assert all(r.failed == 0 for r in results)


# --- minimum and maximum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "symmetric, row, scale, zero, codes",
    [
        (False, [-1.0, 0.1, 0.9, 2.0], 1.0, 1.0, [0, 1, 2, 3]),
        (False, [1.0, 2.0, 3.0], 1.0, 0.0, [1, 2, 3]),  # the range includes 0 even where no weight is near it
        (False, [-6.0, -4.0, -3.9], 2.0, 3.0, [0, 1, 1]),
        (True, [-1.0, 0.4, 3.0], 2.0, 2.0, [2, 2, 3]),  # -3..3: 3 steps of 2 around code 2; -0.5 rounds to even, 1.5 to 2, clamped
        (True, [0.0, -3.0], 2.0, 2.0, [2, 0]),
    ],
)
def test_minmax_by_hand(symmetric, row, scale, zero, codes):
    grid = Grid(bits=2, symmetric=symmetric)
    w = torch.tensor([row])
    fitted = grid.fit(w)
    assert [t.item() for t in fitted] == [scale, zero]
    assert grid.encode(w, *fitted).tolist() == [codes]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_is_within_half_a_step(bits, symmetric, normal):
    grid, w = Grid(bits, symmetric=symmetric, scale_dtype="float64"), normal(20, 32)
    scale, zero = grid.fit(w)
    codes = grid.encode(w, scale, zero)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1 and torch.equal(codes, codes.round())
    assert ((grid.decode(codes, scale, zero) - w).abs() / scale).max() <= 0.5 + 1e-9
    assert torch.equal(grid.decode(zero, scale, zero), torch.zeros_like(scale))


@pytest.mark.parametrize("metric", [None, torch.eye(6, dtype=torch.float64)], ids=["minmax", "search"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_zero_is_a_code_even_where_all_weights_have_one_sign(bits, metric, normal):
    w = normal(500, 6).abs() + 0.5
    for rows in (w, -w):
        _, zero = Grid(bits).fit(rows, metric)
        assert zero.min() >= 0 and zero.max() <= 2**bits - 1 and torch.equal(zero, zero.round())


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_zeros_stay_zero(symmetric):
    grid, w = Grid(3, symmetric=symmetric), torch.zeros(2, 4)
    for metric in (None, torch.eye(4)):
        scale, zero = grid.fit(w, metric)
        assert bool((scale > 0).all())
        assert torch.equal(grid.nearest(w, scale, zero), w)


# --- groups and stored scales ----------------------------------------------------------------------------------------


def test_groups_are_fitted_each_by_itself(normal, moments):
    w, (h,) = normal(5, 12), moments(1, 12)
    grouped = Grid(3, group=4).fit(w, h)
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        alone = Grid(3).fit(w[:, part], h[part, part])
        assert all(torch.equal(a[:, i : i + 1], b) for a, b in zip(grouped, alone, strict=True))


def test_group_must_divide_the_row():
    with pytest.raises(UserError, match="group 5 does not divide a row of 12"):
        Grid(4, group=5).fit(torch.ones(2, 12))
    assert Grid(4, group=4).groups(12) == 3 and Grid(4).groups(12) == 1


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group": 0}])
def test_impossible_grids_are_refused(options):
    with pytest.raises(UserError):
        Grid(**options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("metric", [None, torch.eye(8)], ids=["minmax", "search"])
def test_scales_are_exactly_what_the_artifact_stores(dtype, metric, normal):
    scale, _ = Grid(3, scale_dtype=dtype).fit(normal(50, 8).float(), metric)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.to(getattr(torch, dtype)).float(), scale)


def test_zero_belongs_to_the_stored_scale():
    w = torch.tensor([[-1000.3, 0.0, 2000.1]])
    scale, zero = Grid(8, scale_dtype="bfloat16").fit(w)
    assert scale.item() == 11.75 and zero.item() == 85  # 3000.4 / 255 = 11.766; 1000.3 / 11.75 = 85.1


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_beyond_the_stored_type_are_refused(size):
    with pytest.raises(UserError, match="float16"):
        Grid(4, scale_dtype="float16").fit(torch.tensor([[size, -size]]))


# --- search ----------------------------------------------------------------------------------------------------------


def brute_force(w: list[float], h: torch.Tensor, bits: int, symmetric: bool) -> tuple[float, float, float]:
    """Best score, scale and zero of one row among 100 clip ratios (times 2 zeros); of equal ones the first."""
    low, high = min(0, *w), max(0, *w)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    top, best = 2**bits - 1, (float("inf"), 0.0, 0.0)
    full = (high - low) / top
    middle = 2.0 ** (bits - 1)
    for i in range(100):
        scale = full * (1 - i / 100)
        for zero in [middle] if symmetric else [float(-low / full // 1), float(-(low / full // 1))]:
            codes = [min(max(round(x / scale) + zero, 0), top) for x in w]
            e = torch.tensor([(c - zero) * scale - x for c, x in zip(codes, w, strict=True)], dtype=torch.float64)
            score = float(e @ h @ e)
            if score < best[0] - 1e-12:
                best = (score, scale, zero)
    return best


def score(grid, w, h, scale, zero):
    e = grid.nearest(w, scale, zero) - w
    return ((e @ h) * e).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("diagonal", [False, True])
def test_exhaustive_search_is_brute_force(diagonal, bits, symmetric, normal, moments):
    w, (h,) = normal(20, 3), moments(1, 3)
    h = h.diagonal().diag() if diagonal else h
    grid = Grid(bits, symmetric=symmetric, scale_dtype="float64")
    scale, zero = grid.fit(w, h, exhaustive=True)
    found = zip(score(grid, w, h, scale, zero).tolist(), scale.flatten().tolist(), zero.flatten().tolist(), strict=True)
    for row, result in zip(w.tolist(), found, strict=True):
        assert result == pytest.approx(brute_force(row, h, bits, symmetric), rel=1e-9)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_of_equal_candidates_the_first_wins(exhaustive):
    w = torch.tensor([[-1.0, 0.5, 2.0], [-1.6, 0.0, 1.4]])
    nothing = torch.zeros(3, 3)  # every error weighs nothing, so all candidates are equal: full range, zero rounded down
    scale, zero = Grid(2).fit(w, nothing, exhaustive)
    assert scale.tolist() == [[1.0], [1.0]] and zero.tolist() == [[1.0], [1.0]]
    scale, zero = Grid(2, symmetric=True).fit(w, nothing, exhaustive)
    assert torch.equal(scale, torch.tensor([[4.0], [3.2]]) / 3) and zero.tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_never_loses_to_minmax_and_little_to_brute_force(bits, symmetric, normal, moments):
    grid, w, (h,) = Grid(bits, symmetric=symmetric), normal(300, 24), moments(1, 24)
    minmax, quick, full = (score(grid, w, h, *fit) for fit in (grid.fit(w), grid.fit(w, h), grid.fit(w, h, exhaustive=True)))
    assert bool((quick <= minmax * (1 + 1e-9)).all()) and bool((full <= minmax * (1 + 1e-9)).all())
    assert quick.sum() < 1.05 * full.sum() < 0.9 * minmax.sum()


@pytest.mark.parametrize("exhaustive", [False, True])
def test_vector_metric_is_a_diagonal_matrix(exhaustive, normal):
    w, d = normal(3, 10, 12), normal(3, 12).square()
    for group in (None, 4):
        vector = Grid(3, group).fit(w, d, exhaustive)
        matrix = Grid(3, group).fit(w, d.diag_embed(), exhaustive)
        assert all(torch.equal(a, b) for a, b in zip(vector, matrix, strict=True))


def test_scaling_the_metric_changes_nothing(normal, moments):
    w, (h,) = normal(30, 8), moments(1, 8)
    for factor in (2.0**-40, 2.0**60):
        assert all(torch.equal(a, b) for a, b in zip(Grid(3).fit(w, h), Grid(3).fit(w, h * factor), strict=True))


def test_heads_are_searched_each_with_its_own_metric(normal, moments):
    w, h = normal(2, 5, 8), moments(2, 8)
    together = Grid(2).fit(w, h)
    for i in range(2):
        alone = Grid(2).fit(w[i], h[i])
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))


# --- QWeight ---------------------------------------------------------------------------------------------------------


def quantized(w, grid):
    scale, zero = grid.fit(w)
    return QWeight(grid.encode(w, *(expand(t, w.shape[1]) for t in (scale, zero))).byte(), scale, zero, grid)


def test_dequantize_uses_each_groups_own_scale(normal):
    w = normal(3, 8) * torch.tensor([1.0, 100.0]).repeat_interleave(4)
    q = quantized(w, Grid(8, group=4))
    assert torch.equal(q.dequantize(), (q.codes - q.zero.repeat_interleave(4, 1)) * q.scale.repeat_interleave(4, 1))
    assert bool(((q.dequantize() - w).abs() <= q.scale.repeat_interleave(4, 1)).all())


def test_dequantize_multiplies_in_the_stored_type(normal):
    q = quantized(normal(6, 8).float(), Grid(4, scale_dtype="float16"))
    assert torch.equal(q.dequantize(), ((q.codes.half() - q.zero.half()) * q.scale.half()).float())


def test_stack_puts_rows_below_each_other(normal):
    parts = [quantized(normal(rows, 8), Grid(4, group=4)) for rows in (2, 3)]
    assert torch.equal(QWeight.stack(parts).dequantize(), torch.cat([p.dequantize() for p in parts]))
