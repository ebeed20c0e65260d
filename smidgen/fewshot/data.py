"""Images by name, and the refusals that training and evaluation share."""

from pathlib import Path

import numpy as np
import torch

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Images

SPLITS = ("train", "val", "test")
SPLIT_ARRAYS = ("class_split", "class_split_vinyals")  # of every class, 0: train, 1: validation, 2: test


def load_images(source: str, split: str = "all") -> Images:
    """Classes of one split of a data set: train, val, test or all; `source` is an .npz file with images, labels and class_names."""
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{source}: no such data; give an .npz file with images, labels and class_names")
    with np.load(path) as arrays:
        missing = {"images", "labels", "class_names"} - set(arrays.files)
        if missing:
            raise UserError(f"{source}: holds no {', '.join(sorted(missing))}; an image set has images, labels and class_names")
        pixels, labels, names = arrays["images"], arrays["labels"], arrays["class_names"]
        stored = next((arrays[name] for name in SPLIT_ARRAYS if name in arrays.files), None)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(labels) != len(pixels):
        raise UserError(f"{source}: images are {pixels.dtype} of shape {pixels.shape}; they have to be uint8, (n, height, width[, channels])")
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    images = Images(path.stem, torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names)))
    if split == "all":
        return images
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; there are {', '.join(SPLITS)} and all")
    if stored is None:
        raise UserError(f"{source} is not divided into {', '.join(SPLITS)}; use the split all")
    chosen = np.flatnonzero(stored == SPLITS.index(split)).tolist()
    if not chosen:
        raise UserError(f"{source} has no class in the split {split}")
    return images.of(chosen)


def shape_of(images: Images) -> tuple[int, int, int]:
    """(channels, height, width)"""
    height, width, channels = images.pixels.shape[1:]
    return channels, height, width
