"""Search on Android's settings: baselines, teacher, students; quality, size and time.

    python benchmarks/search.py                                              # everything, five seeds; a GPU's work
    python benchmarks/search.py --tables baselines                           # a minute on two cores
    python benchmarks/search.py --tables teacher students --seeds 0 --models models --device cuda
    python benchmarks/search.py --tables students --students 3@steps=6000@learning_rate=3e-4 --seeds 0 --models models
    python benchmarks/search.py --tables times --seeds 0 --models models     # the same models again, where their times matter

    baselines   rankings without training (smidgen/search/baselines.py)
    teacher     fine-tuned on benchmarks/data/android_queries.jsonl, at every weight between its start and its end
    students    3 and 2 layers and the static table, in 32 and 8 bits, with meaning alone and with trigrams ("fused"); what follows @ is
                set in the configuration of distillation (steps, learning_rate, batch, vocabulary, method.texts, ...)
    leave-out   five teachers, each without the queries of a fifth of the features, measured on the development queries of that fifth,
                beside the teacher that had them ("all features"), at the default lift and at others; and the queries of the other four
                fifths, which pay for a lift
    unasked     the same of the untrained encoder, in the index alone: with a feature's own texts, and with the examples to be expected
                of it beside them (smidgen/search/expected.py)
    ablations   the teacher without one of its parts
    times       of written students: p50 and p95 of warm queries on one thread, and the cold start

The features and the development queries are in DATA/search; figures are of the development queries, on which nothing was trained. The
teacher's weight is chosen by held-out features (`smidgen search train`), not by them. "Texts" are scores by the features' own
texts, "examples" with the training queries beside them (smidgen/search/relevance.py). A row per system and seed goes to --results; its
columns are KIND FIGURE, as smidgen/search/metrics.py defines them. Run with OMP_NUM_THREADS=1 where times matter.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rows import append, provenance, settings

from smidgen.run import Run
from smidgen.search import baselines, distill, evaluate, teacher
from smidgen.search.bert import MINILM, Encoder, find, load, save
from smidgen.search.contrastive import Contrastive, labels
from smidgen.search.encoder import whole_words
from smidgen.search.features import FEATURES, Feature, Query, read_features, read_queries, write_features, write_queries
from smidgen.search.folder import sizes
from smidgen.search.fusion import Lexicon, fuse, words
from smidgen.search.metrics import by_kind
from smidgen.search.relevance import LIFT, relevance, sides
from smidgen.search.searcher import Searcher
from smidgen.search.spelling import Speller
from smidgen.search.static import static

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "search.csv"
LIFTS = (1.0, 1.05, 1.1, LIFT, 1.2)
KINDS, FIGURES = ("contextual", "keyword", "typo", "all"), ("hit@1", "hit@10", "mrr@10", "ndcg@10")
COLUMNS = [
    "table", "system", "seed", *(f"{kind} {figure}" for kind in KINDS for figure in FIGURES), "auroc", "size_mb", "p50_ms", "p95_ms",
    "cold_ms", "seconds", "commit", "machine", "date",
]  # fmt: skip
ABLATIONS = {
    "whole": Contrastive(),
    "no self-teaching": Contrastive(teaching=0.0),
    "no hard negatives": Contrastive(hard=0),
    "hard negatives unfiltered": Contrastive(filter=1.0),
    "4 hard negatives": Contrastive(hard=4),
    "temperature 0.02": Contrastive(temperature=0.02),
}


class Bench:
    """Data, options, and where models are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder = options.data / "search"
        self.options = options
        self.catalogue = folder / "android_settings.jsonl"
        self.features: tuple[Feature, ...] = read_features(self.catalogue)
        self.dev: tuple[Query, ...] = read_queries(folder / "dev_queries.jsonl", self.features)
        self.queries: tuple[Query, ...] = read_queries(HERE / "data" / "android_queries.jsonl", self.features)
        self.texts = [q.query for q in self.dev]

    def figures(self, scores: np.ndarray) -> dict[str, float]:
        """The columns of quality."""
        found = by_kind(scores, self.dev, self.features)
        row = {f"{kind} {figure}": round(found[kind][figure], 4) for kind in KINDS for figure in FIGURES}
        return row | {"auroc": round(found["none"]["auroc"], 4)}

    def fused(self, encoder: Encoder, by: str) -> np.ndarray:
        """Scores of a teacher as a device fuses them: spelling (smidgen/search/spelling.py) and trigrams (fusion.py)."""
        lexicon = Lexicon.of([words(feature) for feature in self.features])
        speller = Speller.of([feature.everything() for feature in self.features], whole_words(encoder.tokenizer))
        meant = [speller.corrected(text) for text in self.texts]
        cosine = np.maximum(scored(self, encoder, by), scored(self, encoder, by, texts=meant))
        covered = [np.maximum(lexicon.coverage(a), lexicon.coverage(b)) for a, b in zip(self.texts, meant, strict=True)]
        return np.stack([fuse(row.astype(np.float32), c) for row, c in zip(cosine, covered, strict=True)])

    def start(self) -> Encoder:
        """The pre-trained encoder."""
        encoder = load(find(self.options.teacher), teacher.LENGTH)
        encoder.model.to(self.options.device)
        return encoder

    def run(self, job: str, name: str, config: object) -> Run:
        """A run in the folder of models."""
        return Run(job, config, self.options.models / name)

    def config(self, seed: int, **changes: object) -> teacher.Config:
        """Of a teacher."""
        options = self.options
        config = teacher.Config(self.catalogue, epochs=options.epochs, device=options.device, seed=seed, hold_out=0.0, folds=options.folds)
        return replace(config, **changes)


def rankings(bench: Bench, seed: int) -> Iterator[dict]:
    """Without training; there is nothing a seed would change."""
    if seed != bench.options.seeds[0]:
        return
    features, texts = bench.features, bench.texts
    start = bench.start()
    titles, whole = [f.title for f in features], [f.everything() for f in features]
    bm25 = baselines.bm25(features)(texts)
    dense = baselines.dense(start, titles, whole)(texts)
    systems = {
        "aosp": lambda: baselines.aosp(features)(texts),
        "fts5": lambda: baselines.fts5(features)(texts),
        "bm25 titles": lambda: baselines.bm25(features, titles=True)(texts),
        "bm25": lambda: bm25,
        "minilm title": lambda: baselines.dense(start, titles)(texts),
        "minilm all fields": lambda: baselines.dense(start, whole)(texts),
        "minilm mean of both": lambda: dense,
        "minilm views": lambda: scored(bench, start, "texts"),
        "minilm views and examples": lambda: scored(bench, start, "examples"),
        "static of minilm, 256 wide": lambda: baselines.dense(static(start, 256), titles, whole)(texts),
        "rrf of bm25 and minilm": lambda: baselines.fused(bm25, dense),
    }
    for name, scores in systems.items():
        yield {"system": name} | bench.figures(scores())


def scored(
    bench: Bench,
    encoder: Encoder,
    by: str,
    examples: Sequence[Query] | None = None,
    lift: float = LIFT,
    texts: Sequence[str] | None = None,
) -> np.ndarray:
    """Scores of an encoder by texts or by examples, all of them or some; of the development queries or of other texts."""
    examples = () if by == "texts" else bench.queries if examples is None else examples
    return relevance(encoder.encode(texts or bench.texts), sides(encoder, bench.features, examples, lift)).cpu().numpy()


def teachers(bench: Bench, seed: int) -> Iterator[dict]:
    """Trained on all queries; what lies between the start and the end; the chosen one is kept for students."""
    started = time.monotonic()
    config, start = bench.config(seed), bench.start()
    with bench.run("search train", f"teacher-{seed}", config) as run:
        weight = bench.options.interpolation
        if weight is None:
            kept, held_out = hold_out(bench.queries, seed)
            chosen = teacher.choose(start, bench.features, kept, held_out, config, run)
            weight = teacher.pick(chosen)
            print("held-out MRR@10 by weight:", {w: round(value, 4) for w, value in chosen.items()})
        end = teacher.train(start, bench.features, bench.queries, config, run, 1.0)
        folder = run.partial("artifact")
        save(folder, teacher.between(start, end, weight))
        (folder / teacher.RELEVANCE).write_text(json.dumps({"version": 1, "lift": config.lift}) + "\n")
        write_features(folder / FEATURES, bench.features)
        write_queries(folder / teacher.TRAINED_ON, bench.queries)
        write_queries(folder / teacher.HELD_OUT, bench.dev)
        size = (run.keep(folder) / "model.safetensors").stat().st_size
    seconds = round(time.monotonic() - started)
    for w in sorted({weight, *teacher.WEIGHTS}):
        encoder = teacher.between(start, end, w)
        about = {"seconds": seconds, "size_mb": round(size / 1e6, 2)}
        for by in ("texts", "examples"):
            name = f"teacher, weight {w:g}{' (chosen)' if w == weight else ''}, {by}"
            yield {"system": name} | about | bench.figures(scored(bench, encoder, by))
            yield {"system": f"{name}, fused"} | about | bench.figures(bench.fused(encoder, by))


def hold_out(queries: tuple[Query, ...], seed: int) -> tuple[tuple[Query, ...], tuple[Query, ...]]:
    """A tenth of the queries, to choose by, and the others."""
    third = set(np.random.default_rng(seed).permutation(teacher.nth(queries, 3))[: len(queries) // 10].tolist())
    return tuple(q for i, q in enumerate(queries) if i not in third), tuple(q for i, q in enumerate(queries) if i in third)


def students(bench: Bench, seed: int) -> Iterator[dict]:
    """Every size of the seed's teacher."""
    for spec in bench.options.students:
        started = time.monotonic()
        config = student(bench, spec, seed)
        with bench.run("search distill", f"student-{spec}-{seed}", config) as run:
            made = distill.distilled(config, run)
            seconds = round(time.monotonic() - started)
            if config.layers == "static":  # a table is written in eight bits only: what they cost is seen in memory
                scores = relevance(made.student.encode(bench.texts), made.bank).cpu().numpy()
                yield {"system": "static, 32 bits, not written", "seconds": seconds} | bench.figures(scores)
            for bits in (8,) if config.layers == "static" else (32, 8):
                folder = run.partial(f"bits-{bits}")
                distill.write(folder, made, replace(config, bits=bits))
                folder = run.keep(folder)
                for row in written(bench, folder):
                    name = f"{config.layers} layers".replace("static layers", "static")
                    other = "".join(f", {part.replace('=', ' ')}" for part in spec.split("@")[1:])
                    yield row | {"system": f"{name}, {bits} bits{other}{row['system']}", "seconds": seconds}


def student(bench: Bench, spec: str, seed: int) -> distill.Config:
    """`layers@setting=value@method.number=value` as the configuration of its distillation."""
    layers, *parts = spec.split("@")
    chosen = settings(parts)
    numbers = {name.removeprefix("method."): value for name, value in chosen.items() if name.startswith("method.")}
    others = {name: value for name, value in chosen.items() if not name.startswith("method.")}
    folder, device = bench.options.models / f"teacher-{seed}", bench.options.device
    return distill.Config(folder, layers=layers, method=replace(distill.Distillation(), **numbers), device=device, seed=seed, **others)  # pyright: ignore


def written(bench: Bench, folder: Path) -> Iterator[dict]:
    """Figures of a student's folder, with meaning alone and with trigrams."""
    searcher = Searcher.open(folder)
    size = {"size_mb": round(sum(sizes(folder).values()) / 1e6, 2)}
    meaning = np.stack([searcher.index.scores(u) for u in searcher.encoder(bench.texts)])
    yield {"system": ""} | size | bench.figures(meaning)
    fused = np.stack([searcher.scores(text) for text in bench.texts])
    yield {"system": ", fused"} | size | bench.figures(fused) | latency(bench, folder)


def latency(bench: Bench, folder: Path) -> dict[str, float]:
    """Milliseconds on one thread."""
    started = time.perf_counter()
    searcher = Searcher.open(folder)
    searcher(bench.texts[0])
    cold = time.perf_counter() - started
    config = evaluate.Config(folder, bench.catalogue)
    with bench.run("search evaluate", f"times-{time.time_ns()}", config) as run:
        found = evaluate.timed(searcher, bench.dev, config, run)
    return {
        "p50_ms": round(float(np.percentile(found, 50)), 3),
        "p95_ms": round(float(np.percentile(found, 95)), 3),
        "cold_ms": round(1e3 * cold, 1),
    }


def times(bench: Bench, seed: int) -> Iterator[dict]:
    """Of students that `students` wrote."""
    for folder in sorted(bench.options.models.glob(f"student-*-{seed}/bits-*")):
        size = {"size_mb": round(sum(sizes(folder).values()) / 1e6, 2)}
        yield {"system": f"{folder.parent.name}, {folder.name}"} | size | latency(bench, folder)


def leave_out(bench: Bench, seed: int) -> Iterator[dict]:
    """Features that nobody gave an example query for."""
    start, config = bench.start(), bench.config(seed)
    full = load(bench.options.models / f"teacher-{seed}" / "artifact", teacher.LENGTH)
    full.model.to(bench.options.device)
    weight = 1.0 if bench.options.interpolation is None else bench.options.interpolation
    for by in ("texts", "examples"):
        yield {"system": f"all features, {by}"} | answerable(bench, scored(bench, full, by))
    folds = np.array([fold_of(bench, query, seed) for query in bench.dev])
    left: dict[tuple[str, float], np.ndarray] = defaultdict(lambda: np.zeros((len(bench.dev), len(bench.features))))
    others: dict[float, list[dict]] = defaultdict(list)
    with bench.run("search train", f"leave-out-{seed}", config) as run:
        for fold in range(teacher.FOLDS):
            kept, _ = teacher.split(bench.features, bench.queries, (), fold, seed)
            end = teacher.train(start, bench.features, kept, config, run, weight)
            unseen = folds == fold
            left["texts", LIFT][unseen] = scored(bench, end, "texts")[unseen]
            for lift in LIFTS:
                scores = scored(bench, end, "examples", kept, lift)
                left["examples", lift][unseen] = scores[unseen]
                others[lift].append(answerable(bench, scores, ~unseen & (folds >= 0)))
    for (by, lift), rows in left.items():
        yield {"system": f"left out, {by}, lift {lift:g}"} | answerable(bench, rows)
    for lift, figures in others.items():
        yield {"system": f"not left out, lift {lift:g}"} | means(figures)


def unasked(bench: Bench, seed: int) -> Iterator[dict]:
    """What features without examples are compared by, nothing else changed."""
    start = bench.start()
    asked = start.encode(bench.texts)
    folds = np.array([fold_of(bench, query, seed) for query in bench.dev])
    left: dict[tuple[str, float], np.ndarray] = defaultdict(lambda: np.zeros((len(bench.dev), len(bench.features))))
    others: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for fold in range(teacher.FOLDS):
        kept, _ = teacher.split(bench.features, bench.queries, (), fold, seed)
        silent = ~labels(kept, bench.features, start.device)[0].any(0)[:, None, None]
        bank = sides(start, bench.features, kept, lift=1.0)
        for name, guess in (("own texts", torch.where(silent, bank[:, :1], bank)), ("expected examples", bank)):
            for lift in LIFTS:
                scores = relevance(asked, torch.where(silent, lift * guess, guess)).cpu().numpy()
                left[name, lift][folds == fold] = scores[folds == fold]
                others[name, lift].append(answerable(bench, scores, (folds != fold) & (folds >= 0)))
    for (name, lift), rows in left.items():
        yield {"system": f"{name}, lift {lift:g}, left out"} | answerable(bench, rows)
        yield {"system": f"{name}, lift {lift:g}, others"} | means(others[name, lift])


def means(rows: list[dict]) -> dict:
    """Of every figure."""
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def fold_of(bench: Bench, query: Query, seed: int) -> int:
    """The fold in which the first relevant feature of a query is left out; -1 of a query that nothing fits."""
    place = np.random.default_rng(seed).permutation(len(bench.features))
    number = {feature.id: i for i, feature in enumerate(bench.features)}
    return int(place[number[query.relevant[0]]] % teacher.FOLDS) if query.relevant else -1


def answerable(bench: Bench, scores: np.ndarray, some: np.ndarray | None = None) -> dict[str, float]:
    """Figures, of some queries or of all, without AUROC: queries that nothing fits belong to no fold."""
    rows = np.arange(len(bench.dev)) if some is None else np.flatnonzero(some)
    found = by_kind(scores[rows], [bench.dev[i] for i in rows], bench.features)
    return {f"{kind} {figure}": round(found[kind][figure], 4) for kind in KINDS if kind in found for figure in FIGURES}


def ablations(bench: Bench, seed: int) -> Iterator[dict]:
    """At weight 1."""
    start = bench.start()
    for name, method in ABLATIONS.items():
        started = time.monotonic()
        config = bench.config(seed, method=method)
        with bench.run("search train", f"ablation-{name.replace(' ', '-')}-{seed}", config) as run:
            end = teacher.train(start, bench.features, bench.queries, config, run, 1.0)
        for by in ("texts", "examples"):
            yield {"system": f"{name}, {by}", "seconds": round(time.monotonic() - started)} | bench.figures(scored(bench, end, by))


TABLES = {
    "baselines": rankings, "teacher": teachers, "students": students, "leave-out": leave_out, "unasked": unasked, "ablations": ablations,
    "times": times,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["baselines", "teacher", "students", "leave-out"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--teacher", default=MINILM, help="what the teacher starts from")
    parser.add_argument("--epochs", type=int, default=teacher.Config.epochs, help="of the teacher")
    parser.add_argument("--folds", type=int, default=1, help="trained to choose the teacher's weight")
    parser.add_argument("--interpolation", type=float, help="the teacher's weight, instead of choosing it")
    parser.add_argument("--students", nargs="+", default=["3", "2", "static"], help="layers, and settings of distillation after @")
    parser.add_argument("--models", type=Path, default=Path("runs") / time.strftime("search-%Y%m%d-%H%M%S"), help="where models are kept")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that rows are added to")
    return parser.parse_args()


def main() -> None:
    """Every table for every seed."""
    options = arguments()
    bench, source = Bench(options), provenance()
    for seed in options.seeds:
        for table in options.tables:
            for row in TABLES[table](bench, seed):
                append(options.results, COLUMNS, [{"table": table, "seed": seed} | row | source])
                shown = {
                    k: row[k] for k in ("contextual hit@1", "contextual hit@10", "contextual mrr@10", "typo hit@10", "p95_ms") if k in row
                }
                print(f"{table:10} {row['system']:40} {shown}", flush=True)


if __name__ == "__main__":
    main()
