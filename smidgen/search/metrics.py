"""How good a ranking is. Needs numpy alone.

Of a query with relevant features R and the ranking d_1, d_2, ...:

    hit@k    1 if one of d_1 .. d_k is in R
    MRR@10   1 / rank of the first in R, 0 if that is beyond 10
    nDCG@10  sum over i <= 10 with d_i in R of 1 / log2(i + 1), divided by what the best order gives
    AUROC    chance that the best score of an answerable query is above that of one that nothing fits (ties count half)

Equal scores are ranked in the order of the features.

>>> figures([[1, 0, 2]], [{0}])["mrr@10"], round(figures([[1, 0, 2]], [{0}])["ndcg@10"], 5)
(0.5, 0.63093)
"""

from collections.abc import Sequence, Set

import numpy as np
from jaxtyping import Float, Int

from smidgen.search.features import Feature, Query

DEPTH = 10
HITS = (1, 3, 5, 10)


def ranking(scores: Float[np.ndarray, "features"], depth: int = DEPTH) -> Int[np.ndarray, "_"]:
    """The `depth` best features, the best first; those that score -inf were not found.

    >>> ranking(np.array([0.5, -np.inf, 0.7])).tolist()
    [2, 0]
    """
    best = np.argsort(-scores, kind="stable")[:depth]
    return best[np.isfinite(scores[best])]


def figures(rankings: Sequence[Sequence[int] | Int[np.ndarray, "_"]], relevant: Sequence[Set[int]]) -> dict[str, float]:
    """Means over queries, each with its ten best or what was found, and the numbers of its relevant features."""
    if not rankings or not all(relevant):
        raise ValueError("figures are of queries, each with a relevant feature")
    hits, reciprocal, gains = [], [], []
    for ranked, right in zip(rankings, relevant, strict=True):
        found = [int(d) in right for d in ranked[:DEPTH]]
        first = found.index(True) + 1 if True in found else None
        hits.append([first is not None and first <= k for k in HITS])
        reciprocal.append(0.0 if first is None else 1 / first)
        best = sum(_discount(i) for i in range(min(DEPTH, len(right))))
        gains.append(sum(_discount(i) for i, yes in enumerate(found) if yes) / best)
    means = np.mean(hits, 0)
    return {f"hit@{k}": float(m) for k, m in zip(HITS, means, strict=True)} | {
        "mrr@10": float(np.mean(reciprocal)),
        "ndcg@10": float(np.mean(gains)),
    }


def by_kind(scores: Float[np.ndarray, "queries features"], queries: Sequence[Query], features: Sequence[Feature]) -> dict[str, dict]:
    """Figures of every kind of query there is, of all answerable ones, and {auroc} of contextual ones against none."""
    number = {f.id: i for i, f in enumerate(features)}
    rankings = [ranking(row) for row in scores]
    relevant = [{number[name] for name in q.relevant} for q in queries]
    found = {}
    for kind in ("contextual", "keyword", "typo", "all"):
        rows = [i for i, q in enumerate(queries) if q.kind == kind or (kind == "all" and q.kind != "none")]
        if rows:
            found[kind] = figures([rankings[i] for i in rows], [relevant[i] for i in rows])
    best = scores.max(1)
    fits, none = (best[[q.kind == kind for q in queries]] for kind in ("contextual", "none"))
    if len(fits) and len(none):
        found["none"] = {"auroc": auroc(fits, none)}
    return found


def auroc(above: Float[np.ndarray, "n"], below: Float[np.ndarray, "m"]) -> float:
    """Chance that a score of `above` beats one of `below`.

    >>> auroc(np.array([0.9, 0.5]), np.array([0.5, 0.1]))
    0.875
    """
    a, b = above[:, None], below[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def _discount(i: int) -> float:
    return 1 / float(np.log2(i + 2))
