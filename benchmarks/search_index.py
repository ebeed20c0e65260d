"""How long a query takes to search an index, on one thread: the product with all vectors, the trigrams, and both with the ten best.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/search_index.py

Vectors are random, two a feature as the students have them (its texts, its example queries); texts are words of the embedded catalogue
drawn anew, 14 a feature; queries are the catalogue's. Times are the processor's, of this thread alone, so that what else runs hardly
matters; wall times stand beside them. Rows go to benchmarks/results/search_index.csv.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from rows import append, provenance

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


def measured(features: int, width: int, repeats: int) -> list[dict]:
    """A row per step, of one size."""
    queries = [query.query for query in read_queries(QUERIES)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.smi"
        index = made(features, width, path)
        started = time.perf_counter()
        Index.read(path)
        opened = time.perf_counter() - started
        size = {"features": features, "width": width, "index_mb": round(path.stat().st_size / 1e6, 3), "open_ms": round(1e3 * opened, 2)}
        units = np.random.default_rng(1).normal(size=(len(queries), width)).astype(np.float32)
        units /= np.linalg.norm(units, axis=1, keepdims=True)

        def vectors(i: int) -> np.ndarray:
            return index.scores(units[i % len(units)])

        def trigrams(i: int) -> np.ndarray:
            return index.lexicon.coverage(queries[i % len(queries)])

        def everything(i: int) -> np.ndarray:
            return best(fuse(vectors(i), trigrams(i), WEIGHT), 10)

        steps = {"vectors": vectors, "trigrams": trigrams, "all": everything}
        return [size | {"step": name} | timed(step, repeats) for name, step in steps.items()]


def main() -> None:
    """All sizes, all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[636, 10_000, 100_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[384])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    for features, width in product(options.features, options.widths):
        rows = measured(features, width, options.repeats)
        append(RESULTS, COLUMNS, [row | provenance() for row in rows])
        print(*rows, sep="\n")


if __name__ == "__main__":
    main()
