"""Few- and any-shot classification: accuracy on classes, and on data sets, that training has not seen.

    python benchmarks/fewshot.py                                       # everything; a GPU's work, days on two cores
    python benchmarks/fewshot.py --tables omniglot mxml --seeds 0 --steps 2000 --episodes 200

    omniglot   28 x 28, Vinyals classes in four rotations: 5- and 20-way, 1 and 5 shots
    cifar-fs   32 x 32, 100 images a class (published figures have 600): 5-way, queries balanced and Dirichlet
    any-shot   5-way, 1 to 50 shots, trained on CIFAR-FS; tested on its test classes and on data sets never seen
    mxml       10-way 5-shot, members Omniglot and CIFAR-FS; tested on data sets of neither
    frozen     EfficientNet-Lite0's features and heads without training, 5-way 1 and 5 shots

A method is one of `smidgen fewshot train`, with options after + ("meta-sgd+balance=classes") and, after @, shots to train with ("tpn@5").
Accuracy is the mean over episodes, the interval 1.96 s / sqrt(episodes) of it. A row per method, test set, query balance and seed goes to
benchmarks/results/fewshot.csv. Images of other shapes are scaled, and grey ones made coloured, where a table mixes data sets; frames of one
track of GTSRB may be in support and queries.
"""

import argparse
import csv
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from smidgen.fewshot.episodes import Queries, Sampler, Shots
from smidgen.fewshot.evaluate import evaluated
from smidgen.fewshot.models import make
from smidgen.fewshot.train import train
from smidgen.fit import FitConfig
from smidgen.images import Images, load
from smidgen.run import Run

RESULTS = Path(__file__).parent / "results" / "fewshot.csv"
COLUMNS = [
    "table", "method", "trained", "tested", "ways", "shots", "queries", "seed", "accuracy", "interval", "episodes", "steps", "seconds",
    "commit", "machine", "date",
]  # fmt: skip
FILES = {
    "omniglot": "omniglot28", "cifar_fs": "cifar_fs_100", "gtsrb": "gtsrb_32", "fashion_mnist": "fashion_mnist_28",
    "flowers12": "flowers12_48", "sign_digits": "sign_digits_32", "mnist": "mnist_28",
}  # fmt: skip
ELSEWHERE = ["gtsrb", "fashion_mnist", "flowers12", "sign_digits"]
TARGETS = ["mnist", "fashion_mnist", "flowers12", "sign_digits"]
EPISODIC = ["protonet", "label-propagation", "tpn", "tpn@higher"]
ANY_SHOT = ["protonet", "maml", "meta-sgd", "meta-sgd+balance=classes", "btaml"]
BALANCES: tuple[Queries, ...] = ("balanced", "dirichlet")
SIGMAS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)  # of label propagation over features of length 1, times the root of their number
TEST = 1_000_003  # seed of test tasks: the same for every method and seed of training


def data(options: argparse.Namespace, name: str, split: str | None = None, size: int | None = None, channels: int | None = None) -> Images:
    """A stored data set, on the device."""
    images = load(options.data / "fewshot" / name / f"{FILES[name]}.npz", split, size, channels)
    return replace(images, name=name).to(options.device)


def rotated(images: Images) -> Images:
    """Every class in four rotations, each a class of its own."""
    count, turns = len(images.classes), range(4)
    pixels = torch.cat([images.pixels.rot90(k, (1, 2)) for k in turns])
    labels = torch.cat([images.labels + k * count for k in turns])
    return Images(images.name, pixels, labels, tuple(f"{c}, {90 * k} degrees" for k in turns for c in images.classes))


def shape(images: Images) -> tuple[int, int, int]:
    """Channels, height, width."""
    height, width, channels = images.pixels.shape[1:]
    return channels, height, width


def trained(
    method: str, ways: int, shots: Shots, train_set: Images, validation: Images, seed: int, options: argparse.Namespace
) -> tuple[nn.Module, int]:
    """A method of `smidgen fewshot train`, as it was best on validation tasks; and the updates made."""
    named, _, higher = method.partition("@")
    name, *given = named.split("+")
    settings = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given)}
    torch.manual_seed(seed)
    model = make(name, shape(train_set), ways, settings).to(options.device)
    anyshot = shots == "any"
    with_shots: Shots = {1: 5, 5: 10}[shots] if higher == "higher" else int(higher) if higher else shots
    tasks = Sampler(train_set, ways, with_shots, options.queries, tasks=4 if anyshot else 1, seed=seed)
    checked = Sampler(validation, ways, shots, options.queries, seed=seed + 1)
    steps = options.anyshot_steps if anyshot else options.steps
    config = FitConfig(
        steps, 1e-3, clip=None, precision="float32", evaluate_every=max(1, steps // 20), patience=steps + 2, seed=seed
    )  # so much patience keeps the best state and never stops
    with tempfile.TemporaryDirectory() as scratch, Run("fewshot train", config, Path(scratch) / "run") as run:
        result = train(model, tasks, config, run, checked, options.validation)
    return model.eval(), result.kept


def measured(model: nn.Module, images: Images, ways: int, shots: Shots, balance: Queries, options: argparse.Namespace) -> dict:
    """Accuracy on the test tasks of a data set."""
    sampler = Sampler(images, ways, shots, options.queries, balance, seed=TEST)
    result = evaluated(model, sampler, options.episodes)
    return {
        "tested": images.name,
        "ways": ways,
        "shots": shots,
        "queries": balance,
        "accuracy": round(result.accuracy, 4),
        "interval": round(result.interval, 4),
    }


def omniglot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Many characters, one drawing or five."""
    parts = [rotated(data(options, "omniglot", f"vinyals:{split}")) for split in ("train", "val", "test")]
    yield from episodic(parts, [(5, 1), (5, 5), (20, 1), (20, 5)], ("balanced",), seed, options)


def cifar_fs(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Photographs; what transductive methods lose when queries are unbalanced."""
    parts = [data(options, "cifar_fs", split) for split in ("train", "val", "test")]
    yield from episodic(parts, [(5, 1), (5, 5)], BALANCES, seed, options)


def episodic(
    parts: list[Images], settings: list[tuple[int, int]], balances: tuple[Queries, ...], seed: int, options: argparse.Namespace
) -> Iterator[dict]:
    """Every method in every setting, trained for it."""
    train_set, validation, test = parts
    for ways, shots in settings:
        for method in options.methods or EPISODIC:
            started = time.monotonic()
            model, steps = trained(method, ways, shots, train_set, validation, seed, options)
            seconds = time.monotonic() - started
            for balance in balances:
                figures = measured(model, test, ways, shots, balance, options)
                yield figures | {"method": method, "trained": train_set.name, "steps": steps, "seconds": seconds}


def any_shot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """One training, tested where it was trained and elsewhere."""
    train_set, validation, test = (data(options, "cifar_fs", split) for split in ("train", "val", "test"))
    for method in options.methods or ANY_SHOT:
        started = time.monotonic()
        model, steps = trained(method, 5, "any", train_set, validation, seed, options)
        seconds = time.monotonic() - started
        for images in (test, *(data(options, name, size=32, channels=3) for name in ELSEWHERE)):
            figures = measured(model, images, 5, "any", "balanced", options)
            yield figures | {"method": method, "trained": "cifar_fs", "steps": steps, "seconds": seconds}


def mxml(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Members, one learner on all sets, the members' mean, and mixtures, which are trained on classes that no member has seen."""
    from smidgen.fewshot.methods import mxml as m
    from smidgen.fewshot.sets import SetsSampler
    from smidgen.networks import Conv4

    ways, shots, names = 10, 5, ("omniglot", "cifar_fs")
    splits = {"omniglot": "vinyals:", "cifar_fs": ""}
    sets, unseen, tests = (tuple(data(options, n, splits[n] + s, 32, 3) for n in names) for s in ("train", "val", "test"))
    targets = [*tests, *(data(options, name, size=32, channels=3) for name in TARGETS)]
    torch.manual_seed(seed)
    members = [m.NormalisedProtoNet(Conv4(3)).to(options.device) for _ in names]
    learner = m.NormalisedProtoNet(Conv4(3)).to(options.device)
    first = replace(m.MEMBERS, steps=options.steps, precision="float32", seed=seed)
    second = replace(m.WEIGHTS, steps=options.steps, precision="float32", seed=seed)
    own = [Sampler(s, ways, shots, options.queries, seed=seed) for s in sets]

    def in_scratch(stage, *arguments) -> float:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, Run("fewshot train", first, Path(scratch) / "run") as run:
            stage(*arguments, run)
        return time.monotonic() - started

    seconds = {"members": in_scratch(m.train_members, members, own, first)}
    seconds["one learner"] = in_scratch(m.train_members, [learner], [SetsSampler(sets, ways, shots, options.queries, seed=seed)], first)
    models: dict[str, nn.Module] = dict(zip(names, members, strict=True))
    models |= {"one learner": learner, "ensemble": m.Ensemble(members)}
    for form, transductive, normalise in (
        ("authors", True, "none"),
        ("authors", False, "none"),
        ("authors", True, "softmax"),
        ("invariant", True, "none"),
        ("invariant", False, "none"),
    ):
        torch.manual_seed(seed)
        network = m.WeightNetwork(256, ways if form == "authors" else None, form, transductive)
        model = m.MxML(members, network, normalise).to(options.device)
        name = f"mxml {form} {'transductive' if transductive else 'inductive'} {normalise}"
        seconds[name] = in_scratch(m.train_weights, model, SetsSampler(unseen, ways, shots, 3, seed=seed), second)
        models[name] = model
    for name, model in models.items():
        for images in targets:
            for balance in BALANCES:
                figures = measured(model, images, ways, shots, balance, options)
                trained_on = name if name in names else " ".join(names)
                yield figures | {
                    "method": "member" if name in names else name,
                    "trained": trained_on,
                    "steps": options.steps,
                    "seconds": seconds.get(name, seconds["members"]),
                }


class Stored(nn.Module):
    """A backbone over features made once: an image is its own number, as `numbered` draws them."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(tasks, n, 1, 1, 1) -> (tasks, n, width)"""
        return self.get_buffer("features")[(x.flatten(2)[..., 0] * 255).round().long()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1) -> (n, width)"""
        return self.embed(x[None])[0]


def numbered(images: Images) -> Images:
    """The same labels, every image a single pixel that says which one it is."""
    return replace(images, pixels=torch.arange(len(images.labels), device=images.labels.device).view(-1, 1, 1, 1), members=(), paths=())


def frozen(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Heads over a network that was trained on ImageNet, whose classes include many of these; nothing here is trained."""
    from smidgen.backbones import open_backbone
    from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation
    from smidgen.fewshot.methods.prototypes import ProtoNet, choose
    from smidgen.fewshot.methods.simpleshot import SimpleShot, unit

    if seed != options.seeds[0]:
        return  # there is nothing a seed would change
    started = time.monotonic()
    backbone = open_backbone("efficientnet-lite0", options.device)
    base = backbone.features(data(options, "cifar_fs", "train"), 64, options.cache).mean(0)

    def centred(images: Images) -> Stored:
        return Stored(unit(backbone.features(images, 64, options.cache) - base)).to(options.device)

    validation = data(options, "cifar_fs", "val")
    stored, sigmas = centred(validation), [scale * len(base) ** -0.5 for scale in SIGMAS]
    chosen = {}
    for shots in (1, 5):
        sampler = Sampler(numbered(validation), 5, shots, options.queries, seed=1)
        chosen[shots] = choose(lambda sigma: LabelPropagation(stored, sigma), sigmas, [sampler(i) for i in range(options.validation)])
    for images in (data(options, "cifar_fs", "test"), *(data(options, name) for name in ELSEWHERE)):
        plain, unit_features = Stored(backbone.features(images, 64, options.cache)), centred(images)
        seconds = time.monotonic() - started
        for shots in (1, 5):
            heads = {
                "prototypes": ProtoNet(plain),
                "simpleshot": SimpleShot(plain, base),
                "label-propagation": LabelPropagation(unit_features, chosen[shots]),
                "label-propagation rebalanced": LabelPropagation(unit_features, chosen[shots], Propagation(balance=1.0)),
            }
            for name, head in heads.items():
                for balance in BALANCES:
                    figures = measured(head.to(options.device), numbered(images), 5, shots, balance, options)
                    yield figures | {"method": name, "trained": "efficientnet-lite0", "steps": 0, "seconds": seconds}


TABLES = {"omniglot": omniglot, "cifar-fs": cifar_fs, "any-shot": any_shot, "mxml": mxml, "frozen": frozen}


def append(row: dict) -> None:
    """Adds a row to the results."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def provenance() -> dict:
    """What made a row."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help="of omniglot, cifar-fs and any-shot; by default a list for each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_000, help="updates of a training, and of each stage of mxml")
    parser.add_argument("--anyshot-steps", type=int, default=20_000, help="updates of an any-shot training, of 4 tasks")
    parser.add_argument("--episodes", type=int, default=600, help="of a test")
    parser.add_argument("--validation", type=int, default=200, help="episodes of a validation")
    parser.add_argument("--queries", type=int, default=15, help="per class")
    parser.add_argument("--cache", type=Path, help="folder that keeps features of frozen backbones")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options = parser.parse_args()
    if not math.prod((options.steps, options.anyshot_steps, options.episodes, options.validation, options.queries)) > 0:
        parser.error("numbers must be positive")
    return options


if __name__ == "__main__":
    options = arguments()
    made_by = provenance()
    for seed in options.seeds:
        for table in options.tables:
            for figures in TABLES[table](seed, options):
                row = (
                    figures
                    | {"table": table, "seed": seed, "episodes": options.episodes, "seconds": round(figures["seconds"], 1)}
                    | made_by
                )
                append(row)
                print("\t".join(str(row[c]) for c in COLUMNS[:10]), flush=True)
