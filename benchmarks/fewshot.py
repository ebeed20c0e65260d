"""Few- and any-shot classification: accuracy on classes, and on data sets, that training has not seen.

    python benchmarks/fewshot.py                                       # everything, one after the other
    python benchmarks/fewshot.py --tables omniglot --ways-shots 20w1s --methods tpn --seeds 0 --results tpn-20w1s-0.csv

    omniglot   28 x 28, Vinyals classes in four rotations: 5- and 20-way, 1 and 5 shots
    cifar-fs   32 x 32, 100 images a class (published figures have 600): 5-way, queries balanced and Dirichlet
    any-shot   5-way, 1 to 50 shots, trained on CIFAR-FS; tested on its test classes and on data sets never seen
    mxml       5-way 5-shot, members Omniglot, CIFAR-FS, GTSRB and Flowers; tested on their held-out classes and on other data sets
    frozen     EfficientNet-Lite0's features and heads, 5-way 1 and 5 shots

Every table, method, setting and seed can be a process of its own, with a --results file of its own: a row per test set and query balance.
A method is one of `smidgen fewshot train`, with options after + ("btaml+omega=false") and, after @, shots to train with ("tpn@5";
"@higher": 5 for 1, 10 for 5). Rows come besides, without more training, of
    protonet   "label-propagation", over its backbone, with sigma chosen on validation tasks (unlearned)
    tpn, label propagation, where queries are Dirichlet: "... rebalanced", strength chosen on Dirichlet tasks of the validation classes
    btaml      "btaml mean", by the mean of phi in place of ten samples

Recipes (what is ours is marked *)
    omniglot, cifar-fs   Adam 1e-3; TPN's is halved every 10,000 of 210,000 tasks and tested after 5 to 8 halvings. Here* --steps updates of
                         --tasks tasks, halved three times over them, for every method alike; CIFAR-FS images, being few, are cropped and
                         mirrored*; the state of the best of 20 validations is kept. TPN's sigma starts at 0.3*, "tpn+start=0.0" as drawn
    any-shot             Adam 1e-3, 4 tasks, 5 inner steps in training and 10 at test; of the authors' 50,000 updates
                         --anyshot-steps*, the rate falling to 0 as a cosine*; inner loops start from a ProtoNet's convolutions,
                         --start-steps updates of one 20-way 5-shot task*, all alike. Chosen on CIFAR-FS's validation classes alone
                         (the authors: on those of the unseen sets as well). With --keep a process may train (`--tested` with nothing
                         behind it) and others test, a set each
    mxml                 members Adam 1e-3, a tenth after 70 %, 100 x images / 150 updates, at least 1,000*; one learner: their sum*;
                         weights Adam 1e-4, a tenth after 70 %, --weight-steps updates, 3 queries a class, on classes that no member saw
                         (Flowers has none to spare, as VOC had not); classes in order: GTSRB 60 / 20 / 20 %*, Flowers 7 / 0 / 5*
    frozen               nothing is trained but the TPN head's graph module, on CIFAR-FS training classes*; features are centred by those
                         classes' mean, the heads of `smidgen fewshot predict` by the mean of a task's own support

Accuracy is the mean over episodes, the interval 1.96 s / sqrt(episodes) of it. Images of other shapes are scaled, and grey ones made
coloured, where a table mixes data sets. Of GTSRB frames of one track are never in both support and queries: half of a class's tracks,
drawn anew for every task, are for each; the published any-shot protocol ignores tracks.

One thread of two busy cores, seconds of processor time per update of 4 tasks, 32 x 32, 15 queries: ProtoNet 5w1s 0.65, TPN 5w1s 0.75, TPN
5w5s 1.05. Trainings are a GPU's work.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import rows
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from smidgen.fewshot.augment import KINDS, Augment
from smidgen.fewshot.data import shape_of
from smidgen.fewshot.episodes import Episode, Queries, Sampler, Shots, Tasks
from smidgen.fewshot.measure import evaluated, norm_mode
from smidgen.fewshot.methods.inner import EPSILON, Classifier
from smidgen.fewshot.methods.mxml import Form, Normalise, NormalisedProtoNet
from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation, nodes, spread
from smidgen.fewshot.methods.prototypes import ProtoNet, choose
from smidgen.fewshot.methods.simpleshot import unit
from smidgen.fewshot.methods.tpn import TPN, FlatGraph
from smidgen.fewshot.models import make
from smidgen.fewshot.train import train
from smidgen.fit import FitConfig
from smidgen.images import Images, load
from smidgen.run import Run

RESULTS = Path(__file__).parent / "results" / "fewshot.csv"
COLUMNS = [
    "table", "method", "trained", "tested", "ways", "shots", "queries", "seed", "accuracy", "interval", "episodes", "batch_norm",
    "chosen", "steps", "kept", "tasks", "augment", "start", "seconds", "commit", "machine", "date",
]  # fmt: skip
FILES = {
    "omniglot": "omniglot28", "cifar_fs": "cifar_fs_100", "gtsrb": "gtsrb_32", "fashion_mnist": "fashion_mnist_28",
    "flowers12": "flowers12_48", "sign_digits": "sign_digits_32", "mnist": "mnist_28",
}  # fmt: skip
ANYWHERE = ["cifar_fs", "gtsrb", "flowers12", "sign_digits", "fashion_mnist"]
TARGETS = ["sign_digits", "mnist", "fashion_mnist"]
EPISODIC = ["protonet", "tpn", "tpn@higher", "tpn+start=0.0"]
ANY_SHOT = [
    "protonet", "maml", "meta-sgd", "meta-sgd+balance=classes", "btaml", "btaml+bayesian=false", "btaml+gamma=false+z=false",
    "btaml+omega=false+z=false", "btaml+omega=false+gamma=false",
]  # fmt: skip
MIXTURES: dict[str, tuple[Form, bool, Normalise]] = {
    f"mxml {form} {'transductive' if transductive else 'inductive'} {normalise}": (form, transductive, normalise)
    for form, transductive, normalise in (
        ("authors", True, "none"),
        ("authors", False, "none"),
        ("authors", True, "softmax"),
        ("invariant", True, "none"),
        ("invariant", False, "none"),
        ("invariant", True, "softmax"),
        ("authors", True, "product"),
        ("invariant", True, "product"),
        ("invariant", False, "product"),
        ("invariant", True, "sum"),
    )
}  # form of the weight network, whether it sees all queries at once, normalisation
HEADS = [
    "prototypes", "simpleshot", "label-propagation", "label-propagation rebalanced", "tpn head",
    "tpn head, 5 neighbours", "predict simpleshot", "predict label-propagation",
]  # fmt: skip
BALANCES: tuple[Queries, ...] = ("balanced", "dirichlet")
SIGMAS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)  # of label propagation, in units of the mean spread of validation tasks
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the correction for unbalanced queries
TEST = 1_000_003  # seed of test tasks: the same for every method and seed of training
AT_ONCE = 8  # tasks of a batch in tests and validations; another number draws other tasks
PHOTOS: tuple[Augment, ...] = ("flip", "crop")


# --- data and training -----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Trained:
    """A model and what a row says of its making."""

    model: nn.Module
    steps: int = 0
    kept: int = 0
    "The update it is the state of."
    tasks: int = 0
    seconds: float = 0.0
    augment: str = ""
    start: str = ""
    "Where training started, if not where it always does."
    chosen: str = ""
    "What was chosen on validation tasks."
    batch_norm: str = ""
    "Mode of a model that is looked up; of others it is seen."

    def row(self) -> dict:
        """All but the model."""
        columns = {name: value for name, value in vars(self).items() if name != "model"}
        return columns | {"seconds": round(self.seconds, 1), "batch_norm": self.batch_norm or norm_mode(self.model)}

    def variant(self, model: nn.Module, chosen: str) -> "Trained":
        """The same training with another answer."""
        return replace(self, model=model.eval(), chosen=chosen)


def halving(steps: int, halvings: int, seed: int, weight_decay: float = 0.0) -> FitConfig:
    """TPN's schedule: 1e-3, halved `halvings` times, in stretches of equal length."""
    every = max(1, -(-steps // (halvings + 1)))
    return FitConfig(steps=steps, learning_rate=1e-3, schedule="steps", decay=0.5, decay_every=every, weight_decay=weight_decay, seed=seed)


def untrained(method: str, sampler: Tasks, seed: int, device: torch.device) -> nn.Module:
    """A method of `smidgen fewshot train`."""
    name, *given = method.partition("@")[0].split("+")
    settings = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in given)}
    torch.manual_seed(seed)
    return make(name, shape_of(sampler.images), sampler.ways, settings).to(device)


def trained(method: str, sampler: Tasks, validation: Tasks, config: FitConfig, options: argparse.Namespace) -> Trained:
    """A method, as it was best on validation tasks."""
    return fitted(untrained(method, sampler, config.seed, options.device), sampler, validation, config, options, options.graphs)


def fitted(
    model: nn.Module, sampler: Tasks, validation: Tasks, config: FitConfig, options: argparse.Namespace, graphs: bool = False, **groups
) -> Trained:
    """Trains a method in place."""
    config = replace(config, clip=None, precision="float32", keep_best=True)
    started = time.monotonic()
    with scratch(config) as run:
        result = train(model, sampler, config, run, validation, options.validation, graphs=graphs, **groups)
    augment = " ".join(sampler.augment)
    return Trained(model.eval(), config.steps, result.kept, sampler.tasks, time.monotonic() - started, augment)


@contextmanager
def scratch(config: FitConfig) -> Iterator[Run]:
    """A run whose folder nobody keeps."""
    with tempfile.TemporaryDirectory() as place, Run("fewshot train", config, Path(place) / "run") as run:
        yield run


def measured(made: Trained, method: str, images: Images, ways: int, shots: Shots, balance: Queries, options: argparse.Namespace) -> dict:
    """A row: accuracy on the test tasks of a data set."""
    sampler = Sampler(images, ways, shots, options.queries, balance, AT_ONCE, TEST)
    result = evaluated(made.model, sampler, options.episodes)
    figures = {"accuracy": round(result.accuracy, 4), "interval": round(result.interval, 4), "episodes": options.episodes}
    setting = {"method": method, "tested": images.name, "ways": ways, "shots": shots, "queries": balance}
    return setting | figures | made.row()


# --- tables ----------------------------------------------------------------------------------------------------------


def omniglot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Many characters, one drawing or five."""
    parts = [rotated(data(options, "omniglot", f"vinyals:{split}")) for split in ("train", "val", "test")]
    yield from episodic(parts, ["5w1s", "5w5s", "20w1s", "20w5s"], ("balanced",), (), seed, options)


def cifar_fs(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Photographs; what transductive methods lose when queries are unbalanced."""
    parts = [data(options, "cifar_fs", split) for split in ("train", "val", "test")]
    yield from episodic(parts, ["5w1s", "5w5s"], BALANCES, PHOTOS, seed, options)


def episodic(
    parts: list[Images],
    settings: list[str],
    balances: tuple[Queries, ...],
    augment: tuple[Augment, ...],
    seed: int,
    options: argparse.Namespace,
) -> Iterator[dict]:
    """Every method in every setting, trained for it."""
    train_set, validation_set, test = parts
    config = halving(options.steps, options.halvings, seed, options.weight_decay)
    for setting in options.ways_shots or settings:
        ways, shots = map(int, setting.removesuffix("s").split("w"))
        for method in options.methods or EPISODIC:
            higher = method.partition("@")[2]
            with_shots = {1: 5, 5: 10}[shots] if higher == "higher" else int(higher or shots)
            kinds = augment if options.augment is None else tuple(options.augment)
            sampler = Sampler(train_set, ways, with_shots, options.queries, tasks=options.tasks, seed=seed, augment=kinds)
            validation = Sampler(validation_set, ways, shots, options.queries, tasks=AT_ONCE, seed=seed + 1)
            models = {method: trained(method, sampler, validation, config, options)}
            if isinstance(models[method].model, ProtoNet):
                models["label-propagation"] = propagating(models[method], validation, options)
            if "dirichlet" in balances:
                uneven = replace(validation, balance="dirichlet")
                models |= {f"{name} rebalanced": r for name, m in models.items() if (r := rebalanced(m, uneven, options)) is not None}
            for name, made in models.items():
                for balance in balances:
                    yield measured(made, name, test, ways, shots, balance, options) | {"trained": train_set.name}


@torch.no_grad()
def propagating(protonet: Trained, validation: Sampler, options: argparse.Namespace) -> Trained:
    """Label propagation over the backbone of a ProtoNet."""
    backbone, tasks = protonet.model.backbone, some(validation, options)
    spreads = [spread(maps.flatten(2), real).mean() for maps, _, real in (nodes(backbone, task) for task in tasks)]
    unit = float(torch.stack(spreads).mean())
    share = choose(lambda share: LabelPropagation(backbone, share * unit).eval(), SIGMAS, tasks)
    return protonet.variant(LabelPropagation(backbone, share * unit), f"sigma {share}")


def rebalanced(made: Trained, validation: Sampler, options: argparse.Namespace) -> Trained | None:
    """A propagating method with the correction for unbalanced queries; None of other methods."""
    if not isinstance(made.model, TPN | LabelPropagation):
        return None

    def corrected(strength: float) -> nn.Module:
        model = copy.copy(made.model)  # shares all parameters
        model.propagation = replace(model.propagation, balance=strength)
        return model

    strength = choose(corrected, STRENGTHS, some(validation, options))
    return made.variant(corrected(strength), f"{made.chosen} strength {strength}".strip())


def some(sampler: Sampler, options: argparse.Namespace) -> list:
    """As many tasks as a validation has."""
    return [sampler(i) for i in range(-(-options.validation // sampler.tasks))]


def any_shot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """One training, tested where it was trained and elsewhere."""
    parts = [data(options, "cifar_fs", split) for split in ("train", "val", "test")]
    chosen = ANYWHERE if options.tested is None else options.tested
    targets = [parts[2] if name == "cifar_fs" else data(options, name, size=32, channels=3) for name in chosen]
    for method in options.methods or ANY_SHOT:
        models = {method: any_shot_trained(method, parts[0], parts[1], seed, options)}
        if method == "btaml":
            mean = copy.copy(models[method].model)
            mean.config = replace(mean.config, samples=0)
            models["btaml mean"] = models[method].variant(mean, "")
        for name, made in models.items():
            for images in targets:
                yield measured(made, name, images, 5, "any", "balanced", options) | {"trained": "cifar_fs"}


def any_shot_trained(method: str, train_set: Images, validation_set: Images, seed: int, options: argparse.Namespace) -> Trained:
    """A method trained on tasks of any number of shots, or as another process left it."""
    steps, kinds = options.anyshot_steps, tuple(options.augment or ())
    sampler = Sampler(train_set, 5, "any", options.queries, tasks=4, seed=seed, augment=kinds)
    model = untrained(method, sampler, seed, options.device)
    file = options.keep and options.keep / f"{method}-{seed}.pt"
    if file and file.exists():
        stored = torch.load(file, map_location=options.device, weights_only=True)
        model.load_state_dict(stored["state"])
        return Trained(model.eval(), **stored["made"])
    validation = Sampler(validation_set, 5, "any", options.queries, tasks=AT_ONCE, seed=seed + 1)
    config = FitConfig(steps=steps, learning_rate=1e-3, schedule="cosine", weight_decay=options.weight_decay, seed=seed)
    classifiers = [m for m in model.modules() if isinstance(m, Classifier)] if options.start_steps else []
    before = [started(classifier, sampler, validation, options) for classifier in classifiers]
    made = fitted(model, sampler, validation, replace(config, evaluate_every=max(1, steps // 8)), options)
    for first in before:
        made = replace(made, start=f"protonet {first.steps}", seconds=made.seconds + first.seconds)
    if file:
        options.keep.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        row = {name: value for name, value in vars(made).items() if name != "model"}
        torch.save({"state": model.state_dict(), "made": row}, partial)
        partial.rename(file)
    return made


def started(classifier: Classifier, sampler: Sampler, validation: Sampler, options: argparse.Namespace) -> Trained:
    """Trains its convolutions as a ProtoNet's: an update of these costs a small part of one through an inner loop."""
    many = replace(sampler, ways=20, shots=5, queries=10, tasks=1)
    few = replace(validation, shots=5)
    config = FitConfig(steps=options.start_steps, learning_rate=1e-3, schedule="cosine", seed=sampler.seed)
    return fitted(ProtoNet(Trunk(classifier)), many, few, config, options, options.device.type == "cuda")


class Trunk(nn.Module):
    """The convolutions of an inner loop's classifier, not adapted."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) -> (n, features)"""
        c = self.classifier
        for weight, bias, shift in zip(c.weights, c.biases, c.shift, strict=True):
            x = F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, None, shift, True, 0.1, EPSILON)
            x = F.max_pool2d(F.relu(x), 2)
        return x.flatten(1)


def mxml(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Members, one learner on all sets, the members' mean, and mixtures, which are trained on classes that no member has seen."""
    from smidgen.fewshot.methods import mxml as m
    from smidgen.fewshot.methods import mxml_stages as stages
    from smidgen.fewshot.sets import SetsSampler
    from smidgen.networks import Conv4

    ways, shots = 5, 5
    parts = member_parts(options)
    sets, unseen, tests = ([part[k] for part in parts.values() if part[k] is not None] for k in range(3))
    targets = [*tests, *(data(options, name, size=32, channels=3) for name in TARGETS)]
    kinds = tuple(options.augment or ())

    def alone(sampler: Tasks, steps: int) -> Trained:
        """One learner on tasks of one sampler."""
        torch.manual_seed(seed)
        learner = m.NormalisedProtoNet(Conv4(3)).to(options.device)
        config = replace(stages.MEMBERS, steps=steps, decay_every=max(1, 7 * steps // 10), precision="float32", seed=seed)
        return timed(learner, config, sampler, lambda run: stages.train_members([learner], [sampler], config, run))

    def timed(model: nn.Module, config: FitConfig, sampler: Tasks, stage: Callable) -> Trained:
        started = time.monotonic()
        with scratch(config) as run:
            stage(run)
        return Trained(model.eval(), config.steps, config.steps, sampler.tasks, time.monotonic() - started, " ".join(sampler.augment))

    lengths = [min(options.member_steps, max(1000, 100 * len(s.labels) // 150)) for s in sets]
    members = [alone(Sampler(s, ways, shots, options.queries, seed=seed, augment=kinds), n) for s, n in zip(sets, lengths, strict=True)]
    models = {f"member {name}": member for name, member in zip(parts, members, strict=True)}
    if not options.methods or "one learner" in options.methods:
        models["one learner"] = alone(SetsSampler(tuple(sets), ways, shots, options.queries, seed=seed, augment=kinds), sum(lengths))
    known = [*unseen, *targets]  # members do not change any more: from here on their features are looked up
    models = {name: replace(made, model=remembered(made.model, known), batch_norm=norm_mode(made.model)) for name, made in models.items()}
    drawn = numbered(known)
    unseen, targets = drawn[: len(unseen)], drawn[len(unseen) :]
    networks = [models[f"member {name}"].model for name in parts]
    models["ensemble"] = replace(models["member omniglot"], model=m.Ensemble(networks), seconds=sum(member.seconds for member in members))
    weighing = SetsSampler(tuple(unseen), ways, shots, 3, seed=seed)
    second = replace(
        stages.WEIGHTS, steps=options.weight_steps, decay_every=max(1, 7 * options.weight_steps // 10), precision="float32", seed=seed
    )
    for name in (n for n in options.methods or MIXTURES if n in MIXTURES):
        form, transductive, normalise = MIXTURES[name]
        torch.manual_seed(seed)
        network = m.WeightNetwork(256, ways if form == "authors" else None, form, transductive)
        mixture = m.MxML(networks, network, normalise).to(options.device)
        made = timed(mixture, second, weighing, lambda run, mixture=mixture: stages.train_weights(mixture, weighing, second, run))
        models[name] = replace(made, batch_norm=models["ensemble"].batch_norm)
    for name, made in models.items():
        for images in targets:
            for balance in BALANCES:
                yield measured(made, name, images, ways, shots, balance, options) | {"trained": " ".join(parts)}


def member_parts(options: argparse.Namespace) -> dict[str, tuple[Images, Images | None, Images]]:
    """Classes that a member learns from, that weights are learned from, and that are tested on."""

    def split(name: str, prefix: str = "") -> tuple[Images, ...]:
        return tuple(data(options, name, prefix + part, 32, 3) for part in ("train", "val", "test"))

    def cut(name: str, *ends: int) -> tuple[Images | None, ...]:
        images = data(options, name, size=32, channels=3)
        edges = [0, *ends, len(images.classes)]
        return tuple(images.of(list(range(a, b))) if b > a else None for a, b in zip(edges, edges[1:], strict=False))

    parts = {"omniglot": split("omniglot", "vinyals:"), "cifar_fs": split("cifar_fs")}
    return parts | {"gtsrb": cut("gtsrb", 26, 35), "flowers12": cut("flowers12", 7, 7)}  # pyright: ignore


# --- frozen features -------------------------------------------------------------------------------------------------


class Stored(nn.Module):
    """A backbone over features made once: an image is its own number, as `numbered` draws them."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1) -> (n, width)"""
        return self.get_buffer("features")[(x.flatten(1)[..., 0] * 255).round().long()]


def numbered(sets: Sequence[Images]) -> list[Images]:
    """The same labels, every image a single pixel that says which one it is, counted through all sets."""
    firsts = [sum(len(images.labels) for images in sets[:i]) for i in range(len(sets))]
    return [
        replace(images, pixels=(first + torch.arange(len(images.labels), device=images.labels.device)).view(-1, 1, 1, 1), paths=())
        for first, images in zip(firsts, sets, strict=True)
    ]


class Remembered(NormalisedProtoNet):
    """A member of a mixture over features made once."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__(nn.Identity())  # pyright: ignore  it embeds nothing
        self.stored = Stored(features)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(tasks, n, 1, 1, 1) -> (tasks, n, width)"""
        return self.stored(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@torch.no_grad()
def remembered(member: nn.Module, sets: Sequence[Images]) -> Remembered:
    """The member over `numbered(sets)`."""
    batches = (images.floats(part) for images in sets for part in torch.arange(len(images.labels), device=images.labels.device).split(500))
    return Remembered(torch.cat([member.embed(x[None])[0] for x in batches])).eval()


def frozen(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Heads over a network that was trained on ImageNet, whose classes include many of these."""
    from smidgen.backbones import open_backbone

    backbone = open_backbone("efficientnet-lite0", options.device)
    asked = options.methods or HEADS
    asked = [name for name in asked if name.startswith("tpn head") or seed == options.seeds[0]]  # the others have nothing drawn in them

    def features(images: Images) -> torch.Tensor:
        return backbone.features(images, 64, options.cache).to(options.device)

    train_set, validation_set = data(options, "cifar_fs", "train"), data(options, "cifar_fs", "val")
    raw = features(train_set)
    base = raw.mean(0)
    seen, held = (Stored(unit(part - base)) for part in (raw, features(validation_set)))
    tests = [
        (images, features(images)) for images in (data(options, "cifar_fs", "test"), data(options, "gtsrb"), data(options, "flowers12"))
    ]
    for setting in options.ways_shots or ["5w1s", "5w5s"]:
        ways, shots = map(int, setting.removesuffix("s").split("w"))
        validation = Sampler(numbered([validation_set])[0], ways, shots, options.queries, tasks=AT_ONCE, seed=seed + 1)
        share = choose(lambda share: LabelPropagation(held, share * len(base) ** -0.5).eval(), SIGMAS, some(validation, options))
        sampler = Sampler(numbered([train_set])[0], ways, shots, options.queries, seed=seed)
        sigma = share * len(base) ** -0.5
        trained_heads = {
            name: headed(seen, held, sigma, Propagation(k=k), sampler, validation, options)
            for name, k in (("tpn head", 20), ("tpn head, 5 neighbours", 5))
            if name in asked
        }
        for images, plain in tests:
            for name, head in heads(plain, base, sigma, share, trained_heads).items():
                for balance in BALANCES if name in asked else ():
                    head.model.to(options.device).eval()
                    row = measured(head, name, numbered([images])[0], ways, shots, balance, options)
                    yield row | {"trained": "efficientnet-lite0"}


def heads(plain: torch.Tensor, base: torch.Tensor, sigma: float, share: float, trained_heads: dict[str, Trained]) -> dict[str, Trained]:
    """Over the features of one data set; `base` is the mean of the features of CIFAR-FS's training classes."""
    from smidgen.fewshot.methods.simpleshot import SimpleShot

    own, direct = Stored(unit(plain - base)), Stored(plain)
    made = {
        "prototypes": Trained(ProtoNet(direct)),
        "simpleshot": Trained(SimpleShot(direct, base)),
        "label-propagation": Trained(LabelPropagation(own, sigma), chosen=f"sigma {share}"),
        "label-propagation rebalanced": Trained(
            LabelPropagation(own, sigma, Propagation(balance=1.0)), chosen=f"sigma {share} strength 1.0"
        ),
        "predict simpleshot": Trained(AsPredict(direct, "simpleshot")),
        "predict label-propagation": Trained(AsPredict(direct, "label-propagation")),
    }
    for name, head in trained_heads.items():
        made[name] = head.variant(TPN(own, head.model.graph, head.model.propagation), f"sigma starts {share}")
    return made


class AsPredict(nn.Module):
    """What `smidgen fewshot predict` says: centred on the task's own support, and propagation with five neighbours."""

    def __init__(self, backbone: Stored, method: Literal["simpleshot", "label-propagation"]) -> None:
        super().__init__()
        self.backbone, self.method = backbone, method

    def predict(self, episode: Episode) -> torch.Tensor:
        """Probabilities, task after task."""
        from smidgen.fewshot.predict import classify

        out = episode.query_x.new_zeros(*episode.query_y.shape, episode.ways)
        for t, (support_y, query_y) in enumerate(zip(episode.support_y, episode.query_y, strict=True)):
            support, query = (self.backbone(x[t][y >= 0]) for x, y in ((episode.support_x, support_y), (episode.query_x, query_y)))
            out[t, query_y >= 0] = classify(self.method, support, support_y[support_y >= 0], query, episode.ways)
        return out


def headed(
    seen: Stored, held: Stored, sigma: float, propagation: Propagation, sampler: Sampler, validation: Sampler, options: argparse.Namespace
) -> Trained:
    """TPN whose graph module alone is trained; `seen` are features of the training classes, `held` of the validation classes."""
    torch.manual_seed(sampler.seed)
    model = TPN(Both(seen, held), FlatGraph(seen.get_buffer("features").shape[1], sigma), propagation).to(options.device)
    return fitted(
        model,
        sampler,
        validation,
        halving(options.head_steps, options.halvings, sampler.seed),
        options,
        options.graphs,
        groups=[{"params": model.graph.parameters()}],
    )


class Both(nn.Module):
    """Stored features of the training classes in training, of the validation classes in evaluation."""

    def __init__(self, seen: Stored, held: Stored) -> None:
        super().__init__()
        self.seen, self.held = seen, held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1) -> (n, width)"""
        return (self.seen if self.training else self.held)(x)


# --- the command line ------------------------------------------------------------------------------------------------


TABLES = {"omniglot": omniglot, "cifar-fs": cifar_fs, "any-shot": any_shot, "mxml": mxml, "frozen": frozen}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are added to")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help='by default a list for each table; of mxml the mixtures, and "one learner"')
    parser.add_argument("--ways-shots", nargs="+", metavar="5w1s", help="of omniglot, cifar-fs and frozen; by default those named above")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    numbers = {
        "steps": (20_000, "updates of a training of omniglot and cifar-fs"),
        "tasks": (4, "tasks of each of these updates"),
        "halvings": (3, "of the learning rate in such a training"),
        "anyshot-steps": (20_000, "updates of an any-shot training, of 4 tasks"),
        "start-steps": (3000, "updates of the ProtoNet that inner loops of any-shot start from; 0: from random weights"),
        "member-steps": (20_000, "largest number of updates of a member of mxml"),
        "weight-steps": (10_000, "updates of a weight network of mxml"),
        "head-steps": (2000, "updates of the TPN head over frozen features"),
        "episodes": (600, "of a test"),
        "validation": (200, "episodes of a validation"),
        "queries": (15, "per class"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default}")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--augment", nargs="*", choices=KINDS, help="of training images; by default flip crop for cifar-fs alone")
    parser.add_argument("--graphs", action="store_true", help="train omniglot, cifar-fs and the TPN head by CUDA graphs")
    parser.add_argument("--tested", nargs="*", choices=ANYWHERE, help="sets that any-shot tests on; by default all")
    parser.add_argument("--keep", type=Path, help="folder that keeps trained any-shot methods; those that are there are not trained")
    parser.add_argument("--cache", type=Path, help="folder that keeps features of frozen backbones")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options = parser.parse_args(given)
    for name in numbers:
        if vars(options)[name.replace("-", "_")] < (name != "start-steps"):
            parser.error(f"--{name} must be positive")
    return options


def main(options: argparse.Namespace) -> None:
    """Fills the tables."""
    made_by = rows.provenance()
    for seed in options.seeds:
        for table in options.tables:
            for row in TABLES[table](seed, options):
                row |= {"table": table, "seed": seed} | made_by
                rows.append(options.results, COLUMNS, [row])
                print("\t".join(str(row[c]) for c in COLUMNS[:10]), flush=True)


if __name__ == "__main__":
    main(arguments())
