"""`smidgen lab ranges`: which way to write a quantizer's range can be learned (after You et al., arXiv 2404.16898).

One tensor of fixed samples, one range (quant/ranges.py), Adam on the mean squared error of what is rounded, the whole tensor at every step
and the same learning rate for both parameters: whatever differs between two curves is the parameterization. Six forms of a range

    scale-offset    s and zeta as they are
    normalised      s N and zeta / N
    min-max         the ends, in the units of the data
    beta-gamma      multipliers of the ends it starts from
    exp             their logarithms
    sigmoid         multipliers sigmoid(.), from sigmoid(4) on

learn normal or ReLU-like samples to every number of bits, with every learning rate, from the samples' own ends ("x1"), ends three times too
wide ("x3"), or [-0.5, 8], one end too tight and one too wide ("one-sided"). Losses are given relative to a reference, the least over ends
u min and v max, u and v on a grid from 0.2 to 1. The verdict on a case looks at the tail, the last tenth of the steps:

    converges   the tail never lies above 1.3 times the reference: of a curve that touches and leaves again, only the last step above counts
    oscillates  the tail rises from below 1.3 to above it, or to more than twice what it had come down to
    diverges    the tail's mean lies above where the case started, or is not a number
    slow        neither, and the tail's mean is still 2 % or more below that of as many steps before
    sticks      none of these: it rests above 1.3

Cases with a name, C1 to C5, are drawn. The protocol and the cases are ours: the paper's text could not be had, and no figure here is its.
"""

import math
import time
from dataclasses import KW_ONLY, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError, check_seed
from smidgen.precision import pick_device
from smidgen.quant.ranges import Kind, Link, Range, fake_quantize
from smidgen.report import write_report
from smidgen.run import Run

Data = Literal["normal", "relu"]
Start = Literal["x1", "x3", "one-sided"]
Form = Literal["scale-offset", "normalised", "min-max", "beta-gamma", "exp", "sigmoid"]
Verdict = Literal["converges", "oscillates", "diverges", "slow", "sticks"]

FORMS: dict[Form, tuple[Kind, Link, bool]] = {
    "scale-offset": ("scale-offset", "identity", False),
    "normalised": ("scale-offset", "identity", True),
    "min-max": ("min-max", "identity", False),
    "beta-gamma": ("beta-gamma", "identity", False),
    "exp": ("beta-gamma", "exp", False),
    "sigmoid": ("beta-gamma", "sigmoid", False),
}
SAMPLES = 4096
RELU_LOW = -1e-3  # where the lower end of non-negative samples starts: at 0 no multiplier could move it
ONE_SIDED = -0.5, 8.0
ABOVE = 1.3  # times the reference: what has not converged
SWING = 2.0  # a rise within the tail that is an oscillation
FALLING = 0.98
POINTS = 100  # of a curve that are kept
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class Setting:
    """What all forms have in common."""

    data: Data
    bits: int
    rate: float
    start: Start


CASES = {
    "C1": Setting("normal", 3, 1e-2, "x1"),
    "C2": Setting("normal", 10, 1e-2, "x1"),
    "C2, too wide": Setting("normal", 10, 1e-2, "x3"),
    "C2, slow": Setting("normal", 10, 1e-3, "x1"),
    "C3": Setting("relu", 8, 1e-2, "x1"),
    "C3, 3 bits": Setting("relu", 3, 1e-2, "x1"),
    "C4": Setting("normal", 3, 1e-2, "x3"),
    "C4, slow": Setting("normal", 3, 1e-3, "x3"),
    "C4, slow, 8 bits": Setting("normal", 8, 1e-3, "x3"),
    "C5, 4 bits": Setting("normal", 4, 1e-2, "one-sided"),
    "C5, 8 bits": Setting("normal", 8, 1e-2, "one-sided"),
    "C5, 10 bits": Setting("normal", 10, 1e-2, "one-sided"),
}


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen lab ranges`; the grid is every combination of what the lists name."""

    _: KW_ONLY
    data: Annotated[tuple[Data, ...], Parameter(consume_multiple=True)] = ("normal", "relu")
    "Samples to be rounded."
    bits: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (3, 4, 8, 10)
    "Numbers of bits, 2 to 12."
    rate: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1e-2, 1e-3)
    "Learning rates."
    start: Annotated[tuple[Start, ...], Parameter(consume_multiple=True)] = ("x1", "x3", "one-sided")
    "Where ranges start: at the samples' ends, three times as wide, or at [-0.5, 8]."
    form: Annotated[tuple[Form, ...], Parameter(consume_multiple=True)] = tuple(FORMS)
    "Parameterizations."
    steps: int = 4000
    "Adam steps, 100 or more."
    seed: int = 0
    "Draws the samples."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/lab/ranges."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."

    def settings(self, bits: int) -> list[Setting]:
        """The settings of one number of bits."""
        return [Setting(d, bits, r, s) for d, r, s in product(self.data, self.rate, self.start)]


DEFAULT = Config()


def command(config: Config = DEFAULT) -> dict[str, Any]:
    """Learn the range of one tensor in six ways, over a grid of settings."""
    check(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch is so small that a second thread waits more than it works
    try:
        with Run("lab ranges", config, config.output) as run:
            return main(config, run)
    finally:
        torch.set_num_threads(threads)


def check(config: Config) -> None:
    """Refuses what cannot work before any work starts."""
    for name in ("data", "bits", "rate", "start", "form"):
        values = {"data": config.data, "bits": config.bits, "rate": config.rate, "start": config.start, "form": config.form}[name]
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} must name one value or more, each once")
    for bits in config.bits:
        if not 2 <= bits <= 12:
            raise UserError(f"--bits must lie between 2 and 12, got {bits}")
    for rate in config.rate:
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"--rate must be positive, got {rate}")
    if config.steps < 100:
        raise UserError(f"--steps must be at least 100, got {config.steps}")
    check_seed(config.seed)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Learn every case, judge it, draw the curves."""
    device = pick_device(config.device)
    started = time.monotonic()
    references = {(data, bits): reference(samples(data, config.seed), bits) for data in config.data for bits in config.bits}
    results: dict[Setting, dict[Form, Result]] = {}
    groups = list(product(config.bits, config.form))
    for bits, form in run.track(groups, "bits and form", len(groups)):
        settings = config.settings(bits)
        losses, ends = learned(settings, form, config.steps, config.seed, device)
        for setting, loss, (low, high) in zip(settings, losses, ends, strict=True):
            result = Result(loss / references[setting.data, bits], low, high)
            results.setdefault(setting, {})[form] = result
            run.log(**row(setting, form, references[setting.data, bits], result))
    for line in lines(results, config.form):
        run.say(line)
    verdicts = [(form, result.verdict) for forms in results.values() for form, result in forms.items()]
    metrics = run.finish(
        cases=len(verdicts),
        verdicts={form: {v: verdicts.count((form, v)) for v in get_args(Verdict) if (form, v) in verdicts} for form in config.form},
        steps=config.steps,
        samples=SAMPLES,
        seed=config.seed,
        learn_seconds=time.monotonic() - started,
        device=str(device),
    )
    run.say(f"report: {write_report([run.folder])}")
    return metrics


# --- learning --------------------------------------------------------------------------------------------------------


def samples(data: Data, seed: int) -> Float[Tensor, "n"]:
    """Standard normal numbers, or their positive part."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(SAMPLES)).float()
    return x.relu() if data == "relu" else x


def ends_of(x: Float[Tensor, "n"], start: Start) -> tuple[float, float]:
    """Where the range of `x` starts."""
    if start == "one-sided":
        return ONE_SIDED
    wide = 3.0 if start == "x3" else 1.0
    return wide * min(x.min().item(), RELU_LOW), wide * x.max().item()


def reference(x: Float[Tensor, "n"], bits: int, points: int = 41) -> float:
    """The least mean squared error over ends u min and v max, u and v on a grid from 0.2 to 1."""
    low, high = ends_of(x, "x1")
    least = math.inf
    for u in torch.linspace(0.2, 1, points):
        r = Range((u * low).expand(points, 1), torch.linspace(0.2, 1, points)[:, None] * high, bits)
        with torch.no_grad():
            least = min(least, (fake_quantize(x, *r.scale_zero(), r.top) - x).square().mean(-1).min().item())
    return least


def learned(
    settings: list[Setting], form: Form, steps: int, seed: int, device: torch.device
) -> tuple[Float[np.ndarray, "cases steps"], list[tuple[float, float]]]:
    """Losses before every step, and the ends at last; settings have their bits in common, and a row each in one batch."""
    kind, link, normalised = FORMS[form]
    x = torch.stack([samples(s.data, seed) for s in settings]).to(device)
    starts = torch.tensor([ends_of(samples(s.data, seed), s.start) for s in settings], device=device)
    r = Range(starts[:, :1], starts[:, 1:], settings[0].bits, kind, link, normalised=normalised)
    adam = Adam(list(r.parameters()), torch.tensor([[s.rate] for s in settings], device=device))
    losses = torch.empty(steps, len(settings), device=device)
    for step in range(steps):
        loss = (r(x) - x).square().mean(-1)
        losses[step] = loss.detach()
        adam.step(torch.autograd.grad(loss.sum(), adam.parameters))
    low, high = (end.detach().flatten().tolist() for end in r.ends())
    return losses.T.double().cpu().numpy(), list(zip(low, high, strict=True))


class Adam:
    """torch.optim.Adam with a learning rate per row, which that does not have."""

    def __init__(self, parameters: list[torch.nn.Parameter], rate: Float[Tensor, "rows 1"]) -> None:
        self.parameters, self.rate, self.steps = parameters, rate, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """One step, given a gradient for every parameter."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for p, g, (m, v) in zip(self.parameters, gradients, self.moments, strict=True):
            m.lerp_(g, 1 - BETAS[0])
            v.lerp_(g * g, 1 - BETAS[1])
            p -= self.rate * (m / first) / ((v / second).sqrt() + EPS)


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How one case went."""

    ratio: Float[np.ndarray, "steps"]
    "Loss over reference, before every step."
    low: float
    high: float

    @property
    def tail(self) -> Float[np.ndarray, "tenth"]:
        """The last tenth."""
        return self.ratio[-(len(self.ratio) // 10) :]

    @property
    def last_above(self) -> int | None:
        """The last step whose ratio is above 1.3, or not a number; none: no step is."""
        above = np.flatnonzero(~(self.ratio <= ABOVE))
        return int(above[-1]) if len(above) else None

    @property
    def verdict(self) -> Verdict:
        """By the rules on top of this file."""
        tail = self.tail
        if (tail <= ABOVE).all():
            return "converges"
        if not np.isfinite(tail).all():
            return "diverges"
        least = np.minimum.accumulate(tail)
        if ((tail > SWING * least) | ((tail > ABOVE) & (least <= ABOVE))).any():
            return "oscillates"
        if tail.mean() > max(ABOVE, self.ratio[0]):
            return "diverges"
        before = self.ratio[-2 * len(tail) : -len(tail)]
        return "slow" if tail.mean() <= FALLING * before.mean() else "sticks"


def row(setting: Setting, form: Form, least: float, result: Result) -> dict[str, Any]:
    """A case as a row of steps.jsonl."""
    steps = len(result.ratio)
    kept = np.unique(np.geomspace(1, steps, POINTS).astype(int)) - 1
    ratios = {f"ratio_{t}": float(result.ratio[t]) if t < steps else None for t in (0, 100, 500)}
    return {
        "case": next((name for name, s in CASES.items() if s == setting), None),
        "data": setting.data,
        "bits": setting.bits,
        "rate": setting.rate,
        "start": setting.start,
        "form": form,
        "reference": least,
        **ratios,
        "ratio_tail": float(result.tail.mean()),
        "last_above": result.last_above,
        "verdict": result.verdict,
        "low": result.low,
        "high": result.high,
        "curve": [[int(t) + 1, float(f"{result.ratio[t]:.5g}")] for t in kept],
    }


def lines(results: dict[Setting, dict[Form, Result]], forms: tuple[Form, ...]) -> list[str]:
    """Verdict and mean ratio of the tail, a line per setting."""
    table = [f"{'data':7}{'bits':>4}  {'rate':>6}  {'start':9}  " + "".join(f"{form:20}" for form in forms)]
    for s, by_form in results.items():
        cells = "".join(f"{by_form[form].verdict:11}{by_form[form].tail.mean():<9.3g}" for form in forms)
        table.append(f"{s.data:7}{s.bits:4}  {s.rate:6g}  {s.start:9}  {cells}")
    return [line.rstrip() for line in table]
