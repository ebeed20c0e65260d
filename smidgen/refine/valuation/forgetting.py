"""Forgetting: how often an image that was right is wrong again later in training.

    Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019, arXiv 1812.05159

An event is an epoch after which the image is wrong, having been right after the one before. An image that is never right is forgotten
infinitely often. Many events, or infinitely many: hard, or wrongly labelled.

Worked by hand: right after epochs 1 and 3 of 4: two events, value -2, score 1/2.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from smidgen.refine.dynamics import dynamics_of
from smidgen.refine.evidence import Evidence, Need, Scores


@dataclass(frozen=True)
class Forgetting:
    """Of the training that was watched, or of a linear head's."""

    needs: ClassVar[tuple[Need, ...]] = ("dynamics",)

    def __call__(self, evidence: Evidence) -> Scores:
        """Minus the number of events; -inf where never learned. The score is 1 less events by epochs."""
        return self.values(dynamics_of(evidence), evidence.y)

    def values(self, dynamics: Float[Tensor, "epochs n classes"], y: Tensor) -> Scores:
        """The same of logits."""
        right = dynamics.argmax(-1) == y
        events = (right[:-1] & ~right[1:]).sum(0).to(dynamics.dtype)
        learned = right.any(0)
        value = (-events).masked_fill(~learned, -float("inf"))
        return Scores(value, (1 - events / len(dynamics)).masked_fill(~learned, 0.0))
