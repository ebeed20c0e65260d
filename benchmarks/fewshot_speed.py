"""Training speed of TPN and Bayesian TAML, whose tasks are computed side by side, against a loop over tasks of the same maths.

    python benchmarks/fewshot_speed.py [--device cuda] [--tasks 4] [--seconds 10]

The loop is what one would write after the papers: a task at a time without padding, torch's own batch norm, an inverse for TPN, and
`torch.autograd.grad(..., create_graph=True)` for the inner loop. Both are given the same tasks (32 x 32 noise: speed does not depend on
what is in the images; 5-way, 15 queries a class, TPN with 5 shots, Bayesian TAML with 1 to 50) and, before any timing, must have the same
loss in float64. A step is loss, gradient and Adam's update; on a GPU ours run as CUDA graphs (smidgen/fewshot/graphs.py), which are checked
to have the same loss and made before the clock starts. TPN's batch norm takes its statistics over all images of a batch in training; losses
are compared in evaluation mode and timed in training mode.

A row per method goes to benchmarks/results/fewshot_speed.csv: steps/s and tasks/s of both, and their ratio.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.cuda_graphs import replaying
from smidgen.fewshot.episodes import Episode, Sampler, Shots
from smidgen.fewshot.graphs import Training
from smidgen.fewshot.methods.btaml import BTAML, divergence, sample
from smidgen.fewshot.methods.inner import EPSILON
from smidgen.fewshot.methods.tpn import TPN
from smidgen.fewshot.models import make
from smidgen.images import Images

RESULTS = Path(__file__).parent / "results" / "fewshot_speed.csv"
SHAPE = (3, 32, 32)


def images(device: torch.device) -> Images:
    """20 classes of noise."""
    pixels = torch.randint(0, 256, (20 * 70, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    return Images("noise", pixels, torch.arange(20).repeat_interleave(70), tuple(map(str, range(20)))).to(device)


def singles(batch: Episode) -> list[Episode]:
    """The tasks of a batch one by one, without padding."""
    parts = []
    for t in range(len(batch.support_y)):
        support, query = batch.support_y[t] >= 0, batch.query_y[t] >= 0
        part = (x[t][real][None] for x, real in ((batch.support_x, support), (batch.support_y, support), (batch.query_x, query)))
        parts.append(Episode(*part, batch.query_y[t][query][None], batch.ways))
    return parts


def tpn_loop(method: TPN, batch: Episode) -> Tensor:
    """Mean loss, task after task."""
    losses = []
    for task in singles(batch):
        maps = method.backbone(torch.cat([task.support_x[0], task.query_x[0]]))
        x = maps.flatten(1) / method.graph(maps)
        w = torch.exp(-(x[:, None] - x[None]).square().mean(-1) / 2)
        kept = torch.zeros_like(w).scatter(1, w.topk(method.propagation.k).indices, 1.0)
        w = w * torch.maximum(kept, kept.T)
        d = w.sum(1).rsqrt()
        s = d[:, None] * w * d
        y = F.pad(F.one_hot(task.support_y[0], batch.ways).to(x.dtype), (0, 0, 0, task.query_y.shape[1]))
        f = torch.linalg.inv(torch.eye(len(s), dtype=s.dtype, device=s.device) - method.propagation.alpha * s) @ y
        losses.append(F.cross_entropy(f, torch.cat([task.support_y[0], task.query_y[0]])))
    return torch.stack(losses).mean()


def network(theta: list[tuple[Tensor, Tensor]], shift: Tensor, x: Tensor) -> Tensor:
    """Logits of Bayesian TAML's classifier."""
    for (weight, bias), moved in zip(theta[:-1], shift, strict=True):
        x = F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, torch.ones_like(moved), moved, True, 0.1, EPSILON)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), *theta[-1])


def btaml_loop(method: BTAML, batch: Episode, noise: dict[str, Tensor]) -> Tensor:
    """Mean objective, task after task."""
    classifier, ways, losses = method.classifier, batch.ways, []
    for t, task in enumerate(singles(batch)):
        q = method.encoder(task)
        phi = {name: value[0] for name, value in sample(q, {name: value[t : t + 1] for name, value in noise.items()}).items()}
        convolutions = list(zip(classifier.weights, classifier.biases, *phi["z"], strict=True))
        theta = [(w * (1 + z_w)[:, None, None, None], b + z_b) for w, b, z_w, z_b in convolutions]
        theta.append((classifier.shift.new_zeros(ways, classifier.features), classifier.shift.new_zeros(ways)))
        theta = [(w.requires_grad_() if w.is_leaf else w, b.requires_grad_() if b.is_leaf else b) for w, b in theta]
        rates = [(w[0], b[0]) for w, b in method.rates(task)]
        y, weight = task.support_y[0], phi["omega"].softmax(0) * ways / task.support_y.shape[1]
        for _ in range(classifier.inner.steps):
            loss = (weight[y] * F.cross_entropy(network(theta, classifier.shift, task.support_x[0]), y, reduction="none")).sum()
            gradient = iter(torch.autograd.grad(loss, [p for pair in theta for p in pair], create_graph=True))
            theta = [
                (w - factor * rate_w * next(gradient), b - factor * rate_b * next(gradient))
                for (w, b), (rate_w, rate_b), factor in zip(theta, rates, phi["gamma"].exp(), strict=True)
            ]
        answer = F.cross_entropy(network(theta, classifier.shift, task.query_x[0]), task.query_y[0])
        losses.append(answer + divergence(q, 1)[0] / (task.support_y.shape[1] + task.query_y.shape[1]))
    return torch.stack(losses).mean()


def btaml_batched(method: BTAML, batch: Episode, noise: dict[str, Tensor]) -> Tensor:
    """The same as the package computes it, with the noise given."""
    from smidgen.fewshot.methods.inner import query_loss

    q = method.encoder(batch)
    size = (batch.support_y >= 0).sum(1) + (batch.query_y >= 0).sum(1)
    answers = method.answers(batch, sample(q, noise), method.config.inner.steps)
    return (query_loss(answers, batch) + divergence(q, len(size)) / size).mean()


Loss = Callable[[Any, Episode, dict[str, Tensor]], Tensor]
"(method, batch, noise) -> loss"


def rate(method: nn.Module, loss: Loss, batches: list[Episode], noises: list[dict[str, Tensor]], seconds: float) -> float:
    """Steps per second, of loss, gradient and update; every batch once to warm up."""
    optimizer = torch.optim.Adam(method.parameters(), 1e-4)
    cuda, started, steps = next(method.parameters()).is_cuda, 0.0, -len(batches)
    while steps < 1 or time.monotonic() - started < seconds:
        if steps == 0:
            started = time.monotonic()
        i = steps % len(batches)
        optimizer.zero_grad()
        loss(method, batches[i], noises[i]).backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        steps += 1
    return steps / (time.monotonic() - started)


def by_graphs(method: nn.Module, tasks: Sampler) -> Loss:
    """A method's loss as `smidgen fewshot train` has it on a GPU; refuses graphs whose loss is another, float32 and its noise aside."""
    training = Training(method)
    training.capture(tasks)
    losses = []
    for loss in (method.loss, training):  # pyright: ignore  a Method
        torch.manual_seed(1)
        losses.append(float(loss(tasks(0)).detach()))
    if not abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[0]):
        raise SystemExit(f"loss {losses[0]} without graphs, {losses[1]} with them")
    return lambda _, batch, noise: training(batch)


def compared(name: str, method: nn.Module, side_by_side: Loss, loop: Loss, shots: Shots, options: argparse.Namespace) -> dict:
    """A row; refuses to time what does not compute the same, in float64."""
    tasks = Sampler(images(options.device), 5, shots, 15, tasks=options.tasks)
    batches = [tasks(i) for i in range(8)]
    with torch.no_grad():
        read = [method.encoder(batch) if isinstance(method, BTAML) else {} for batch in batches]
        noises = [{name: torch.randn_like(mu) for name, (mu, _) in q.items()} for q in read]
    exact, task = copy.deepcopy(method).double().eval(), batches[0]
    task = replace(task, support_x=task.support_x.double(), query_x=task.query_x.double())
    a, b = (float(f(exact, task, {n: value.double() for n, value in noises[0].items()}).detach()) for f in (side_by_side, loop))
    if not abs(a - b) <= 1e-8 * abs(b):
        raise SystemExit(f"{name}: loss {a} side by side, {b} in a loop")
    method.train()
    fast = by_graphs(method, tasks) if options.device.type == "cuda" else side_by_side
    with replaying():
        fast, slow = (rate(method, f, batches, noises, options.seconds) for f in (fast, loop))
    row = {"method": name, "tasks": options.tasks, "loss": round(a, 5), "loop_loss": round(b, 5)}
    row |= {"steps_per_s": round(fast, 3), "loop_steps_per_s": round(slow, 3), "tasks_per_s": round(fast * options.tasks, 2)}
    return row | {"ratio": round(fast / slow, 2)} | rows.provenance()


def tpn(options: argparse.Namespace) -> dict:
    """Higher-shot training for one shot."""
    torch.manual_seed(0)
    method = make("tpn", SHAPE, 5, {}).to(options.device)
    with torch.no_grad():
        method.graph[-1].bias.fill_(1.0)  # sigma about 1: no node is left alone
    return compared("tpn", method, lambda m, batch, _: m.loss(batch), lambda m, batch, _: tpn_loop(m, batch), 5, options)


def btaml(options: argparse.Namespace) -> dict:
    """Any-shot training."""
    torch.manual_seed(0)
    return compared("btaml", make("btaml", SHAPE, 5, {}).to(options.device), btaml_batched, btaml_loop, "any", options)


def main() -> None:
    """Times and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--tasks", type=int, default=4, help="of a step")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each timing")
    parser.add_argument("--methods", nargs="+", choices=("tpn", "btaml"), default=["tpn", "btaml"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.methods:
        row = {"tpn": tpn, "btaml": btaml}[name](options)
        print(row, flush=True)
        rows.append(options.results, list(row), [row])


if __name__ == "__main__":
    main()
