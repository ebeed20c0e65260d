"""Words beside meaning, so that keywords and misspelt words are found and sentences are not hurt (notes 2.9).

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
from jaxtyping import Float32, Int64, UInt32, UInt64

from smidgen.search.features import Feature

WEIGHT = 0.4  # of coverage squared, w; chosen in docs/search.md
POWER = 2
WORD = re.compile(r"\w+")
JOINED = re.compile(r"(?<=\w)[-\u2010\u2011](?=\w)")
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
        places = np.searchsorted(self.keys, wanted)
        found = places[(places < len(self.keys))]
        found = found[self.keys[found] == wanted[places < len(self.keys)]]
        counts = (self.first[found + 1] - self.first[found]).astype(np.int64)
        weights = idf(counts, self.features)
        whole = weights.sum() + (len(wanted) - len(found)) * float(idf(np.zeros(1, np.int64), self.features)[0])
        if whole == 0:
            return np.zeros(self.features, np.float32)
        hits = [self.members[self.first[i] : self.first[i + 1]] for i in found]
        summed = np.bincount(np.concatenate([np.zeros(0, np.uint32), *hits]), np.repeat(weights, counts), self.features)
        return (summed / whole).astype(np.float32)


def idf(counts: Int64[np.ndarray, "n"], features: int) -> np.ndarray:
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
    found = WORD.findall(plain(text))
    padded = [f" {word} " for word in found]
    if padded and open_end and not text[-1:].isspace():
        padded[-1] = padded[-1].rstrip()
    letters = [np.array([ord(c) for c in word], np.uint64) for word in padded]
    codes = [(w[:-2] << np.uint64(2 * BITS)) | (w[1:-1] << np.uint64(BITS)) | w[2:] for w in letters if len(w) > 2]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *codes]))


def plain(text: str) -> str:
    """Lower case, without accents: what people type."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in apart if not unicodedata.combining(c)).replace("'", "").replace("\u2019", "")


def spelt(trigram: int) -> str:
    """The letters of a trigram's integer."""
    return "".join(chr(trigram >> shift & (1 << BITS) - 1) for shift in (2 * BITS, BITS, 0))
