"""`smidgen search distill`: from a relevance model to one that a phone can hold.

    smidgen search distill teacher --layers 3 --output student

Fewer words, positions and layers, then eight bits, then the index. What each step costs is measured against the teacher on held-out queries
(metrics.json, the report): how alike the vectors are, how many of the ten best features stay, how well the right ones are ranked. The
threshold below which nothing fits comes from the same queries, some of which have to be of kind none.
"""

import copy
import json
import time
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError, check_seed
from smidgen.fit import FitConfig, fit
from smidgen.precision import pick_device
from smidgen.run import Run
from smidgen.search.bert import Bert, Encoder, keep_layers, keep_rows, load
from smidgen.search.contrastive import own_queries
from smidgen.search.distillation import Distillation, Material, batches, narrowed, objective, spread
from smidgen.search.export import export
from smidgen.search.features import CATALOGUE, FEATURES, QUERIES, Feature, Query, read_features, read_queries, write_features
from smidgen.search.folder import DESCRIPTION, INDEX, INNER, SETTINGS, TOKENIZER, sizes
from smidgen.search.fusion import words
from smidgen.search.index import Index
from smidgen.search.metrics import DEPTH, by_kind
from smidgen.search.relevance import LIFT, relevance, sides
from smidgen.search.searcher import Searcher, Settings, settle
from smidgen.search.static import components, static
from smidgen.search.teacher import HELD_OUT, LENGTH, RELEVANCE, TRAINED_ON
from smidgen.search.vocabulary import pruned

WARMUP = 0.1  # of the updates
POSITIONS = 64
LAYERS_RATE, TABLE_RATE = 3e-4, 5e-3
ENCODER_VERSION = 1


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
    "Updates; 0: none, the teacher's layers as they are."
    batch: int = 128
    "Texts per update."
    learning_rate: float | None = None
    "Of AdamW; none: 3e-4 for layers, 5e-3 for a table."
    method: Distillation = field(default_factory=Distillation)
    "Numbers of the method."
    texts: Path | None = None
    "More texts to learn from, one a line; without them those of the features and of the package's catalogue."
    held_out: Path | None = None
    "Queries that were not trained on, to measure with and to choose the threshold of 'nothing fits'; none: those the teacher kept back."
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
        check_seed(self.seed)
        if self.steps < 0:
            raise UserError(f"--steps must not be negative, got {self.steps}")
        if self.texts is not None and not self.texts.is_file():
            raise UserError(f"--texts: no such file: {self.texts}")
        method = self.method
        if not (method.temperature > 0 and min(method.alignment, method.list_kl, method.labels) >= 0):
            raise UserError("--method: temperature must be positive, alignment, list-kl and labels not negative")
        if not 0 <= method.texts <= 1:
            raise UserError(f"--method.texts is a share, 0 to 1, got {method.texts}")
        if self.layers != "static" and self.width != type(self).width:
            raise UserError(f"--width is of --layers static; {self.layers} layers keep the teacher's")
        if self.layers == "static" and self.bits != 8:
            raise UserError("--bits 32 is for networks; a static table is written in 8 bits")

    def rate(self) -> float:
        """Of learning."""
        if self.learning_rate is not None:
            return self.learning_rate
        return TABLE_RATE if self.layers == "static" else LAYERS_RATE


def command(config: Config) -> dict[str, Any]:
    """Distil a relevance model into a folder that a device answers queries from."""
    with Run("search distill", config, config.output, f"{config.teacher.name}-{config.layers}") as run:
        return main(config, run)


@dataclass(frozen=True)
class Taught:
    """What a teacher's folder holds."""

    teacher: Encoder
    features: tuple[Feature, ...]
    queries: tuple[Query, ...]
    "It was trained on these,"
    held_out: tuple[Query, ...]
    "and not on those."
    bank: Float[Tensor, "features 2 width"]
    "v_f and e_f"
    lift: float

    @staticmethod
    def read(config: Config, device: torch.device) -> "Taught":
        """The folder of a run, or the model in it."""
        folder = config.teacher / INNER if (config.teacher / INNER).is_dir() else config.teacher
        if not (folder / FEATURES).is_file():
            raise UserError(f"{config.teacher}: no {FEATURES} in it; give a folder that smidgen search train wrote")
        features = read_features(folder / FEATURES)
        queries = read_queries(folder / TRAINED_ON, features) if (folder / TRAINED_ON).is_file() else ()
        kept_back = config.held_out or folder / HELD_OUT
        held_out = read_queries(kept_back, features) if kept_back.is_file() or config.held_out else ()
        teacher = load(folder, LENGTH)
        teacher.model.to(device)
        lift = read_lift(folder / RELEVANCE)
        return Taught(teacher, features, queries, held_out, sides(teacher, features, queries, lift), lift)


@dataclass(frozen=True)
class Distilled:
    """A student and what it is measured against."""

    taught: Taught
    smaller: Encoder
    "Before training."
    student: Encoder
    bank: Float[Tensor, "features 2 narrow"]
    "v_f and e_f as they stand in the index."
    basis: Float[Tensor, "width narrow"] | None
    "Directions kept of the teacher's vectors; none: all."


def main(config: Config, run: Run) -> dict[str, Any]:
    """Distil, write, calibrate, measure."""
    started = time.monotonic()
    made = distilled(config, run)
    folder = run.partial(INNER)
    write(folder, made, config)
    calibration = None
    if {q.kind == "none" for q in made.taught.held_out} == {True, False}:
        calibration = settle(folder, made.taught.held_out)
    else:
        run.say("no held-out queries of both sorts, answerable and of kind none: every query will be shown an answer")
    folder = run.keep(folder)
    costs = measured(folder, made)
    for row in costs:
        run.log(**row)
    return run.finish(
        costs=costs,
        layers=config.layers,
        bits=config.bits,
        vocabulary=made.student.tokenizer.get_vocab_size(),
        width=made.bank.shape[2],
        features=len(made.taught.features),
        parameters=sum(p.numel() for p in made.student.model.parameters()),
        size_bytes=sum(sizes(folder).values()),
        size_bytes_by_file=sizes(folder),
        calibration=None if calibration is None else calibration.row(),
        steps=config.steps,
        seconds=time.monotonic() - started,
        device=str(made.bank.device),
        seed=config.seed,
    )


def distilled(config: Config, run: Run) -> Distilled:
    """Read, shrink, train."""
    config.check()
    taught = Taught.read(config, pick_device(config.device))
    queries = (*taught.queries, *own_queries(taught.features))
    material = Material.of(taught.features, queries, more_texts(config), taught.teacher)
    smaller, basis = shrunk(taught, material, config)
    bank = narrowed(taught.bank, basis)
    model = copy.deepcopy(smaller.model)
    if config.steps:
        fitting = FitConfig(
            steps=config.steps, learning_rate=config.rate(), warmup=int(WARMUP * config.steps), precision=config.precision, seed=config.seed
        )
        loss = objective(config.method, taught.teacher, bank, basis)
        drawn = batches(smaller, taught.teacher, material, taught.features, config.batch, config.seed, config.method.texts)
        fit(model, loss, drawn, fitting, run)
    return Distilled(taught, smaller, replace(smaller, model=model), bank, basis)


def read_lift(path: Path) -> float:
    """What the teacher's folder says of it; a folder of sentence-transformers says nothing."""
    if not path.is_file():
        return LIFT
    try:
        return float(json.loads(path.read_text())["lift"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; train again") from error


def more_texts(config: Config) -> list[str]:
    """Texts without labels: of the option, or the package's catalogue and queries, which are about phones as well."""
    if config.texts is None:
        catalogue = read_features(CATALOGUE)
        return [view for feature in catalogue for view in feature.views()] + [q.query for q in read_queries(QUERIES, catalogue)]
    lines = config.texts.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def shrunk(taught: Taught, material: Material, config: Config) -> tuple[Encoder, Float[Tensor, "width narrow"] | None]:
    """The student before training, and the directions its vectors keep of the teacher's, if not all."""
    teacher, known = taught.teacher, [q.query for q in material.queries]
    assert isinstance(teacher.model, Bert)
    tokenizer, pieces = pruned(
        teacher.tokenizer, [*known, *(view for feature in taught.features for view in feature.views())], config.vocabulary
    )
    positions = min(POSITIONS, teacher.model.shape.positions)
    small = Encoder(keep_rows(teacher.model, pieces, positions).eval(), tokenizer, positions)
    if config.layers == "static":
        width = min(config.width, teacher.model.shape.width)
        basis = components(torch.cat([taught.bank.flatten(0, 1), teacher.encode(known)]), width)
        return static(small, width, basis), basis
    if int(config.layers) > teacher.model.shape.layers:
        raise UserError(f"--layers {config.layers}: the teacher has {teacher.model.shape.layers}")
    assert isinstance(small.model, Bert)
    kept = spread(int(config.layers), teacher.model.shape.layers)
    return replace(small, model=keep_layers(small.model, kept).eval()), None


def write(folder: Path, made: Distilled, config: Config) -> None:
    """What a device needs, every answer shown; see the package's description."""
    student, features, bank = made.student, made.taught.features, made.bank
    write_features(folder / FEATURES, features)
    student.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    export(student, folder, config.bits)
    description = {
        "version": ENCODER_VERSION,
        "kind": "static" if config.layers == "static" else "onnx",
        "width": bank.shape[2],
        "length": student.length,
        "vocabulary": student.tokenizer.get_vocab_size(),
        "layers": 0 if config.layers == "static" else int(config.layers),
        "bits": config.bits,
        "lift": made.taught.lift,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    views = [pair[:1] if np.array_equal(*pair) else pair for pair in bank.cpu().double().numpy()]
    Index.of(views, [words(feature) for feature in features]).write(folder / INDEX)
    Settings().write(folder / SETTINGS)


def measured(folder: Path, made: Distilled) -> list[dict[str, Any]]:
    """What each step cost, on held-out queries, or without any on those learnt from."""
    taught, bank, basis = made.taught, made.bank, made.basis
    queries = taught.held_out or taught.queries or own_queries(taught.features)
    texts = [q.query for q in queries]
    full = taught.teacher.encode(texts)
    vectors = {"teacher": full} if basis is None else {"teacher": full, "narrow": narrowed(full, basis)}
    vectors |= {"smaller": made.smaller.encode(texts), "distilled": made.student.encode(texts)}
    searcher = Searcher.open(folder)
    vectors["written"] = torch.from_numpy(searcher.encoder(texts)).to(full.device)
    scores = {name: relevance(u, taught.bank if u.shape[1] == full.shape[1] else bank).cpu().numpy() for name, u in vectors.items()}
    scores["indexed"] = np.stack([searcher.index.scores(u) for u in vectors["written"].cpu().numpy()])
    scores["fused"] = np.stack([searcher.scores(text) for text in texts])
    best = {name: np.argsort(-s, 1, kind="stable")[:, :DEPTH] for name, s in scores.items()}
    rows = []
    for name in scores:
        same = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(best[name], best["teacher"], strict=True)])
        row: dict[str, Any] = {"step": name, "overlap@10": float(same)}
        if name in vectors:
            target = full if basis is None or name == "teacher" else narrowed(full, basis)
            row["cosine"] = float((vectors[name] * target).sum(1).mean())
        figures = by_kind(scores[name], queries, taught.features)
        rows.append(row | {f"{kind} {k}": v for kind, part in figures.items() for k, v in part.items()})
    return rows
