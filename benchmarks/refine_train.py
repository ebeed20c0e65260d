"""The fixed network of the 2021 Data-Centric AI competition, trained on the sets that refine.py made: is refined data better data?

    python benchmarks/refine_train.py --work DIR --device cuda                                  # every set, five seeds
    python benchmarks/refine_train.py --work DIR --device cuda --sets all --seeds 3             # a network
    python benchmarks/refine_train.py --work DIR --sets raw all --seeds 0 --epochs 5            # a proxy for two cores

The fixed protocol: Keras's ResNet50 without weights up to conv2_block3_out, global average, 10 classes; Adam 1e-4, batch 8, 100
epochs; the epoch that is best on val is the one kept, for every set alike, so accuracy on val is a little too good for all; that of the
last epoch is beside it. A row per set and seed goes to benchmarks/results/refine.csv, at the end of its training.

    val            all 813 images            val_unleaked   those whose picture is not in train
    label_book     the 52 of the organisers  ..._last       after the last epoch

A twin, not Keras: other random numbers; an epoch leaves out what does not fill a batch. On a GPU the step is one recorded graph, for it is
some hundred kernels of microseconds; --eager does without.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rows as table
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "refine.csv"
MEASURED = ("val", "val_unleaked", "label_book")
COLUMNS = [
    "set", "seed", "images", *MEASURED, *(f"{name}_last" for name in MEASURED), "epoch", "epochs", "batch", "seconds",
    "commit", "machine", "date",
]  # fmt: skip
MEAN = (103.939, 116.779, 123.68)  # blue, green, red
HELD = ("val", "label_book")


def convolution(a: int, b: int, size: int = 1, padding: int = 0, stride: int = 1) -> nn.Sequential:
    """With bias and batch norm, as Keras has them."""
    layer = nn.Conv2d(a, b, size, stride, padding)
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
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

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])  # a graph may not copy it from the processor at every step
        self.stem = nn.Sequential(convolution(3, 64, 7, 3, 2), nn.ReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))
        self.blocks = nn.Sequential(Bottleneck(64), Bottleneck(256), Bottleneck(256))
        self.head = nn.Linear(256, 10)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Grey levels (n, 32, 32), 0 .. 255 -> logits."""
        return self.head(self.blocks(self.stem(x[:, None].float() - self.mean)).mean((2, 3)))


class Training:
    """A network and its optimiser on one set."""

    def __init__(self, x: Tensor, y: Tensor, seed: int, batch: int, rate: float, eager: bool) -> None:
        self.x, self.y = x, y
        torch.manual_seed(seed)
        self.model = Fixed().to(x.device)
        gpu = x.device.type == "cuda"
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate, eps=1e-7, capturable=gpu, foreach=gpu)
        self.order = torch.Generator().manual_seed(seed)
        self.index = torch.zeros(batch, dtype=torch.int64, device=x.device)
        self.step = self.recorded() if gpu and not eager else self.update

    def update(self) -> None:
        """One step on the images of `index`."""
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.x[self.index]), self.y[self.index]).backward()
        self.optimizer.step()

    def recorded(self) -> Callable[[], None]:
        """`update` as a CUDA graph; what warming up changed is put back."""
        begun = {name: value.clone() for name, value in self.model.state_dict().items()}
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.update()
        here.wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own memory is to hold the gradients
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        self.model.load_state_dict(begun)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        return graph.replay

    def epoch(self) -> None:
        """Every image once, but for what does not fill a batch."""
        self.model.train()
        size = len(self.index)
        order = torch.randperm(len(self.x), generator=self.order)[: len(self.x) // size * size]
        for part in order.to(self.x.device).split(size):
            self.index.copy_(part)
            self.step()

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images the network is right about."""
        self.model.eval()
        return torch.cat([self.model(part).argmax(1) for part in x.split(512)]) == y


def trained(name: str, seed: int, arrays: dict[str, Tensor], options: argparse.Namespace) -> dict:
    """The fixed protocol on one set."""
    started = time.monotonic()
    training = Training(arrays[f"{name} x"], arrays[f"{name} y"], seed, options.batch, options.rate, options.eager)
    best: dict = {"val": -1.0}
    now: dict = {}
    for epoch in range(1, options.epochs + 1):
        training.epoch()
        val, book = (training.right(arrays[f"{held} x"], arrays[f"{held} y"]) for held in HELD)
        shares = (accuracy(right) for right in (val, val[arrays["unleaked"]], book))
        now = dict(zip(MEASURED, shares, strict=True))
        best = now | {"epoch": epoch} if now["val"] > best["val"] else best
        if epoch % 10 == 0 or epoch == options.epochs:
            print(f"{name} seed {seed} epoch {epoch}: val {now['val']:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    last = {f"{measured}_last": now[measured] for measured in MEASURED}
    size = {"set": name, "seed": seed, "images": len(training.x), "epochs": options.epochs, "batch": options.batch}
    return best | last | size | {"seconds": round(time.monotonic() - started, 1)}


def accuracy(right: Tensor) -> float:
    """Share of them."""
    return round(float(right.float().mean()), 4)


def main() -> None:
    """A row per set and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with sets.npz")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sets", nargs="*", help="all, if not given")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="no recorded graph on a GPU")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    with np.load(options.work / "sets.npz") as file:
        there = [key.removesuffix(" x") for key in file.files if key.endswith(" x") and key.removesuffix(" x") not in HELD]
        wanted = options.sets or there
        if unknown := set(wanted) - set(there):
            parser.error(f"{options.work / 'sets.npz'}: no set {sorted(unknown)}; there are {', '.join(there)}")
        names = [*(f"{name} {part}" for name in (*wanted, *HELD) for part in "xy"), "unleaked"]
        arrays = {name: torch.from_numpy(file[name]).to(options.device) for name in names}
    for seed in options.seeds:
        for name in wanted:
            row = trained(name, seed, arrays, options) | table.provenance()
            table.append(options.results, COLUMNS, [row])
            print(
                f"{name:<12} seed {seed}  val {row['val']:.4f} (last {row['val_last']:.4f})  label book {row['label_book']:.4f}", flush=True
            )


if __name__ == "__main__":
    main()
