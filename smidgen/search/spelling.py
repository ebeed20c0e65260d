"""Misspelt words, set right before a query is read.

One wrong letter turns a word into other pieces altogether, and an encoder's vector with it. So a word that is neither in the features'
texts nor a whole piece of the vocabulary is replaced by the nearest one that is, if that is near enough:

    distance   insertions, deletions, changes of a letter and swaps of two neighbours (optimal string alignment)
    near       1 for words of 4 letters and more; 2 from 8 letters on, and then only to a word of the features

Of several at the same distance: one with the same first letter, then the features' own words, then the commoner one. The last word of a
query stays as it is while a known word begins with it: it may be half typed.

Not every unknown word is misspelt, so a query is searched as it was typed and as it is read, and a feature has the better of both scores.

A changed letter is two letters that differ, counted without order; one more or less is a letter and a length; a swap is nothing. So an
integer has two bits a letter, for its first and its second time in a word, and one for every length reached: integers of words at
distance k differ in at most 2 k bits, which leaves a handful of ten thousand to be compared letter by letter.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64

from smidgen.search.fusion import WORD, plain

SHORT, LONG = 4, 8  # letters from which one and two slips are forgiven
ENDINGS = ("s", "es", "d", "ed", "ing", "r", "er", "st", "est", "ly", "y", "ish", "ness", "less", "ful", "able", "en")
APOSTROPHES = {"'", "\u2019"}
TYPED = re.compile(r"[\w'\u2019]+")
CLOSING = ".,;:!?"  # they end a text, not its last word
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLUMN = np.array([LETTERS.find(chr(c)) % (len(LETTERS) + 1) for c in range(129)])  # of a character; those beyond ASCII share the last
COLUMNS = 4 ** np.arange(len(LETTERS) + 1, dtype=np.uint64)  # the lower bit of each
HIGHEST = 2 ** np.arange(2 * len(COLUMNS), 64, dtype=np.uint64)


@dataclass(frozen=True)
class Speller:
    """Known words, the likeliest first."""

    words: tuple[str, ...]
    outlines: UInt64[np.ndarray, "words"]
    "Their letters without order, and their lengths."
    rank: dict[str, int]
    ordered: tuple[str, ...]
    "The words by the alphabet."
    own: int
    "Of the words, so many are the features'; they come first."

    @staticmethod
    def of(texts: Sequence[str], vocabulary: Iterable[str]) -> "Speller":
        """From the features' texts and the encoder's vocabulary, commonest first."""
        own = Counter(WORD.findall(plain(" ".join(texts))))
        rest = (word for word in vocabulary if len(word) >= SHORT - 1 and word.isalpha())
        words = tuple(dict.fromkeys((*(word for word, _ in own.most_common()), *rest)))
        return Speller(words, outlines(words), {word: i for i, word in enumerate(words)}, tuple(sorted(words)), len(own))

    def corrected(self, text: str) -> str:
        """The text with its misspelt words set right; the very same one if there are none."""
        last = len(text) if text[-1:].isspace() else len(text.rstrip(CLOSING))

        def right(match: re.Match[str]) -> str:
            return match[0] if set(match[0]) & APOSTROPHES else self.word(match[0], match.end() == last)

        return TYPED.sub(right, text)

    def word(self, word: str, open_end: bool = False) -> str:
        """The word, or the nearest known one."""
        low = plain(word)
        if len(low) < SHORT or not low.isalpha() or self.knows(low) or (open_end and self.begins(low)):
            return word
        forgiven = 2 if len(low) >= LONG else 1
        apart = np.bitwise_count(self.outlines ^ outlines((low,))[0])
        apart[self.own :] += 2 * (forgiven - 1)
        near = np.flatnonzero(apart <= 2 * forgiven).tolist()
        found = [(distance(low, self.words[i], forgiven if i < self.own else 1), self.words[i][0] != low[0], i) for i in near]
        nearest = min((row for row in found if row[0] <= (forgiven if row[2] < self.own else 1)), default=None)
        return word if nearest is None else self.words[nearest[2]]

    def begins(self, start: str) -> bool:
        """Whether a known word begins so."""
        at = bisect_left(self.ordered, start)
        return at < len(self.ordered) and self.ordered[at].startswith(start)

    def knows(self, word: str) -> bool:
        """Whether it is a known word, or one with an ending: dimm-er, ring-ing, yellow-ish, charg-ed."""
        if word in self.rank:
            return True
        stems = (word[: -len(ending)] for ending in ENDINGS if word.endswith(ending) and len(word) - len(ending) >= SHORT - 1)
        return any(s in self.rank or s + "e" in self.rank or (s[-1] == s[-2] and s[:-1] in self.rank) for s in stems)


def outlines(words: Sequence[str]) -> UInt64[np.ndarray, "words"]:
    """For every word an integer of two bits a letter, set if the word has it once, and twice; letters beyond a to z share theirs.

    The ten highest bits say how long it is: longer than 3, than 4, .. than 12.

    >>> [bin(int(n) % 2**54) for n in outlines(["abba", "cab"])]
    ['0b1111', '0b10101']
    """
    lengths = np.array([len(word) for word in words])
    letters = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
    columns = COLUMN[np.minimum(letters, len(COLUMN) - 1)]
    places = np.repeat(np.arange(len(words)), lengths) * len(COLUMNS) + columns
    counts = np.bincount(places, minlength=len(COLUMNS) * len(words)).reshape(-1, len(COLUMNS))
    longer = lengths[:, None] > np.arange(SHORT - 1, SHORT - 1 + len(HIGHEST))
    return (counts >= 1) @ COLUMNS + (counts >= 2) @ (2 * COLUMNS) + longer @ HIGHEST


def distance(a: str, b: str, most: int) -> int:
    """Slips between two words, or most + 1 if they are more.

    >>> distance("blutooth", "bluetooth", 2), distance("wfii", "wifi", 1), distance("night", "sight", 1), distance("abc", "xyz", 1)
    (1, 1, 1, 2)
    """
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    if abs(len(a) - len(b)) > most or (most == 1 and max(len(a), len(b)) > 2):  # what is left differs at both ends
        return most + 1
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, start=1):
            cost = before[j - 1] + (x != y)
            if before[j] < cost:
                cost = before[j] + 1
            if row[j - 1] < cost:
                cost = row[j - 1] + 1
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y and older[j - 2] < cost:
                cost = older[j - 2] + 1
            row.append(cost)
        if min(row) > most:
            return most + 1
    return min(row[-1], most + 1)
