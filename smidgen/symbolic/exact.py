"""The exact back end: numbers are read off the learned layout and calculated with, instead of convolved (ours, not the paper's).

The module has learned where the digits of a question go. What the grid network has to learn besides, carries and borrows of any
length, is known. So:

    1. The likeliest action of every token makes lists. Digits that lie together in one, with a "-" before them, are a number; the newest
       lists that hold numbers count, as many as the grid has rows.
    2. The rest of the question, numbers read as "#" and others as "_", says what is asked: "What is # less than #?".
    3. A rule answers it: a small integer combination of the numbers, and of the product of two, or its magnitude. Which rule, for which
       rest, is learned from training questions: the one that explains their answers.

                 slot   0  1  2  3                          numbers (12, 345), rest "What is # plus #?"
        row 0           5  4  3                             rule +1 +1 0: 357
        row 1           2  1

It abstains, and says why, if no rule is known for the rest, or if a number reaches beyond the last slot. Its score is how crisp the layout
is, the least probability of an action that the numbers it read depend on, times how reliable the rule has been.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from smidgen.symbolic.tasks import NLP, NOOP

NUMBER = re.compile(r"-?[0-9]+")
DIGITS = tuple("-0123456789")
COEFFICIENTS = (0, 1, -1, 2, -2, 3, -3)
MOST = 3  # numbers in a rule
TRIED = 32  # questions a rule is chosen by
SUPPORT = 8  # and at least so many
SHARE = 0.9  # of them it has to explain


@dataclass(frozen=True)
class Reading:
    """What a layout says."""

    numbers: tuple[int, ...]
    "In the order of the question."
    rest: str
    "The question without them."
    crispness: float
    "Least probability of an action they depend on."
    cut: bool = False
    "Whether one reaches beyond its row."


@dataclass(frozen=True)
class Rule:
    """Sum of coefficients times terms, or its magnitude."""

    coefficients: tuple[int, ...]
    magnitude: bool
    right: int
    "Training questions it explains,"
    of: int
    "among those with its rest."

    def __call__(self, numbers: Sequence[int]) -> int:
        """The answer.

        >>> Rule((1, -1, 0), True, 9, 9)((3, 10))
        7
        """
        total = sum(c * x for c, x in zip(self.coefficients, terms(numbers), strict=True))
        return abs(total) if self.magnitude else total

    @property
    def reliability(self) -> float:
        """Share of questions it explains, by Laplace's rule of succession."""
        return (self.right + 1) / (self.of + 2)


def terms(numbers: Sequence[int]) -> tuple[int, ...]:
    """What is summed: the numbers, and the product where there are two."""
    return (*numbers, numbers[0] * numbers[1]) if len(numbers) == 2 else tuple(numbers)


@dataclass(frozen=True)
class Outcome:
    """An answer, or why there is none."""

    answer: str | None
    score: float = 0.0
    "Crispness times reliability, 0 .. 1."
    reason: str = ""


def read(text: str, actions: Float[np.ndarray, "tokens 3"], rows: int, columns: int) -> Reading:
    """Numbers of a layout; `actions` are the probabilities of those of every character, and of the end."""
    sure = actions.max(-1)
    used, numbers, crispness, cut = list(text), {}, 1.0, False
    ended = text + "\0"
    holding = [(tokens, found) for tokens in lists(actions) if (found := list(NUMBER.finditer("".join(ended[t] for t in tokens))))]
    for tokens, found in holding[-rows:]:
        for first, last in ((match.start(), match.end() - 1) for match in found if len(tokens) - match.end() < columns):
            number = tokens[first : last + 1]
            numbers[number[0]] = int("".join(text[t] for t in number))
            cut = cut or len(tokens) - first > columns
            around = slice(number[0] - (text[: number[0]][-1:] in DIGITS), number[-1] + 1 + (text[number[-1] + 1 :][:1] in DIGITS))
            crispness = min(crispness, float(sure[around].min()))
            for t in number:
                used[t] = ""
            used[number[0]] = "#"
    return Reading(tuple(numbers[t] for t in sorted(numbers)), shortened("".join(used)), crispness, cut)


def lists(actions: Float[np.ndarray, "tokens 3"]) -> list[list[int]]:
    """Tokens by the list that the likeliest actions write them into, oldest list and token first."""
    found: list[list[int]] = [[]]
    for token, action in enumerate(actions.argmax(-1).tolist()):
        if action == NLP:
            found.append([])
        if action != NOOP:
            found[-1].append(token)
    return found


def shortened(rest: str) -> str:
    """Numbers not read as "_", however many follow each other: a long sequence asks what a short one does.

    >>> shortened("12 -3 4 # # #")
    '_ # # #'
    """
    return re.sub(r"(_[^#\w]*)\1+", r"\1", NUMBER.sub("_", rest))


def learn(readings: Sequence[Reading], targets: Sequence[str]) -> dict[str, Rule]:
    """The rule of every rest that has one."""
    asked: dict[str, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for reading, target in zip(readings, targets, strict=True):
        if 0 < len(reading.numbers) <= MOST and not reading.cut and NUMBER.fullmatch(target):
            asked[reading.rest].append((reading.numbers, int(target)))
    rules = {rest: rule(questions) for rest, questions in asked.items() if len(questions) >= SUPPORT}
    return {rest: found for rest, found in rules.items() if found is not None}


def rule(questions: Sequence[tuple[tuple[int, ...], int]]) -> Rule | None:
    """The simplest of the rules that explain most of the first questions, which have as many numbers each; none if it fails too many."""
    count = len(terms(questions[0][0]))
    tried = questions[:TRIED]
    x = np.array([terms(numbers) for numbers, _ in tried], object)  # beyond 64 bits
    y = np.array([target for _, target in tried], object)
    best, explained = ((0,) * count, False), 0
    for coefficients in sorted(itertools.product(COEFFICIENTS, repeat=count), key=lambda c: sum(map(abs, c))):
        total = x @ np.array(coefficients, object)
        for magnitude, says in ((False, total), (True, abs(total))):
            if (right := int((says == y).sum())) > explained:
                best, explained = (coefficients, magnitude), right
    found = Rule(*best, 0, 0)
    right = sum(found(numbers) == target for numbers, target in questions)
    return Rule(*best, right, len(questions)) if right >= SHARE * len(questions) else None


def answer(reading: Reading, rules: Mapping[str, Rule]) -> Outcome:
    """What the rules make of a reading."""
    if not reading.numbers:
        return Outcome(None, reason="there is no number on the grid")
    if reading.cut:
        return Outcome(None, reason="a number reaches beyond the last slot of its row")
    known = rules.get(reading.rest)
    if known is None or len(known.coefficients) != len(terms(reading.numbers)):
        return Outcome(None, reason=f"no rule is known for {reading.rest!r}")
    return Outcome(str(known(reading.numbers)), reading.crispness * known.reliability)
