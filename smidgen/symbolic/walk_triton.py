"""The recurrence of seq2grid's `Walk` in one GPU kernel: as separate operations it is two launches a step.

A program per example holds all rows' places. Its neighbour's value is the one thing a place has not got in its own register: it is read
back from the y just stored, which a barrier makes visible, and which is in the first-level cache.
"""

import torch
import triton  # pyright: ignore  comes with torch for CUDA
import triton.language as tl  # pyright: ignore
from torch import Tensor


@triton.jit
def _walk(a, c, v, y, steps, batch, rows, places, ROWS: tl.constexpr, PLACES: tl.constexpr):
    """y_j[k] = v_j[k] + a_j[k] y_{j-1}[k] + c_j[k] y_{j-1}[k-1] of one example."""
    example = tl.program_id(0).to(tl.int64)
    h, k = tl.arange(0, ROWS)[:, None], tl.arange(0, PLACES)[None, :]
    inside, at = (h < rows) & (k < places), example * rows * places + h * places + k
    state = tl.load(v + at, mask=inside, other=0.0)
    tl.store(y + at, state, mask=inside)
    of_step = example * places + k
    for _ in range(steps):
        tl.debug_barrier()
        below = tl.load(y + at - 1, mask=inside & (k > 0), other=0.0)
        stay = tl.load(a + of_step, mask=k < places, other=0.0)
        move = tl.load(c + of_step, mask=k < places, other=0.0)
        at += batch * rows * places
        of_step += batch * places
        state = tl.load(v + at, mask=inside, other=0.0) + stay * state + move * below
        tl.store(y + at, state, mask=inside)


def walk_triton(a: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """As `walk_steps`."""
    a, c, v = a.contiguous(), c.contiguous(), v.contiguous()
    y = torch.empty_like(v)
    _, batch, rows, places = v.shape
    if batch:
        sizes = {"ROWS": triton.next_power_of_2(rows), "PLACES": triton.next_power_of_2(places)}
        _walk[(batch,)](a, c, v, y, len(a), batch, rows, places, num_warps=4, num_stages=1, **sizes)  # pyright: ignore
    return y
