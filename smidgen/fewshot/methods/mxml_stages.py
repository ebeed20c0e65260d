"""MxML's training: members, each on its own data set; then, members frozen, the network that weighs them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, accuracy
from smidgen.fewshot.methods.mxml import Episodes, Form, Member, MxML, Normalise, NormalisedProtoNet, WeightNetwork, listed
from smidgen.fit import FitConfig, FitResult, fit
from smidgen.networks import Conv4
from smidgen.run import Run

MEMBERS = FitConfig(steps=10_000, learning_rate=1e-3, schedule="steps", decay=0.1, decay_every=7000, clip=None)
"""Of stage one. The authors': Adam at 1e-3, a tenth of it after 70 % of the steps, 100 x images / 150; 10 ways, 15 queries a class."""
WEIGHTS = replace(MEMBERS, learning_rate=1e-4)
"""Of stage two. The authors': Adam at 1e-4, a tenth of it after 70 %, 10,000 steps, 10 ways, 3 queries a class."""


def conv4_mixture(
    shape: tuple[int, int, int],
    members: int,
    ways: int | None,
    width: int = 64,
    form: Form = "authors",
    transductive: bool = True,
    normalise: Normalise = "none",
) -> MxML:
    """An untrained mixture of Conv-4 members, for images of `shape` (channels, height, width)."""
    channels, height, breadth = shape
    if min(height, breadth) < 16:
        raise UserError(f"four poolings leave nothing of images of {height} x {breadth}; enlarge them to 16 x 16 at least")
    learners = [NormalisedProtoNet(Conv4(channels, width)) for _ in range(members)]
    return MxML(learners, WeightNetwork(width * (height // 16) * (breadth // 16), ways, form, transductive), normalise)


def train_members(
    members: Iterable[Member],
    samplers: Sequence[Episodes],
    config: FitConfig,
    run: Run,
    validation: Sequence[Episodes] = (),
    episodes: int = 20,
) -> FitResult:
    """Stage one: every member on tasks of its own sampler, in place.

    All in one training, whose loss is the sum of theirs: they share no parameters, so each becomes what it would alone (but for
    `config.clip`, which measures the gradients of all together). With `validation`, one sampler per member, their loss and accuracy are
    measured on `episodes` batches. Members are in evaluation mode afterwards.
    """
    learners = listed(members)
    if len(samplers) != len(learners) or len(validation) not in (0, len(learners)):
        raise UserError(f"{len(learners)} members need as many samplers, got {len(samplers)}, and {len(validation)} for validation")
    if len(set(learners)) < len(learners):
        raise UserError("a member is listed twice; every data set needs a member of its own")
    learners.train()

    def evaluate(_: nn.Module) -> dict[str, Any]:
        losses, rights = zip(*(_measured(m, v, episodes) for m, v in zip(learners, validation, strict=True)), strict=True)
        return {"held_out": sum(losses) / len(losses), "member_losses": list(losses), "member_accuracies": list(rights)}

    result = fit(
        _Losses(learners),
        lambda model, batch: model(batch),
        lambda i: [sampler(i) for sampler in samplers],
        config,
        run,
        evaluate=evaluate if validation else None,
    )
    learners.eval()
    return result


def train_weights(
    mixture: MxML, sampler: Episodes, config: FitConfig, run: Run, validation: Episodes | None = None, episodes: int = 20
) -> FitResult:
    """Stage two: the network of the mixture, in place; members stay as they are to the bit.

    `sampler` draws from classes that members have not seen. With `validation`, another such sampler, loss and accuracy are measured on
    `episodes` batches.
    """
    mixture.train()

    def evaluate(_: nn.Module) -> dict[str, Any]:
        loss, right = _measured(mixture, validation, episodes) if validation else (0.0, 0.0)
        return {"held_out": loss, "accuracy": right}

    groups = [{"params": mixture.network.parameters()}]
    model = _Losses(nn.ModuleList([mixture]))
    result = fit(
        model, lambda m, batch: m(batch), lambda i: [sampler(i)], config, run, groups=groups, evaluate=evaluate if validation else None
    )
    mixture.eval()
    return result


class _Losses(nn.Module):
    """The sum of the methods' losses, each of its own episode; `fit` spreads over devices what is called, and methods are not."""

    def __init__(self, methods: nn.ModuleList) -> None:
        super().__init__()
        self.methods = methods

    def forward(self, episodes: Sequence[Episode]) -> Float[Tensor, ""]:
        losses = [method.loss(episode) for method, episode in zip(self.methods, episodes, strict=True)]  # pyright: ignore
        return torch.stack(losses).sum()


@torch.no_grad()
def _measured(method: Any, sampler: Episodes, episodes: int) -> tuple[float, float]:
    """Mean loss and accuracy over the first batches of a sampler."""
    batches = [sampler(i) for i in range(episodes)]
    losses = [float(method.loss(batch)) for batch in batches]
    rights = [float(accuracy(method.predict(batch), batch).mean()) for batch in batches]
    return sum(losses) / episodes, sum(rights) / episodes
