"""`smidgen fewshot predict`: which of a few classes, each shown by a few photos, new photos belong to.

    smidgen fewshot predict --support photos --images new > classes.csv

Standard output is a CSV and nothing else: path,class,probability, a line per image, in the order of their paths. The run's folder holds
it again as predictions.csv, with the probabilities of all classes as columns, and the figures of the run in metrics.json.

Two ways. A frozen backbone and a head without parameters (below), or with `--model` a method that `smidgen fewshot train` trained, which
sees the images themselves. All images make one task: where a method lets queries inform each other (label-propagation, TPN, batch
statistics), an image's class depends on the others given with it; prototypes and simpleshot judge each one alone.

    prototypes          p(class | x) = softmax( -t |z - c|^2 )      z: features of length 1; c: mean z of the class's support
    simpleshot          the same, z less the mean feature of the support first (the paper takes the mean of base classes,
                        which a backbone brought from elsewhere does not tell)
    label-propagation   over simpleshot's z; images vote for each other along their likeness

Squared distances of such z lie between 0 and 4, so that t = 1 would call nothing certain; t = 10 is a choice of ours.

Label propagation has 5 neighbours instead of the paper's 20, and a sigma of 0.3 times the spread: with 20, half the nodes or more of a
task of few photos are neighbours, and with a wide sigma all of them alike. Accuracy over EfficientNet-lite's centred features of
flowers, 100 tasks, as this was chosen: 3-way 4-shot with 4 queries a class 0.93 (20 neighbours, sigma 0.5: 0.43; prototypes 0.93), with one
0.94 (0.42; 0.95), 5-way with 10 queries a class, 1-shot 0.86 (0.40; 0.74), 5-shot 0.94 (0.65; 0.91).
"""

import csv
import sys
import time
from dataclasses import KW_ONLY, dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, cast

import torch
from cyclopts import Parameter
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.backbones import LITE, TRAINED, EfficientNetLite, Scaling, normalised, open_backbone
from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode
from smidgen.fewshot.methods import Method as Trained
from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation, spread
from smidgen.fewshot.methods.prototypes import ProtoNet
from smidgen.fewshot.models import describe, load
from smidgen.images import Images, unlabelled
from smidgen.images import load as load_images
from smidgen.precision import pick_device
from smidgen.run import Run

Method = Literal["prototypes", "simpleshot", "label-propagation"]
PREDICTIONS = "predictions.csv"
FEATURES = "features"
TEMPERATURE = 10.0
SIGMA, NEIGHBOURS = 0.3, 5  # of label-propagation; sigma in units of the images' spread
SIZE = 64  # side of images, for a backbone that reads any


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen fewshot predict`."""

    _: KW_ONLY
    support: Path
    "Labelled images: a folder with a folder per class, a .csv with the columns path,label, or a .npz."
    images: Path
    "Images to classify: a file, or all of a folder and the folders in it."
    model: Path | None = None
    "A run of smidgen fewshot train, instead of method and backbone."
    method: Method | None = None
    "Head over the features; prototypes if none is given."
    backbone: str | None = None
    "pixels, efficientnet-lite0 (the one if none is given), a .onnx file, a trained Conv-4, or a folder with a transformers image model."
    scaling: Scaling | None = None
    "What a .onnx backbone wants of pixels in 0 .. 1; none if not given."
    temperature: float | None = None
    "Factor of squared distances, t; 10 if not given."
    size: int | None = None
    "Side of the images, for a backbone that reads any; 64 if not given."
    skip_bad: bool = False
    "Leave files out that cannot be read, instead of stopping."
    batch: int = 32
    "Images computed at once."
    cache: Path | None = None
    "Folder where features are kept and looked up; the run's own if none is given."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/predict."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."

    def check(self) -> None:
        """Refuses what cannot work, or would do nothing."""
        of_backbone = {"method": self.method, "backbone": self.backbone, "scaling": self.scaling, "temperature": self.temperature}
        of_backbone |= {"size": self.size, "cache": self.cache, "batch": None if self.batch == type(self).batch else self.batch}
        for name, value in of_backbone.items():
            if self.model is not None and value is not None:
                raise UserError(f"--{name} is for a backbone without training; a --model brings its own, leave one of the two out")
        if self.temperature is not None and self.method == "label-propagation":
            raise UserError("--temperature is for distances to prototypes; label-propagation takes none")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature must be positive, got {self.temperature}")
        if self.batch < 1:
            raise UserError(f"--batch must be at least one image, got {self.batch}")


@dataclass(frozen=True)
class Predictions:
    """Probabilities of every class for every image."""

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: Float[Tensor, "n classes"]

    def csv(self, every: bool = False) -> str:
        """A line per image with its likeliest class; `every`: a column per class besides."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "class", "probability", *(self.classes if every else ())])
        for path, row in zip(self.paths, self.probabilities.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            writer.writerow([path, self.classes[best], f"{row[best]:.6f}", *(f"{p:.6f}" for p in (row if every else ()))])
        return text.getvalue()


def command(config: Config) -> None:
    """Classify images by a few labelled ones; prints a CSV."""
    with Run("fewshot predict", config, config.output, config.support.stem) as run:
        predictions = main(config, run)
    sys.stdout.write(predictions.csv())


def main(config: Config, run: Run) -> Predictions:
    """Read, embed, compare; or read and ask the trained method."""
    config.check()
    started = time.monotonic()
    device = pick_device(config.device)
    if config.model is not None:
        support, queries, probabilities, name = by_model(config, config.model, device)
    else:
        support, queries, probabilities, name = by_backbone(config, config.cache or run.folder / FEATURES, device)
    if not probabilities.isfinite().all():
        raise UserError("the probabilities are NaN or infinite; the network is damaged, or reads other images")
    for path in (*support.skipped, *queries.skipped):
        run.say(f"skipped, cannot be read: {path}")
    predictions = Predictions(queries.paths, support.classes, probabilities)
    (run.folder / PREDICTIONS).write_text(predictions.csv(every=True), encoding="utf-8")
    run.finish(
        images=len(queries.paths),
        classes=len(support.classes),
        shots=[len(members) for members in support.members],
        skipped=len(support.skipped) + len(queries.skipped),
        method=config.method or ("prototypes" if config.model is None else describe(_trained(config.model)).name),
        network=name,
        probability=float(probabilities.max(1).values.mean()),
        seconds=time.monotonic() - started,
    )
    return predictions


def by_backbone(config: Config, cache: Path, device: torch.device) -> tuple[Images, Images, Float[Tensor, "n classes"], str]:
    """Support, images, their probabilities and the network's name."""
    backbone = open_backbone(config.backbone or LITE, device, config.scaling)
    if config.size is not None and backbone.size not in (None, config.size):
        raise UserError(f"--size {config.size}: {backbone.name} reads images of side {backbone.size}; leave --size out")
    support, queries = read(config, backbone.size or config.size or SIZE, backbone.channels or 3)
    x, q = (backbone.features(images, config.batch, cache) for images in (support, queries))
    temperature = TEMPERATURE if config.temperature is None else config.temperature
    probabilities = classify(config.method or "prototypes", x, support.labels, q, len(support.classes), temperature)
    return support, queries, probabilities, backbone.name


@torch.no_grad()
def by_model(config: Config, model: Path, device: torch.device) -> tuple[Images, Images, Float[Tensor, "n classes"], str]:
    """The same of a trained method."""
    folder = _trained(model)
    described = describe(folder)
    channels, height, _ = described.shape
    support, queries = read(config, height, channels)
    x, q = (images.floats(torch.arange(len(images.labels)))[None].to(device) for images in (support, queries))
    episode = Episode(x, support.labels[None].to(device), q, queries.labels[None].to(device), len(support.classes))
    method = cast(Trained, load(folder, device))
    return support, queries, method.predict(episode)[0].cpu(), str(model)


def read(config: Config, size: int, channels: int) -> tuple[Images, Images]:
    """Support and queries, of one shape."""
    support = load_images(config.support, None, size, channels, config.skip_bad)
    if len(support.classes) < 2:
        raise UserError(f"{config.support}: holds one class, {' '.join(support.classes)!r}; there is nothing to tell apart, add another")
    return support, unlabelled(config.images, size, channels, config.skip_bad)


@torch.no_grad()
def classify(
    method: Method,
    support: Float[Tensor, "s width"],
    labels: Int[Tensor, "s"],
    queries: Float[Tensor, "n width"],
    ways: int,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "n ways"]:
    """Probabilities from features; see the module's description."""
    mean = torch.zeros_like(support[0])
    if method != "prototypes":  # the mean of class means: a class with many images does not draw it to itself
        mean = torch.stack([support[labels == c].mean(0) for c in range(ways)]).mean(0)
    z, q = normalised(support, mean)[None], normalised(queries, mean)[None]
    episode = Episode(z, labels[None], q, labels.new_zeros(1, len(queries)), ways)
    if method == "label-propagation":
        nodes = torch.cat([z, q], 1)
        sigma = SIGMA * float(spread(nodes, torch.ones_like(nodes[..., 0], dtype=torch.bool)))
        return LabelPropagation(nn.Identity(), sigma, Propagation(k=NEIGHBOURS)).predict(episode)[0]
    return (temperature * ProtoNet(nn.Identity()).logits(episode)).softmax(-1)[0]


class Unit(nn.Module):
    """Features of one length, whose squared distances are t times those of length 1."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.length = temperature**0.5

    def forward(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """As the head takes them."""
        return self.length * normalised(x)


def prototypes_over_lite(temperature: float = TEMPERATURE) -> ProtoNet:
    """Backbone and head of `--method prototypes` in one module, which sees images: the same probabilities."""
    return ProtoNet(nn.Sequential(EfficientNetLite(), Unit(temperature))).eval()


def _trained(model: Path) -> Path:
    return model / TRAINED if (model / TRAINED).is_dir() else model
