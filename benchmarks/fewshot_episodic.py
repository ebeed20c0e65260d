"""Tables omniglot and cifar-fs of fewshot.py: a training per number of ways and shots, and what comes of it without more training."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from fewshot_trainings import AT_ONCE, BALANCES, SIGMAS, Trained, data, halving, measured, some, trained
from torch import nn

from smidgen.fewshot.augment import Augment
from smidgen.fewshot.episodes import Queries, Sampler
from smidgen.fewshot.methods.propagation import LabelPropagation, nodes, spread
from smidgen.fewshot.methods.prototypes import ProtoNet, choose
from smidgen.fewshot.methods.tpn import TPN
from smidgen.images import Images

EPISODIC = ["protonet", "tpn", "tpn@higher", "tpn+start=0.0"]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the correction for unbalanced queries
PHOTOS: tuple[Augment, ...] = ("flip", "crop")


def omniglot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Many characters, one drawing or five."""
    parts = [rotated(data(options, "omniglot", f"vinyals:{split}")) for split in ("train", "val", "test")]
    yield from episodic(parts, ["5w1s", "5w5s", "20w1s", "20w5s"], ("balanced",), (), seed, options)


def rotated(images: Images) -> Images:
    """Every class in four rotations, each a class of its own."""
    count, turns = len(images.classes), range(4)
    pixels = torch.cat([images.pixels.rot90(k, (1, 2)) for k in turns])
    labels = torch.cat([images.labels + k * count for k in turns])
    return Images(images.name, pixels, labels, tuple(f"{c}, {90 * k} degrees" for k in turns for c in images.classes))


def cifar_fs(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Photographs; what transductive methods lose when queries are unbalanced."""
    parts = [data(options, "cifar_fs", split) for split in ("train", "val", "test")]
    yield from episodic(parts, ["5w1s", "5w5s"], BALANCES, PHOTOS, seed, options)


def episodic(
    parts: list[Images],
    settings: list[str],
    balances: tuple[Queries, ...],
    augment: tuple[Augment, ...],
    seed: int,
    options: argparse.Namespace,
) -> Iterator[dict]:
    """Every method in every setting, trained for it."""
    train_set, validation_set, test = parts
    config = halving(options.steps, options.halvings, seed, options.weight_decay)
    for setting in options.ways_shots or settings:
        ways, shots = map(int, setting.removesuffix("s").split("w"))
        for method in options.methods or EPISODIC:
            higher = method.partition("@")[2]
            with_shots = {1: 5, 5: 10}[shots] if higher == "higher" else int(higher or shots)
            kinds = augment if options.augment is None else tuple(options.augment)
            sampler = Sampler(train_set, ways, with_shots, options.queries, tasks=options.tasks, seed=seed, augment=kinds)
            validation = Sampler(validation_set, ways, shots, options.queries, tasks=AT_ONCE, seed=seed + 1)
            models = {method: trained(method, sampler, validation, config, options)}
            if isinstance(models[method].model, ProtoNet):
                models["label-propagation"] = propagating(models[method], validation, options)
            if "dirichlet" in balances:
                uneven = replace(validation, balance="dirichlet")
                models |= {f"{name} rebalanced": r for name, m in models.items() if (r := rebalanced(m, uneven, options)) is not None}
            for name, made in models.items():
                for balance in balances:
                    yield measured(made, name, test, ways, shots, balance, options) | {"trained": train_set.name}


@torch.no_grad()
def propagating(protonet: Trained, validation: Sampler, options: argparse.Namespace) -> Trained:
    """Label propagation over the backbone of a ProtoNet."""
    backbone, tasks = protonet.model.backbone, some(validation, options)
    spreads = [spread(maps.flatten(2), real).mean() for maps, _, real in (nodes(backbone, task) for task in tasks)]
    unit = float(torch.stack(spreads).mean())
    share = choose(lambda share: LabelPropagation(backbone, share * unit).eval(), SIGMAS, tasks)
    return protonet.variant(LabelPropagation(backbone, share * unit), f"sigma {share}")


def rebalanced(made: Trained, validation: Sampler, options: argparse.Namespace) -> Trained | None:
    """A propagating method with the correction for unbalanced queries; None of other methods."""
    if not isinstance(made.model, TPN | LabelPropagation):
        return None

    def corrected(strength: float) -> nn.Module:
        model = copy.copy(made.model)  # shares all parameters
        model.propagation = replace(model.propagation, balance=strength)
        return model

    strength = choose(corrected, STRENGTHS, some(validation, options))
    return made.variant(corrected(strength), f"{made.chosen} strength {strength}".strip())
