"""How logits of the training images move while a linear head is trained on them: what AUM, forgetting and EL2N look at.

Plain stochastic gradient descent with momentum, several heads side by side, each with an order and, perhaps, labels of its own. Not `fit`,
whose AdamW trains one model: these values were defined on SGD, and a head is too small for a loop of its own each.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smidgen.refine.evidence import Evidence

EPOCHS = 30
BATCH = 64
RATE = 1.0  # of features with mean squared length 1, whose loss has a curvature of 1 at most
MOMENTUM = 0.9


def epochs(
    x: Float[Tensor, "n k"], y: Int[Tensor, "heads n"], classes: int, count: int = EPOCHS, seed: int = 0
) -> Iterator[Float[Tensor, "heads n classes"]]:
    """Logits of all images after every epoch; `x` as a Compression makes it, a row of labels per head."""
    heads, n = y.shape
    batch = min(BATCH, n)
    generator = torch.Generator().manual_seed(seed)
    w, velocity = x.new_zeros(2, heads, x.shape[1], classes).unbind()
    for _ in range(count):
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(heads)]).to(y.device)
        for rows in order[:, : n // batch * batch].split(batch, 1):  # (heads, batch)
            inputs = x[rows]
            errors = (inputs @ w).softmax(-1)
            errors.scatter_add_(2, y.gather(1, rows)[..., None], errors.new_full((*rows.shape, 1), -1.0))
            velocity = MOMENTUM * velocity + inputs.mT @ errors / batch
            w = w - RATE * (1 - MOMENTUM) * velocity
        yield x @ w


def dynamics_of(evidence: Evidence) -> Float[Tensor, "epochs n classes"]:
    """Those given, or those of one linear head."""
    if evidence.dynamics is not None:
        return evidence.dynamics
    return torch.cat(list(epochs(evidence.components, evidence.y[None], evidence.classes, seed=evidence.seed)))


def margins(logits: Float[Tensor, "*shape classes"], y: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The given class's logit less the largest other one.

    >>> margins(torch.tensor([[2.0, 5.0, 1.0]]), torch.tensor([0]))
    tensor([-3.])
    """
    own = y[..., None]
    others = logits.scatter(-1, own, -torch.inf)
    return logits.gather(-1, own)[..., 0] - others.max(-1).values
