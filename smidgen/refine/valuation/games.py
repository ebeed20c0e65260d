"""The game that retraining valuations play: a utility of subsets of the training images.

    utility(masks) -> U of every row      masks (m, n): row r holds the images of subset r

Many subsets are asked for at once, because linear heads are trained at once (heads.py). Any other game with this signature will do.
"""

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

from smidgen.refine.evidence import Evidence, required
from smidgen.refine.heads import Compression, predictions

Utility = Callable[[Bool[Tensor, "m n"]], Float[Tensor, "m"]]


class HeadGame:
    """U(S): accuracy on the validation set of a linear head trained on S; of the empty set that of a guess."""

    def __init__(self, evidence: Evidence, width: int = 32, steps: int = 20) -> None:
        """`width` components of the features are used: valuations train thousands of heads."""
        x_val, self.y_val = required(evidence)
        compression = Compression(evidence.x, width)
        self.x, self.x_val = compression(evidence.x), compression(x_val)
        self.targets = evidence.targets
        self.decay = evidence.decay
        self.steps = steps

    def __call__(self, masks: Bool[Tensor, "m n"]) -> Float[Tensor, "m"]:
        """Accuracy of every subset's head."""
        accuracy = self.x.new_full((len(masks),), 1 / self.targets.shape[1])
        filled = masks.any(1).nonzero()[:, 0]
        weights = masks[filled].mT.to(self.x.dtype)
        for part, p in predictions(self.x, self.targets, weights, self.decay, self.steps, self.x_val):
            accuracy[filled[part]] = (p.argmax(-1) == self.y_val[:, None]).to(self.x.dtype).mean(0)
        return accuracy

    def deviation(self, accuracy: float) -> float:
        """Standard deviation of an accuracy over validation sets of this size."""
        return (max(accuracy * (1 - accuracy), 1 / len(self.y_val)) / len(self.y_val)) ** 0.5
