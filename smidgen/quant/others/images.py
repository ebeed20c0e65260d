"""EfficientNet-Lite0: images in [0, 1] (n, 3, 224, 224) -> features (n, 1280), what `--backbone RUN/onnx/model.onnx` reads again."""

from pathlib import Path

import torch

from smidgen.backbones import LITE, LITE_SIZE, EfficientNetLite, efficientnet_lite_of
from smidgen.errors import UserError
from smidgen.fewshot.data import GLYPHS, load_images
from smidgen.images import Images, load, unlabelled
from smidgen.quant.others.other import Other, Sample


def efficientnet_lite(source: str | None) -> Other:
    """The packaged network; its classifier is left out."""
    network = EfficientNetLite()
    fitted = efficientnet_lite_of(network).fitted

    def samples(count: int, seed: int) -> list[Sample]:
        images = opened(source, count, seed)
        chosen = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[:count]
        return [Sample.of(images=fitted(images.floats(chosen[i : i + 1]))) for i in range(len(chosen))]

    kept = "sums of residual connections, the mean over places"
    return Other(LITE, network, network, ("features",), samples, skip=("network._fc",), high_precision=kept)


def opened(source: str | None, count: int, seed: int) -> Images:
    """The images of a source: `count` of them at most where each is a file."""
    if source is None:
        raise UserError(f"{LITE} takes its ranges from images: give a folder, a .npz or {GLYPHS} with --calibration")
    if source == GLYPHS:
        return load_images(GLYPHS, "train")
    path = Path(source)
    return load(path) if path.suffix in (".npz", ".csv") else unlabelled(path, LITE_SIZE, 3, count=count, seed=seed)
