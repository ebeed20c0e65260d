"""What a relevance model has to beat: rankings without training.

A baseline is made for features and then scores queries against all of them; a feature it does not find scores -inf.

    aosp     what ships: the settings search of the Android Open Source Project
    fts5     SQLite's full-text index: every word, as a prefix, must be there
    bm25     S. Robertson, H. Zaragoza, The Probabilistic Relevance Framework, 2009; by the package bm25s
    dense    an encoder as it comes (zero-shot), or a table of it (static.py)
    fused    reciprocal rank fusion: G. Cormack, C. Clarke, S. Buettcher, SIGIR 2009
"""

import re
import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from smidgen.errors import UserError
from smidgen.search.features import Feature

if TYPE_CHECKING:
    from smidgen.search.bert import Encoder

Scores = Float[np.ndarray, "queries features"]
Baseline = Callable[[Sequence[str]], Scores]
TITLE, LATER, SUMMARY, KEYWORDS = 1.0, 3.0, 7.0, 9.0  # base ranks of the four rounds
LONG_TITLE = 20  # characters, beyond which a rank is one worse
K = 60  # of reciprocal rank fusion


def aosp(features: Sequence[Feature]) -> Baseline:
    """The whole typed text must begin a title, a later word of a title, a word of the summary, or one of the keywords or options.

    The best of these four rounds decides; the pattern is SQL's, q% or % q%, of the text as it is and normalised.
    """

    def rank(query: str, feature: Feature) -> float:
        worse = len(feature.title) > LONG_TITLE
        if starts(query, feature.title):
            return TITLE + worse
        if later(query, feature.title):
            return LATER + worse
        if starts(query, feature.summary) or later(query, feature.summary):
            return SUMMARY + worse
        if any(starts(query, text) or later(query, text) for text in (*feature.keywords, *feature.options)):
            return KEYWORDS + worse
        return np.inf

    return lambda queries: -np.array([[rank(q.strip(), f) for f in features] for q in queries])


def starts(query: str, text: str) -> bool:
    """LIKE 'q%'."""
    return any(form(text).startswith(form(query)) for form in (str.casefold, plain))


def later(query: str, text: str) -> bool:
    """LIKE '% q%'."""
    return any(" " + form(query) in form(text) for form in (str.casefold, plain))


def plain(text: str) -> str:
    """Without case, accents and signs, as the index keeps it beside the text: hyphens joined, other signs gone.

    >>> plain("Wi-Fi Aufl\u00f6sung")
    'wifi auflosung'
    """
    letters = unicodedata.normalize("NFD", text.casefold())
    return "".join(c for c in letters if c.isalnum() or c.isspace())


def words(text: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return re.findall(r"\w+", text.casefold())


def fts5(features: Sequence[Feature]) -> Baseline:
    """All fields in one table; every word of the query has to begin a word of the feature. Order: FTS5's own bm25."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE features USING fts5(title, summary, keywords, path, description, options)")
    rows = [(f.title, f.summary, " ".join(f.keywords), f.path, f.description, " ".join(f.options)) for f in features]
    database.executemany("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?)", rows)

    def score(queries: Sequence[str]) -> Scores:
        found = np.full((len(queries), len(features)), -np.inf)
        for i, query in enumerate(queries):
            pattern = " ".join(f'"{word}"*' for word in words(query))
            if pattern:
                matches = database.execute("SELECT rowid, bm25(features) FROM features WHERE features MATCH ?", (pattern,))
                for row, value in matches:
                    found[i, row - 1] = -value
        return found

    return score


def bm25(features: Sequence[Feature], titles: bool = False, k1: float = 1.2, b: float = 0.75) -> Baseline:
    """Words of titles, or of all fields with the title counted twice."""
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise UserError("the baseline bm25 needs the package bm25s: pip install bm25s") from error
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    texts = [words(f.title) if titles else words(f"{f.title} {f.everything()}") for f in features]
    index.index(texts, show_progress=False)
    known = {word for text in texts for word in text}

    def score(queries: Sequence[str]) -> Scores:
        found = np.zeros((len(queries), len(features)))
        for i, query in enumerate(queries):
            kept = [word for word in words(query) if word in known]
            if kept:
                found[i] = index.get_scores(kept)
        return np.where(found > 0, found, -np.inf)

    return score


def dense(encoder: "Encoder", *texts: Sequence[str]) -> Baseline:
    """Mean cosine with one text or several of every feature, each a list in the features' order."""
    parts = [encoder.encode(part) for part in texts]

    def score(queries: Sequence[str]) -> Scores:
        u = encoder.encode(queries)
        return np.mean([(u @ v.T).cpu().numpy() for v in parts], 0).astype(np.float64)

    return score


def fused(*scores: Scores, k: int = K) -> Scores:
    """sum over lists of 1 / (k + rank): 2/61 for a feature that is first in two lists.

    >>> fused(np.array([[0.9, 0.1]]), np.array([[5.0, -np.inf]])).round(6).tolist()
    [[0.032787, 0.016129]]
    """
    total = np.zeros(scores[0].shape)
    for part in scores:
        rank = np.argsort(np.argsort(-part, 1, kind="stable"), 1, kind="stable") + 1
        total += np.where(np.isfinite(part), 1 / (k + rank), 0.0)
    return np.where(total > 0, total, -np.inf)
