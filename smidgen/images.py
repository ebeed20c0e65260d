"""Labelled images of every job, read from where people keep them; nothing is written.

    photos/cat/1.jpg, photos/dog/a.png ...     a folder with a folder per class (png, jpg, jpeg, webp, bmp; other files are left alone)
    photos/train/cat/1.jpg ...                 the same, a folder per split, chosen by `split`
    list.csv                                   columns path,label and perhaps split; paths are relative to the file
    set.npz                                    images uint8 (n, height, width) or (n, height, width, 3), labels int (n,), class_names,
                                               and perhaps class_split* (a number per class) or split* (per image),
                                               and track (a number per image), the same for frames of one film

Numbers of a split array are named by the text array `<its name>_names`, else train, val, test (0, 1, 2). Where a file has several split
arrays, `vinyals:train` is `train` of class_split_vinyals.

Photos are turned as their camera says, cropped to the centred square and scaled; transparent ones lie on white. Without a size they must
all have the same one. Without channels they are grey (1) if all of them are, else colour (3).
"""

import csv
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from smidgen.arrays import SYNONYMS, NoSplit, distinct, read_arrays, some
from smidgen.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Images:
    """A set of labelled images, on the device where they are used; uint8 (height, width, channels) as stored."""

    name: str
    pixels: Integer[Tensor, "n height width channels"]
    labels: Int[Tensor, "n"]
    classes: tuple[str, ...]
    members: tuple[Int[Tensor, "_"], ...] = field(default=(), repr=False)
    "Indices of every class's images."
    paths: tuple[str, ...] = field(default=(), repr=False)
    "Where every image came from; none where they came from one file."
    skipped: tuple[str, ...] = field(default=(), repr=False)
    "Files that could not be read."
    groups: Int[Tensor, "n"] | None = field(default=None, repr=False)
    "A number per image, the same for images that belong together (frames of one film), or nothing."

    def __post_init__(self) -> None:
        if not self.members:
            order = torch.argsort(self.labels, stable=True)
            counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
            object.__setattr__(self, "members", tuple(order.split(counts)))

    def to(self, device: torch.device) -> "Images":
        """On another device."""
        groups = None if self.groups is None else self.groups.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), members=(), groups=groups)

    def of(self, classes: list[int]) -> "Images":
        """Some classes alone, relabelled in this order."""
        index = torch.cat([self.members[c] for c in classes])
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(self.members[c]) for c in classes]))
        paths = tuple(self.paths[i] for i in index.tolist()) if self.paths else ()
        names, groups = tuple(self.classes[c] for c in classes), None if self.groups is None else self.groups[index]
        return Images(self.name, self.pixels[index], labels.to(index.device), names, paths=paths, skipped=self.skipped, groups=groups)

    def floats(self, index: Int[Tensor, "*n"]) -> Float[Tensor, "*n channels height width"]:
        """Images as networks read them, in [0, 1]; of a negative index zeros."""
        x = self.pixels[index.clamp(min=0)].movedim(-1, -3).float() / 255
        return x * (index >= 0)[..., None, None, None]


def load(
    source: str | Path,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    least: int = 1,
) -> Images:
    """The images of a folder of class folders, a .npz or a .csv; see the module's description.

    `size` is the side of the square images; `least` is how many every class has to have; `skip_bad` leaves files out that cannot be read.
    """
    source = Path(source)
    if size is not None and size < 1:
        raise UserError(f"the size of images must be positive, got {size}")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 channel (grey) or 3 (colour), got {channels}")
    if source.suffix == ".npz" and source.is_file():
        pixels, labels, classes, groups = read_arrays(source, split, size, channels)
        name = f"{source}:{split}" if split else str(source)
        tracks = None if groups is None else torch.from_numpy(groups)
        images = Images(name, torch.from_numpy(pixels), torch.from_numpy(labels), tuple(classes), groups=tracks)
    else:
        images = _from_files(str(source), files(source, split), size, channels, skip_bad)
    for name, members in zip(images.classes, images.members, strict=True):
        if len(members) < least:
            count = {0: "no image", 1: "only 1 image"}.get(len(members), f"only {len(members)} images")
            raise UserError(
                f"{source}: class {name!r} has {count} that can be read, {least} or more are needed; add some or remove the class"
            )
    return images


def files(source: str | Path, split: str | None = None) -> dict[str, list[Path]]:
    """Class -> its image files, of a folder of class folders or a .csv; none of them is opened."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"no such image folder or file: {source}")
    if not source.is_dir() and source.suffix != ".csv":
        raise UserError(f"{source}: images come from a folder of class folders, a .npz or a .csv with the columns path,label")
    found = _class_folders(source, split) if source.is_dir() else _listed(source, split)
    distinct(str(source), found)
    return found


def unlabelled(
    source: str | Path,
    size: int | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    count: int | None = None,
    seed: int = 0,
) -> Images:
    """One image file, or all of a folder and the folders in it, or `count` of them; a single class without a name."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"no such image folder or file: {source}")
    paths = sorted(f for f in source.rglob("*") if _is_image(f)) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"{source}: no image in it (looked for {', '.join(sorted(SUFFIXES))})")
    if count is not None and count < len(paths):
        paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]]
    images = _from_files(str(source), {"": paths}, size, channels, skip_bad)
    if not len(images.labels):
        raise UserError(f"{source}: none of its {len(paths)} images can be read")
    return images


# --- files -----------------------------------------------------------------------------------------------------------


def _class_folders(source: Path, split: str | None) -> dict[str, list[Path]]:
    """Class -> image files."""
    root = source
    if split is not None:
        names = {SYNONYMS.get(f.name, f.name): f for f in _folders(source)}
        root = names.get(SYNONYMS.get(split, split), source)
        if root == source:
            raise NoSplit(f"{source} has no split {split!r}; its folders are {some(sorted(names))}")
    found = {f.name: sorted(i for i in f.iterdir() if _is_image(i)) for f in _folders(root)}
    if not found:
        raise UserError(f"{root}: no class folders in it; put the images of every class into a folder named after the class")
    deeper = [f.name for f in _folders(root) if not found[f.name] and any(_is_image(i) for c in _folders(f) for i in c.iterdir())]
    if deeper and split is None:
        raise UserError(f"{source}: holds folders of class folders; choose a split, one of {some(deeper)}")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise UserError(f"{root / empty[0]}: a class folder without images (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def _listed(source: Path, split: str | None) -> dict[str, list[Path]]:
    """Class -> image files of a CSV."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a CSV file in UTF-8 ({error})") from error
    if not rows or not {"path", "label"} <= rows[0].keys():
        raise UserError(f"{source}: needs a first line path,label and a line per image")
    if split is not None:
        if "split" not in rows[0]:
            raise NoSplit(f"{source} has no column split to choose {split!r} by")
        names = [SYNONYMS.get(row["split"] or "", row["split"] or "") for row in rows]
        if SYNONYMS.get(split, split) not in names:
            raise NoSplit(f"{source} has no split {split!r}; it has {some(sorted(set(names)))}")
        rows = [row for row, name in zip(rows, names, strict=True) if name == SYNONYMS.get(split, split)]
    found: dict[str, list[Path]] = {}
    for line, row in enumerate(rows, start=2):
        if not row["path"] or not row["label"]:
            raise UserError(f"{source}, image {line - 1}: no path or no label")
        found.setdefault(row["label"], []).append(source.parent / row["path"])
    return dict(sorted(found.items()))


def _from_files(name: str, found: dict[str, list[Path]], size: int | None, channels: int | None, skip_bad: bool) -> Images:
    distinct(name, found)
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    kept: list[str] = []
    skipped: list[str] = []
    for label, paths in enumerate(found.values()):
        for path in paths:
            try:
                arrays.append(read(path, size, channels))
            except UserError:
                if not skip_bad:
                    raise
                skipped.append(str(path))
                continue
            labels.append(label)
            kept.append(str(path))
    shapes = Counter(a.shape[:2] for a in arrays)
    if len(shapes) > 1:
        (h, w), other = (next(s for s in shapes if s == shape) for shape in list(shapes)[:2])
        raise UserError(
            f"{name}: images of different sizes, {w} x {h} and {other[1]} x {other[0]} among them; give a size to bring them to"
        )
    depth = max((a.shape[-1] for a in arrays), default=1)
    height, width = next(iter(shapes), (size or 1, size or 1))
    pixels = np.empty((len(arrays), height, width, depth), np.uint8)
    for i, array in enumerate(arrays):
        pixels[i] = array  # grey among colour: the same value in every channel
    return Images(
        name, torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.int64), tuple(found), paths=tuple(kept), skipped=tuple(skipped)
    )


def read(path: Path, size: int | None = None, channels: int | None = None) -> UInt8[np.ndarray, "height width channels"]:
    """One photo, upright; with a size a square one."""
    if not path.is_file():
        raise UserError(f"{path}: no such image file")
    try:
        with Image.open(path) as opened:
            if size is not None:
                opened.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a half, a quarter or an eighth where that is enough
            image = ImageOps.exif_transpose(opened)
            image = _grey_or_colour(image, channels)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:  # what its decoders raise
        reason = "damaged, or no image at all" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); repair or remove it, or leave such files out (--skip-bad)"
        ) from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _grey_or_colour(image: Image.Image, channels: int | None) -> Image.Image:
    """In mode L or RGB, of whatever it was."""
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scale
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise ValueError("more than 16 bits per pixel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        opaque = Image.alpha_composite(white, image).convert("RGB")
        image = opaque.convert("L") if _is_grey(opaque) else opaque
    elif image.mode == "P":
        image = image.convert("RGB")
        image = image.convert("L") if _is_grey(image) else image
    grey = channels == 1 if channels is not None else image.mode in ("1", "L", "LA")
    return image.convert("L" if grey else "RGB")


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (np.asarray(channel) for channel in image.split())
    return bool((red == green).all() and (green == blue).all())


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
