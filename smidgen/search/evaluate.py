"""`smidgen search evaluate`: how good and how fast a model's folder answers queries whose answers are known.

Figures of every kind of query as metrics.py defines them. Of queries that nothing fits: auroc, and false_show, the share that is answered
all the same with the folder's threshold, beside answer_rate, the share of the contextual ones that are.

Time is of one thread from text to ranked features, tokenizer included: the queries in random order, the first WARM not counted.
cold_ms is opening the folder and the first answer, with the files in the system's cache and the packages imported.
"""

import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import Parameter
from jaxtyping import Float32

from smidgen.errors import UserError, check_seed
from smidgen.run import Run
from smidgen.search.features import Query, read_queries
from smidgen.search.folder import sizes
from smidgen.search.index import best
from smidgen.search.metrics import by_kind
from smidgen.search.searcher import Searcher

WARM = 200


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search evaluate`."""

    model: Path
    "A folder of smidgen search distill."
    queries: Path
    "JSONL with query, relevant (ids, the best first) and kind (contextual, keyword, typo, none)."
    _: KW_ONLY
    timed: int = 1000
    "Answers whose time is measured."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/search/evaluate."
    seed: int = 0
    "Of the order in which queries are timed."

    def check(self) -> None:
        """Refuses what cannot work."""
        if self.timed < 1:
            raise UserError(f"--timed must be at least 1, got {self.timed}")
        check_seed(self.seed)


def command(config: Config) -> dict[str, Any]:
    """Measure a model on queries whose answers are known."""
    with Run("search evaluate", config, config.output, config.model.resolve().name) as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Open, answer, count, time."""
    config.check()
    started = time.perf_counter()
    searcher = Searcher.open(config.model)
    queries = read_queries(config.queries, searcher.features)
    opened = time.perf_counter()
    searcher(queries[0].query)
    cold = time.perf_counter() - started

    scores = np.stack([searcher.scores(q.query) for q in run.track(queries, "queries", len(queries))])
    shown = [searcher.answer(row).fits for row in scores]
    for row in rows(searcher, queries, scores, shown):
        run.log(**row)
    milliseconds = timed(searcher, queries, config, run)
    found = by_kind(scores, queries, searcher.features)
    found.setdefault("none", {}).update(rates(queries, shown))
    return run.finish(
        **found,
        latency_ms_p50=float(np.percentile(milliseconds, 50)),
        latency_ms_p95=float(np.percentile(milliseconds, 95)),
        latency_ms_p99=float(np.percentile(milliseconds, 99)),
        cold_ms=1e3 * cold,
        open_ms=1e3 * (opened - started),
        size_bytes=sum(sizes(searcher.folder).values()),
        size_bytes_by_file=sizes(searcher.folder),
        features=len(searcher.features),
        queries={kind: count for kind in ("contextual", "keyword", "typo", "none") if (count := sum(q.kind == kind for q in queries))},
        model=str(config.model),
    )


def timed(searcher: Searcher, queries: tuple[Query, ...], config: Config, run: Run) -> list[float]:
    """Milliseconds of answers, after some that do not count."""
    order = np.random.default_rng(config.seed).integers(len(queries), size=WARM + config.timed)
    found = []
    for i in run.track(order, "timing", len(order)):
        started = time.perf_counter()
        searcher(queries[i].query)
        found.append(1e3 * (time.perf_counter() - started))
    return found[WARM:]


def rates(queries: tuple[Query, ...], shown: list[bool]) -> dict[str, float]:
    """Shares that are shown an answer: of contextual queries, and of those that nothing fits; without such queries nothing."""
    found = {}
    for name, kind in (("answer_rate", "contextual"), ("false_show", "none")):
        own = [yes for q, yes in zip(queries, shown, strict=True) if q.kind == kind]
        if own:
            found[name] = float(np.mean(own))
    return found


def rows(
    searcher: Searcher, queries: tuple[Query, ...], scores: Float32[np.ndarray, "n features"], shown: list[bool]
) -> list[dict[str, Any]]:
    """What was asked, what came first, and at which rank the answer was."""
    number = {feature.id: i for i, feature in enumerate(searcher.features)}
    found = []
    for query, row, fits in zip(queries, scores, shown, strict=True):
        order = best(row, len(row))
        rank = min((int(np.flatnonzero(order == number[name])[0]) + 1 for name in query.relevant), default=None)
        first = searcher.features[order[0]]
        found.append(
            {
                "query": query.query,
                "kind": query.kind,
                "relevant": list(query.relevant),
                "rank": rank,
                "first": first.id,
                "title": first.title,
                "score": float(row[order[0]]),
                "shown": fits,
            }  # fmt: skip
        )
    return found
