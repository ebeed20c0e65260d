"""aespa: attention-aware rounding, learned on precomputed matrices (Kim et al., NeurIPS 2024, arXiv 2402.08958).

Each projection is quantized on its own, but its error is measured where attention returns it. That error is a quadratic form whose
matrices are collected once (3.2), so a step of learning costs the same for any amount of data:

    L(dW) = tr(G dW H dW^T),   queries: G = E[K^T K],  keys: G = E[Q^T Q],  values: H = E[X A^T A X^T],  G = I elsewhere

    W~ = S (clamp(floor(W_upd / S) + h(B) + z, 0, 2^n - 1) - z),   h(B) = clip(1.2 sigmoid(B) - 0.1, 0, 1)        (3.5)

W_upd is every weight as GPTQ would have rounded it, after compensation; B starts where h(B) is its fractional part, so without steps
the result is GPTQ's. B then follows Adam on L + lambda sum(1 - |2h - 1|^beta), which ends with every h at 0 or 1.

The authors differentiate by autograd. The gradient is 2 G dW H times an element-wise factor, so here a step is one matrix product, two
with G, and its forward half is never stored; on a CUDA device the step is captured once as a graph and replayed.

lambda weighs against L as the authors scale it: every second moment is 2/N times a sum over tokens, so L below is 2x, or 4x with G, ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight, expand
from smidgen.quant.solvers.descent import losses, refine
from smidgen.quant.solvers.gptq import GPTQ, as_qweight
from smidgen.quant.solvers.hessian import prepare
from smidgen.quant.solvers.rtn import check_finite
from smidgen.quant.stats import Stats

LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched to this range and clipped to 0..1
BETA = 20.0, 2.0  # the regulariser's exponent, from and to

Heads = Float[Tensor, "heads rows in"]


@dataclass(frozen=True)
class AESPA(GPTQ):
    """GPTQ's compensation with attention-aware values, then learned rounding."""

    zfold: bool = True
    "Fold a factor per input channel into the layer before: see `transforms/zfold.py`."
    steps: int = 2000
    "Steps of learning; 0 is the paper's fast mode."
    learning_rate: float = 0.015
    "Of Adam."
    pull: float = 1.0
    "Lambda, the regulariser's weight; one and a half times as much for queries, keys and values."
    warm_up: float = 0.2
    "Fraction of the steps without regulariser."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise UserError(f"steps must not be negative, got {self.steps}")
        if not (self.learning_rate > 0 and self.pull >= 0 and 0 <= self.warm_up <= 1):
            raise UserError(
                "aespa: learning_rate must be positive, pull not negative, warm_up between 0 and 1, "
                f"got {self.learning_rate}, {self.pull}, {self.warm_up}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What `collect` must gather."""
        return super().needs | {"h_out"}

    def quick(self) -> GPTQ:
        """What is tried for a choice: no learning."""
        return replace(self, passes=0, steps=0)

    def __call__(self, w: Float[Tensor, "out in"], stats: Stats, grid: Grid) -> QWeight:
        """Solves for the codes; computes in float32, or float64 where the weights are."""
        if self.choose:
            w = self.aim(w, stats)
            return self.chosen(w, stats, grid)(w, stats, grid)
        w, h = prepare(self.aim(w, stats), stats, self.damp)
        codes, scale, zero, updated = self.rounded(w, h, grid)
        h_out = None if stats.h_out is None else stats.h_out.to(w.dtype)
        if self.steps:
            if h_out is not None:
                check_finite(h_out, "second moments of the heads")
            attention = h_out is not None or len(stats.h_in) > 1
            steps = expand(scale, w.shape[-1]), expand(zero, w.shape[-1])
            learned = learn(w, updated, h, h_out, grid, *steps, self, self.pull * (1.5 if attention else 1.0))
            old, new = (losses(w, h, h_out, c, scale, zero, grid) for c in (codes, learned))
            codes = torch.where((new < old)[:, None, None], learned, codes)  # lambda may be wrong for a layer
        if self.passes:
            codes, scale = refine(w, h, h_out, codes, scale, zero, grid, self.passes)
        return as_qweight(codes, scale, zero, grid)


def learn(
    w: Heads,
    updated: Heads,
    h: Float[Tensor, "one_or_heads in in"],
    h_out: Float[Tensor, "heads rows rows"] | None,
    grid: Grid,
    scale: Heads,
    zero: Heads,
    options: AESPA,
    pull: float,
) -> Heads:
    """Codes after `options.steps` steps from the compensated weights `updated`, towards the weights `w`."""
    whole = zero.round()
    levels = updated / scale + (zero - whole)  # the second term is 0 unless a format has real zeros
    floor = torch.floor(levels)
    b = torch.logit((levels - floor - LOW) / (HIGH - LOW))
    floor += whole
    optimizer = torch.optim.Adam([b], lr=options.learning_rate, fused=True)
    b.grad = torch.empty_like(b)
    schedule = annealed(options, pull).to(w)
    at = torch.zeros(1, dtype=torch.long, device=w.device)

    def step() -> None:
        beta, weight = schedule.index_select(0, at).unbind(-1)
        assert b.grad is not None
        b.grad.copy_(gradient(b, floor, w, h, h_out, grid, scale, zero, beta, weight))
        optimizer.step()
        at.add_(1)

    repeat(step, options.steps, [b, at], optimizer)
    return (floor + (b >= 0)).clamp_(0, grid.top)


def annealed(options: AESPA, pull: float) -> Float[Tensor, "steps 2"]:
    """The regulariser's exponent and weight at every step."""
    start = int(options.warm_up * options.steps)
    progress = ((torch.arange(options.steps) - start) / max(1, options.steps - start)).clamp(min=0)
    weight = torch.where(torch.arange(options.steps) < start, 0.0, pull)
    return torch.stack([BETA[0] + (BETA[1] - BETA[0]) * progress, weight], 1)


def gradient(
    b: Heads,
    floor: Heads,
    w: Heads,
    h: Float[Tensor, "one_or_heads in in"],
    h_out: Float[Tensor, "heads rows rows"] | None,
    grid: Grid,
    scale: Heads,
    zero: Heads,
    beta: Float[Tensor, "1"],
    pull: Float[Tensor, "1"],
) -> Heads:
    """d/dB of  c tr(G dW H dW^T) + pull sum(1 - |2h - 1|^beta),  c = 4 with G, else 2."""
    sigmoid = torch.sigmoid(b)
    soft = (sigmoid * (HIGH - LOW)).add_(LOW).clamp_(0, 1)
    levels = floor + soft
    inside = (levels > 0) & (levels < grid.top)
    error = levels.clamp_(0, grid.top).sub_(zero).mul_(scale).sub_(w)
    slope = error @ h
    if h_out is not None:
        slope = (h_out @ slope).mul_(2)
    slope.mul_(scale).mul_(inside).mul_(4)
    distance = soft.mul_(2).sub_(1)
    free = distance.abs() < 1
    slope -= distance.sign().mul_(distance.abs_().pow_(beta - 1)).mul_(2 * beta * pull)
    return slope.mul_(sigmoid * (1 - sigmoid) * (HIGH - LOW)).mul_(free)


def repeat(step: Callable[[], None], times: int, state: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Runs `step` so often; on a CUDA device as a graph, whose trial runs are undone in `state`."""
    if not state[0].is_cuda or times < 10:
        for _ in range(times):
            step()
        return
    for group in optimizer.param_groups:
        group["capturable"] = True
    before = [t.clone() for t in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()
    for _ in range(times):
        graph.replay()
