"""Table frozen of fewshot.py: heads over the features of a network that was trained on ImageNet."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from fewshot_trainings import AT_ONCE, BALANCES, SIGMAS, Trained, data, fitted, halving, measured, some
from torch import nn

from smidgen.backbones import open_backbone
from smidgen.fewshot.episodes import Episode, Sampler
from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation
from smidgen.fewshot.methods.prototypes import ProtoNet, choose
from smidgen.fewshot.methods.simpleshot import SimpleShot, unit
from smidgen.fewshot.methods.tpn import TPN, FlatGraph
from smidgen.fewshot.predict import classify
from smidgen.images import Images

HEADS = [
    "prototypes", "simpleshot", "label-propagation", "label-propagation rebalanced", "tpn head",
    "tpn head, 5 neighbours", "predict simpleshot", "predict label-propagation",
]  # fmt: skip


class Stored(nn.Module):
    """A backbone over features made once: an image is its own number, as `numbered` draws them."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1) -> (n, width)"""
        return self.get_buffer("features")[(x.flatten(1)[..., 0] * 255).round().long()]


def numbered(sets: Sequence[Images]) -> list[Images]:
    """The same labels, every image a single pixel that says which one it is, counted through all sets."""
    firsts = [sum(len(images.labels) for images in sets[:i]) for i in range(len(sets))]
    return [
        replace(images, pixels=(first + torch.arange(len(images.labels), device=images.labels.device)).view(-1, 1, 1, 1), paths=())
        for first, images in zip(firsts, sets, strict=True)
    ]


def frozen(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Heads over a network that was trained on ImageNet, whose classes include many of these."""
    backbone = open_backbone("efficientnet-lite0", options.device)
    asked = options.methods or HEADS
    asked = [name for name in asked if name.startswith("tpn head") or seed == options.seeds[0]]  # the others have nothing drawn in them

    def features(images: Images) -> torch.Tensor:
        return backbone.features(images, 64, options.cache).to(options.device)

    train_set, validation_set = data(options, "cifar_fs", "train"), data(options, "cifar_fs", "val")
    raw = features(train_set)
    base = raw.mean(0)
    seen, held = (Stored(unit(part - base)) for part in (raw, features(validation_set)))
    tests = [
        (images, features(images)) for images in (data(options, "cifar_fs", "test"), data(options, "gtsrb"), data(options, "flowers12"))
    ]
    for setting in options.ways_shots or ["5w1s", "5w5s"]:
        ways, shots = map(int, setting.removesuffix("s").split("w"))
        validation = Sampler(numbered([validation_set])[0], ways, shots, options.queries, tasks=AT_ONCE, seed=seed + 1)
        share = choose(lambda share: LabelPropagation(held, share * len(base) ** -0.5).eval(), SIGMAS, some(validation, options))
        sampler = Sampler(numbered([train_set])[0], ways, shots, options.queries, seed=seed)
        sigma = share * len(base) ** -0.5
        trained_heads = {
            name: headed(seen, held, sigma, Propagation(k=k), sampler, validation, options)
            for name, k in (("tpn head", 20), ("tpn head, 5 neighbours", 5))
            if name in asked
        }
        for images, plain in tests:
            for name, head in heads(plain, base, sigma, share, trained_heads).items():
                for balance in BALANCES if name in asked else ():
                    head.model.to(options.device).eval()
                    row = measured(head, name, numbered([images])[0], ways, shots, balance, options)
                    yield row | {"trained": "efficientnet-lite0"}


def heads(plain: torch.Tensor, base: torch.Tensor, sigma: float, share: float, trained_heads: dict[str, Trained]) -> dict[str, Trained]:
    """Over the features of one data set; `base` is the mean of the features of CIFAR-FS's training classes."""
    own, direct = Stored(unit(plain - base)), Stored(plain)
    made = {
        "prototypes": Trained(ProtoNet(direct)),
        "simpleshot": Trained(SimpleShot(direct, base)),
        "label-propagation": Trained(LabelPropagation(own, sigma), chosen=f"sigma {share}"),
        "label-propagation rebalanced": Trained(
            LabelPropagation(own, sigma, Propagation(balance=1.0)), chosen=f"sigma {share} strength 1.0"
        ),
        "predict simpleshot": Trained(AsPredict(direct, "simpleshot")),
        "predict label-propagation": Trained(AsPredict(direct, "label-propagation")),
    }
    for name, head in trained_heads.items():
        made[name] = head.variant(TPN(own, head.model.graph, head.model.propagation), f"sigma starts {share}")
    return made


def headed(
    seen: Stored, held: Stored, sigma: float, propagation: Propagation, sampler: Sampler, validation: Sampler, options: argparse.Namespace
) -> Trained:
    """TPN whose graph module alone is trained; `seen` are features of the training classes, `held` of the validation classes."""
    torch.manual_seed(sampler.seed)
    model = TPN(Both(seen, held), FlatGraph(seen.get_buffer("features").shape[1], sigma), propagation).to(options.device)
    return fitted(
        model,
        sampler,
        validation,
        halving(options.head_steps, options.halvings, sampler.seed),
        options,
        options.graphs,
        groups=[{"params": model.graph.parameters()}],
    )


class Both(nn.Module):
    """Stored features of the training classes in training, of the validation classes in evaluation."""

    def __init__(self, seen: Stored, held: Stored) -> None:
        super().__init__()
        self.seen, self.held = seen, held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 1, 1) -> (n, width)"""
        return (self.seen if self.training else self.held)(x)


class AsPredict(nn.Module):
    """What `smidgen fewshot predict` says: centred on the task's own support, and propagation with five neighbours."""

    def __init__(self, backbone: Stored, method: Literal["simpleshot", "label-propagation"]) -> None:
        super().__init__()
        self.backbone, self.method = backbone, method

    def predict(self, episode: Episode) -> torch.Tensor:
        """Probabilities, task after task."""
        out = episode.query_x.new_zeros(*episode.query_y.shape, episode.ways)
        for t, (support_y, query_y) in enumerate(zip(episode.support_y, episode.query_y, strict=True)):
            support, query = (self.backbone(x[t][y >= 0]) for x, y in ((episode.support_x, support_y), (episode.query_x, query_y)))
            out[t, query_y >= 0] = classify(self.method, support, support_y[support_y >= 0], query, episode.ways)
        return out
