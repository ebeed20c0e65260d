"""Table any-shot of fewshot.py: one training on tasks of 1 to 50 shots, tested where it was trained and elsewhere."""

import argparse
import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from fewshot_trainings import AT_ONCE, Trained, data, fitted, measured, untrained
from torch import nn

from smidgen.fewshot.episodes import Sampler
from smidgen.fewshot.methods.btaml import BTAML
from smidgen.fewshot.methods.inner import EPSILON, Classifier
from smidgen.fewshot.methods.prototypes import ProtoNet
from smidgen.fit import FitConfig
from smidgen.images import Images

ANYWHERE = ["cifar_fs", "gtsrb", "flowers12", "sign_digits", "fashion_mnist"]
ANY_SHOT = [
    "protonet", "maml", "meta-sgd", "meta-sgd+balance=classes", "btaml", "btaml+bayesian=false", "btaml+gamma=false+z=false",
    "btaml+omega=false+z=false", "btaml+omega=false+gamma=false",
]  # fmt: skip


def any_shot(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """One training, tested where it was trained and elsewhere."""
    parts = [data(options, "cifar_fs", split) for split in ("train", "val", "test")]
    chosen = ANYWHERE if options.tested is None else options.tested
    targets = [parts[2] if name == "cifar_fs" else data(options, name, size=32, channels=3) for name in chosen]
    for method in options.methods or ANY_SHOT:
        models = {method: any_shot_trained(method, parts[0], parts[1], seed, options)}
        trained = models[method].model
        if isinstance(trained, BTAML) and trained.config.bayesian:
            mean = copy.copy(trained)
            mean.config = replace(trained.config, samples=0)
            models[f"{method} mean"] = models[method].variant(mean, "")
        for name, made in models.items():
            for images in targets:
                yield measured(made, name, images, 5, "any", "balanced", options) | {"trained": "cifar_fs"}


def any_shot_trained(method: str, train_set: Images, validation_set: Images, seed: int, options: argparse.Namespace) -> Trained:
    """A method trained on tasks of any number of shots, or as another process left it."""
    steps, kinds = options.anyshot_steps, tuple(options.augment or ())
    sampler = Sampler(train_set, 5, "any", options.queries, tasks=4, seed=seed, augment=kinds)
    model = untrained(method, sampler, seed, options.device)
    file = options.keep and options.keep / f"{method}-{seed}.pt"
    if file and file.exists():
        return restored(file, model, options.device)
    validation = Sampler(validation_set, 5, "any", options.queries, tasks=AT_ONCE, seed=seed + 1)
    config = FitConfig(steps=steps, learning_rate=1e-3, schedule="cosine", weight_decay=options.weight_decay, seed=seed)
    classifiers = [m for m in model.modules() if isinstance(m, Classifier)]  # of an inner loop
    before = [started(classifier, sampler, validation, options) for classifier in classifiers if options.start_steps]
    made = fitted(
        model, sampler, validation, replace(config, evaluate_every=max(1, steps // 8)), options, options.graphs and bool(classifiers)
    )
    for first in before:
        made = replace(made, start=f"protonet {first.steps}", seconds=made.seconds + first.seconds)
    if file:
        store(file, made)
    return made


def store(file: Path, made: Trained) -> None:
    """For other processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    row = {name: value for name, value in vars(made).items() if name != "model"}
    torch.save({"state": made.model.state_dict(), "made": row}, partial)
    partial.rename(file)


def restored(file: Path, model: nn.Module, device: torch.device) -> Trained:
    """As another process left it."""
    stored = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(stored["state"])
    return Trained(model.eval(), **stored["made"])


def started(classifier: Classifier, sampler: Sampler, validation: Sampler, options: argparse.Namespace) -> Trained:
    """Trains its convolutions as a ProtoNet's, or takes them as another process left them: the same for every method of a seed."""
    file = options.keep and options.keep / f"start-{options.start_steps}{''.join(f'-{kind}' for kind in sampler.augment)}-{sampler.seed}.pt"
    if file and file.exists():
        return restored(file, classifier, options.device)
    many = replace(sampler, ways=20, shots=5, queries=10, tasks=1)
    few = replace(validation, shots=5)
    config = FitConfig(steps=options.start_steps, learning_rate=1e-3, schedule="cosine", seed=sampler.seed)
    made = replace(fitted(ProtoNet(Trunk(classifier)), many, few, config, options, options.device.type == "cuda"), model=classifier)
    if file:
        store(file, made)
    return made


class Trunk(nn.Module):
    """The convolutions of an inner loop's classifier, not adapted."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) -> (n, features)"""
        c = self.classifier
        one = torch.ones_like(c.shift[0])  # without a scale a GPU's batch norm has no gradient for its shift
        for weight, bias, shift in zip(c.weights, c.biases, c.shift, strict=True):
            x = F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, one, shift, True, 0.1, EPSILON)
            x = F.max_pool2d(F.relu(x), 2)
        return x.flatten(1)
