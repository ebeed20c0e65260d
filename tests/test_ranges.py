"""Learnable ranges against their gradient table, against finite differences, and in what integers demand of them."""

import copy

import pytest
import torch

from smidgen.errors import UserError
from smidgen.quant.ranges import SMALLEST, Range, fake_quantize, moved

KINDS = {
    "scale-offset": dict(kind="scale-offset", normalised=False),
    "normalised": dict(kind="scale-offset", normalised=True),
    "min-max": dict(kind="min-max"),
    "beta-gamma": dict(kind="beta-gamma", link="identity"),
    "exp": dict(kind="beta-gamma", link="exp"),
    "sigmoid": dict(kind="beta-gamma", link="sigmoid"),
}
LINKS = {
    "identity": (lambda t: t, torch.ones_like),
    "exp": (torch.exp, torch.exp),
    "sigmoid": (torch.sigmoid, lambda t: torch.sigmoid(t) * (1 - torch.sigmoid(t))),
}
REGIONS = ("in", "below", "above")


@pytest.fixture(params=KINDS)
def kind(request) -> dict:
    return KINDS[request.param]


@pytest.fixture(params=["per tensor", "per channel"])
def case(request, kind, normal):
    """(range, x) in float64, x in all three regions and no value near their edges."""
    low, high = -0.6 - normal(5, 1).abs(), 0.9 + normal(5, 1).abs()
    if request.param == "per tensor":
        low, high = low[0, 0], high[0, 0]
    r = Range(low, high, 4, **kind)
    with torch.no_grad():
        for parameter in r.parameters():  # off the start, where residues happen to be simple
            parameter.mul_(1.03).add_(0.013)
    x = 3 * normal(5, 400)
    assert all((regions(r, x)[region]).any() for region in REGIONS)
    return r, x


def regions(r: Range, x: torch.Tensor) -> dict[str, torch.Tensor]:
    scale, zero = r.scale_zero()
    code = (x / scale).round() + zero
    return {"in": (code >= 0) & (code <= r.top), "below": code < 0, "above": code > r.top}


def smooth(r: Range, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zeta before rounding, as the formulas of the three kinds have them."""
    if r.kind == "scale-offset":
        n = r.top if r.normalised else 1
        return values["scale"] / n, values["offset"] * n
    if r.kind == "min-max":
        low, high = values["low"] * r.unit, values["high"] * r.unit
    else:
        f, _ = LINKS[r.link]
        low, high = f(values["beta"]) * r.m, f(values["gamma"]) * r.M
    return (high - low) / r.top, -low * r.top / (high - low)


def table(r: Range, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """d x_hat / d parameter of every element: the table, region by region."""
    values = {name: p.detach() for name, p in r.named_parameters()}
    scale, zeta = smooth(r, values)
    zero, n = zeta.round(), r.top
    e, d, where = (x / scale).round() - x / scale, zero - zeta, regions(r, x)

    def column(inside, below, above) -> torch.Tensor:
        return sum(where[region] * value for region, value in zip(REGIONS, (inside, below, above), strict=True))

    if r.kind == "scale-offset":
        k = n if r.normalised else 1
        return {"scale": column(e, -zero, n - zero) / k, "offset": column(0 * e, -scale, -scale) * k}
    low, high = column(-e / n, 1 + d / n, d / n), column(e / n, -d / n, 1 - d / n)
    if r.kind == "min-max":
        return {"low": low * r.unit, "high": high * r.unit}
    _, slope = LINKS[r.link]
    return {"beta": low * r.m * slope(values["beta"]), "gamma": high * r.M * slope(values["gamma"])}


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", REGIONS)
def test_gradients_are_those_of_the_table(case, region, normal):
    r, x = case
    g = normal(*x.shape) * regions(r, x)[region]
    names, parameters = zip(*r.named_parameters(), strict=True)
    found = torch.autograd.grad((g * r(x)).sum(), parameters)
    for name, parameter, gradient in zip(names, parameters, found, strict=True):
        expected = (g * table(r, x)[name]).sum_to_size(parameter.shape)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_finite_differences_with_residues_and_regions_frozen(case, normal):
    r, x = case
    values = {name: p.detach() for name, p in r.named_parameters()}
    scale, zeta = smooth(r, values)
    e, d, where = (x / scale).round() - x / scale, zeta.round() - zeta, regions(r, x)
    g = normal(*x.shape)

    def loss(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        s, z = smooth(r, changed)
        z = z + d
        return (g * s * (torch.where(where["in"], x / s + e + z, r.top * where["above"].double()) - z)).sum(-1)

    found = dict(zip(values, torch.autograd.grad((g * r(x)).sum(), list(r.parameters())), strict=True))
    step = 1e-6
    for name, value in values.items():
        difference = (loss(values | {name: value + step}) - loss(values | {name: value - step})) / (2 * step)
        expected = difference[:, None].sum_to_size(value.shape) if value.ndim else difference.sum()
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_inputs_have_gradient_one_in_range_and_none_outside(case):
    r, x = case
    x.requires_grad_()
    (found,) = torch.autograd.grad(r(x).sum(), x)
    assert torch.equal(found, regions(r, x)["in"].double())


@pytest.mark.parametrize("kind", ["scale-offset", "min-max", "beta-gamma"])
def test_a_symmetric_range_is_its_absolute_maximum_whatever_the_kind(kind, normal):
    x, g = 2 * normal(400), normal(400)
    r = Range(torch.tensor(-1.1, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64), 4, kind, symmetric=True)
    scale, zero = r.scale_zero()
    assert r.top == 14 and zero == 7 and scale.item() == pytest.approx(1.1 / 7)
    (parameter,) = r.parameters()
    (found,) = torch.autograd.grad((g * r(x)).sum(), parameter)
    where = regions(r, x)
    by_end = where["in"] * ((x / scale).round() - x / scale) / 7 - where["below"].double() + where["above"].double()
    unit = {"scale-offset": 0.5, "min-max": 1.0, "beta-gamma": 1.1}[kind]  # d end / d parameter
    assert found.item() == pytest.approx((g * by_end).sum().item() * unit, rel=1e-9)


class DetachedZero(Range):
    """Min-max whose zero point is rounded without passing its gradient on, as some public code has it."""

    def scale_zero(self):
        scale, zero = super().scale_zero()
        return scale, zero.detach()


def ends_move_alone(r: Range, x: torch.Tensor) -> bool:
    """Whether d/dlow + d/dhigh is 0 for values in range and 1 for those outside; every element has a range of its own."""
    low, high = torch.autograd.grad(r(x).sum(), list(r.parameters()))
    return torch.allclose(low + high, 1.0 - regions(r, x)["in"].double(), atol=1e-12)


def test_moving_both_ends_moves_clipped_values_along_and_no_others(normal):
    x = 3 * normal(500, 1)
    ends = -0.6 - normal(500, 1).abs(), 0.9 + normal(500, 1).abs()
    assert ends_move_alone(Range(*ends, 4), x)
    assert not ends_move_alone(DetachedZero(*ends, 4), x)  # the negative control: each end pulls on the other


# --- codes and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
def test_all_kinds_give_the_same_codes_for_the_same_range(bits, normal):
    low, high, x = -normal(50, 1).abs(), normal(50, 1).abs(), normal(50, 300)
    scale_offset = Range(low, high, bits, "scale-offset")
    min_max = Range(*scale_offset.ends(), bits, "min-max", unit=torch.full_like(low, 3.0))
    others = [min_max, Range(low, high, bits, "scale-offset", normalised=False)]
    others += [Range(*min_max.ends(), bits, "beta-gamma", link) for link in ("identity", "exp")]
    for other in others:
        assert torch.equal(other.codes(x), scale_offset.codes(x))


def test_docstring_example_by_hand():
    r = Range(torch.tensor(-1.0), torch.tensor(3.0), bits=2)  # s = 4/3, z = round(3/4) = 1
    assert r.codes(torch.tensor([-9.0, 0.0, 1.0, 9.0])).tolist() == [0, 1, 2, 3]
    assert r(torch.tensor([-9.0, 0.0, 1.0, 9.0])).tolist() == pytest.approx([-4 / 3, 0, 4 / 3, 8 / 3])


def test_halves_go_to_even_codes():
    r = Range(torch.tensor(-2.0), torch.tensor(5.0), bits=3)  # s = 1, z = 2
    assert r.codes(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])).tolist() == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
def test_zero_is_exact_whatever_the_ends(bits, kind, normal):
    low, high = (10 * normal(10_000, 1)).float(), (10 * normal(10_000, 1)).float()  # crossed, and on one side of zero, too
    r = Range(low, high, bits, **kind)
    with torch.no_grad():
        for parameter in r.parameters():
            parameter.add_(normal(10_000, 1).float())
    scale, zero = r.scale_zero()
    assert torch.equal(r(torch.zeros(10_000, 1)), torch.zeros(10_000, 1))
    assert bool((scale >= SMALLEST).all() & (zero >= 0).all() & (zero <= r.top).all() & (zero == zero.round()).all())
    ends = r.ends()
    assert bool((ends[0] <= 0).all() & (ends[1] >= 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 10])
def test_rounding_is_idempotent_monotone_and_half_a_step_off_at_most(bits, kind, normal):
    x = (3 * normal(20, 2000)).float().sort(-1).values
    r = Range(-normal(20, 1).abs().float(), 2 * normal(20, 1).abs().float(), bits, **kind)
    y, codes, scale = r(x), r.codes(x), r.scale_zero()[0]
    assert torch.equal(r(y), y)
    assert torch.equal(r.codes(y), codes)
    assert codes.min() >= 0 and codes.max() <= r.top and bool((codes.diff() >= 0).all())
    inside = regions(r, x)["in"]
    assert bool(((y - x).abs() <= scale / 2 * (1 + 1e-4))[inside].all())
    assert r.clipped(x) == pytest.approx(1 - inside.double().mean().item())
    assert bool((y == scale * (codes - r.scale_zero()[1])).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_as_the_float32_it_stands_for(dtype, normal):
    x = normal(4000).to(dtype)
    r = Range(torch.tensor(-3.0), torch.tensor(3.1), bits=10)
    assert r(x).dtype == torch.float32
    assert torch.equal(r(x), r(x.float()))
    assert torch.equal(r.codes(x), r.codes(x.float()))
    assert r.clipped(x) == r.clipped(x.float())


# --- what else may come in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "ends"), [(0.0, (-1.0, 1.0)), (3.0, (0.0, 3.0)), (-3.0, (-3.0, 0.0))])
def test_a_constant_has_a_range_that_holds_it(value, ends, kind):
    if kind.get("link") == "sigmoid":
        ends = tuple(end * torch.sigmoid(torch.tensor(4.0)).item() for end in ends)
    low = high = torch.tensor(value)
    r = Range(low, high, 8, **kind)
    assert [t.item() for t in r.ends()] == pytest.approx(ends, abs=0.005)
    assert r(torch.full((3,), value)).tolist() == pytest.approx([value] * 3, rel=0.02)


def test_zeros_alone_do_not_freeze_a_range_with_a_relative_unit():
    zeros = torch.tensor([0.0, 2.0])
    r = Range(-zeros, zeros, 8, unit=zeros.clamp(min=1e-8))
    assert r.high.tolist() == [1.0, 1.0]
    assert [t.tolist() for t in r.ends()] == [[-1.0, -2.0], [1.0, 2.0]]


def test_an_empty_tensor_stays_empty(kind):
    r = Range(torch.tensor(-1.0), torch.tensor(1.0), 8, **kind)
    assert r(torch.empty(0, 4)).shape == r.codes(torch.empty(0, 4)).shape == (0, 4)
    assert r.clipped(torch.empty(0)) == 0
    assert all(bool(g == 0) for g in torch.autograd.grad(r(torch.empty(0)).sum(), list(r.parameters())))


def test_infinity_is_clipped_like_any_large_value(kind):
    r = Range(torch.tensor(-1.0), torch.tensor(3.0), 8, **kind)

    def result(x: float) -> list[float]:
        x_hat = r(torch.tensor([-x, x, 0.5]))
        return x_hat.tolist() + [g.item() for g in torch.autograd.grad((x_hat * torch.tensor([1.0, 2.0, 3.0])).sum(), list(r.parameters()))]

    assert result(torch.inf) == result(1e38) == result(100.0)
    assert r.codes(torch.tensor([-torch.inf, torch.inf])).tolist() == [0, 255]
    assert r.clipped(torch.tensor([-torch.inf, torch.inf, 0.0, 0.0])) == 0.5


def test_nan_stays_nan_and_has_no_code(kind):
    r = Range(torch.tensor(-1.0), torch.tensor(3.0), 8, **kind)
    x_hat = r(torch.tensor([torch.nan, 1.0]))
    assert x_hat.isnan().tolist() == [True, False]
    assert any(bool(g.isnan()) for g in torch.autograd.grad(x_hat.sum(), list(r.parameters())))
    with pytest.raises(UserError, match="NaN has no code"):
        r.codes(torch.tensor([torch.nan, 1.0]))


def test_what_no_range_can_be_made_of_is_refused():
    with pytest.raises(UserError, match="at least 2 bits, got 1"):
        Range(torch.tensor(-1.0), torch.tensor(1.0), bits=1)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="cannot start at NaN or infinity"):
            Range(torch.tensor(-1.0), torch.tensor(bad))


# --- learning --------------------------------------------------------------------------------------------------------


def learn(r: Range, x: torch.Tensor, lr: float, steps: int, eps: float = 1e-8, factor: float = 1.0) -> torch.Tensor:
    """Mean squared error of every row (rows, steps) under Adam."""
    adam = torch.optim.Adam(r.parameters(), lr, eps=eps)
    losses = []
    for _ in range(steps):
        loss = (r(x) - x).square().mean(-1)
        adam.zero_grad()
        (factor * loss.sum()).backward()
        adam.step()
        losses.append(loss.detach())
    return torch.stack(losses, -1)


BROKEN = {  # parameters that make no range: collapsed, one end crossed, both crossed, one code for everything on a side
    "scale-offset": [(0.0, 7.0), (-0.04, 7.0), (0.4, -5.0), (0.0, 20.0)],
    "normalised": [(0.0, 0.5), (-0.6, 0.5), (4.0, -0.5), (0.0, 2.0)],
    "min-max": [(0.0, 0.0), (1.0, 2.0), (1.0, -1.0), (-2.0, -3.0)],
    "beta-gamma": [(0.0, 0.0), (-0.5, 1.0), (-0.5, -0.5), (1.0, -1.0)],
    "exp": [(-8.0, -8.0), (-8.0, 0.0), (0.0, -8.0), (-4.0, -8.0)],
    "sigmoid": [(-8.0, -8.0), (-8.0, 4.0), (4.0, -8.0), (-4.0, -8.0)],
}


@pytest.mark.parametrize("name", KINDS)
def test_crossed_and_collapsed_ranges_recover(name, normal):
    x = normal(256).expand(4, -1)
    start = torch.full((4, 1), 3.0, dtype=torch.float64)
    whole, broken = Range(-start, start, 4, **KINDS[name]), Range(-start, start, 4, **KINDS[name])
    with torch.no_grad():
        for parameter, values in zip(broken.parameters(), zip(*BROKEN[name], strict=True), strict=True):
            parameter.copy_(torch.tensor(values)[:, None])
    reference = learn(whole, x, 0.03, 200)[:, -50:].mean(-1)
    losses = learn(broken, x, 0.03, 700)
    limit = {"scale-offset": 4.0, "normalised": 1.4}.get(name, 1.15)  # one learning rate hardly suits both of its parameters
    assert bool((losses[:, 0] > 3 * reference).all())
    assert bool((losses[:, -50:].mean(-1) < limit * reference).all()), losses[:, -50:].mean(-1) / reference


def test_adam_does_not_see_a_constant_factor_on_the_gradient_while_its_eps_is_small(kind, normal):
    x = normal(1, 512)
    start = torch.full((1, 1), 2.0, dtype=torch.float64)
    one = Range(-start, start, 4, **kind)
    other, lost = copy.deepcopy(one), copy.deepcopy(one)
    learn(one, x, 1e-2, 100, eps=1e-30)
    learn(other, x, 1e-2, 100, eps=1e-30, factor=2.0**-10)
    learn(lost, x, 1e-2, 100, factor=2.0**-40)
    for p, q, r in zip(one.parameters(), other.parameters(), lost.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.allclose(p, r, rtol=1e-3)


def test_dynamic_base_follows_the_tensor(normal):
    r = Range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 8, "beta-gamma")
    r.rebase(torch.tensor([[-4.0]]), torch.tensor([[2.0]]))
    assert [t.item() for t in r.ends()] == [-4.0, 2.0]
    s = Range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 8, "beta-gamma", symmetric=True)
    s.rebase(torch.tensor([[-4.0]]), torch.tensor([[2.0]]))
    assert [t.item() for t in s.ends()] == [-4.0, 4.0]


def test_moved_is_a_value_with_the_gradient_of_another():
    x = torch.tensor(1e8, requires_grad=True)
    y = moved(x, torch.tensor(0.1))
    y.backward()
    assert y.item() == torch.tensor(0.1).item() and x.grad == 1  # x + (0.1 - x) would have lost 0.1


def test_scale_of_any_sign_is_a_scale(normal):
    x = normal(100)
    r = Range(torch.tensor(-1.0).double(), torch.tensor(3.0).double(), 8, "scale-offset")
    before = r(x)
    with torch.no_grad():
        r.scale.neg_()
    assert torch.equal(r(x), before)
    assert torch.equal(fake_quantize(x, *r.scale_zero(), r.top), before)
