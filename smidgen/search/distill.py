"""`smidgen search distill`: from a relevance model to one that a phone can hold.

    smidgen search distill teacher --layers 3 --output student

Fewer words, positions and layers, then eight bits, then the index; what each step costs is measured on the way against the teacher, on the
same queries (steps.jsonl, and the report): how alike the vectors are, how many of the ten best features stay, and, with labels, how well the
right ones are ranked. Give queries that were not trained on with --held-out; the threshold from which on an answer is shown needs them, some
of them of kind none.
"""

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.fit import FitConfig, fit
from smidgen.precision import pick_device
from smidgen.run import Run
from smidgen.search.bert import Bert, Encoder, keep_layers, keep_rows, load
from smidgen.search.contrastive import Views, own_queries
from smidgen.search.distillation import Distillation, Material, batches, narrowed, objective, spread
from smidgen.search.export import export
from smidgen.search.features import CATALOGUE, FEATURES, QUERIES, Feature, Query, read_features, read_queries, write_features
from smidgen.search.folder import Described, described, open_encoder
from smidgen.search.metrics import by_kind
from smidgen.search.static import components, static
from smidgen.search.vocabulary import pruned

WARMUP = 0.1  # of the updates
POSITIONS = 64
DEEPER = 1e-4, 5e-3  # learning rates of a network and of a table


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search distill`."""

    teacher: Path
    "Folder of smidgen search train."
    _: KW_ONLY
    layers: Literal["1", "2", "3", "4", "5", "6", "static"] = "3"
    "Layers of the student; static: none, a table of words."
    vocabulary: int = 8000
    "Pieces of words the student knows."
    width: int = 256
    "Of the static table's vectors."
    bits: Literal[8, 32] = 8
    "Of the network's weights; a table always has 8."
    steps: int = 2000
    "Updates."
    batch: int = 128
    "Texts per update."
    learning_rate: float | None = None
    "Of AdamW; none: 1e-4 for layers, 5e-3 for a table."
    method: Distillation = field(default_factory=Distillation)
    "Numbers of the method."
    texts: Path | None = None
    "More texts to learn from, one a line; without them those of the features and of the package's catalogue."
    held_out: Path | None = None
    "Queries that were not trained on, to measure with and to choose the threshold of 'nothing fits'."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Of matrix products."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/search/distill."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the texts."

    def check(self) -> None:
        """Refuses what cannot work."""
        for name, value in (("vocabulary", self.vocabulary), ("width", self.width), ("batch", self.batch)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.layers == "static" and self.bits != 8:
            raise UserError("--bits 32 is for networks; a static table is written in 8 bits")
