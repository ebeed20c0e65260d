"""`smidgen search add`: new features without training.

Their views go through the encoder of the folder, which is the small one: the features learnt with it were written by its teacher, and
most have example queries, so a new one is found less well. It gets the mean of its views, lifted as its like were (relevance.py).
features.jsonl gets its lines first and the index is renamed into place after it; lines beyond the number of features in the index are an
addition that was cut short, which readers leave alone and the next addition removes.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import Parameter

from smidgen.errors import UserError
from smidgen.search.features import Feature, read_features, write_features
from smidgen.search.folder import DESCRIPTION, FEATURES, INDEX
from smidgen.search.fusion import words
from smidgen.search.searcher import Searcher


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search add`."""

    model: Path
    "A folder of smidgen search distill."
    features: Path
    "JSONL with id, title, summary, keywords, path."


def command(config: Config) -> dict[str, Any]:
    """Add features to an index, without training."""
    started = time.monotonic()
    searcher = Searcher.open(config.model)
    added = read_features(config.features)
    add(searcher, added, config.features)
    path = searcher.folder / INDEX
    return {
        "added": len(added),
        "features": len(searcher.features) + len(added),
        "index_bytes": path.stat().st_size,
        "add_seconds": time.monotonic() - started,
    }


def add(searcher: Searcher, added: tuple[Feature, ...], source: Path) -> None:
    """Writes features more into the folder of a model."""
    known = {feature.id for feature in searcher.features}
    for number, feature in enumerate(added, start=1):
        if feature.id in known:
            raise UserError(f"{source}, feature {number}: id {feature.id!r} is in {searcher.folder / FEATURES} already; ids must differ")
    lift = json.loads((searcher.folder / DESCRIPTION).read_text(encoding="utf-8")).get("lift", 1.0)
    means = [searcher.encoder(feature.views()).mean(0, keepdims=True) for feature in added]
    vectors = [lift * mean / max(float(np.linalg.norm(mean)), 1e-12) for mean in means]
    index = searcher.index.extended(vectors, [words(feature) for feature in added])
    partial = searcher.folder / f"{FEATURES}.partial"
    write_features(partial, (*searcher.features, *added))
    partial.replace(searcher.folder / FEATURES)
    index.write(searcher.folder / INDEX)
