"""Algebraic word problems: one addition or subtraction of two integers, asked for in words.

The sentences are data of the Apache-2.0 package mathematics_dataset (DeepMind), module arithmetic, add_or_sub. Entropy e is "about e
decimal digits":

    unbounded    uniform in -M .. M without 0, M = ceil(10^e / 2)
    bounded      magnitude uniform in 10^(floor(e) - 1) .. ceil(10^e), fair sign

    split               entropies of p and q                                              numbers
    train, dev, id      e uniform in [4, 16], e_p = max(1, U(0, e)), e_q = max(1, e - e_p)    unbounded: both share 16 digits at most
    ood                 each uniform in [16, 20]                                          bounded: 16 to 20 digits each

All of train, dev and id are draws of one distribution, without a hash between them, as the paper has it: short questions repeat.
"""

import numpy as np

from smidgen.symbolic.tasks import Examples, Task
from smidgen.symbolic.vocabulary import Vocabulary

ADD = (
    "{p} + {q}",
    "{p}+{q}",
    "Work out {p} + {q}.",
    "Add {p} and {q}.",
    "Put together {p} and {q}.",
    "Sum {p} and {q}.",
    "Total of {p} and {q}.",
    "Add together {p} and {q}.",
    "What is {p} plus {q}?",
    "Calculate {p} + {q}.",
    "What is {p} + {q}?",
)
SUBTRACT = (
    "{p} - {q}",
    "Work out {p} - {q}.",
    "What is {p} minus {q}?",
    "What is {p} take away {q}?",
    "What is {q} less than {p}?",
    "Subtract {q} from {p}.",
    "Calculate {p} - {q}.",
    "What is {p} - {q}?",
)
DISTANCE = (  # asked only of p >= q
    "What is the distance between {p} and {q}?",
    "What is the distance between {q} and {p}?",
    "What is the difference between {p} and {q}?",
    "What is the difference between {q} and {p}?",
)
TEMPLATES = ADD + SUBTRACT + DISTANCE
GROUPS = ("magnitudes add", "magnitudes subtract")
DIGITS = 20


def task() -> Task:
    """The task of all splits."""
    most = -(10**DIGITS - 1)
    return Task(
        name="word-problem",
        tokens=Vocabulary(tuple(sorted(set("-0123456789".join(t.format(p=0, q=0) for t in TEMPLATES))))),
        answers=Vocabulary(tuple("-0123456789")),
        length=max(len(t.format(p=most, q=most)) for t in TEMPLATES) + 1,
        slots=len(str(2 * most)) + 1,
        splits=dict.fromkeys(("train", "dev", "id", "ood")),
        draw=draw,
        groups=GROUPS,
    )


def draw(split: str, n: int, rng: np.random.Generator) -> Examples:
    """`n` problems."""
    p, q = longer(n, rng) if split == "ood" else shared(n, rng)
    subtracts = rng.random(n) < 0.5
    choice = rng.random(n).tolist()
    inputs, targets, groups = [], [], []
    for a, b, minus, c in zip(p, q, subtracts.tolist(), choice, strict=True):
        first, count = (len(ADD), len(SUBTRACT) + len(DISTANCE) * (a >= b)) if minus else (0, len(ADD))
        inputs.append(TEMPLATES[first + int(c * count)].format(p=a, q=b))
        targets.append(str(a - b if minus else a + b))
        groups.append(int(minus == ((a < 0) == (b < 0))))
    return Examples(inputs, targets, groups)


def shared(n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Numbers that share a budget of digits."""
    e = rng.uniform(4, 16, n)
    p = np.maximum(1, rng.uniform(0, e))
    return unbounded(p, rng), unbounded(np.maximum(1, e - p), rng)


def unbounded(e: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Uniform in -M .. M without 0."""
    most = np.ceil(10**e / 2).astype(np.int64)
    return (rng.integers(1, most + 1) * rng.choice((-1, 1), len(e))).tolist()


def longer(n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Numbers of 16 to 20 digits each."""
    return bounded(rng.uniform(16, DIGITS, n), rng), bounded(rng.uniform(16, DIGITS, n), rng)


def bounded(e: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Magnitude uniform in 10^(floor(e) - 1) .. ceil(10^e); beyond 64 bits, so Python's integers, from 126 random bits each."""
    high, low = (rng.integers(0, 2**63, len(e)).tolist() for _ in range(2))
    found = []
    for entropy, sign, a, b in zip(e.tolist(), rng.choice((-1, 1), len(e)).tolist(), high, low, strict=True):
        least, most = 10 ** (int(entropy) - 1), int(np.ceil(10**entropy))
        found.append(sign * (least + ((a << 63) + b) % (most - least + 1)))
    return found
