"""Answers on the top list of a grid: slot 0 holds the end, slot 1 the last symbol, slot 2 the one before.

A number that ends in slot 0 has its units in slot 1 whatever its length, which is where a network that adds wants them.

    target   4 0 END PAD   ->   slots   END 0 4 PAD PAD ...

Numpy alone: a device decodes with it too.
"""

import numpy as np
from jaxtyping import Float, Int

from smidgen.symbolic.vocabulary import END, PAD, Vocabulary


def to_slots(target: Int[np.ndarray, "n length"], columns: int) -> Int[np.ndarray, "n columns"]:
    """Targets, each with its end, reversed and padded; what is longer loses its first symbols, as in the paper, so nobody answers it.

    >>> to_slots(np.array([[6, 2, 1, 0], [9, 1, 0, 0]]), 5).tolist()
    [[1, 2, 6, 0, 0], [1, 9, 0, 0, 0]]
    """
    lengths = (target != PAD).sum(1, keepdims=True)
    place = lengths - 1 - np.arange(columns)
    return np.where(place >= 0, np.take_along_axis(target, np.maximum(place, 0), 1), PAD)


def from_slots(slots: Int[np.ndarray, "n columns"]) -> Int[np.ndarray, "n columns"]:
    """What `to_slots` was given, of what a network says for every slot: as many symbols as are no padding, reversed, cut at the end.

    Padding in between therefore moves what is before it and makes the answer wrong, as it should.

    >>> from_slots(np.array([[1, 2, 6, 0, 0], [1, 0, 6, 0, 0]])).tolist()
    [[6, 2, 1, 0, 0], [0, 1, 0, 0, 0]]
    """
    lengths = (slots != PAD).sum(1, keepdims=True)
    columns = np.arange(slots.shape[1])
    found = np.take_along_axis(slots, np.maximum(lengths - 1 - columns, 0), 1)
    ended = np.cumsum(found == END, 1) - (found == END) > 0
    return np.where((columns < lengths) & ~ended, found, PAD)


def read(
    best: Float[np.ndarray, "n *length"], chosen: Int[np.ndarray, "n *length"], slots: bool
) -> tuple[Int[np.ndarray, "n *length"], Float[np.ndarray, "n"]]:
    """Answers in reading order, padded, or labels; and the logarithms of their probabilities.

    `chosen` are the likeliest symbols and `best` the logarithms of theirs. On a top list every slot belongs to the answer; in reading order
    what comes after the end does not.
    """
    if chosen.ndim == 1:
        return chosen, best
    if slots:
        return from_slots(chosen), best.sum(1)
    ended = np.cumsum(chosen == END, 1) - (chosen == END) > 0
    return np.where(ended, PAD, chosen), np.where(ended, 0.0, best).sum(1)


def answers(slots: Int[np.ndarray, "n columns"], vocabulary: Vocabulary) -> list[str]:
    """The text of each row of slots."""
    return [vocabulary.decode(row) for row in from_slots(slots)]


def log_softmax(logits: Float[np.ndarray, "*shape symbols"]) -> Float[np.ndarray, "*shape symbols"]:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
