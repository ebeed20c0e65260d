"""Wrong labels by several detectors, weighed by how well they find errors that we plant.

    1   every detector scores the given labels
    2   some labels are flipped on purpose, as the set's own confusions suggest; every detector scores those labels, several times over
    3   logistic regression tells planted labels from the others by the detectors' scores; no weight is negative, so that a detector that
        calls a label bad never speaks for it
    4   the same regression is applied to 1

Among the "others" of 3 there are the set's own errors. That lowers the probability of being planted but keeps its order, as long as planted
errors look like the set's own; this is learning from positive and unlabelled examples (Elkan and Noto, KDD 2008). With r(s) the
regression's ratio of densities, planted over others, and `share` the part of the set that is wrong (proportions.planted_share)

    P(wrong | s) = share * r(s)

No true label is needed, or used. The label proposed is the likeliest other one under the hidden-label model (noise.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.refine.detectors.mislabeled import LabelQuality
from smidgen.refine.detectors.noise import HiddenLabel, confusions
from smidgen.refine.detectors.votes import Votes
from smidgen.refine.evidence import Evidence, Method
from smidgen.refine.proportions import planted_share
from smidgen.refine.valuation.data_oob import DataOOB
from smidgen.refine.valuation.knn_shapley import KNNShapley

MEMBERS: Mapping[str, Method] = {
    "self-confidence": LabelQuality("self-confidence"),
    "hidden-label": HiddenLabel(),
    "data-oob": DataOOB(credit="probability"),
    "votes": Votes(),
    "knn-shapley": KNNShapley(),
}
LEAST, MOST = 0.05, 0.2  # of the labels, planted
RIDGE = 1e-3  # of the regression
EXTREME = 1e-4  # scores are brought inside (EXTREME, 1 - EXTREME), where a logit is finite


@dataclass(frozen=True)
class WrongLabels:
    """What the detectors found together; one entry per image."""

    wrong: Float[Tensor, "n"] = field(repr=False)
    "Probability that the given label is wrong."
    proposed: Int[Tensor, "n"] = field(repr=False)
    "The likeliest other class."
    confidence: Float[Tensor, "n"] = field(repr=False)
    "Probability that the proposal is right."
    scores: Mapping[str, Float[Tensor, "n"]] = field(repr=False)
    "Of every detector, in [0, 1], low is suspicious; `wrong-label` is 1 - wrong."
    weights: Mapping[str, float]
    "Of the detectors' standardised scores."
    share: float
    "Estimated part of the labels that is wrong."


@dataclass(frozen=True)
class Ensemble:
    """Detectors and how they are weighed."""

    members: Mapping[str, Method] = field(default_factory=lambda: MEMBERS)
    plantings: int = 2

    def __call__(self, evidence: Evidence) -> WrongLabels:
        """Scores every image as often as there are plantings, and once more."""
        evidence = replace(evidence, x=evidence.components[:, :-1])  # compressed once for all plantings
        n, y = len(evidence.y), evidence.y
        scores = {name: method(evidence).score for name, method in self.members.items()}
        q = HiddenLabel().posterior(evidence)
        met = logits(scores)
        features, targets = [], []
        for changed, planted in self.plantings_of(evidence, q):
            features.append(logits({name: method(changed).score for name, method in self.members.items()}))
            targets.append(planted)
        middle, spread = met.mean(0), met.std(0).clamp(min=1e-6)
        seen, planted = (torch.cat(features) - middle) / spread, torch.cat(targets)
        weights, bias = suspicion(-seen, planted)
        log_odds = -((met - middle) / spread) @ weights
        share = planted_share(-log_odds, seen[planted] @ weights)
        prior = float(planted.double().mean())
        ratio = torch.exp((log_odds + bias).clamp(max=50)) * (1 - prior) / prior
        wrong = (share * ratio).clamp(max=1 - 1 / n)
        other = q.scatter(1, y[:, None], 0)
        confidence, proposed = (other / other.sum(1, keepdim=True).clamp(min=1e-12)).max(1)
        named = dict(zip(scores, weights.tolist(), strict=True))
        order = {name: s for name, s in scores.items()} | {"wrong-label": 1 - wrong.to(evidence.x.dtype)}
        return WrongLabels(wrong.to(evidence.x.dtype), proposed, confidence * wrong.to(confidence), order, named, share)

    def plantings_of(self, evidence: Evidence, q: Float[Tensor, "n classes"]) -> Iterator[tuple[Evidence, Bool[Tensor, "n"]]]:
        """The evidence with labels planted, and which they are."""
        wrong = 1 - q.gather(1, evidence.y[:, None])[:, 0]
        rate = min(max(float(wrong.mean()), LEAST), MOST)
        for r in range(self.plantings):
            y, planted = plant(evidence.y, confusions(q, evidence.y), rate, evidence.seed + r)
            yield replace(evidence, y=y), planted


def plant(
    y: Int[Tensor, "n"], t: Float[Tensor, "classes classes"], rate: float, seed: int = 0
) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"]]:
    """A part of the labels changed, each to another class as often as t confuses it with that; and which were."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.zeros(len(y), dtype=torch.bool)
    planted[torch.randperm(len(y), generator=generator)[: round(rate * len(y))]] = True
    chances = (t.cpu() + 0.01 / len(t)).fill_diagonal_(0)  # a table without confusions: any other class
    drawn = torch.multinomial(chances.mT[y.cpu()[planted]].float(), 1, generator=generator)[:, 0]
    planted = planted.to(y.device)
    return y.masked_scatter(planted, drawn.to(y)), planted


def logits(scores: Mapping[str, Float[Tensor, "n"]]) -> Float[Tensor, "n members"]:
    """Of scores, float64: where scores crowd at 0 and 1 they are told apart."""
    s = torch.stack(list(scores.values()), 1).double().clamp(EXTREME, 1 - EXTREME)
    return torch.logit(s)


def suspicion(features: Float[Tensor, "n members"], planted: Bool[Tensor, "n"]) -> tuple[Float[Tensor, "members"], float]:
    """Weights, none negative, and bias of a logistic regression, by accelerated projected gradients."""
    x = F.pad(features, (0, 1), value=1.0)
    target = planted.to(x.dtype)
    rate = 1 / (float(torch.linalg.eigvalsh(x.mT @ x / len(x))[-1]) / 4 + RIDGE)
    w = ahead = x.new_zeros(x.shape[1])
    for step in range(500):
        gradient = x.mT @ (torch.sigmoid(x @ ahead) - target) / len(x) + RIDGE * F.pad(ahead[:-1], (0, 1))
        new = ahead - rate * gradient
        new[:-1].clamp_(min=0)
        ahead = new + step / (step + 3) * (new - w)
        w = new
    return w[:-1], float(w[-1])
