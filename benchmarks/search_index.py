"""How long a query takes to search an index, on one thread: the product with all vectors, the trigrams, and both with the ten best.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/search_index.py

Vectors are random, two a feature as the students have them (its texts, its example queries); texts are words of the embedded catalogue
drawn anew, 14 a feature; queries are the catalogue's. Times are the processor's, of this thread alone, so that what else runs hardly
matters; wall times stand beside them. Rows go to benchmarks/results/search_index.csv.
"""

import argparse
import csv
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from smidgen.search.features import CATALOGUE, QUERIES, read_features, read_queries
from smidgen.search.fusion import WEIGHT, fuse, words
from smidgen.search.index import Index, best

VECTORS = 2  # of a feature
RESULTS = Path(__file__).parent / "results" / "search_index.csv"
COLUMNS = [
    "features",
    "width",
    "step",
    "cpu_ms_p50",
    "cpu_ms_p95",
    "wall_ms_p50",
    "wall_ms_p95",
    "index_mb",
    "open_ms",
    "commit",
    "machine",
    "date",
]


def made(features: int, width: int, path: Path) -> Index:
    """A random index, written and read again."""
    random = np.random.default_rng(0)
    vocabulary = np.array([word for feature in read_features(CATALOGUE) for word in words(feature).split()])
    vectors = random.standard_normal((features, VECTORS, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    texts = [" ".join(row) for row in random.choice(vocabulary, (features, 14))]
    Index.of(list(vectors), texts).write(path)
    return Index.read(path)


def timed(step: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Percentiles in ms, after a tenth that does not count."""
    cpu, wall = [], []
    for i in range(repeats + repeats // 10):
        a, b = time.thread_time(), time.perf_counter()
        step(i)
        cpu.append(1e3 * (time.thread_time() - a))
        wall.append(1e3 * (time.perf_counter() - b))
    kept = {"cpu_ms": cpu[repeats // 10 :], "wall_ms": wall[repeats // 10 :]}
    return {f"{name}_p{p}": round(float(np.percentile(values, p)), 4) for name, values in kept.items() for p in (50, 95)}


def main() -> None:
    """All sizes, all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[636, 10_000, 100_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[384])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    common = {"commit": commit, "machine": platform.processor() or platform.machine(), "date": time.strftime("%Y-%m-%d")}
    queries = [query.query for query in read_queries(QUERIES)]
    rows = []
    for features in options.features:
        for width in options.widths:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "index.smi"
                index = made(features, width, path)
                started = time.perf_counter()
                Index.read(path)
                size = {"features": features, "width": width, "index_mb": round(path.stat().st_size / 1e6, 3)}
                size["open_ms"] = round(1e3 * (time.perf_counter() - started), 2)
                units = np.random.default_rng(1).normal(size=(len(queries), width)).astype(np.float32)
                units /= np.linalg.norm(units, axis=1, keepdims=True)
                steps: dict[str, Callable[[int], object]] = {
                    "vectors": lambda i, index=index, units=units: index.scores(units[i % len(units)]),
                    "trigrams": lambda i, index=index: index.lexicon.coverage(queries[i % len(queries)]),
                    "all": lambda i, index=index, units=units: best(
                        fuse(index.scores(units[i % len(units)]), index.lexicon.coverage(queries[i % len(queries)]), WEIGHT), 10
                    ),
                }
                for name, step in steps.items():
                    rows.append(size | {"step": name} | timed(step, options.repeats) | common)
                    print({k: v for k, v in rows[-1].items() if k not in common})
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
