"""What people may be expected to say who want a feature that comes without example queries.

Features with examples show how far, and whereto, people's words lie from the features' own. That move is learnt by ridge regression,

    e_f - v_f ~ m + W (v_f - c),     W minimises  sum_f |e_f - v_f - m - W (v_f - c)|^2 + a |W|^2

over the features that have both, with c the mean of their v_f and m that of their moves; and where there are no examples

    e_f = v_f + m + W (v_f - c), brought to length 1                                                relevance.py has v_f and e_f

The move rather than e_f itself is what is drawn to its mean, so that few examples change little: with ten it is hardly more than m.
Numpy alone: `smidgen search add` needs it on a device.
"""

import numpy as np
from jaxtyping import Bool, Float

RIDGE = 0.3  # a
FEWEST = 10  # features with examples that say anything of the others


def expected(
    texts: Float[np.ndarray, "features width"], said: Float[np.ndarray, "known width"], known: Bool[np.ndarray, "features"]
) -> Float[np.ndarray, "features width"] | None:
    """e of all features from v of all and e of the known ones, all of length 1; none where fewer than ten are known."""
    if known.sum() < FEWEST:
        return None
    v, moves = texts[known].astype(np.float64), said.astype(np.float64) - texts[known]
    centre, usual = v.mean(0), moves.mean(0)
    x = v - centre
    w = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (moves - usual))
    return unit(texts + usual + (texts - centre) @ w)


def unit(rows: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    """Of length 1; zeros stay zeros."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
