"""Roman numerals for the fixed network of the 2021 Data-Centric AI competition: what every stage of refining makes of the training images.

    python benchmarks/refine.py --work DIR                            # some minutes on two cores, no GPU
    python benchmarks/refine_train.py --work DIR --device cuda        # then: the network on each set

Writes the 2,067 training images as class folders in their own proportions (stored: 64 pixels, padded, and the size they had), applies the
stages to all of them, alone and together, no stage being undone, and keeps what the network would see as DIR/sets.npz: uint8 32 x 32, the
whole image squeezed bilinearly without antialiasing. Of images kept as they were that is the very array the competition's script saw.
Nothing looks at val or at the label book, but for duplicates: these are counted, and told in DIR/found.json.

    raw        as handed out                       clean          duplicates, outsiders, other labels
    value      less what is probably wrong         value+clean    both
    augment    raw and new images                  all            value, clean, new images up to the budget
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from smidgen.backbones import PIXELS, open_backbone
from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Recipe
from smidgen.refine.folder import Copy, Source, read
from smidgen.refine.material import gather
from smidgen.refine.refine import SIZE
from smidgen.refine.stages import Stages
from smidgen.run import Run

SPLITS = ("train", "val", "label_book")
SETS = {
    "raw": (), "value": ("value",), "clean": ("clean",), "value+clean": ("value", "clean"), "augment": ("augment",),
    "all": ("value", "clean", "augment"),
}  # fmt: skip
SIDE = 32


def unpacked(data: Path, work: Path) -> dict[str, np.ndarray]:
    """The stored arrays; each split as class folders in DIR/SPLIT, drawn in the size and proportions the files had."""
    with np.load(data / "refine" / "roman" / "roman.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["size_wh"] = arrays["size_wh"].astype(int)  # times 64 does not fit into the stored int16
    for x, label, split, (w, h), name in zip(*(arrays[n] for n in ("x64", "label", "split", "size_wh", "name")), strict=True):
        folder = work / SPLITS[split] / str(arrays["classes"][label])
        folder.mkdir(parents=True, exist_ok=True)
        wide, high = (max(1, round(64 * side / max(w, h))) for side in (w, h))
        left, top = (64 - wide) // 2, (64 - high) // 2
        picture = Image.fromarray(x).crop((left, top, left + wide, top + high))
        picture.resize((int(w), int(h)), Image.Resampling.BICUBIC).save(folder / name)
    return arrays


def squeezed(image: Image.Image) -> np.ndarray:
    """As the competition's script reads an image."""
    x = torch.from_numpy(np.array(image.convert("L"), np.float32))[None, None]
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0].round().clamp(0, 255).byte().numpy()


def rows_of(source: Source, arrays: dict[str, np.ndarray]) -> list[int]:
    """Of every image of the training folders, its row in the arrays."""
    train = np.flatnonzero(arrays["split"] == 0)
    place = {f"{arrays['classes'][arrays['label'][i]]}/{arrays['name'][i]}": int(i) for i in train}
    return [place[name] for name in source.names]


def make_sets(options: argparse.Namespace) -> None:
    """sets.npz, and found.json."""
    started = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    arrays = unpacked(options.data, options.work)
    device, cache, recipe = torch.device(options.device), Cache(options.work / "cache"), Recipe(steps=options.steps)
    backbone = open_backbone(options.embed, device)
    with Run("refine", recipe, options.work / "run" / time.strftime("%H%M%S")) as run:
        source = read(options.work / "train", None, backbone.size or SIZE, run)
        material = gather(source, None, backbone, recipe.side, 0.2, cache, 32, 0)
        work = Stages(material, recipe, options.budget, 1, device, cache, run, 0)
        judges = work.judges()
        known = work.known(np.arange(len(source)), judges)
        rows = rows_of(source, arrays)
        sets = {}
        for name in options.sets or SETS:
            result = work.apply(SETS[name], known, judges)
            sets |= seen(name, result.images(), source, rows, arrays, run)
            run.say(f"{name}: {len(result.images())} images, {len(result.kept())} of them originals")
        leaks, known_by_heart = leaked(options.work, device, cache, run)
    unleaked = np.array([n not in known_by_heart for n in names(arrays, 1)])
    held = {split: arrays["x32"][arrays["split"] == i] for i, split in enumerate(SPLITS) if i}
    labels = {f"{split} y": arrays["label"][arrays["split"] == i].astype(int) for i, split in enumerate(SPLITS) if i}
    kept: dict[str, Any] = sets | {f"{s} x": x for s, x in held.items()} | labels | {"unleaked": unleaked}
    np.savez(options.work / "sets.npz", **kept)
    found = {"groups_in_train": len(material.twins.groups), **leaks, "share_wrong": round(known.share, 4)}
    found |= {"judges_right": round(float((known.guess == known.labels).mean()), 4), "seconds": round(time.monotonic() - started, 1)}
    (options.work / "found.json").write_text(json.dumps(found | {"known_by_heart": sorted(known_by_heart)}, indent=1) + "\n")
    print(json.dumps(found))


def names(arrays: dict[str, np.ndarray], split: int) -> list[str]:
    """class/file of a split's images."""
    return [f"{arrays['classes'][arrays['label'][i]]}/{arrays['name'][i]}" for i in np.flatnonzero(arrays["split"] == split)]


def seen(
    name: str, images: Sequence[Copy], source: Source, rows: Sequence[int], arrays: dict[str, np.ndarray], run: Run
) -> dict[str, np.ndarray]:
    """What the network sees of a set."""
    x = np.empty((len(images), SIDE, SIDE), np.uint8)
    for i, image in enumerate(run.track(images, f"drawing {name}", len(images))):
        if image.transform.steps:
            x[i] = squeezed(image.transform(source.original(image.row)))
        else:
            x[i] = arrays["x32"][rows[image.row]]
    order = {c: k for k, c in enumerate(arrays["classes"].tolist())}  # i, ii, iii, ...; folders are sorted by name
    y = np.array([order[source.classes[image.label]] for image in images])
    return {f"{name} x": x, f"{name} y": y}


def leaked(work: Path, device: torch.device, cache: Cache, run: Run) -> tuple[dict[str, int], set[str]]:
    """How many pictures two splits share, on either side; and which of val are in train. Pixels tell."""
    found, known_by_heart = {}, set()
    backbone = open_backbone(PIXELS, device)
    sources = {split: read(work / split, None, SIZE, run) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        material = gather(sources[one], sources[other], backbone, SIDE, 0.2, cache, 32, 0)
        found[f"{one}_images_in_{other}"] = len(material.twins.leaks)
        found[f"{other}_images_in_{one}"] = len(sources[other]) - len(material.held_y)
        if (one, other) == ("train", "val"):
            known_by_heart = set(material.twins.leaks.values())
    return found, known_by_heart


def main() -> None:
    """The sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--sets", nargs="*", choices=list(SETS))
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--embed", default="efficientnet-lite0")
    parser.add_argument("--steps", type=int, default=1000, help="of the judges")
    parser.add_argument("--device", default="cpu")
    make_sets(parser.parse_args())


if __name__ == "__main__":
    main()
