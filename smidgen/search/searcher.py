"""A model's folder, opened: a query in, the features that answer it out. Needs numpy, tokenizers and onnxruntime."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from smidgen.errors import UserError
from smidgen.search.calibration import Calibration, calibrate, evidence
from smidgen.search.encoder import Encoder, open_encoder, whole_words
from smidgen.search.features import FEATURES, Feature, Query, read_features
from smidgen.search.folder import INDEX, SETTINGS, model_folder, present, written
from smidgen.search.fusion import WEIGHT, fuse
from smidgen.search.index import Index, best
from smidgen.search.spelling import Speller

VERSION = 1
LONGEST = 1000  # characters of a query; more is a document, not a question
SENTENCE = 6  # words of an example


@dataclass(frozen=True)
class Settings:
    """What a folder says of the run-time part."""

    weight: float = WEIGHT
    "Of covered letters beside meaning: fusion.py's w."
    calibration: Calibration | None = None
    "None: every answer is shown."
    examples: tuple[str, ...] = ()
    "Queries to begin with, for a page."

    @staticmethod
    def read(path: Path) -> "Settings":
        """The file."""
        present(path)
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            version, weight, calibration, examples = (
                row["version"],
                float(row["weight"]),
                row["calibration"],
                tuple(map(str, row["examples"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged, not the settings of a search") from error
        if version != VERSION or not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{path}: settings this version does not read; distil again")
        try:
            return Settings(weight, None if calibration is None else Calibration.read(calibration), examples)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def write(self, path: Path) -> None:
        """The file; complete or as it was."""
        calibration = None if self.calibration is None else self.calibration.row()
        row = {"version": VERSION, "weight": self.weight, "calibration": calibration, "examples": list(self.examples)}
        with written(path) as file:
            file.write((json.dumps(row, indent=1, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True)
class Hit:
    """A feature found."""

    feature: Feature
    score: float
    "Cosine plus what its letters cover: at most 1 + w."

    @property
    def place(self) -> str:
        """Menus to it, its own name last."""
        return " > ".join(filter(None, (self.feature.path, self.feature.title)))

    def row(self) -> dict[str, Any]:
        """For JSON."""
        feature = self.feature
        return {"id": feature.id, "title": feature.title, "summary": feature.summary, "path": feature.path, "score": round(self.score, 4)}


@dataclass(frozen=True)
class Answer:
    """What was found, the best first, and whether it should be shown."""

    hits: tuple[Hit, ...]
    fits: bool
    "Whether anything fits; if not, the hits are merely the closest."
    confidence: float | None
    "Probability that something fits; none without a calibration."

    def row(self) -> dict[str, Any]:
        """For JSON."""
        confidence = None if self.confidence is None else round(self.confidence, 4)
        return {"fits": self.fits, "confidence": confidence, "hits": [hit.row() for hit in self.hits]}


@dataclass(frozen=True)
class Searcher:
    """A model's folder, read once; may be asked from several threads."""

    folder: Path
    features: tuple[Feature, ...]
    encoder: Encoder
    index: Index
    settings: Settings
    speller: Speller

    @staticmethod
    def open(folder: Path, mapped: bool = True) -> "Searcher":
        """A folder of `smidgen search distill`, or the run it lies in; every file is checked. `mapped` is that of `Index.read`."""
        folder = model_folder(folder)
        index, encoder = Index.read(folder / INDEX, mapped), open_encoder(folder)
        if index.width != encoder.width:
            raise UserError(f"{folder / INDEX}: vectors of {index.width} numbers, the encoder makes {encoder.width}; distil again")
        features = read_features(folder / FEATURES)
        if len(features) < len(index):
            raise UserError(f"{folder / FEATURES}: holds {len(features)} of the {len(index)} features of {INDEX}; copy or distil again")
        features = features[: len(index)]
        speller = Speller.of([feature.everything() for feature in features], whole_words(encoder.tokenizer))
        return Searcher(folder, features, encoder, index, Settings.read(folder / SETTINGS), speller)

    def scores(self, query: str) -> Float32[np.ndarray, "features"]:
        """Of all features, in their order: of the query as it was typed or as it was meant, whichever a feature is nearer to."""
        text = checked(query)
        texts = list(dict.fromkeys((text, self.speller.corrected(text))))
        cosine = self.index.scores(*self.encoder(texts))
        return fuse(cosine, np.maximum.reduce([self.index.lexicon.coverage(t) for t in texts]), self.settings.weight)

    def __call__(self, query: str, count: int = 10) -> Answer:
        """The best features, at most `count`; equal scores in the order of the features."""
        return self.answer(self.scores(query), count)

    def answer(self, scores: Float32[np.ndarray, "features"], count: int = 10) -> Answer:
        """The same of scores."""
        if count < 1:
            raise UserError(f"at least one feature must be asked for, got {count}")
        hits = tuple(Hit(self.features[i], float(scores[i])) for i in best(scores, count))
        calibration = self.settings.calibration
        if calibration is None or not scores.any():  # of a text without a known letter or piece all scores are 0
            return Answer(hits, bool(scores.any()), None if calibration is None else 0.0)
        confidence = calibration.confidence(scores)
        return Answer(hits, confidence >= calibration.threshold, confidence)


def checked(query: str) -> str:
    """The query, its spaces made single; refused if it is empty, endless or no text.

    A space at the end is kept: the last word is complete.
    """
    text = " ".join(query[: LONGEST + 1].split())
    if not text:
        raise UserError("the query is empty; say what you need, 'my eyes hurt when I read at night'")
    if len(query) > LONGEST:
        raise UserError(f"the query has {len(query):,} characters, {LONGEST:,} at most; say it shorter")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("the query is not text (half a character in it)")
    return text + " " * query[-1:].isspace()


def settle(folder: Path, queries: Sequence[Query], weight: float = WEIGHT, examples: int = 3) -> Calibration:
    """Writes the settings of a folder that has everything else, from queries it was not trained on; some must be of kind none.

    Examples for the page are the shortest sentences among them whose answer came first, from different menus.
    """
    Settings(weight).write(folder / SETTINGS)
    searcher = Searcher.open(folder)
    scores = [searcher.scores(query.query) for query in queries]
    found = np.array([evidence(row) for row in scores])
    fits = np.array([query.kind != "none" for query in queries])
    calibration = calibrate(found[fits], found[~fits])
    first = [searcher.features[best(row, 1)[0]] for row in scores]
    right = [(q.query, f) for q, f in zip(queries, first, strict=True) if q.kind == "contextual" and f.id in q.relevant]
    by_area: dict[str, str] = {}
    for text, feature in sorted(right, key=lambda pair: (len(pair[0]), pair[0])):
        if len(text.split()) >= SENTENCE:
            by_area.setdefault(area(feature), text)
    Settings(weight, calibration, tuple(by_area.values())[:examples]).write(folder / SETTINGS)
    return calibration


def area(feature: Feature) -> str:
    """The menu a feature is under, below what all paths begin with."""
    return feature.path.split(" > ", 2)[1] if " > " in feature.path else feature.path
