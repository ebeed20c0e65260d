"""What `smidgen refine` reads and writes; the source is only ever read.

    NEWDIR/CLASS/a.png        a kept original, the file as it was (of a .npz: a png)
    NEWDIR/CLASS/a~1.png      a new image made of it
    NEWDIR/findings.csv       a line per original: path, verdict, label, proposed, reason, and its scores
    NEWDIR/augmented.csv      a line per new image: path, source, label, transform, seed; enough to make it again

Networks see an image whole, squeezed into a square: what they must judge may lie at the border. Transforms are tried on small copies with
the image's own proportions, and done again on the original when the folder is written.
"""

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from smidgen.errors import UserError
from smidgen.images import Images, files, load
from smidgen.images import read as read_image
from smidgen.refine.operators import Transform
from smidgen.run import PARTIAL, Run

SMALL = 128  # longer side of small copies
LEAST = 5  # images of a class, below which nothing can be said of it
FINDINGS, AUGMENTED, PICTURES = "findings.csv", "augmented.csv", "decisions.json"
KNOWN = {
    "config.yaml",
    "environment.json",
    "steps.jsonl",
    "metrics.json",
    "log.txt",
    "report.html",
    "review.jsonl",
    PICTURES,
    FINDINGS,
    AUGMENTED,
}
LOSSY, QUALITY = {".jpg", ".jpeg", ".webp"}, 95  # of new images; others become png

Verdict = Literal["keep", "relabel", "drop", "duplicate", "outlier"]


@dataclass(frozen=True)
class Finding:
    """What was decided about an image."""

    path: str
    verdict: Verdict
    label: str
    "The class given."
    proposed: str
    "The class it seems to be of."
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)
    "Each in [0, 1], low is suspicious."


@dataclass(frozen=True)
class Copy:
    """A new image: a transform of an original."""

    row: int
    "Of the original in its source."
    label: int
    transform: Transform


@dataclass(frozen=True)
class View:
    """What networks see of images, originals or transformed: all of it, squeezed into a square."""

    small: tuple[Image.Image, ...] = field(repr=False)
    "Of the source."
    channels: int
    side: int

    def __call__(self, copies: Sequence[Copy]) -> UInt8[Tensor, "n channels side side"]:
        """Their pixels."""
        out = np.empty((len(copies), self.side, self.side, self.channels), np.uint8)
        for i, copy in enumerate(copies):
            out[i] = pixels(copy.transform(self.small[copy.row]).resize((self.side, self.side)), self.channels)
        return torch.from_numpy(out).movedim(-1, 1)


def untouched(rows: Sequence[int], labels: Sequence[int]) -> list[Copy]:
    """Originals as they are."""
    return [Copy(row, label, Transform(())) for row, label in zip(rows, labels, strict=True)]


@dataclass(frozen=True)
class Source:
    """The images given, whatever they were stored in."""

    images: Images
    "Whole, squeezed into squares."
    small: tuple[Image.Image, ...] = field(repr=False)
    "At most SMALL pixels long, in their own proportions."
    names: tuple[str, ...] = field(repr=False)
    "Path within the source, or the row of an array."
    paths: tuple[Path, ...] = field(default=(), repr=False)
    "None of a .npz."
    stored: Images | None = field(default=None, repr=False)
    "Of a .npz."
    unreadable: tuple[Finding, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names."""
        return self.images.classes

    @cached_property
    def labels(self) -> np.ndarray:
        """Given, of every image."""
        return self.images.labels.numpy()

    def __len__(self) -> int:
        return len(self.names)

    def original(self, row: int) -> Image.Image:
        """An image in its full size, grey or colour."""
        return picture(read_image(self.paths[row]) if self.stored is None else self.stored.pixels[row].numpy())


def picture(pixels: np.ndarray) -> Image.Image:
    """(height, width, 1 or 3) -> an image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def read(source: str | Path, split: str | None, size: int, run: Run) -> Source:
    """Images of class folders, a .csv or a .npz; a file that cannot be read becomes a finding."""
    source = Path(source)
    if source.suffix == ".npz" and source.is_file():
        stored = load(source, split)
        names = tuple(f"{source.name}[{i}]" for i in range(len(stored.labels)))
        return gathered(
            str(source), [shrunk(picture(p), size) for p in stored.pixels.numpy()], stored.labels, stored.classes, names, stored=stored
        )
    found = files(source, split)
    root = source if source.is_dir() else source.parent
    listed = [(label, path) for label, of_class in enumerate(found.values()) for path in of_class]
    pairs, labels, paths, unreadable = [], [], [], []
    for label, path in run.track(listed, "reading", max(1, len(listed))):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        try:
            pairs.append(shrunk(picture(read_image(path)), size))
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
            unreadable.append(Finding(name, "drop", list(found)[label], "", reason))
            continue
        labels.append(label)
        paths.append((name, path))
    names = tuple(name for name, _ in paths)
    kept = tuple(path for _, path in paths)
    return gathered(str(source), pairs, torch.tensor(labels, dtype=torch.int64), tuple(found), names, kept, unreadable=tuple(unreadable))


def shrunk(image: Image.Image, size: int) -> tuple[Image.Image, Image.Image]:
    """A square of it, and a small copy."""
    scale = min(1.0, SMALL / max(image.size))
    small = image if scale == 1 else image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    return image.resize((size, size)), small


def gathered(
    name: str,
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    labels: torch.Tensor,
    classes: tuple[str, ...],
    names: tuple[str, ...],
    paths: tuple[Path, ...] = (),
    stored: Images | None = None,
    unreadable: tuple[Finding, ...] = (),
) -> Source:
    """A checked source."""
    check_classes(name, labels, classes)
    channels = 1 if all(small.mode == "L" for _, small in pairs) else 3
    squares = torch.from_numpy(np.stack([pixels(square, channels) for square, _ in pairs]))
    return Source(Images(name, squares, labels, classes), tuple(small for _, small in pairs), names, paths, stored, unreadable)


def pixels(image: Image.Image, channels: int) -> UInt8[np.ndarray, "height width channels"]:
    """As arrays have it, in grey or in colour."""
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[..., None] if channels == 1 else array


def check_classes(name: str, labels: torch.Tensor, classes: tuple[str, ...]) -> None:
    """Refuses sets that cannot be judged, and names that cannot be folders."""
    if len(classes) == 1:
        raise UserError(f"{name}: holds one class, {classes[-1]!r}; labels can be judged only against another one, add it")
    for label, count in zip(classes, torch.bincount(labels, minlength=len(classes)).tolist(), strict=True):
        if count < LEAST:
            raise UserError(
                f"{name}: class {label!r} has {count} images that can be read, {LEAST} or more are needed; add some or remove it"
            )
        if label != label.strip() or set(label) & set("/\\\0") or label.startswith(".") or label.endswith(PARTIAL) or label in KNOWN:
            raise UserError(f"{name}: class {label!r} cannot be the name of a folder in the output; rename it")


def check_output(source: Path, output: Path) -> None:
    """Refuses an output that would change the source."""
    a, b = source.resolve(), output.resolve()
    if a == b or (a.is_dir() and b.is_relative_to(a)) or a.is_relative_to(b):
        raise UserError(f"--output {output}: lies within {source} or around it, which must stay as it is; choose a folder beside it")


# --- written ---------------------------------------------------------------------------------------------------------


def write_images(source: Source, kept: Mapping[int, int], copies: Sequence[Copy], run: Run) -> None:
    """Class folders in the run's folder; `kept` is row -> class. All of them appear at the end, or none."""
    partial = run.partial("images")
    taken: list[set[str]] = [set() for _ in source.classes]
    for label in source.classes:
        (partial / label).mkdir()
    for row, label in kept.items():
        stem, suffix = file_name(source, row)
        target = partial / source.classes[label] / unused(stem, suffix, taken[label])
        if source.stored is None:
            shutil.copyfile(source.paths[row], target)
        else:
            source.original(row).save(target)
    lines = []
    for copy in run.track(sorted(copies, key=lambda c: c.row), "writing new images", max(1, len(copies))):
        stem, suffix = file_name(source, copy.row)
        suffix = suffix if suffix.lower() in LOSSY else ".png"
        name = unused(f"{stem}~1", suffix, taken[copy.label])
        label = source.classes[copy.label]
        copy.transform(source.original(copy.row)).save(partial / label / name, quality=QUALITY)
        lines.append([f"{label}/{name}", source.names[copy.row], label, str(copy.transform), copy.transform.seed])
    write_csv(run.folder / AUGMENTED, ["path", "source", "label", "transform", "seed"], lines)
    for label in source.classes:
        shutil.rmtree(run.folder / label, ignore_errors=True)
        (partial / label).rename(run.folder / label)
    partial.rmdir()


def file_name(source: Source, row: int) -> tuple[str, str]:
    """Stem and suffix of what an original is called in the output."""
    return (source.paths[row].stem, source.paths[row].suffix) if source.stored is None else (f"{row:06d}", ".png")


def unused(stem: str, suffix: str, taken: set[str]) -> str:
    """A name no other file of the class has, on any file system: a.png, a~2.png, ...; adds it to those taken."""
    before, tilde, after = stem.rpartition("~")
    base, number = (before, int(after)) if tilde and after.isdecimal() else (stem, 1)
    name = f"{stem}{suffix}"
    while name.casefold() in taken:
        number += 1
        name = f"{base}~{number}{suffix}"
    taken.add(name.casefold())
    return name


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """findings.csv, the most suspicious first."""
    columns = list(dict.fromkeys(name for finding in findings for name in finding.scores))
    rows = [
        [f.path, f.verdict, f.label, f.proposed, f.reason, *(f"{f.scores[c]:.6f}" if c in f.scores else "" for c in columns)]
        for f in findings
    ]
    write_csv(path, ["path", "verdict", "label", "proposed", "reason", *columns], rows)


def write_csv(path: Path, head: list[str], rows: Sequence[Sequence[object]]) -> None:
    """Complete or not there."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    partial.replace(path)
