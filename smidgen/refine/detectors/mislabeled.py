"""Wrong labels from out-of-fold probabilities: label quality and confident learning.

    Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021, arXiv 1911.00068

p_i: probabilities of image i by models that were not trained on it; y_i its given label. In-sample probabilities make everything here fail
silently. Label quality, in [0, 1], low is suspicious:

    self-confidence      p_i,y_i
    normalised margin    (p_i,y_i - max_{k != y_i} p_i,k + 1) / 2
    weighted entropy     (ln C)-normalised entropy of p_i over p_i,y_i, brought to [0, 1]

Confident learning: t_k is the mean of p_k over images given k. An image is confidently of the likeliest class among {k : p_k >= t_k}; if
there is none it is not counted. C[given][guess] counts; calibrated to the counts of given labels and divided by n it estimates Q, the joint
distribution of given and true labels; 1 - trace Q is the share of wrong labels.

Not cleanlab's code, whose guess is the argmax over all classes wherever several pass: it can be a class below its own threshold. The
paper's is among the classes that passed. Nor is a dependency needed for a page of counting; tests compare the two.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smidgen.refine.evidence import Evidence, Need, Scores

TOLERANCE = 1e-6  # of passing a threshold
Quality = Literal["self-confidence", "normalised-margin", "weighted-entropy"]


@dataclass(frozen=True)
class LabelQuality:
    """How well the label fits what models say that did not see the image."""

    kind: Quality = "self-confidence"
    "self-confidence for junk, normalised-margin for swapped labels."
    needs: ClassVar[tuple[Need, ...]] = ("probabilities",)

    def __call__(self, evidence: Evidence) -> Scores:
        """Quality, its own score."""
        quality = label_quality(evidence.out_of_fold, evidence.y, self.kind)
        return Scores(quality, quality)


@dataclass(frozen=True)
class KernelQuality:
    """The same by a kernel machine trained without the image: for embeddings in which classes are no half-spaces."""

    kind: Quality = "self-confidence"
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """Quality, its own score."""
        machine, targets = evidence.machine, evidence.targets
        quality = label_quality(machine.probabilities(targets, machine.best(targets)), evidence.y, self.kind)
        return Scores(quality, quality)


def label_quality(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"], kind: Quality = "self-confidence") -> Float[Tensor, "n"]:
    """In [0, 1].

    >>> label_quality(torch.tensor([[0.2, 0.7, 0.1]]), torch.tensor([0]), "normalised-margin")
    tensor([0.2500])
    """
    own = p.gather(1, y[:, None])[:, 0]
    if kind == "self-confidence":
        return own
    if kind == "normalised-margin":
        return (own - p.scatter(1, y[:, None], -torch.inf).amax(1) + 1) / 2
    least = torch.finfo(p.dtype).tiny
    entropy = -torch.special.xlogy(p, p).sum(1) / torch.log(p.new_tensor(p.shape[1]))
    ratio = (entropy / own.clamp(min=least)).clamp(min=1e-6)  # certain of the given label: 0, where the next line has its limit 1
    return torch.log1p(ratio) / ratio


# --- confident learning ----------------------------------------------------------------------------------------------


def thresholds(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "classes"]:
    """t; of a class without images above all probabilities."""
    classes = p.shape[1]
    total = p.new_zeros(classes).index_add_(0, y, p.gather(1, y[:, None])[:, 0])
    count = y.bincount(minlength=classes)
    return torch.where(count > 0, total / count.clamp(min=1), 2.0)


def guesses(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The class an image is confidently of; -1 for none."""
    passed = p >= thresholds(p, y) - TOLERANCE
    best = p.masked_fill(~passed, -torch.inf).argmax(1)
    return torch.where(passed.any(1), best, -1)


def confident_joint(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "classes classes"]:
    """Calibrated counts, rows given and columns true: n Q. Rows sum to the counts of given labels."""
    classes = p.shape[1]
    guess = guesses(p, y)
    counted = guess >= 0
    c = (y * classes + guess)[counted].bincount(minlength=classes**2).view(classes, classes).to(p.dtype)
    c.diagonal().clamp_(min=1)
    return c / c.sum(1, keepdim=True) * y.bincount(minlength=classes)[:, None]


def flipping(joint: Float[Tensor, "classes classes"]) -> Float[Tensor, "classes classes"]:
    """P(given i | true j), columns summing to 1."""
    return joint / joint.sum(0, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)


Rule = Literal["confident", "by-class", "by-noise-rate", "both"]


def flagged(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"], rule: Rule = "both", least: int = 1) -> Bool[Tensor, "n"]:
    """Images whose label confident learning takes for wrong; never so many that a class is left with fewer than `least`.

    confident       those counted off the diagonal of C
    by-class        in class i the n sum_{j != i} Q_ij with the least p_i
    by-noise-rate   for each i != j the n Q_ij with the largest p_j - p_i
    both            those that the last two agree on
    """
    own, argmax = p.gather(1, y[:, None])[:, 0], p.argmax(1)
    if rule == "confident":
        guess = guesses(p, y)
        chosen = (guess >= 0) & (guess != y)
    else:
        joint = confident_joint(p, y)
        chosen = argmax != y
        if rule != "by-noise-rate":
            chosen &= _by_class(own, y, joint)
        if rule != "by-class":
            chosen &= _by_noise_rate(p, own, y, joint)
    for c in range(p.shape[1]):
        members = (y == c).nonzero()[:, 0]
        kept = own[members].argsort(descending=True)[:least]
        if (~chosen[members]).sum() < least:
            chosen[members[kept]] = False
    return chosen


def _by_class(own: Tensor, y: Tensor, joint: Tensor) -> Bool[Tensor, "n"]:
    chosen = torch.zeros_like(y, dtype=torch.bool)
    for c, number in enumerate((joint.sum(1) - joint.diagonal()).round().int().tolist()):
        members = (y == c).nonzero()[:, 0]
        chosen[members[own[members].argsort(stable=True)[:number]]] = True
    return chosen


def _by_noise_rate(p: Tensor, own: Tensor, y: Tensor, joint: Tensor) -> Bool[Tensor, "n"]:
    chosen = torch.zeros_like(y, dtype=torch.bool)
    for i, row in enumerate(joint.round().int().tolist()):
        members = (y == i).nonzero()[:, 0]
        for j, number in enumerate(row):
            if i != j:
                margin = p[members, j] - own[members]
                chosen[members[margin.argsort(descending=True, stable=True)[:number]]] = True
    return chosen
