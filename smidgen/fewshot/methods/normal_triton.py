"""The kernels of normal.py: a program per part and channel, whose places lie one after the other."""

import torch
import triton  # pyright: ignore  comes with torch for CUDA
import triton.language as tl  # pyright: ignore
from torch import Tensor

BLOCK = 1024  # places of a program at a time


@triton.jit
def _sums(x, counted, out, channels, part, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p, c = row // channels, row % channels
    first, second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, part * PLACES, BLOCK):
        s = start + tl.arange(0, BLOCK)
        real = s < part * PLACES
        value = tl.load(x + row * part * PLACES + s, mask=real, other=0.0)
        weighed = value * tl.load(counted + p * part + s // PLACES, mask=real, other=0.0)
        first += weighed
        second += weighed * value
    tl.store(out + 2 * p * channels + c, tl.sum(first) / PLACES)
    tl.store(out + (2 * p + 1) * channels + c, tl.sum(second) / PLACES)


@triton.jit
def _sums_backward(g, x, counted, out, channels, part, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p, c = row // channels, row % channels
    first, second = tl.load(g + 2 * p * channels + c), tl.load(g + (2 * p + 1) * channels + c)
    for start in range(0, part * PLACES, BLOCK):
        s = start + tl.arange(0, BLOCK)
        real = s < part * PLACES
        value = tl.load(x + row * part * PLACES + s, mask=real, other=0.0)
        weight = tl.load(counted + p * part + s // PLACES, mask=real, other=0.0) / PLACES
        tl.store(out + row * part * PLACES + s, weight * (first + 2 * second * value), mask=real)


@triton.jit
def _sums_twice(v, g, x, counted, by_g, by_x, channels, part, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p, c = row // channels, row % channels
    factor = tl.load(g + (2 * p + 1) * channels + c)
    first, second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, part * PLACES, BLOCK):
        s = start + tl.arange(0, BLOCK)
        real = s < part * PLACES
        value = tl.load(x + row * part * PLACES + s, mask=real, other=0.0)
        weight = tl.load(counted + p * part + s // PLACES, mask=real, other=0.0) / PLACES
        way = weight * tl.load(v + row * part * PLACES + s, mask=real, other=0.0)
        first += way
        second += 2 * way * value
        tl.store(by_x + row * part * PLACES + s, 2 * factor * way, mask=real)
    tl.store(by_g + 2 * p * channels + c, tl.sum(first))
    tl.store(by_g + (2 * p + 1) * channels + c, tl.sum(second))


@triton.jit
def _affine(mean, variance, shift, scale, moved, count, epsilon, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    m, h = tl.load(mean + at, mask=real, other=0.0), tl.load(shift + at, mask=real, other=0.0)
    s = 1 / tl.sqrt(tl.load(variance + at, mask=real, other=1.0) + epsilon)
    tl.store(scale + at, s, mask=real)
    tl.store(moved + at, h - m * s, mask=real)


@triton.jit
def _affine_backward(of_scale, of_moved, mean, variance, by_mean, by_variance, count, epsilon, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    m = tl.load(mean + at, mask=real, other=0.0)
    g, h = tl.load(of_scale + at, mask=real, other=0.0), tl.load(of_moved + at, mask=real, other=0.0)
    s = 1 / tl.sqrt(tl.load(variance + at, mask=real, other=1.0) + epsilon)
    tl.store(by_mean + at, -h * s, mask=real)
    tl.store(by_variance + at, -0.5 * (g - h * m) * s * s * s, mask=real)


@triton.jit
def _affine_twice(
    of_mean, of_variance, of_scale, of_moved, mean, variance, by_scale, by_moved, by_mean, by_variance, count, epsilon, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    m = tl.load(mean + at, mask=real, other=0.0)
    g, h = tl.load(of_scale + at, mask=real, other=0.0), tl.load(of_moved + at, mask=real, other=0.0)
    a, b = tl.load(of_mean + at, mask=real, other=0.0), tl.load(of_variance + at, mask=real, other=0.0)
    s = 1 / tl.sqrt(tl.load(variance + at, mask=real, other=1.0) + epsilon)
    half = 0.5 * s * s * s
    tl.store(by_scale + at, -b * half, mask=real)
    tl.store(by_moved + at, b * m * half - a * s, mask=real)
    tl.store(by_mean + at, b * h * half, mask=real)
    tl.store(by_variance + at, (a * h + 1.5 * b * (g - h * m) * s * s) * half, mask=real)


@triton.jit
def _corner(at, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The first of the four places behind an output."""
    column, rows = at % (WIDTH // 2), at // (WIDTH // 2)
    return ((rows // (HEIGHT // 2)) * HEIGHT + 2 * (rows % (HEIGHT // 2))) * WIDTH + 2 * column


@triton.jit
def _pooled(x, scale, shift, task, y, which, channels, part, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    outputs = part * (HEIGHT // 2) * (WIDTH // 2)
    of_task = tl.load(task + row // channels) * channels + row % channels
    factor, added = tl.load(scale + of_task), tl.load(shift + of_task)
    x += row * part * HEIGHT * WIDTH
    for start in range(0, outputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        real, corner = at < outputs, x + _corner(at, HEIGHT, WIDTH)
        most = tl.load(corner, mask=real, other=0.0)
        number = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(1, 4):
            value = tl.load(corner + (k // 2) * WIDTH + k % 2, mask=real, other=0.0)
            more = value > most
            most, number = tl.where(more, value, most), tl.where(more, k, number)
        value = factor * most + added
        tl.store(y + row * outputs + at, tl.where(value <= 0.0, 0.0, value), mask=real)
        tl.store(which + row * outputs + at, (number + tl.where(value > 0.0, 4, 0)).to(tl.int8), mask=real)


@triton.jit
def _pooled_backward(
    g, x, scale, which, task, by_x, sums, channels, part, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, c, outputs = row // channels, row % channels, part * (HEIGHT // 2) * (WIDTH // 2)
    factor = tl.load(scale + tl.load(task + p) * channels + c)
    first, second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, outputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        real, corner = at < outputs, row * part * HEIGHT * WIDTH + _corner(at, HEIGHT, WIDTH)
        code = tl.load(which + row * outputs + at, mask=real, other=0).to(tl.int32)
        number = code % 4
        passed = tl.where(code > 3, tl.load(g + row * outputs + at, mask=real, other=0.0), 0.0)
        first += passed * tl.load(x + corner + (number // 2) * WIDTH + number % 2, mask=real, other=0.0)
        second += passed
        for k in tl.static_range(4):
            tl.store(by_x + corner + (k // 2) * WIDTH + k % 2, tl.where(number == k, factor * passed, 0.0), mask=real)
    tl.store(sums + 2 * p * channels + c, tl.sum(first))
    tl.store(sums + (2 * p + 1) * channels + c, tl.sum(second))


@triton.jit
def _pooled_twice(
    v, v_sums, g, x, scale, which, task, by_g, by_x, by_scale, channels, part,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, c, outputs = row // channels, row % channels, part * (HEIGHT // 2) * (WIDTH // 2)
    factor = tl.load(scale + tl.load(task + p) * channels + c)
    of_scale, of_shift = tl.load(v_sums + 2 * p * channels + c), tl.load(v_sums + (2 * p + 1) * channels + c)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, outputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        real, corner = at < outputs, row * part * HEIGHT * WIDTH + _corner(at, HEIGHT, WIDTH)
        code = tl.load(which + row * outputs + at, mask=real, other=0).to(tl.int32)
        number = code % 4
        chosen = corner + (number // 2) * WIDTH + number % 2
        passed = tl.where(code > 3, tl.load(g + row * outputs + at, mask=real, other=0.0), 0.0)
        way = tl.load(v + chosen, mask=real, other=0.0)
        total += passed * way
        given = factor * way + of_scale * tl.load(x + chosen, mask=real, other=0.0) + of_shift
        tl.store(by_g + row * outputs + at, tl.where(code > 3, given, 0.0), mask=real)
        for k in tl.static_range(4):
            tl.store(by_x + corner + (k // 2) * WIDTH + k % 2, tl.where(number == k, of_scale * passed, 0.0), mask=real)
    tl.store(by_scale + p * channels + c, tl.sum(total))


def sums(x: Tensor, counted: Tensor) -> Tensor:
    """(parts, 2 channels)."""
    x, counted = x.contiguous(), counted.contiguous()
    out = x.new_empty(len(x), 2 * x.shape[1])
    _launch(_sums, x, (x, counted, out), x.shape[3] * x.shape[4])
    return out


def sums_backward(gradient: Tensor, x: Tensor, counted: Tensor) -> Tensor:
    """Like x."""
    gradient, x, counted = gradient.contiguous(), x.contiguous(), counted.contiguous()
    out = torch.empty_like(x)
    _launch(_sums_backward, x, (gradient, x, counted, out), x.shape[3] * x.shape[4])
    return out


def sums_twice(second: Tensor, gradient: Tensor, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """By the gradient and by x."""
    second, gradient, x, counted = second.contiguous(), gradient.contiguous(), x.contiguous(), counted.contiguous()
    by_gradient, by_x = torch.empty_like(gradient), torch.empty_like(x)
    _launch(_sums_twice, x, (second, gradient, x, counted, by_gradient, by_x), x.shape[3] * x.shape[4])
    return by_gradient, by_x


def affine(mean: Tensor, variance: Tensor, shift: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Scale and moved."""
    scale, moved = _each(_affine, 2, epsilon, mean, variance, shift)
    return scale, moved


def affine_backward(of_scale: Tensor, of_moved: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """By the mean and the variance."""
    by_mean, by_variance = _each(_affine_backward, 2, epsilon, of_scale, of_moved, mean, variance)
    return by_mean, by_variance


def affine_twice(
    of_mean: Tensor, of_variance: Tensor, of_scale: Tensor, of_moved: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> list[Tensor]:
    """By the gradients of scale and moved, the mean and the variance."""
    return _each(_affine_twice, 4, epsilon, of_mean, of_variance, of_scale, of_moved, mean, variance)


def pooled(x: Tensor, scale: Tensor, shift: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and of each the number of the largest of four, and 4 if it passed."""
    x, scale, shift = x.contiguous(), scale.contiguous(), shift.contiguous()
    *rest, height, width = x.shape
    y = x.new_empty(*rest, height // 2, width // 2)
    which = torch.empty_like(y, dtype=torch.int8)
    _launch(_pooled, x, (x, scale, shift, task, y, which), height, width)
    return y, which


def pooled_backward(gradient: Tensor, x: Tensor, scale: Tensor, which: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """By x, and the sums over each part."""
    gradient, x, scale = gradient.contiguous(), x.contiguous(), scale.contiguous()
    by_x, out = _like(x), x.new_empty(len(x), 2 * x.shape[1])
    _launch(_pooled_backward, x, (gradient, x, scale, which, task, by_x, out), *x.shape[3:])
    return by_x, out


def pooled_twice(
    second: Tensor, second_sums: Tensor, gradient: Tensor, x: Tensor, scale: Tensor, which: Tensor, task: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the gradient, by x, and by every part's scale."""
    second, second_sums, gradient, x, scale = (t.contiguous() for t in (second, second_sums, gradient, x, scale))
    by_gradient, by_x, by_scale = torch.empty_like(gradient), _like(x), x.new_empty(x.shape[:2])
    tensors = second, second_sums, gradient, x, scale, which, task, by_gradient, by_x, by_scale
    _launch(_pooled_twice, x, tensors, *x.shape[3:])
    return by_gradient, by_x, by_scale


def _like(x: Tensor) -> Tensor:
    """Zeros where the last row or column belongs to no output."""
    return torch.zeros_like(x) if x.shape[3] % 2 or x.shape[4] % 2 else torch.empty_like(x)


def _launch(kernel, x: Tensor, tensors: tuple[Tensor, ...], *sizes: int) -> None:
    if x.numel():
        block = min(BLOCK, triton.next_power_of_2(x[0, 0].numel()))
        kernel[(x.shape[0] * x.shape[1],)](*tensors, x.shape[1], x.shape[2], *sizes, BLOCK=block)


def _each(kernel, outputs: int, epsilon: float, *given: Tensor) -> list[Tensor]:
    """Entry by entry, of tensors of one shape."""
    given = tuple(t.contiguous() for t in given)
    out = [torch.empty_like(given[0]) for _ in range(outputs)]
    count = given[0].numel()
    if count:
        kernel[(triton.cdiv(count, BLOCK),)](*given, *out, count, epsilon, BLOCK=BLOCK)
    return out
