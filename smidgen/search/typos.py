"""Misspelt queries, as thumbs make them: a neighbouring key, a letter lost, doubled, or swapped with the next."""

from collections.abc import Sequence

import numpy as np

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST = 4  # letters of a word worth misspelling


def neighbours() -> dict[str, str]:
    """Keys beside and above every letter's.

    >>> neighbours()["a"]
    'swqz'
    """
    found = {}
    for r, row in enumerate(ROWS):
        for c, letter in enumerate(row):
            places = [(r, c + 1), (r, c - 1), (r - 1, c + 1), (r - 1, c), (r + 1, c), (r + 1, c - 1)]
            found[letter] = "".join(ROWS[y][x] for y, x in places if 0 <= y < len(ROWS) and 0 <= x < len(ROWS[y]))
    return found


NEIGHBOURS = neighbours()


def misspelt(text: str, random: np.random.Generator, errors: int = 1) -> str:
    """The text with that many slips, in words of four letters or more; unchanged if it has none."""
    words = text.split(" ")
    for _ in range(errors):
        long = [i for i, word in enumerate(words) if len(word) >= SHORTEST and word.isascii()]
        if not long:
            return text
        i = int(random.choice(long))
        words[i] = _slip(words[i], random)
    return " ".join(words)


def corrupted(texts: Sequence[str], seed: int, rate: float = 1.0) -> list[str]:
    """A share `rate` of the texts with one slip, or two; always the same ones for a seed."""
    random = np.random.default_rng(seed)
    return [misspelt(text, random, 1 + int(random.random() < 0.3)) if random.random() < rate else text for text in texts]


def _slip(word: str, random: np.random.Generator) -> str:
    at, kind = int(random.integers(len(word) - 1)), int(random.integers(4))
    letter, rest = word[at], word[at + 1 :]
    if kind == 0:
        near = NEIGHBOURS.get(letter.lower(), letter)
        return word[:at] + str(random.choice(list(near))) + rest
    if kind == 1:
        return word[:at] + rest
    if kind == 2:
        return word[:at] + letter + letter + rest
    return word[:at] + rest[0] + letter + rest[1:]
