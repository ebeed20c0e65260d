"""Words beside meaning, so that keywords and misspelt words are found and sentences are not hurt.

    s(q, d) = cos(q, d) + w c(q, d)^2

c, the coverage, is the share of the query's letters that the feature's own words contain, counted in trigrams and in information:

    c(q, d) = sum of idf(t) over trigrams t of q that d has / sum of idf(t) over trigrams t of q         0 <= c <= 1
    idf(t)  = ln(1 + (N - n_t + 1/2) / (n_t + 1/2))                          n_t of N features have t, as in BM25

The square makes it a gate. A sentence shares a third of its trigrams with many a feature, which the square turns into next to nothing; a
word of the title, or one misspelt in a letter or two, is covered almost whole. Fusing by ranks (reciprocal rank fusion) has no such gate:
two lists that agree on rubbish beat one that is right.

Words are padded with a space at either end, so that a trigram knows where a word begins. The last word of a query is not padded behind: it
may be half typed.

>>> [spelt(int(t)) for t in trigrams("Wi-Fi", open_end=True)]
[' wi', 'wi ', ' fi']
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt32, UInt64

from smidgen.search.features import Feature

WEIGHT = 0.2  # of coverage squared, w; chosen on development queries (dev/log.md)
POWER = 2
WORD = re.compile(r"\w+")
JOINED = re.compile(r"(?<=\w)[-\u2010\u2011](?=\w)")
SPACE = ord(" ")
FIRST, NOBODY = np.ones(1, bool), np.zeros(0, np.uint32)
BITS = 21  # of a Unicode character; three of them fit an integer of 64 bits


@dataclass(frozen=True)
class Lexicon:
    """For every trigram the features that have it."""

    keys: UInt64[np.ndarray, "trigrams"]
    "Trigrams, ascending; 21 bits a letter."
    first: UInt32[np.ndarray, "trigrams_and_one"]
    "Those of keys[i] are members[first[i] : first[i + 1]]."
    members: UInt32[np.ndarray, "postings"]
    features: int

    @staticmethod
    def of(texts: Sequence[str]) -> "Lexicon":
        """Of one text per feature."""
        return Lexicon.merged([trigrams(text) for text in texts])

    @staticmethod
    def merged(found: Sequence[UInt64[np.ndarray, "_"]]) -> "Lexicon":
        """Of the trigrams of every feature."""
        pairs = np.concatenate([np.zeros(0, np.uint64), *found])
        members = np.repeat(np.arange(len(found), dtype=np.uint32), [len(t) for t in found])
        return Lexicon._sorted(pairs, members, len(found))

    def extended(self, texts: Sequence[str]) -> "Lexicon":
        """With features more, numbered on."""
        new = Lexicon.of(texts)
        pairs = np.concatenate([np.repeat(lexicon.keys, np.diff(lexicon.first)) for lexicon in (self, new)])
        members = np.concatenate([self.members, new.members + np.uint32(self.features)])
        return Lexicon._sorted(pairs, members, self.features + new.features)

    @staticmethod
    def _sorted(pairs: UInt64[np.ndarray, "n"], members: UInt32[np.ndarray, "n"], features: int) -> "Lexicon":
        order = np.argsort(pairs, kind="stable")
        keys, counts = np.unique(pairs, return_counts=True)
        return Lexicon(keys, np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32), members[order], features)

    def coverage(self, query: str) -> Float32[np.ndarray, "features"]:
        """c of every feature; 0 of a query without letters."""
        wanted = trigrams(query, open_end=True)
        if not len(wanted) or not len(self.keys):
            return np.zeros(self.features, np.float32)
        places = self.keys.searchsorted(wanted)
        known = self.keys.take(places, mode="clip") == wanted
        found = places[known]
        ends = self.first[found + 1]
        counts = ends - self.first[found]
        weights = idf(counts, self.features)
        whole = float(weights.sum()) + (len(wanted) - len(found)) * float(idf(0, self.features))
        hits = np.concatenate([NOBODY, *(self.members[i:j] for i, j in zip(self.first[found].tolist(), ends.tolist(), strict=True))])
        summed = np.bincount(hits, np.repeat(weights, counts), self.features)
        return (summed / whole).astype(np.float32)


def idf(counts: Integer[np.ndarray, "n"] | int, features: int) -> Float[np.ndarray, "n"] | np.float64:
    """Information of a trigram that so many of the features have."""
    return np.log1p((features - counts + 0.5) / (counts + 0.5))


def fuse(
    cosine: Float32[np.ndarray, "features"], coverage: Float32[np.ndarray, "features"], weight: float = WEIGHT
) -> Float32[np.ndarray, "features"]:
    """s of every feature."""
    return (cosine + weight * coverage**POWER).astype(np.float32)


def words(feature: Feature) -> str:
    """The text whose trigrams a feature is found by."""
    return JOINED.sub("", feature.everything()) + " " + feature.everything()  # wifi finds Wi-Fi


def trigrams(text: str, open_end: bool = False) -> UInt64[np.ndarray, "_"]:
    """The different trigrams of a text's words, as integers, ascending; `open_end`: its last word may go on."""
    padded = f" {' '.join(WORD.findall(plain(text)))} "
    if open_end and not text[-1:].isspace():
        padded = padded[:-1]
    letters = np.frombuffer(padded.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(letters) < 3:
        return np.zeros(0, np.uint64)
    codes = (letters[:-2] << np.uint64(2 * BITS)) | (letters[1:-1] << np.uint64(BITS)) | letters[2:]
    codes = codes[letters[1:-1] != SPACE]  # a space in the middle: two words
    codes.sort()
    return codes[np.concatenate([FIRST, codes[1:] != codes[:-1]])[: len(codes)]]


def plain(text: str) -> str:
    """Lower case, without accents and apostrophes: what people type."""
    text = text.casefold()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).replace("\u2019", "")
    return text.replace("'", "")


def spelt(trigram: int) -> str:
    """The letters of a trigram's integer."""
    return "".join(chr(trigram >> shift & (1 << BITS) - 1) for shift in (2 * BITS, BITS, 0))
