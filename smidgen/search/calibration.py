"""When to say that nothing fits: a probability, and the least one with which an answer is shown.

An answer's evidence x is its best score and how far that stands out of the ten best,

    x = (s_1, s_1 - mean(s_2 .. s_10)),   p(fits | x) = 1 / (1 + exp(-(w . x + b)))

and an answer is shown if p >= t. w and b maximise the likelihood, both kinds of queries weighing the same,

    1/n sum over answerable ln p + 1/m sum over none ln(1 - p) - ridge/2 |w|^2                 x standardised

and t is the largest with which the wanted share of the answerable ones, the answer rate, is shown. What it costs is the false-show
rate: the share of queries that nothing fits which are answered all the same. Both rates must come from queries that were not trained on:
a network is surer of those it has seen.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from smidgen.errors import UserError
from smidgen.search.index import best
from smidgen.search.metrics import auroc

DEPTH = 10
ANSWER_RATE = 0.95
RIDGE = 1e-3
STEPS = 50  # of Newton's method; it needs about eight


@dataclass(frozen=True)
class Calibration:
    """From scores to a decision, and what it cost on the queries it was fitted on."""

    weights: tuple[float, ...]
    bias: float
    threshold: float
    "t"
    answer_rate: float
    "Share of answerable queries that are shown an answer."
    false_show: float
    "Share of queries that nothing fits which are shown one."
    auroc: float
    answerable: int
    "Queries it was fitted on."
    none: int

    def confidence(self, scores: Float[np.ndarray, "features"]) -> float:
        """p(fits) of an answer, from the scores of all features."""
        return float(_logistic(np.dot(self.weights, evidence(scores)) + self.bias))

    def row(self) -> dict[str, Any]:
        """As `Calibration.read` reads it."""
        return asdict(self)

    @staticmethod
    def read(row: dict[str, Any]) -> "Calibration":
        """Of a JSON object."""
        try:
            values = {name: float(row[name]) for name in ("bias", "threshold", "answer_rate", "false_show", "auroc")}
            counts = {name: int(row[name]) for name in ("answerable", "none")}
            weights = tuple(map(float, row["weights"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the calibration is damaged, {error}") from error
        if len(weights) != 2:
            raise UserError(f"the calibration has {len(weights)} weights, 2 are needed")
        return Calibration(weights, **values, **counts)  # pyright: ignore[reportArgumentType]  floats and ints by name


def evidence(scores: Float[np.ndarray, "features"]) -> Float[np.ndarray, "2"]:
    """x of an answer.

    >>> evidence(np.array([0.2, 0.9, 0.4])).round(6).tolist()
    [0.9, 0.6]
    """
    top = scores[best(scores, DEPTH)].astype(np.float64)
    return np.array([top[0], top[0] - top[1:].mean() if len(top) > 1 else 0.0])


def calibrate(answerable: Float[np.ndarray, "n 2"], none: Float[np.ndarray, "m 2"], answer_rate: float = ANSWER_RATE) -> Calibration:
    """From the evidence of queries, held out from training, that something fits and that nothing does."""
    if not len(answerable) or not len(none):
        raise UserError("a threshold needs queries of both sorts: some with relevant features, some of kind none")
    if not 0 < answer_rate <= 1:
        raise UserError(f"the answer rate must be above 0 and at most 1, got {answer_rate}")
    x = np.concatenate([answerable, none])
    mean, spread = x.mean(0), np.maximum(x.std(0), 1e-12)
    w, b = _fitted((x - mean) / spread, np.arange(len(x)) < len(answerable))
    weights, bias = w / spread, float(b - np.dot(w, mean / spread))
    p, q = _logistic(answerable @ weights + bias), _logistic(none @ weights + bias)
    lowest = float(np.sort(p)[int(np.floor((1 - answer_rate) * len(p) + 1e-9))])
    threshold = lowest * (1 - 1e-6)  # the query it comes from is answered, however its p is rounded next time
    return Calibration(
        tuple(weights.tolist()),
        bias,
        threshold,
        float((p >= threshold).mean()),
        float((q >= threshold).mean()),
        auroc(p, q),
        len(p),
        len(q),
    )


def _fitted(z: Float[np.ndarray, "n 2"], fits: np.ndarray) -> tuple[Float[np.ndarray, "2"], float]:
    """w and b by Newton's method."""
    a = np.concatenate([z, np.ones((len(z), 1))], 1)
    share = np.where(fits, 0.5 / fits.sum(), 0.5 / (~fits).sum())
    ridge = np.diag([RIDGE, RIDGE, 0.0])
    w = np.zeros(3)
    for _ in range(STEPS):
        p = _logistic(a @ w)
        gradient = a.T @ (share * (fits - p)) - ridge @ w
        step = np.linalg.solve((a.T * (share * p * (1 - p))) @ a + ridge + 1e-9 * np.eye(3), gradient)
        w = w + step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return w[:2], float(w[2])


def _logistic(x: Any) -> Any:
    """Of numbers or arrays."""
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
