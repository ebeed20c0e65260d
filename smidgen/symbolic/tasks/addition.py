"""The toy with given alignment: the sum, or difference, of two positive numbers written one after the other.

Every token comes with its list action: NLP at a character after a space, else TLU. "582 13" then lies on the grid as

    slot     0     1   2   3
    row 0    END   3   1
    row 1    " "   2   8   5

with ends in slot 0, units in slot 1, tens in slot 2: what a network can reach when the layout is right. Training numbers have 1 to 5 digits
each, their count drawn first; those of a test have as many each, 3 to 5 (id) or 6 to 8 (ood).
"""

from collections.abc import Callable

import numpy as np

from smidgen.symbolic.tasks import NLP, TLU, Examples, Task, hashed
from smidgen.symbolic.vocabulary import Vocabulary

TRAINED, ID, OOD = (1, 5), (3, 5), (6, 8)  # fewest and most digits
OPERATIONS: dict[str, Callable[[int, int], int]] = {"addition": lambda a, b: a + b, "subtraction": lambda a, b: a - b}


def task(name: str) -> Task:
    """`addition` or `subtraction`."""
    operation, most = OPERATIONS[name], OOD[1]
    return Task(
        name=name,
        tokens=Vocabulary(tuple(" 0123456789")),
        answers=Vocabulary(tuple("0123456789" if name == "addition" else "-0123456789")),
        length=2 * most + 2,
        slots=most + 2,
        splits=dict.fromkeys(("train", "dev", "id", "ood")),
        draw=lambda split, n, rng: hashed(split, n, lambda count: pairs(split, count, operation, rng)),
        groups=tuple(f"{digits} digit{'s' * (digits > 1)}" for digits in range(1, most + 1)),
    )


def pairs(split: str, n: int, operation: Callable[[int, int], int], rng: np.random.Generator) -> Examples:
    """`n` questions of any part of the hash."""
    least, most = {"id": ID, "ood": OOD}.get(split, TRAINED)
    digits = rng.integers(least, most + 1, (n, 2))
    if split in ("id", "ood"):
        digits[:, 1] = digits[:, 0]
    numbers = rng.integers(10 ** (digits - 1), 10**digits).tolist()
    inputs = [f"{a} {b}" for a, b in numbers]
    return Examples(inputs, [str(operation(a, b)) for a, b in numbers], (digits.max(1) - 1).tolist(), [given(text) for text in inputs])


def given(text: str) -> list[int]:
    """The action of every character, and of the end."""
    return [NLP if before == " " else TLU for before in "." + text]
