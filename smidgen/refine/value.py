"""`smidgen refine value DIR --method knn-shapley`: what is every image worth? Prints a CSV: path,label,score,value, the worst first.

The score is in [0, 1], low is suspicious; the value is in the method's own units. The run's folder holds the same as values.csv.
"""

import csv
import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from smidgen.backbones import LITE, Scaling, open_backbone
from smidgen.errors import UserError, check_seed
from smidgen.precision import pick_device
from smidgen.refine.detectors.duplicates import find_duplicates, group_numbers
from smidgen.refine.evidence import Evidence, Method
from smidgen.refine.folder import read, write_csv
from smidgen.refine.material import renamed
from smidgen.refine.refine import SIZE
from smidgen.refine.valuation import VALUATIONS
from smidgen.run import Run

VALUES = "values.csv"


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen refine value`."""

    source: str
    "Images: class folders, a .csv with the columns path,label, or a .npz."
    _: KW_ONLY
    method: str = "knn-shapley"
    "By name; a wrong one is answered with the list."
    validation: str | None = None
    "Images that values are measured on, labelled with care; some methods need them."
    embed: str = LITE
    "What images are compared by: efficientnet-lite0, pixels, a .onnx file, a trained Conv-4, or a folder with a transformers image model."
    scaling: Scaling | None = None
    "What a .onnx file wants of pixels in 0 .. 1; none if not given."
    size: int | None = None
    "Side of the images, where --embed reads any; 64 if not given."
    split: str | None = None
    "Part of the source."
    validation_split: str | None = None
    "Part of --validation."
    batch: int = 32
    "Images embedded at once."
    cache: Path | None = None
    "Folder where features are kept and looked up; the run's own if none is given."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/refine/value."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Of what a method draws."

    def chosen(self) -> Method:
        """The method, if all is well."""
        if self.method not in VALUATIONS:
            raise UserError(f"--method: there is no method {self.method!r}; there are {', '.join(VALUATIONS)}")
        method = VALUATIONS[self.method]()
        if "validation" in method.needs and self.validation is None:
            raise UserError(
                f"--method {self.method} compares models on a validation set; give one (--validation), or choose knn-shapley or data-oob"
            )
        check_seed(self.seed)
        if self.validation_split is not None and self.validation is None:
            raise UserError("--validation-split is a part of --validation; give that, too")
        return method


def command(config: Config) -> None:
    """Value every image of a set; prints a CSV."""
    with Run("refine value", config, config.output, f"{Path(config.source).stem}-{config.method}") as run:
        rows = main(config, run)
    csv.writer(sys.stdout, lineterminator="\n").writerows([["path", "label", "score", "value"], *rows])


def main(config: Config, run: Run) -> list[list[str]]:
    """Read, embed, value, sort."""
    started, method, device = time.monotonic(), config.chosen(), pick_device(config.device)
    backbone = open_backbone(config.embed, device, config.scaling)
    if config.size is not None and backbone.size not in (None, config.size):
        raise UserError(f"--size {config.size}: {backbone.name} reads images of side {backbone.size}; leave --size out")
    size, cache = backbone.size or config.size or SIZE, config.cache or run.folder / "features"
    source = read(config.source, config.split, size, run)
    x, y = backbone.features(source.images, config.batch, cache), source.images.labels
    given = None
    if config.validation is not None:
        held = read(config.validation, config.validation_split, size, run)
        given = backbone.features(held.images, config.batch, cache).to(device), renamed(held, source.classes).to(device)
    groups = group_numbers(find_duplicates(source.images.pixels, y, x), len(y)).to(device)
    evidence = Evidence(x.to(device), y.to(device), len(source.classes), given, groups=groups, seed=config.seed)
    scores = method(evidence)

    order = scores.value.argsort(stable=True).tolist()
    score, value = scores.score.tolist(), scores.value.tolist()
    rows = [[source.names[i], source.classes[source.labels[i]], f"{score[i]:.6f}", f"{value[i]:.6g}"] for i in order]
    write_csv(run.folder / VALUES, ["path", "label", "score", "value"], rows)
    for finding in source.unreadable:
        run.say(f"left out, cannot be read: {finding.path}")
    run.finish(
        images=len(rows),
        unreadable=len(source.unreadable),
        method=config.method,
        embed=config.embed,
        value_mean=sum(value) / len(value),
        value_seconds=time.monotonic() - started,
        seed=config.seed,
    )
    return rows
