"""Few-shot methods in closed form, as fewshot/predictor.py has them: support, labels, queries -> probabilities; the backbone in integers.

The graph module of TPN and the heads stay float: a rounding error of sigma moves whole rows of the graph.
"""

from pathlib import Path

import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.data import GLYPHS, load_images, shape_of
from smidgen.fewshot.episodes import Sampler
from smidgen.fewshot.models import describe, load, trained_folder
from smidgen.fewshot.predictor import INPUTS, OUTPUT, Predictor, exportable, inductive, tasks
from smidgen.quant.linear import is_product
from smidgen.quant.others.other import Other, Sample

QUERIES = 5  # images of each class to be classified in a calibration task


def few_shot(model: Path, source: str | None) -> Other:
    """A method that `smidgen fewshot train` trained."""
    folder = trained_folder(model)
    described = describe(folder)
    predictor = inductive(Predictor(exportable(load(folder)))).eval()
    channels, height, _ = described.shape

    given = source or described.data
    if not given:
        raise UserError(f"{model} does not say what it was trained on: give images in classes with --calibration")

    def samples(count: int, seed: int) -> list[Sample]:
        size = (None, None) if given == GLYPHS else (height, channels)
        images = load_images(given, "train" if given == GLYPHS else "all", *size)
        described.check(shape_of(images), given)
        shots = described.shots if isinstance(described.shots, int) else 5
        sampler = Sampler(images, described.ways, shots, QUERIES, seed=seed)
        feeds = [feed for i in range(count) for feed in tasks(sampler(i))]
        return [Sample({name: torch.from_numpy(feed[name]) for name in INPUTS}, feed) for feed in feeds]

    axes = {"support_images": {0: "support"}, "support_labels": {0: "support", 1: "ways"}, "query_images": {0: "queries"}}
    backbone: nn.Module = predictor.method.backbone
    inside = {f"method.backbone.{name}" if name else "method.backbone" for name, _ in backbone.named_modules()}
    skip = tuple(name for name, m in predictor.named_modules() if is_product(m) and name not in inside)
    name = model.resolve().name
    return Other(name, predictor, predictor, (OUTPUT,), samples, axes, skip, rows=True, high_precision="the head behind the backbone")
