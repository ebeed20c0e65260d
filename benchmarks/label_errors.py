"""Wrong labels that people made: how well are they found, and what is gained by leaving them out?

    python benchmarks/label_errors.py --cache CACHE                     # everything: minutes on an idle core
    python benchmarks/label_errors.py --sets mnist
    python benchmarks/label_errors.py --sets random1 --seeds 0 1 2 --parts clean

    cifar10n   5,000 CIFAR-10 images with the labels of Mechanical Turk workers: aggregate (9 % wrong), random1 to random3 (17 %), worst
               (40 %); EfficientNet-Lite0's features, the same for every method; the truth is CIFAR-10's own label
    mnist      MNIST's test set, 10,000 images with a network's out-of-fold probabilities; of 100 suspects 15 were confirmed as wrong

A row per set, method and seed.

    rank    average precision of the ranking. cleanlab ranks by the out-of-fold probabilities that ours starts from; the confident joint
            ranks its suspects first, then by self-confidence. Nothing of ours is chosen by the truth: the ensemble's weights are those
            that predict the given labels best
    clean   cifar10n: accuracy on 1,000 test images of one fixed linear head (decay 1e-4 for all) trained on the given labels, without those
            P(wrong) > 0.5, with relabelled ones besides, on all images weighed by 1 - P(wrong), and on what the gate lets through: a stage
            that does not gain more than its standard error on held-out images under their given labels, five folds of a fifth each, is
            undone, as in `smidgen refine`
"""

import argparse
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import rows as table
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from smidgen.backbones import open_backbone
from smidgen.images import Images
from smidgen.refine.decide import DROP, RELABEL
from smidgen.refine.detectors import Ensemble, HiddenLabel, KernelQuality, WrongLabels
from smidgen.refine.detectors.mislabeled import flagged, label_quality
from smidgen.refine.evidence import Evidence
from smidgen.refine.gate import compare
from smidgen.refine.heads import Compression, Heads, assigned
from smidgen.refine.valuation import DataOOB, KNNShapley

RESULTS = Path(__file__).parent / "results" / "label_errors.csv"
COLUMNS = ["set", "method", "seed", "average_precision", "images", "wrong", "accuracy", "cpu_seconds", "commit", "machine", "date"]
LEVELS = ["aggregate", "random1", "random2", "random3", "worst"]
DECAY = 1e-4  # of the fixed head: what folds choose under the given labels of most levels
FOLDS = 5  # of the gate


def cifar10n(level: str, options: argparse.Namespace) -> tuple[Evidence, Tensor, tuple[Tensor, Tensor]]:
    """Evidence, which labels are wrong, test features and labels."""
    data = np.load(options.data / "refine" / "cifar10n" / "cifar10n_dev.npz")
    pixels = torch.from_numpy(np.concatenate([data["x"], data["x_test"]]))
    images = Images("cifar10n", pixels, torch.zeros(len(pixels), dtype=torch.int64), ("any",))
    features = open_backbone("efficientnet-lite0").features(images, 32, options.cache)
    y, clean, test = (torch.from_numpy(data[name].astype(np.int64)) for name in (level, "clean", "y_test"))
    return Evidence(features[: len(y)], y, 10), y != clean, (features[len(y) :], test)


def mnist(options: argparse.Namespace) -> tuple[Evidence, Tensor]:
    """Evidence, and the labels that people confirmed as wrong."""
    data = np.load(options.data / "refine" / "mnist_label_errors" / "mnist_test_label_errors.npz")
    y = torch.from_numpy(data["given"].astype(np.int64))
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.from_numpy(data["review_index"].astype(np.int64))[torch.from_numpy(data["review_verdict"]) > 0]] = True
    x = torch.from_numpy(data["x"]).flatten(1).float() / 255
    return Evidence(x, y, 10, probabilities=torch.from_numpy(data["pred_probs"])), wrong


def average_precision(suspicion: Tensor, wrong: Tensor) -> float:
    """Mean precision over the places of wrong ones, the most suspicious first."""
    hits = wrong[suspicion.argsort(descending=True, stable=True)].double()
    return float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum())


def cleanlabs(evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Its rankings."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    y, p = evidence.y.numpy(), evidence.out_of_fold.double().numpy()
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        yield f"cleanlab {method}", 1 - torch.from_numpy(get_label_quality_scores(y, p, method=method))
    own = torch.from_numpy(get_label_quality_scores(y, p))
    for rule in ("confident_learning", "prune_by_noise_rate"):
        yield f"cleanlab {rule}", torch.from_numpy(find_label_issues(y, p, filter_by=rule, n_jobs=1).astype(float)) + (1 - own)


def ours(evidence: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Single methods."""
    yield (
        "confident joint",
        flagged(evidence.out_of_fold, evidence.y, "confident").double() + 1 - label_quality(evidence.out_of_fold.double(), evidence.y),
    )
    methods = {
        "data-oob": DataOOB(credit="probability"),
        "knn-shapley": KNNShapley(),
        "hidden-label": HiddenLabel(),
        "kernel": KernelQuality(),
    }
    for name, method in methods.items():
        yield name, -method(evidence).value


Cleaned = tuple[Tensor, Tensor]  # label and weight of every image


def stages(found: WrongLabels, y: Tensor) -> dict[str, Cleaned]:
    """What each makes of the images: `smidgen refine`'s value, its value and clean, and what a folder cannot say."""
    sure, kept = found.confidence > RELABEL, found.wrong < DROP
    return {
        "without P(wrong) > 0.5": (y, kept.float()),
        "with proposals above 0.8": (torch.where(sure, found.proposed, y), (kept | sure).float()),
        "weighed by 1 - P(wrong)": (y, 1 - found.wrong),
    }


def predicted(x: Tensor, cleaned: Cleaned, queries: Tensor) -> Tensor:
    """Classes of queries by the fixed head."""
    y, weights = cleaned
    heads = Heads(x, weights[:, None].to(x.dtype), DECAY).fit(one_hot(y, 10).to(x.dtype), 100)
    return heads.probabilities(queries)[:, 0].argmax(1)


def gated(evidence: Evidence) -> str | None:
    """The stages that stay, by their name; none: the given labels stay."""
    x = evidence.components[:, :-1]  # of all images, which saves five decompositions; labels have no part in it
    fold = assigned(evidence.y, FOLDS, evidence.seed)
    right: dict[str | None, Tensor] = {}
    for f in range(FOLDS):
        inside, held = fold != f, fold == f
        part = Evidence(x[inside], evidence.y[inside], evidence.classes, seed=evidence.seed)
        queries = Compression(part.x)(x[held])
        for name, cleaned in {None: (part.y, torch.ones(len(part.y))), **stages(Ensemble()(part), part.y)}.items():
            answers = right.setdefault(name, torch.zeros(1, len(fold)))
            answers[0, held] = (predicted(part.components, cleaned, queries) == evidence.y[held]).float()
    best = None
    for name in ("without P(wrong) > 0.5", "with proposals above 0.8"):
        gain = compare(right[best], right[name])
        print(f"gate: {name}: {gain.gain:+.4f}, standard error {gain.error:.4f}")
        best = name if gain.helps else best
    return best


def accuracies(evidence: Evidence, found: WrongLabels, test: tuple[Tensor, Tensor]) -> Iterator[tuple[str, float]]:
    """Of the fixed head, before and after cleaning."""
    queries = Compression(evidence.x)(test[0])
    every = {"on given labels": (evidence.y, torch.ones(len(evidence.y))), **stages(found, evidence.y)}
    right = {name: float((predicted(evidence.components, cleaned, queries) == test[1]).double().mean()) for name, cleaned in every.items()}
    for name, share in right.items():
        yield f"head {name}", share
    yield "head after the gate", right[gated(evidence) or "on given labels"]


def rows(name: str, seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """All methods on one set."""
    started = time.process_time()
    if name == "mnist":
        evidence, wrong = mnist(options)
        test = None
    else:
        evidence, wrong, test = cifar10n(name, options)
    evidence = Evidence(evidence.x, evidence.y, 10, probabilities=evidence.probabilities, seed=seed)
    shared = {"set": name, "seed": seed, "images": len(wrong), "wrong": int(wrong.sum())}

    def row(method: str, **figures: float) -> dict:
        nonlocal started
        seconds, started = time.process_time() - started, time.process_time()
        return shared | {"method": method, "cpu_seconds": round(seconds, 1)} | {k: round(v, 4) for k, v in figures.items()}

    ranking = "rank" in options.parts
    for method, suspicion in chain(cleanlabs(evidence), ours(evidence)) if ranking else ():
        yield row(method, average_precision=average_precision(suspicion, wrong))
    found = Ensemble()(evidence)
    flags, weights = found.wrong > 0.5, {k: round(v, 2) for k, v in found.weights.items()}
    print(f"share {found.share:.3f}; P(wrong) > 0.5: {int(flags.sum())}, wrong are {int((flags & wrong).sum())} of them; weights {weights}")
    if ranking:
        yield row("ensemble", average_precision=average_precision(found.wrong, wrong))
    if test is not None and "clean" in options.parts:
        for method, accuracy in accuracies(evidence, found, test):
            yield row(method, accuracy=accuracy)


def main() -> None:
    """Every set and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, help="folder that keeps the features")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sets", nargs="+", choices=[*LEVELS, "mnist"], default=[*LEVELS, "mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of folds, bags and planted errors")
    parser.add_argument("--parts", nargs="+", choices=["rank", "clean"], default=["rank", "clean"])
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.sets:
            for row in rows(name, seed, options):
                table.append(options.results, COLUMNS, [row | table.provenance()])
                print("\t".join(str(row.get(c, "")) for c in COLUMNS[:8]), flush=True)


if __name__ == "__main__":
    main()
