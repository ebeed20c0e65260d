"""Labelled images in one .npz file, as `images.py` describes it: read, checked, one split of them chosen."""

import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps

from smidgen.errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"class_split_lake": ("background", "evaluation")}  # of arrays that do not mean SPLITS
SYNONYMS = {"validation": "val", "valid": "val"}


class NoSplit(UserError):
    """A split was asked for that the images do not have."""


class Arrays(NamedTuple):
    """The images of one split."""

    pixels: UInt8[np.ndarray, "n height width channels"]
    labels: Int64[np.ndarray, "n"]
    classes: list[str]
    groups: Int64[np.ndarray, "n"] | None


def read_arrays(source: Path, split: str | None, size: int | None, channels: int | None) -> Arrays:
    """A split of a .npz, its classes numbered anew; all of it without one. `size` and `channels` as `images.load` has them."""
    try:
        with source.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # numpy leaves a damaged file open
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{source}: not a readable .npz file ({error})") from error
    missing = {"images", "labels", "class_names"} - arrays.keys()
    if missing:
        raise UserError(f"{source}: holds no array {' and no array '.join(sorted(missing))}; it has {some(sorted(arrays))}")
    pixels, labels, names = arrays["images"], arrays["labels"], [str(n) for n in arrays["class_names"].ravel()]
    _check_arrays(source, pixels, labels, len(names))
    groups = _grouping(source, arrays, len(labels))
    distinct(str(source), names)
    if split is not None:
        array, number = _split(source, arrays, split, len(names), len(labels))
        chosen = array == number
        rows = np.flatnonzero(chosen[labels] if len(chosen) == len(names) else chosen)
        classes = np.flatnonzero(chosen) if len(chosen) == len(names) else np.unique(labels[rows])
        pixels, labels, names = pixels[rows], np.searchsorted(classes, labels[rows]), [names[c] for c in classes]
        groups = None if groups is None else groups[rows]
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    pixels = _recoloured(pixels, pixels.shape[-1] if channels is None else channels)
    if size is not None and pixels.shape[1:3] != (size, size):
        pixels = np.stack([_rescaled(image, size) for image in pixels])
    return Arrays(np.ascontiguousarray(pixels), labels.astype(np.int64), names, groups)


def _grouping(source: Path, arrays: dict[str, np.ndarray], images: int) -> np.ndarray | None:
    """The array track, if there is one."""
    if "track" not in arrays:
        return None
    if arrays["track"].shape != (images,) or arrays["track"].dtype.kind not in "iu":
        raise UserError(f"{source}: array track must be {images} integers, one per image")
    return arrays["track"].astype(np.int64)


def _check_arrays(source: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UserError(f"{source}: array images holds NaN or infinite values")
    if pixels.dtype != np.uint8:
        raise UserError(f"{source}: array images is {pixels.dtype}, but must be uint8, 0 to 255")
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in (1, 3)) or 0 in pixels.shape:
        raise UserError(f"{source}: array images has shape {pixels.shape}, but must be (n, height, width) or (n, height, width, 3)")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{source}: array labels is {labels.dtype} {labels.shape}, but must be {len(pixels)} integers, one per image")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{source}: labels are {labels.min()} to {labels.max()}, but there are {classes} class_names, so 0 to {classes - 1}"
        )


def _split(source: Path, arrays: dict[str, np.ndarray], split: str, classes: int, images: int) -> tuple[np.ndarray, int | str]:
    """An array and its value that a split's name means."""
    offered: dict[str, list[tuple[np.ndarray, int | str]]] = {}
    for key, array in arrays.items():
        if not key.startswith(("class_split", "split")) or key.endswith("_names"):
            continue
        if len(array) != (classes if key.startswith("class_split") else images):
            raise UserError(f"{source}: array {key} has {len(array)} entries for {classes} classes and {images} images")
        given = arrays.get(f"{key}_names", SPLIT_NAMES.get(key, SPLITS))
        family = key.removeprefix("class_").removeprefix("split").strip("_")
        for value in np.unique(array).tolist():
            if not isinstance(value, str) and not 0 <= value < len(given):
                raise UserError(f"{source}: array {key} holds {value}, but has {len(given)} names, {some([str(n) for n in given])}")
            name = value if isinstance(value, str) else str(given[value])
            for alias in {name, f"{family}:{name}"} if family else {name}:
                offered.setdefault(alias, []).append((array, value))
    asked = ":".join(SYNONYMS.get(part, part) for part in split.split(":"))
    found = offered.get(asked, [])
    if not found:
        raise NoSplit(f"{source} has no split {split!r}; " + (f"it has {some(sorted(offered))}" if offered else "it holds no split at all"))
    if len(found) > 1:
        raise UserError(f"{source}: {len(found)} of its arrays have a split {split!r}; say which, one of {some(sorted(offered))}")
    return found[0]


def _recoloured(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, -1)
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[..., None]  # as Pillow: ITU-R 601-2 luma


def _rescaled(pixels: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    scaled = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    return scaled[..., None] if scaled.ndim == 2 else scaled


def distinct(name: str, classes: Iterable[str]) -> None:
    """Refuses class names that a reader would take for one."""
    seen: dict[str, str] = {}
    for c in classes:
        key = unicodedata.normalize("NFC", c).strip()  # A and a may well be two classes
        if key in seen:
            how = "twice" if seen[key] == c else f"and as {seen[key]!r}"
            raise UserError(f"{name}: class {c!r} is there {how}; give every class one name of its own")
        seen[key] = c


def some(names: list[str]) -> str:
    """The first eight names, for a message."""
    return (", ".join(names[:8]) or "none") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
