"""KNN-Shapley at size: seconds and peak memory, random embeddings.

    python benchmarks/knn_shapley.py                                   # 100,000 x 1,280 against 1,000 validation points
    python benchmarks/knn_shapley.py --images 10000 --validation 100

Wrong labels are planted, and the average precision of finding them is printed, so that a fast wrong answer is seen. Prints one JSON line
and adds it to benchmarks/results/knn_shapley.csv.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rows import append, provenance

from smidgen.process import peak_bytes
from smidgen.refine.evidence import Evidence
from smidgen.refine.valuation import KNNShapley

RESULTS = Path(__file__).parent / "results" / "knn_shapley.csv"


def measure(options: argparse.Namespace) -> dict:
    """One valuation."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(options.classes, options.width, generator=generator)

    def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(options.classes, (n,), generator=generator)
        return torch.randn(n, options.width, generator=generator).mul_(3).add_(means[y]), y

    (x, y), validation = drawn(options.images), drawn(options.validation)
    wrong = torch.rand(options.images, generator=generator) < 0.1
    given = torch.where(wrong, (y + 1) % options.classes, y)
    evidence = Evidence(x, given, options.classes, validation=validation)
    started, worked = time.perf_counter(), time.process_time()
    score = KNNShapley()(evidence).score
    return {
        "images": options.images,
        "width": options.width,
        "validation": options.validation,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - worked, 2),
        "peak_bytes": peak_bytes(),
        "average_precision": round(average_precision(1 - score, wrong), 4),
        "threads": torch.get_num_threads(),
    }


def average_precision(suspicion: torch.Tensor, wrong: torch.Tensor) -> float:
    """Mean precision over the places of wrong ones, the most suspicious first."""
    hits = wrong[suspicion.argsort(descending=True)].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


def main() -> None:
    """Measures, prints, adds a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=10)
    row = measure(parser.parse_args()) | provenance()
    append(RESULTS, list(row), [row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
