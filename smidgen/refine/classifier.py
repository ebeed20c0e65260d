"""The one small network of `smidgen refine`: out-of-fold it judges images and transforms, trained anew it proves stages.

A Conv-4 (networks.py) over the whole image at 32 x 32 and a linear layer; AdamW, cosine, always as many updates, so that more images cost
no more and win nothing by being seen more often. What a network says of images it learnt is worthless here: of k networks, each learns
without one fold and speaks of that fold alone; of images no network has seen, all speak.

The judge sees its images slightly moved while it learns, else it could not tell a moved image from one of another class; the
network of the proof does not, for what new images are worth is what is to be measured.
"""

import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from smidgen.fit import FitConfig, fit, shuffled
from smidgen.networks import Conv4
from smidgen.refine.cache import Cache
from smidgen.run import Run

EVALUATED = 512  # images at once
TURN, SIZE, SHEAR, SHIFT = 12.0, 0.15, 0.15, 0.1  # degrees and shares by which the judge's images are moved, at most
LIGHT, CONTRAST = 0.1, 0.2  # and shares by which they are made brighter and starker, or the other way round


@dataclass(frozen=True)
class Recipe:
    """How the network is trained."""

    side: int = 32
    "Of the images it sees."
    width: int = 32
    "Filters of every layer."
    steps: int = 1000
    "Updates."
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2


class Small(nn.Module):
    """Conv-4 and a linear layer."""

    def __init__(self, channels: int, classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.body = Conv4(channels, recipe.width)
        self.head = nn.Linear(recipe.width * (recipe.side // 16) ** 2, classes)

    def features(self, x: Float[Tensor, "n channels side side"]) -> Float[Tensor, "n width"]:
        """What the linear layer reads, of images in [0, 1]."""
        return self.body(2 * x - 1).flatten(1)

    def forward(self, x: Float[Tensor, "n channels side side"]) -> Float[Tensor, "n classes"]:
        """Logits of images in [0, 1]."""
        return self.head(self.features(x))

    @torch.no_grad()
    def probabilities(self, x: UInt8[Tensor, "n channels side side"]) -> Float[Tensor, "n classes"]:
        """Of every class, on the processor."""
        return torch.cat([x.new_zeros(0, self.head.out_features).float().cpu(), *(self(part).softmax(-1).cpu() for part in self.parts(x))])

    @torch.no_grad()
    def embedded(self, x: UInt8[Tensor, "n channels side side"]) -> Float[Tensor, "n width"]:
        """Features, on the processor."""
        return torch.cat([x.new_zeros(0, self.head.in_features).float().cpu(), *(self.features(part).cpu() for part in self.parts(x))])

    def parts(self, x: UInt8[Tensor, "n channels side side"]) -> Iterator[Float[Tensor, "m channels side side"]]:
        """A few hundred images at a time, in [0, 1], where the network is."""
        return (part.to(self.head.weight.device).float() / 255 for part in x.split(EVALUATED) if len(part))


def train(
    x: UInt8[Tensor, "n channels side side"],
    y: Int[Tensor, "n"],
    classes: int,
    recipe: Recipe,
    run: Run,
    seed: int,
    moving: bool = False,
) -> Small:
    """A network from scratch, in evaluation mode; `run` hears of the training, see `unheard`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small(x.shape[1], classes, recipe).to(x.device)

    def loss(network: nn.Module, index: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        images = x[index].float() / 255
        return F.cross_entropy(network(moved(images) if moving else images), y[index])

    config = FitConfig(
        steps=recipe.steps, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, precision="float32", seed=seed
    )
    fit(model.train(), loss, shuffled(torch.arange(len(y)), min(recipe.batch, len(y)), seed), config, run)
    return model.eval()


def moved(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Each image turned, sheared, scaled and shifted a little, in another light; the border goes on beyond the edge."""
    turn, scale_x, scale_y, shear, dx, dy, light, contrast = (torch.rand(8, len(x), device=x.device) * 2 - 1).unbind()
    angle = turn * TURN * torch.pi / 180
    cos, sin = angle.cos(), angle.sin()
    rows = (cos / (1 + SIZE * scale_x), SHEAR * shear - sin, 2 * SHIFT * dx), (sin, cos / (1 + SIZE * scale_y), 2 * SHIFT * dy)
    theta = torch.stack([torch.stack(row, -1) for row in rows], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x, middle = F.grid_sample(x, grid, padding_mode="border", align_corners=False), x.mean((1, 2, 3), keepdim=True)
    light, contrast = LIGHT * light[:, None, None, None], 1 + CONTRAST * contrast[:, None, None, None]
    return ((x - middle) * contrast + middle + light).clamp(0, 1)


@dataclass(frozen=True)
class Judge:
    """Networks of k folds; images come and answers go by the processor's memory."""

    models: tuple[Small, ...] = field(repr=False)
    fold: Int[Tensor, "n"] = field(repr=False)
    "Of every image of the source, the network that saw neither it nor a duplicate; -1: none saw it."

    def probabilities(self, x: UInt8[Tensor, "m channels side side"], rows: Sequence[int]) -> Float[Tensor, "m classes"]:
        """Of images made from these rows of the source, by networks that did not see them."""
        fold = self.fold[torch.tensor(rows, dtype=torch.int64)]
        unseen = (fold < 0).nonzero()[:, 0]
        out = torch.zeros(len(x), self.models[0].head.out_features)
        for f, model in enumerate(self.models):
            mine = (fold == f).nonzero()[:, 0]
            out[mine] = model.probabilities(x[mine])
            out[unseen] += model.probabilities(x[unseen]) / len(self.models)
        return out

    def features(self, x: UInt8[Tensor, "m channels side side"]) -> Float[Tensor, "m width"]:
        """Of the first network: places of different networks cannot be compared."""
        return self.models[0].embedded(x)


def judge(
    x: UInt8[Tensor, "n channels side side"],
    y: Int[Tensor, "n"],
    fold: Int[Tensor, "n"],
    classes: int,
    recipe: Recipe,
    run: Run,
    cache: Cache,
    seed: int = 0,
) -> Judge:
    """Trains a network per fold; images of fold -1 are left out of all."""
    models = []
    count = int(fold.max()) + 1
    for f in run.track(range(count), "judging networks", count):
        rows = ((fold >= 0) & (fold != f)).nonzero()[:, 0]
        models.append(trained(x[rows], y[rows], classes, recipe, cache, seed * 1_000 + f, moving=True))
    return Judge(tuple(models), fold.cpu())


def trained(
    x: UInt8[Tensor, "n channels side side"],
    y: Int[Tensor, "n"],
    classes: int,
    recipe: Recipe,
    cache: Cache,
    seed: int,
    moving: bool = False,
) -> Small:
    """`train`, or the network it made of the same before."""

    def make() -> dict[str, Tensor]:
        with unheard(recipe) as run:
            return train(x, y, classes, recipe, run, seed, moving).state_dict()

    model = Small(x.shape[1], classes, recipe)
    model.load_state_dict(cache.kept("network", (x, y, repr(recipe), str(seed), str(moving)), make))
    return model.to(x.device).eval()


@contextmanager
def unheard(recipe: Recipe) -> Iterator[Run]:
    """A run nobody reads; Ctrl-C stops its trainings at once, for they are short and begun again."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler
    with tempfile.TemporaryDirectory() as scratch, Run("refine", recipe, Path(scratch) / "run") as run:
        run.console.quiet = True
        if ours:
            signal.signal(signal.SIGINT, stop)  # `fit` would finish a step and write a checkpoint
        try:
            yield run
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)
