"""`smidgen search train`: from features and example queries, a relevance model.

    smidgen search train features.jsonl --queries queries.jsonl --output teacher

A pre-trained encoder is fine-tuned (contrastive.py). Few data pull a network away from what it knew of language, so the result lies between
the start and the end of training: (1 - w) start + w end. w is chosen by features that training has not seen: they are dealt into five
folds, a network is trained without the queries of one fold, and the w is taken that ranks those queries, and some kept back of other
features, best (MRR@10). The lift of features without examples (relevance.py) is what brings most of both among the first ten: those that
nobody gave an example for are to be found at all, before others are found a place higher. Then training is repeated with all features.
What was kept back stays so, for distill's table and threshold.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError, check_seed
from smidgen.fit import FitConfig, fit
from smidgen.precision import pick_device
from smidgen.run import Run
from smidgen.search.bert import MINILM, Bert, Encoder, find, load, save
from smidgen.search.contrastive import Contrastive, Views, batches, groups, interpolated, objective, own_queries
from smidgen.search.features import (
    CATALOGUE,
    FEATURES,
    NONE,
    QUERIES,
    Feature,
    Query,
    read_features,
    read_queries,
    write_features,
    write_queries,
)
from smidgen.search.metrics import by_kind
from smidgen.search.relevance import LIFT, relevance, with_examples

FOLDS = 5
TRAINED_ON, HELD_OUT = "queries.jsonl", "held_out.jsonl"  # in the folder of a teacher
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTH = 64  # tokens of a text
WARMUP = 0.1  # of the updates
RELEVANCE = "relevance.json"  # beside them: {"version", "lift"}
Parts = Mapping[str, Sequence[Query]]
Choices = dict[float, float]
"MRR@10 for a weight."


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search train`."""

    features: Path = CATALOGUE
    "Features as JSON Lines; the catalogue of the package if none are given."
    _: KW_ONLY
    queries: Path | None = None
    "Example queries as JSON Lines; none: those of the package's catalogue, or, for features of your own, their titles and keywords alone."
    teacher: str = MINILM
    "Encoder to start from: minilm-l6 (from its package), a folder of sentence-transformers, or a hub id."
    epochs: int = 4
    "Times every query is seen."
    batch: int = 64
    "Queries per update."
    learning_rate: float = 5e-5
    "Of AdamW, for the uppermost layer."
    layer_decay: float = 0.9
    "Factor of the learning rate per layer downwards."
    method: Contrastive = field(default_factory=Contrastive)
    "Numbers of the method."
    interpolation: float | None = None
    "Weight of the trained network against the start, w; none: chosen by features held out."
    folds: int = 1
    "Of five, trained to choose it."
    lift: float = LIFT
    "Factor of features without example queries among others that have some: larger finds them sooner, and the others later."
    hold_out: float = 0.1
    "Share of the example queries that is kept back, to choose by and to measure with; never more than one of a feature's three."
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    "Of matrix products."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/search/train."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the order of queries, slips and folds."

    def check(self) -> None:
        """Refuses what cannot work."""
        for name, value in (("epochs", self.epochs), ("batch", self.batch), ("method.refresh", self.method.refresh)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        check_seed(self.seed)
        if self.interpolation is not None and not 0 <= self.interpolation <= 1:
            raise UserError(f"--interpolation must be between 0 and 1, got {self.interpolation}")
        if not 0.5 <= self.lift <= 2:
            raise UserError(f"--lift must be between 0.5 and 2, got {self.lift}")
        if self.interpolation is not None and self.folds != type(self).folds:
            raise UserError("--folds choose the interpolation; with --interpolation given leave them out")
        if self.interpolation is None and not 1 <= self.folds <= FOLDS:
            raise UserError(f"--folds must be between 1 and {FOLDS}, got {self.folds}")
        if not (self.method.temperature > 0 and 0 <= self.method.filter <= 1 and self.method.hard >= 0 and self.method.teaching >= 0):
            raise UserError("--method: temperature must be positive, filter between 0 and 1, hard and teaching not negative")
        if not 0 <= self.hold_out < 0.34:
            raise UserError(f"--hold-out must be at least 0 and below 0.34, got {self.hold_out}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer-decay must be above 0 and at most 1, got {self.layer_decay}")


DEFAULT = Config()


def command(config: Config = DEFAULT) -> dict[str, Any]:
    """Fine-tune an encoder on features and example queries."""
    with Run("search train", config, config.output, config.features.stem) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Read, choose the weight, train, interpolate, save."""
    config.check()
    started = time.monotonic()
    device = pick_device(config.device)
    features = read_features(config.features)
    queries, held_out = examples(config, features)
    start = load(find(config.teacher), LENGTH)
    start.model.to(device)

    chosen = {} if config.interpolation is not None else choose(start, features, queries, held_out, config, run)
    weight = pick(chosen) if config.interpolation is None else config.interpolation
    teacher = train(start, features, queries, config, run, weight)

    folder = run.partial("artifact")
    save(folder, teacher)
    write_features(folder / FEATURES, features)
    (folder / RELEVANCE).write_text(json.dumps({"version": 1, "lift": config.lift}) + "\n")
    for name, part in ((TRAINED_ON, queries), (HELD_OUT, held_out)):
        if part:
            write_queries(folder / name, part)
    run.keep(folder)
    return run.finish(
        interpolation=weight,
        lift=config.lift,
        held_out_mrr=chosen,
        features=len(features),
        queries=len(queries),
        parameters=sum(p.numel() for p in teacher.model.parameters()),
        size_bytes=(run.folder / "artifact" / "model.safetensors").stat().st_size,
        seconds=time.monotonic() - started,
        device=str(device),
        seed=config.seed,
    )


def examples(config: Config, features: Sequence[Feature]) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """Queries to train on, and those held out; what nothing fits is held out, and comes from the package if there is none."""
    path = config.queries or (QUERIES if config.features == CATALOGUE else None)
    given = () if path is None else read_queries(path, features)
    answered, none = [q for q in given if q.relevant], [q for q in given if not q.relevant]
    if path is not None and not answered:
        raise UserError(f"{path}: holds no query that a feature answers; there is nothing to learn")
    third = nth(answered, 3)
    count = round(config.hold_out * len(answered))
    chosen = set(np.random.default_rng(config.seed).permutation(third)[:count].tolist())
    kept = tuple(q for i, q in enumerate(answered) if i not in chosen)
    return kept, (*(answered[i] for i in sorted(chosen)), *(none or read_queries(NONE)))


def nth(queries: Sequence[Query], n: int) -> list[int]:
    """Which queries are the n-th of their feature; a feature with fewer keeps them all."""
    seen: dict[str, int] = {}
    found = []
    for i, query in enumerate(queries):
        seen[query.relevant[0]] = seen.get(query.relevant[0], 0) + 1
        if seen[query.relevant[0]] == n:
            found.append(i)
    return found


def train(start: Encoder, features: Sequence[Feature], queries: Sequence[Query], config: Config, run: Run, weight: float) -> Encoder:
    """A fine-tuned copy of the start, interpolated with it."""
    assert isinstance(start.model, Bert)
    model = Bert(start.model.shape).to(start.device)
    model.load_state_dict(start.model.state_dict())
    encoder = replace(start, model=model.train())
    rows = (*queries, *own_queries(features))
    steps = max(1, config.epochs * len(rows) // min(config.batch, len(rows)))
    fitting = FitConfig(
        steps=steps,
        learning_rate=config.learning_rate,
        warmup=int(WARMUP * steps),
        precision=config.precision,
        seed=config.seed,
    )
    fit(
        model,
        objective(config.method, Views(encoder, features)),
        batches(encoder, rows, features, config.batch, config.method.misspelt, config.seed),
        fitting,
        run,
        groups=groups(model, config.learning_rate, config.layer_decay),
    )
    return between(start, replace(encoder, model=model), weight)


def choose(
    start: Encoder, features: Sequence[Feature], queries: Sequence[Query], held_out: Sequence[Query], config: Config, run: Run
) -> Choices:
    """On held-out queries for every weight, mean over folds and over queries of features seen and not seen."""
    assert isinstance(start.model, Bert)
    if not queries:
        raise UserError("without example queries no weight can be chosen; give --queries, or --interpolation, 0.5 for example")
    found: dict[float, list[float]] = {w: [] for w in WEIGHTS}
    for fold in range(config.folds):
        kept, parts = split(features, queries, held_out, fold, config.seed)
        end = train(start, features, kept, config, run, 1.0)
        for weight in WEIGHTS:
            encoder = between(start, end, weight)
            texts = vectors(encoder, features)
            asked = {name: encoder.encode([q.query for q in part]) for name, part in parts.items()}
            bank = with_examples(texts, encoder, features, kept, config.lift)
            ranked = {name: by_kind(relevance(u, bank).cpu().numpy(), parts[name], features)["all"] for name, u in asked.items()}
            run.log(fold=fold, weight=weight, **{f"{name} {k}": v for name, part in ranked.items() for k, v in part.items()})
            found[weight] += [part["mrr@10"] for part in ranked.values()]
    return {weight: float(np.mean(values)) for weight, values in found.items()}


def pick(choices: Choices) -> float:
    """The weight of the highest MRR@10; of equal ones the least."""
    return max(choices, key=lambda weight: (choices[weight], -weight))


def between(start: Encoder, end: Encoder, weight: float) -> Encoder:
    """The network (1 - w) start + w end."""
    assert isinstance(start.model, Bert)
    model = Bert(start.model.shape).to(start.device)
    model.load_state_dict(interpolated(start.model.state_dict(), end.model.state_dict(), weight))
    return replace(start, model=model.eval())


def split(
    features: Sequence[Feature], queries: Sequence[Query], held_out: Sequence[Query], fold: int, seed: int
) -> tuple[tuple[Query, ...], Parts]:
    """Queries to train on, and those to measure with: all of the fold's features ("unseen"), and held-out ones of the others ("seen")."""
    place = np.random.default_rng(seed).permutation(len(features))
    fold_ids = {feature.id for feature, p in zip(features, place, strict=True) if p % FOLDS == fold}
    everything = [q for q in (*queries, *held_out) if q.relevant]
    unseen = [q for q in everything if fold_ids & set(q.relevant)]
    seen = [q for q in held_out if q.relevant and not fold_ids & set(q.relevant)]
    kept = tuple(q for q in queries if not fold_ids & set(q.relevant))
    return kept, {name: part for name, part in (("seen", seen), ("unseen", unseen)) if part}


def vectors(encoder: Encoder, features: Sequence[Feature]) -> Float[Tensor, "features width"]:
    """v_f of every feature."""
    views = Views(encoder, features)
    return views.means(views.bank(encoder.model))
