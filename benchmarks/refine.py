"""Roman numerals with the fixed network of the 2021 Data-Centric AI competition: what refining is worth, stage by stage.

    python benchmarks/refine.py sets --work DIR                       # the sets: some minutes on two cores, no GPU
    python benchmarks/refine.py train --work DIR --device cuda        # the fixed network on each, all seeds side by side
    python benchmarks/refine.py train --work DIR --sets raw all --seeds 0 --epochs 20 --batch 32      # a proxy for two cores

`sets` writes the 2,067 training images as class folders in their own proportions (stored: 64 pixels, padded, and the size they had),
applies the stages to all of them, alone and together, no stage being undone, and keeps what the network would see as DIR/sets.npz: uint8
32 x 32, the whole image squeezed bilinearly without antialiasing. Of images kept as they were that is the very array the competition's
script saw. Nothing looks at val or at the label book, but for duplicates: these are counted and reported.

    raw        as handed out                       clean          duplicates, outsiders, other labels
    value      less what is probably wrong         value+clean    both
    augment    raw and new images                  all            value, clean, new images up to the budget

`train` is the fixed protocol (notes 2): Keras's ResNet50 without weights up to conv2_block3_out, global average, 10 classes; Adam 1e-4,
batch 8, 100 epochs; the epoch that is best on val is the one kept, for every set alike, so accuracy on val is a little too good for all;
that of the last epoch is beside it. A row per set and seed goes to benchmarks/results/refine.csv. A twin, not Keras: other random numbers;
an epoch leaves out what does not fill a batch.
"""

import argparse
import csv
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from smidgen.backbones import PIXELS, open_backbone
from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Recipe
from smidgen.refine.folder import Copy, Source, read
from smidgen.refine.material import gather
from smidgen.refine.refine import SIZE
from smidgen.refine.stages import Stages
from smidgen.run import Run

RESULTS = Path(__file__).parent / "results" / "refine.csv"
COLUMNS = [
    "set", "seed", "images", "val", "val_unleaked", "label_book", "val_last", "val_unleaked_last", "label_book_last", "epoch", "epochs",
    "batch", "seconds", "commit", "machine", "date",
]  # fmt: skip
SPLITS = ("train", "val", "label_book")
SETS = {
    "raw": (), "value": ("value",), "clean": ("clean",), "value+clean": ("value", "clean"), "augment": ("augment",),
    "all": ("value", "clean", "augment"),
}  # fmt: skip
MEAN = (103.939, 116.779, 123.68)  # blue, green, red
SIDE = 32


# --- sets ------------------------------------------------------------------------------------------------------------


def unpacked(data: Path, work: Path) -> dict[str, np.ndarray]:
    """The stored arrays; each split as class folders in DIR/SPLIT, drawn in the size and proportions the files had."""
    with np.load(data / "refine" / "roman" / "roman.npz") as file:
        arrays = {name: file[name] for name in file.files}
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
    unleaked = np.array([f"val/{n}" not in known_by_heart for n in names(arrays, 1)])
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
    """How many pictures of train are in val or in the label book, too; and which of these. Pixels tell."""
    found, known_by_heart = {}, set()
    backbone = open_backbone(PIXELS, device)
    source = read(work / "train", None, SIZE, run)
    for split in SPLITS[1:]:
        held = read(work / split, None, SIZE, run)
        material = gather(source, held, backbone, SIDE, 0.2, cache, 32, 0)
        found[f"train_images_in_{split}"] = len(material.twins.leaks)
        found[f"{split}_images_in_train"] = len(held) - len(material.held_y)
        known_by_heart |= {f"{split}/{name}" for name in material.twins.leaks.values()}
    return found, known_by_heart


# --- the fixed network -----------------------------------------------------------------------------------------------


def convolution(a: int, b: int, size: int = 1, padding: int = 0, stride: int = 1) -> nn.Sequential:
    """With bias and batch norm, as Keras has them."""
    layer = nn.Conv2d(a, b, size, stride, padding)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)  # pyright: ignore  there is one
    return nn.Sequential(layer, nn.BatchNorm2d(b, eps=1.001e-5, momentum=0.01))


class Bottleneck(nn.Module):
    """conv2_block1 .. 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shortcut = convolution(channels, 256) if channels != 256 else nn.Identity()
        self.body = nn.Sequential(convolution(channels, 64), nn.ReLU(), convolution(64, 64, 3, 1), nn.ReLU(), convolution(64, 256))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, 8, 8) -> (n, 256, 8, 8)"""
        return F.relu(self.shortcut(x) + self.body(x))


class Fixed(nn.Module):
    """The competition's network; 232,330 numbers, 2,944 of them batch norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 64, 7, 3, 2), nn.ReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))
        self.blocks = nn.Sequential(Bottleneck(64), Bottleneck(256), Bottleneck(256))
        self.head = nn.Linear(256, 10)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Grey levels (n, 32, 32), 0 .. 255 -> logits."""
        x = x[:, None].float() - x.new_tensor(MEAN, dtype=torch.float32)[:, None, None]
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Training:
    """Networks of several seeds on one set, a step of each at a time; on a GPU the steps are one recorded graph."""

    def __init__(self, x: Tensor, y: Tensor, seeds: Sequence[int], batch: int, rate: float, eager: bool) -> None:
        self.x, self.y, self.device = x, y, x.device
        self.models, self.optimizers = [], []
        for seed in seeds:
            torch.manual_seed(seed)
            self.models.append(Fixed().to(self.device))
            gpu = self.device.type == "cuda"
            self.optimizers.append(torch.optim.Adam(self.models[-1].parameters(), rate, eps=1e-7, capturable=gpu, foreach=gpu))
        self.orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.index = torch.zeros(len(seeds), batch, dtype=torch.int64, device=self.device)
        self.replay = self.step if eager or self.device.type != "cuda" else self.recorded()

    def step(self) -> None:
        """One update of every network on its batch."""
        for model, optimizer, index in zip(self.models, self.optimizers, self.index, strict=True):
            self.update(model, optimizer, index)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, index: Tensor) -> None:
        """One update."""
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(self.x[index]), self.y[index]).backward()
        optimizer.step()

    def recorded(self) -> Callable[[], None]:
        """`step` as a CUDA graph with a branch per network; what warming up changed is put back."""
        states = [{k: v.clone() for k, v in model.state_dict().items()} for model in self.models]
        here = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        here.wait_stream(side)
        graph, branches = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in self.models]
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            for branch, model, optimizer, index in zip(branches, self.models, self.optimizers, self.index, strict=True):
                branch.wait_stream(main)
                with torch.cuda.stream(branch):
                    self.update(model, optimizer, index)
            for branch in branches:
                main.wait_stream(branch)
        for model, state, optimizer in zip(self.models, states, self.optimizers, strict=True):
            model.load_state_dict(state)
            for held in optimizer.state.values():
                for value in held.values():
                    value.zero_()
        return graph.replay

    def epoch(self) -> None:
        """Every image once, but for what does not fill a batch."""
        count, size = len(self.x), self.index.shape[1]
        orders = torch.stack([torch.randperm(count, generator=g) for g in self.orders]).to(self.device)
        for model in self.models:
            model.train()
        for rows in orders[:, : count // size * size].split(size, 1):
            self.index.copy_(rows)
            self.replay()

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of every network, which images it is right about."""
        return [torch.cat([model.eval()(part).argmax(1) for part in x.split(512)]) == y for model in self.models]


def train(options: argparse.Namespace) -> None:
    """A row per set and seed."""
    with np.load(options.work / "sets.npz") as file:
        arrays = {name: torch.from_numpy(file[name]).to(options.device) for name in file.files}
    for name in options.sets or [key.removesuffix(" x") for key in arrays if key.endswith(" x") and key[:-2] not in SPLITS]:
        for row in rows(name, arrays, options):
            record(row, options)


def rows(name: str, arrays: dict[str, Tensor], options: argparse.Namespace) -> Iterator[dict]:
    """The fixed protocol on one set."""
    started = time.monotonic()
    training = Training(arrays[f"{name} x"], arrays[f"{name} y"], options.seeds, options.batch, options.rate, options.eager)
    best: list[dict] = [{"val": -1.0} for _ in options.seeds]
    last: list[dict] = []
    for epoch in range(1, options.epochs + 1):
        training.epoch()
        val = training.right(arrays["val x"], arrays["val y"])
        book = training.right(arrays["label_book x"], arrays["label_book y"])
        last = [
            {"val": mean(v), "val_unleaked": mean(v[arrays["unleaked"]]), "label_book": mean(b), "epoch": epoch}
            for v, b in zip(val, book, strict=True)
        ]
        best = [now if now["val"] > then["val"] else then for now, then in zip(last, best, strict=True)]
    seconds = (time.monotonic() - started) / len(options.seeds)
    for seed, chosen, end in zip(options.seeds, best, last, strict=True):
        yield chosen | {
            "set": name,
            "seed": seed,
            "images": len(arrays[f"{name} x"]),
            **{f"{key}_last": end[key] for key in ("val", "val_unleaked", "label_book")},
            "seconds": round(seconds, 1),
        }


def mean(right: Tensor) -> float:
    """Accuracy."""
    return round(float(right.float().mean()), 4)


def record(row: dict, options: argparse.Namespace) -> None:
    """Adds a row to the results."""
    row |= {"epochs": options.epochs, "batch": options.batch, "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    row["machine"] = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    new = not options.results.exists()
    with options.results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(
        f"{row['set']:<12} seed {row['seed']}  val {row['val']:.4f} (last {row['val_last']:.4f})  label book {row['label_book']:.4f}",
        flush=True,
    )


def commit() -> str:
    """Of the code that made a row."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()


def main() -> None:
    """Sets, or trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=["sets", "train"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sets", nargs="*", choices=list(SETS))
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--embed", default="efficientnet-lite0")
    parser.add_argument("--steps", type=int, default=1000, help="of the judges")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="step by step on a GPU, too")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    make_sets(options) if options.piece == "sets" else train(options)


if __name__ == "__main__":
    main()
