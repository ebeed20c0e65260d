"""How sure an answer is, and when to give none.

A raw score (of the network: the joint probability of its likeliest symbols; of the exact back end: crispness times reliability) becomes a
probability of being right by logistic calibration on questions held out,

    P(right) = sigmoid(a + b logit(score))                    Platt, "Probabilistic outputs for support vector machines", 1999

with his targets (n+ + 1) / (n+ + 2) and 1 / (n- + 2) in place of 1 and 0, so that a model that is always right there is not made certain.

The threshold is the least score above which, on these questions, so many answers are right that the upper end of Wilson's 95 % interval
(one-sided) of the share of wrong ones is within the `risk` asked for. That holds for questions like the held-out ones; of longer ones it is
a hope, which `smidgen symbolic evaluate --split ood` tests.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Z = 1.645  # standard deviations that leave 5 % of a normal distribution on one side
EDGE = 1e-9  # scores are kept off 0 and 1, where their logit is not finite
NEVER = 2.0  # a threshold no score reaches


@dataclass(frozen=True)
class Calibration:
    """Of one kind of score."""

    intercept: float
    slope: float
    threshold: float
    "Least score that is answered; above 1 if none is."
    risk: float
    "Share of wrong answers the threshold was chosen for."

    def probability(self, score: float) -> float:
        """Of being right."""
        return float(sigmoid(self.intercept + self.slope * logit(np.array([score])))[0])


def calibrate(score: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], risk: float) -> Calibration:
    """From answers to held-out questions."""
    a, b = platt(logit(score), right)
    return Calibration(a, b, threshold(score, right, risk), risk)


def platt(z: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> tuple[float, float]:
    """Intercept and slope, by Newton's method on the cross-entropy; the slope is not let below 0."""
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    x = np.stack([np.ones_like(z), z], 1)
    w = np.array([0.0, 0.0])
    for _ in range(100):
        p = sigmoid(x @ w)
        slope = x.T @ (p - target) + 1e-6 * w
        step = np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + 1e-6 * np.eye(2), slope)
        while cross_entropy(x @ (w - step), target) > cross_entropy(x @ w, target) + 1e-9 and np.abs(step).max() > 1e-9:
            step = step / 2
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    if w[1] < 0:  # a surer score is no worse: say the share of right answers instead
        return float(logit(np.array([target.mean()]))[0]), 0.0
    return float(w[0]), float(w[1])


def threshold(score: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], risk: float) -> float:
    """Least score from which on the answers' risk is within bounds."""
    if not len(score):
        return NEVER
    order = np.argsort(-score, kind="stable")
    n = np.arange(1, len(score) + 1)
    bound = wilson(np.cumsum(~right[order]), n)
    last = np.append(score[order][1:] < score[order][:-1], True)  # equal scores are answered together
    allowed = np.flatnonzero((bound <= risk) & last)
    return float(score[order][allowed[-1]]) if len(allowed) else NEVER


def wilson(wrong: Int[np.ndarray, "n"], of: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Upper end of the one-sided 95 % interval of a share.

    >>> wilson(np.array([0, 5]), np.array([268, 100])).round(4).tolist()
    [0.01, 0.0992]
    """
    share = wrong / of
    centre = share + Z**2 / (2 * of)
    return (centre + Z * np.sqrt(share * (1 - share) / of + Z**2 / (4 * of**2))) / (1 + Z**2 / of)


def calibration_error(probability: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"], bins: int = 10) -> float:
    """Expected calibration error: mean distance of probability and share of right answers over equal bins, weighed by their sizes."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    parts = [(place == i) for i in range(bins) if (place == i).any()]
    return float(sum(part.mean() * abs(probability[part].mean() - right[part].mean()) for part in parts))


def sigmoid(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Of the logistic function, without overflow."""
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def logit(p: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Its inverse."""
    p = np.clip(p, EDGE, 1 - EDGE)
    return np.log(p) - np.log1p(-p)


def cross_entropy(z: Float[np.ndarray, "n"], target: Float[np.ndarray, "n"]) -> float:
    """Sum over examples of that of sigmoid(z)."""
    return float((np.logaddexp(0, z) - target * z).sum()) if len(z) else math.nan
