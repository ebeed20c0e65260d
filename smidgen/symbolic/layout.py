"""Which token lies in which cell, without torch: for the exact back end, for pictures, on a device.

The weights are those of `seq2grid.weights`, by the recursion derived there. With u, p, n the probabilities of TLU, NLP and no-op,
f[h, w] that what is written at (0,0) now ends at (h, w), and q[m] that m pushes are still to come, from the last token back:

    M[h,w] = (u + p) f[h,w]
    f[h,w] <- u f[h,w-1] + n f[h,w] + [w=0][h>=1] p q[h-1]         q[m] <- (1 - p) q[m] + p q[m-1]
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EMPTY = -1


@dataclass(frozen=True)
class Cells:
    """A grid as one sees it: the likeliest content of every cell."""

    token: Int[np.ndarray, "rows columns"]
    "Number of the token in the question, or EMPTY."
    weight: Float[np.ndarray, "rows columns"]
    "Probability of that."

    @property
    def rows(self) -> int:
        """Lists."""
        return self.token.shape[0]

    @property
    def columns(self) -> int:
        """Slots of a list."""
        return self.token.shape[1]


def weights(actions: Float[np.ndarray, "n time 3"], rows: int, columns: int) -> Float[np.ndarray, "n time rows columns"]:
    """M: how much of every token each cell holds; n questions at once.

    >>> weights(np.array([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2]]]), 2, 3)[0, 0].round(3).tolist()
    [[0.03, 0.135, 0.105], [0.42, 0.015, 0.0]]
    """
    u, p, n = (actions[..., i, None] for i in range(3))
    f, q = np.zeros((len(actions), rows, columns)), np.zeros((len(actions), rows))
    f[:, 0, 0] = q[:, 0] = 1
    m = np.empty((*actions.shape[:2], rows, columns))
    for t in reversed(range(actions.shape[1])):
        m[:, t] = (u + p)[:, t, :, None] * f
        moved = n[:, t, :, None] * f
        moved[..., 1:] += u[:, t, :, None] * f[..., :-1]
        moved[:, 1:, 0] += p[:, t] * q[:, :-1]
        q[:, 1:], q[:, 0] = (1 - p[:, t]) * q[:, 1:] + p[:, t] * q[:, :-1], (1 - p[:, t, 0]) * q[:, 0]
        f = moved
    return m


def cells(m: Float[np.ndarray, "time rows columns"]) -> Cells:
    """The likeliest token of every cell, or that it is empty."""
    token, weight, empty = m.argmax(0), m.max(0), 1 - m.sum(0)
    return Cells(np.where(weight >= empty, token, EMPTY), np.maximum(weight, empty))
