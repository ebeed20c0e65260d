"""Wrong labels by several opinions of one picture, none of which was taught by that picture.

    log p_i = sum_m w_m log p_i^m + const          opinions m: a kernel machine without image i (kernel.py), its neighbours' votes, and
                                                   the probabilities given, where there are some

The weights w, none negative, are those that give the labels the least cross-entropy: an opinion counts as far as it helps to predict labels
it has not seen (stacking, Wolpert 1992; the pool is Hinton's product of experts). Wrong labels hardly sway that choice, for nobody can
predict them. s_i = -logit p_i,y_i is how surprising a label is, and

    P(wrong | s) = sigmoid(a s + c)

    P(true = j | wrong, s) ~ p_ij^b for j other than y_i

a is that of a logistic regression that tells labels we flipped from the others, b the best at telling what they were before; c is such that
the mean of P is the share of wrong labels that the confident joint of p estimates (mislabeled.py). No true label is needed, or used.

That joint counts what models alone confuse among the wrong labels. The hidden-label model (noise.py) on the same p and joint does not: a
surprising label is right where the picture's ambiguity explains it better than the noise. It ranks worse, but who drops should ask it too.

Weights from planted errors were tried and left: a detector looks good at finding the errors one thinks of planting, and people make others
(dev/log.md). Planted errors set a and b alone, which change no ranking.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.refine.detectors.mislabeled import confident_joint, flipping
from smidgen.refine.detectors.noise import explained, undone
from smidgen.refine.detectors.votes import Votes
from smidgen.refine.evidence import Evidence

LEAST = 1e-6  # of an opinion: a vote may be unanimous
RATE = 0.1  # of the labels, planted
POWERS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # tried for b
VOTES = Votes(50, 0.2)


@dataclass(frozen=True)
class WrongLabels:
    """What was found; one entry per image."""

    wrong: Float[Tensor, "n"] = field(repr=False)
    "Probability that the given label is wrong."
    hidden: Float[Tensor, "n"] = field(repr=False)
    "The same by the hidden-label model."
    proposed: Int[Tensor, "n"] = field(repr=False)
    "The likeliest other class."
    confidence: Float[Tensor, "n"] = field(repr=False)
    "Probability that the proposal is right."
    scores: Mapping[str, Float[Tensor, "n"]] = field(repr=False)
    "What every opinion gives the label, in [0, 1], low is suspicious; `wrong-label` is 1 - wrong."
    weights: Mapping[str, float]
    "Of the opinions."
    share: float
    "Estimated part of the labels that is wrong."


@dataclass(frozen=True)
class Ensemble:
    """Opinions pooled; seconds for some thousand images."""

    plantings: int = 2
    "Times that labels are flipped to find a and b."

    def __call__(self, evidence: Evidence) -> WrongLabels:
        """P(wrong) of every image, and what to put instead."""
        if self.plantings < 1:
            raise UserError(f"P(wrong) needs labels planted once or more, got {self.plantings}")
        y, named = evidence.y, opinions(evidence)
        logs = stacked(named)
        weights = stacking(logs, y)
        p = pool(logs, weights)
        surprise = surprises(p, y)
        joint = confident_joint(p, y)
        share = float(1 - joint.trace() / joint.sum())
        flips = flipping(joint)
        hidden = 1 - own(explained(undone(p, flips), y, flips), y)
        slope, power = self.calibration(evidence, weights)
        wrong = with_mean(slope * surprise, share)
        chance, proposed = alternatives(p, y, power).max(1)
        scores = {name: own(q, y).to(evidence.x.dtype) for name, q in named.items()} | {"wrong-label": (1 - wrong).to(evidence.x.dtype)}
        named_weights = dict(zip(named, weights.tolist(), strict=True))
        wrong, hidden, confidence = (v.to(evidence.x.dtype) for v in (wrong, hidden, chance * wrong))
        return WrongLabels(wrong, hidden, proposed, confidence, scores, named_weights, share)

    def calibration(self, evidence: Evidence, weights: Float[Tensor, "m"]) -> tuple[float, float]:
        """a and b: how fast planted labels outnumber others as labels surprise more, and how sharply p tells what they were."""
        made = []
        for r in range(self.plantings):
            y, planted = plant(evidence.y, evidence.classes, RATE, evidence.seed + r)
            made.append((pool(stacked(opinions(evidence.with_labels(y))), weights), y, planted))
        p, y, planted = (torch.cat(part) for part in zip(*made, strict=True))
        before = evidence.y.repeat(self.plantings)[planted]
        losses = {b: F.nll_loss(alternatives(p[planted], y[planted], b).clamp(min=LEAST).log(), before) for b in POWERS}
        return float(regression(surprises(p, y), planted)), min(losses, key=lambda b: float(losses[b]))


def opinions(evidence: Evidence) -> dict[str, Float[Tensor, "n classes"]]:
    """Probabilities of every class by name, each without the image it is about."""
    machine, targets = evidence.machine, evidence.targets
    found = {"kernel": machine.probabilities(targets, machine.best(targets)), "votes": VOTES.shares(evidence, targets)}
    return found if evidence.probabilities is None else found | {"probabilities": evidence.probabilities}


def stacked(named: Mapping[str, Float[Tensor, "n classes"]]) -> Float[Tensor, "m n classes"]:
    """Their logarithms, float64."""
    return torch.stack([p.double().clamp(min=LEAST).log() for p in named.values()])


def pool(logs: Float[Tensor, "m n classes"], weights: Float[Tensor, "m"]) -> Float[Tensor, "n classes"]:
    """p."""
    return (weights[:, None, None] * logs).sum(0).softmax(1)


def stacking(logs: Float[Tensor, "m n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "m"]:
    """The weights with the least cross-entropy, by Newton steps among those not negative (a convex problem of few unknowns)."""
    targets = F.one_hot(y, logs.shape[2]).to(logs.dtype)
    w = logs.new_full((len(logs),), 1 / len(logs))
    loss = _cross_entropy(logs, w, targets)
    for _ in range(50):
        p = pool(logs, w)
        mean = (p * logs).sum(2)  # (m, n)
        gradient = ((p - targets) * logs).sum((1, 2)) / len(y)
        centred = logs - mean[..., None]
        hessian = torch.einsum("anc,nc,bnc->ab", centred, p, centred) / len(y)
        free = (w > 0) | (gradient < 0)
        step = torch.zeros_like(w)
        ridge = 1e-9 * torch.eye(int(free.sum()), dtype=w.dtype, device=w.device)
        step[free] = torch.linalg.solve(hessian[free][:, free] + ridge, gradient[free])
        for halvings in range(20):
            new = (w - step * 0.5**halvings).clamp(min=0)
            lower = _cross_entropy(logs, new, targets)
            if lower < loss:
                break
        else:
            return w
        w, loss = new, lower
    return w


def _cross_entropy(logs: Tensor, w: Tensor, targets: Tensor) -> float:
    return float(-(targets * (w[:, None, None] * logs).sum(0).log_softmax(1)).sum(1).mean())


def own(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """What p gives the label."""
    return p.gather(1, y[:, None])[:, 0]


def alternatives(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"], power: float) -> Float[Tensor, "n classes"]:
    """Chances of the other classes where the label is wrong; that of the label is 0."""
    return (power * p.log().scatter(1, y[:, None], -torch.inf)).softmax(1)


def surprises(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """s = -logit p_y."""
    return -torch.logit(own(p, y).double(), 1e-9)


def plant(y: Int[Tensor, "n"], classes: int, rate: float, seed: int = 0) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"]]:
    """A part of the labels changed, each to any other class; and which were."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.zeros(len(y), dtype=torch.bool)
    planted[torch.randperm(len(y), generator=generator)[: max(1, round(rate * len(y)))]] = True
    moved = torch.randint(1, classes, (len(y),), generator=generator).to(y.device)
    planted = planted.to(y.device)
    return torch.where(planted, (y + moved) % classes, y), planted


def regression(s: Float[Tensor, "n"], planted: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """The slope of a logistic regression, by Newton's method; as Platt's, with targets moved inside (0, 1) so that it is finite."""
    ones = int(planted.sum())
    targets = torch.where(planted, (ones + 1) / (ones + 2), 1 / (len(planted) - ones + 2)).to(s.dtype)
    x = torch.stack([s, torch.ones_like(s)], 1)
    w = x.new_zeros(2)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).mT @ x / len(x) + 1e-6 * torch.eye(2, dtype=x.dtype, device=x.device)
        step = torch.linalg.solve(hessian, x.mT @ (p - targets) / len(x))
        w = w - step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))  # far from the minimum Newton's steps overshoot
        if float(step.abs().max()) < 1e-9:
            break
    return w[0].clamp(min=0)


def with_mean(log_odds: Float[Tensor, "n"], share: float) -> Float[Tensor, "n"]:
    """Probabilities in the order of the odds, with this mean: all odds are moved by one number, found by bisection."""
    low, high = -float(log_odds.max()) - 50, -float(log_odds.min()) + 50
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(log_odds + middle).mean()) < share else (low, middle)
    return torch.sigmoid(log_odds + low)
