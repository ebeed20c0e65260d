"""Table mxml of fewshot.py: members, one learner on all sets, the members' mean, and mixtures."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from fewshot_frozen import Stored, numbered
from fewshot_trainings import BALANCES, Trained, data, measured, scratch
from torch import nn

from smidgen.fewshot.episodes import Sampler, Tasks
from smidgen.fewshot.measure import norm_mode
from smidgen.fewshot.methods import mxml as m
from smidgen.fewshot.methods import mxml_stages as stages
from smidgen.fewshot.sets import SetsSampler
from smidgen.fit import FitConfig
from smidgen.images import Images
from smidgen.networks import Conv4

TARGETS = ["sign_digits", "mnist", "fashion_mnist"]
MIXTURES: dict[str, tuple[m.Form, bool, m.Normalise]] = {
    f"mxml {form} {'transductive' if transductive else 'inductive'} {normalise}": (form, transductive, normalise)
    for form, transductive, normalise in (
        ("authors", True, "none"),
        ("authors", False, "none"),
        ("authors", True, "softmax"),
        ("invariant", True, "none"),
        ("invariant", False, "none"),
        ("invariant", True, "softmax"),
        ("authors", True, "product"),
        ("invariant", True, "product"),
        ("invariant", False, "product"),
        ("invariant", True, "sum"),
    )
}  # form of the weight network, whether it sees all queries at once, normalisation


def mxml(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Members, one learner on all sets, the members' mean, and mixtures, which are trained on classes that no member has seen."""
    ways, shots = 5, 5
    parts = member_parts(options)
    sets, unseen, tests = ([part[k] for part in parts.values() if part[k] is not None] for k in range(3))
    targets = [*tests, *(data(options, name, size=32, channels=3) for name in TARGETS)]
    kinds = tuple(options.augment or ())

    def alone(sampler: Tasks, steps: int) -> Trained:
        """One learner on tasks of one sampler."""
        torch.manual_seed(seed)
        learner = m.NormalisedProtoNet(Conv4(3)).to(options.device)
        config = replace(stages.MEMBERS, steps=steps, decay_every=max(1, 7 * steps // 10), precision="float32", seed=seed)
        return timed(learner, config, sampler, lambda run: stages.train_members([learner], [sampler], config, run))

    def timed(model: nn.Module, config: FitConfig, sampler: Tasks, stage: Callable) -> Trained:
        started = time.monotonic()
        with scratch(config) as run:
            stage(run)
        return Trained(model.eval(), config.steps, config.steps, sampler.tasks, time.monotonic() - started, " ".join(sampler.augment))

    lengths = [min(options.member_steps, max(1000, 100 * len(s.labels) // 150)) for s in sets]
    members = [alone(Sampler(s, ways, shots, options.queries, seed=seed, augment=kinds), n) for s, n in zip(sets, lengths, strict=True)]
    models = {f"member {name}": member for name, member in zip(parts, members, strict=True)}
    if not options.methods or "one learner" in options.methods:
        models["one learner"] = alone(SetsSampler(tuple(sets), ways, shots, options.queries, seed=seed, augment=kinds), sum(lengths))
    known = [*unseen, *targets]  # members do not change any more: from here on their features are looked up
    models = {name: replace(made, model=remembered(made.model, known), batch_norm=norm_mode(made.model)) for name, made in models.items()}
    drawn = numbered(known)
    unseen, targets = drawn[: len(unseen)], drawn[len(unseen) :]
    networks = [models[f"member {name}"].model for name in parts]
    models["ensemble"] = replace(models["member omniglot"], model=m.Ensemble(networks), seconds=sum(member.seconds for member in members))
    weighing = SetsSampler(tuple(unseen), ways, shots, 3, seed=seed)
    second = replace(
        stages.WEIGHTS, steps=options.weight_steps, decay_every=max(1, 7 * options.weight_steps // 10), precision="float32", seed=seed
    )
    for name in (n for n in options.methods or MIXTURES if n in MIXTURES):
        form, transductive, normalise = MIXTURES[name]
        torch.manual_seed(seed)
        network = m.WeightNetwork(256, ways if form == "authors" else None, form, transductive)
        mixture = m.MxML(networks, network, normalise).to(options.device)
        made = timed(mixture, second, weighing, lambda run, mixture=mixture: stages.train_weights(mixture, weighing, second, run))
        models[name] = replace(made, batch_norm=models["ensemble"].batch_norm)
    for name, made in models.items():
        for images in targets:
            for balance in BALANCES:
                yield measured(made, name, images, ways, shots, balance, options) | {"trained": " ".join(parts)}


def member_parts(options: argparse.Namespace) -> dict[str, tuple[Images, Images | None, Images]]:
    """Classes that a member learns from, that weights are learned from, and that are tested on."""

    def split(name: str, prefix: str = "") -> tuple[Images, ...]:
        return tuple(data(options, name, prefix + part, 32, 3) for part in ("train", "val", "test"))

    def cut(name: str, *ends: int) -> tuple[Images | None, ...]:
        images = data(options, name, size=32, channels=3)
        edges = [0, *ends, len(images.classes)]
        return tuple(images.of(list(range(a, b))) if b > a else None for a, b in zip(edges, edges[1:], strict=False))

    parts = {"omniglot": split("omniglot", "vinyals:"), "cifar_fs": split("cifar_fs")}
    return parts | {"gtsrb": cut("gtsrb", 26, 35), "flowers12": cut("flowers12", 7, 7)}  # pyright: ignore


class Remembered(m.NormalisedProtoNet):
    """A member of a mixture over features made once."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__(nn.Identity())  # pyright: ignore  it embeds nothing
        self.stored = Stored(features)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(tasks, n, 1, 1, 1) -> (tasks, n, width)"""
        return self.stored(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@torch.no_grad()
def remembered(member: nn.Module, sets: Sequence[Images]) -> Remembered:
    """The member over `numbered(sets)`."""
    batches = (images.floats(part) for images in sets for part in torch.arange(len(images.labels), device=images.labels.device).split(500))
    return Remembered(torch.cat([member.embed(x[None])[0] for x in batches])).eval()
