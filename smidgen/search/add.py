"""`smidgen search add`: new features without training.

A new feature is compared by what it says of itself, and with --queries by what people say who want it, as those are that were learnt
(relevance.py): v, the mean of its views' vectors, and e, the mean of its examples', or what the folder's other features let one expect
(expected.py), then both times the folder's lift. They come from the encoder of the folder, which is the small one; the features learnt with
it were written by its teacher.

features.jsonl gets its lines first and the index is renamed into place after it; lines beyond the number of features in the index are an
addition that was cut short, which readers leave alone and the next addition removes.
"""

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import Parameter
from jaxtyping import Float

from smidgen.errors import UserError
from smidgen.search.encoder import Encoder, description
from smidgen.search.expected import expected, unit
from smidgen.search.features import Feature, Query, read_features, read_queries, write_features
from smidgen.search.folder import FEATURES, INDEX
from smidgen.search.fusion import words
from smidgen.search.index import Index
from smidgen.search.searcher import Searcher

PAIRS = 4096  # of the index's features, or up to twice as many, are enough to guess by


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search add`."""

    model: Path
    "A folder of smidgen search distill."
    features: Path
    "JSONL with id, title, summary, keywords, path."
    _: KW_ONLY
    queries: Path | None = None
    "Example queries for them: JSONL with query and relevant."


def command(config: Config) -> dict[str, Any]:
    """Add features to an index, without training."""
    started = time.monotonic()
    searcher = Searcher.open(config.model)
    added = read_features(config.features)
    refuse_known(searcher, added, config.features)
    examples = () if config.queries is None else read_queries(config.queries, added)
    add(searcher, added, examples)
    path = searcher.folder / INDEX
    return {
        "added": len(added),
        "features": len(searcher.features) + len(added),
        "index_bytes": path.stat().st_size,
        "add_seconds": time.monotonic() - started,
    }


def refuse_known(searcher: Searcher, added: Sequence[Feature], source: Path) -> None:
    """Refuses ids that the folder has."""
    known = {feature.id for feature in searcher.features}
    for number, feature in enumerate(added, start=1):
        if feature.id in known:
            raise UserError(f"{source}, feature {number}: id {feature.id!r} is in {searcher.folder / FEATURES} already; ids must differ")


def add(searcher: Searcher, added: Sequence[Feature], examples: Sequence[Query] = ()) -> None:
    """Writes features more into the folder of a model; their ids must be new."""
    lift = description(searcher.folder)["lift"]
    asked = [[q.query for q in examples if f.id in q.relevant] for f in added]
    vectors = [sides(searcher.encoder, f, own, lift) for f, own in zip(added, asked, strict=True)]
    silent = [i for i, own in enumerate(asked) if not own]
    guesses = guessed(searcher.index, np.concatenate([vectors[i] for i in silent]) / lift) if silent else None
    if guesses is not None:
        for i, guess in zip(silent, guesses, strict=True):
            vectors[i] = np.stack([vectors[i][0], lift * guess])
    index = searcher.index.extended(vectors, [words(feature) for feature in added])
    partial = searcher.folder / f"{FEATURES}.partial"
    write_features(partial, (*searcher.features, *added))
    partial.replace(searcher.folder / FEATURES)
    index.write(searcher.folder / INDEX)


def guessed(index: Index, texts: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"] | None:
    """e of features without examples, by the index's features that have two vectors; those whose e was guessed agree with it anyway."""
    first = index.starts[:-1][np.diff(index.starts) == 2]
    first = first[:: max(1, len(first) // PAIRS)]
    v, e = (unit(index.codes[rows] * index.scales[rows, None]) for rows in (first, first + 1))
    found = expected(np.concatenate([v, texts]), e, np.arange(len(v) + len(texts)) < len(v))
    return None if found is None else found[len(v) :]


def sides(encoder: Encoder, feature: Feature, examples: Sequence[str], lift: float) -> Float[np.ndarray, "one_or_two width"]:
    """v times the lift, or, with examples, v and e."""
    groups = [encoder(feature.views()), *([encoder(examples)] if examples else [])]
    units = unit(np.stack([group.mean(0) for group in groups]))
    return units if examples else lift * units
