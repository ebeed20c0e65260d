"""The true label as a hidden variable: what is P(true = j | picture, given label)?

    Bekker and Goldberger, Training Deep Neural-Networks Based on Unreliable Labels, ICASSP 2016; EM as Dawid and Skene 1979

    given i <- true j <- picture x          P(given i | x) = sum_j T_ij p_j(x)

    E   q_nj = T_{y_n j} p_j(x_n) / sum_k T_{y_n k} p_k(x_n)          p(x_n) of a machine trained without image n (kernel.py)
    M   T_ij = sum_{n: y_n = i} q_nj / sum_n q_nj;   the machine is trained again, on q instead of y

It begins with T of the confident joint (mislabeled.py). 1 - q_y is the probability that the label is wrong, argmax q the label proposed,
its q the confidence. Where the labels are right T is the identity, and nothing is proposed. What confident learning does not have: machines
that no longer learn the wrong labels, and a prior for which confusions are usual.

Probabilities that were given stay as they are; T alone is learned then. A few rounds only: q teaches the machine that makes q, so that
errors shared by all of a cluster would in the end be believed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.refine.detectors.mislabeled import confident_joint, flipping
from smidgen.refine.evidence import Evidence, Need, Scores

PRIOR = 1e-4  # least of T: no confusion is impossible


@dataclass(frozen=True)
class HiddenLabel:
    """A machine and a table of confusions, taught by each other."""

    rounds: int = 4
    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, evidence: Evidence) -> Scores:
        """Probability that the given label is right, its own score."""
        right = self.posterior(evidence).gather(1, evidence.y[:, None])[:, 0]
        return Scores(right, right)

    def posterior(self, evidence: Evidence) -> Float[Tensor, "n classes"]:
        """q."""
        given, machine, targets = evidence.probabilities, evidence.machine, evidence.targets
        fit = machine.best(targets)
        p = machine.probabilities(targets, fit) if given is None else given
        t = flipping(confident_joint(p, evidence.y))
        q = explained(p, evidence.y, t)
        for _ in range(self.rounds):
            p = machine.probabilities(q.to(targets.dtype), fit) if given is None else given
            q = explained(p, evidence.y, t)
            t = confusions(q, evidence.y)
        return q


def explained(p: Float[Tensor, "n classes"], y: Int[Tensor, "n"], t: Float[Tensor, "classes classes"]) -> Float[Tensor, "n classes"]:
    """The E step.

    >>> t = torch.tensor([[0.9, 0.5], [0.1, 0.5]])  # of class 1 a half is called 0
    >>> explained(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), t)
    tensor([[0.6429, 0.3571]])
    """
    joint = p * t.clamp(min=PRIOR)[y]
    return joint / joint.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


def undone(p: Float[Tensor, "n classes"], t: Float[Tensor, "classes classes"]) -> Float[Tensor, "n classes"]:
    """Probabilities of the true label from those of the given one: T^-1 p, none below PRIOR.

    >>> undone(torch.tensor([[0.7, 0.3]]), torch.tensor([[0.9, 0.5], [0.1, 0.5]]))
    tensor([[0.5000, 0.5000]])
    """
    true = (p @ torch.linalg.pinv(t).mT).clamp(min=PRIOR)
    return true / true.sum(1, keepdim=True)


def confusions(q: Float[Tensor, "n classes"], y: Int[Tensor, "n"]) -> Float[Tensor, "classes classes"]:
    """The M step of T: P(given i | true j), columns summing to 1."""
    return flipping(q.new_zeros(q.shape[1], q.shape[1]).index_add_(0, y, q))
