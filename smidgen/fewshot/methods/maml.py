"""MAML (Finn, Abbeel, Levine 2017) and Meta-SGD (Li, Zhou, Chen, Li 2017): weights from which few gradient steps lead far.

    theta_k = theta_{k-1} - alpha * grad L_support(theta_{k-1}),  k = 1 .. K;     minimise L_query(theta_K) over theta_0

In MAML alpha is a number; in Meta-SGD a tensor of theta's shape, learned with theta_0. The network, the zero head, the number of steps and
the clipping are those of Bayesian TAML's experiments, so that the three can be compared; the original papers' differ.

Train both at a constant learning rate with FitConfig(clip=None, precision="float32"), since the gradient is clipped here, entry by
entry, and second derivatives do not survive half precision. Query accuracy depends on how many queries share a batch.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode
from smidgen.fewshot.methods.inner import Classifier, Inner, Rates, clipped, even, inverse_size, query_loss


@dataclass(frozen=True)
class MAMLConfig:
    """How MAML adapts."""

    rate: float = 0.5
    "alpha; Bayesian TAML has 0.5 for 32 x 32 images and 0.1 for mini-ImageNet."
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise UserError(f"--rate of MAML must be positive, got {self.rate}")


class MAML(nn.Module):
    """One step size for all weights."""

    def __init__(self, image: tuple[int, int, int], config: MAMLConfig | None = None) -> None:
        """For images of (channels, height, width)."""
        super().__init__()
        self.config = MAMLConfig() if config is None else config
        self.classifier = Classifier(image, self.config.inner)

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean query loss of the adapted classifiers."""
        inner = self.config.inner
        return query_loss(self.answers(episode, inner.steps if self.training else inner.test_steps), episode).mean()

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The same, with a clipped gradient."""
        return clipped(self, episode, self.config.inner.clip)

    def answers(self, episode: Episode, steps: int) -> Float[Tensor, "tasks queries ways"]:
        """Logits after `steps`."""
        theta = self.classifier.start(episode)
        rates = [(torch.full_like(w, self.config.rate), torch.full_like(b, self.config.rate)) for w, b in theta]
        return self.classifier.answers(self.classifier.adapt(theta, rates, even(episode), episode, steps), episode)

    @torch.no_grad()
    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities after the steps of a test."""
        return self.answers(episode, self.config.inner.test_steps).softmax(-1)


@dataclass(frozen=True)
class MetaSGDConfig:
    """How Meta-SGD adapts."""

    rate: float = 0.01
    "Initial alpha."
    balance: Literal["images", "classes"] = "images"
    "What has the same weight in the support loss: every image, or every class (the 1/N_c baseline)."
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.balance not in ("images", "classes"):
            raise UserError(f"--balance of Meta-SGD is images or classes, got {self.balance}")


class MetaSGD(nn.Module):
    """A learned step size for every weight."""

    def __init__(self, image: tuple[int, int, int], config: MetaSGDConfig | None = None) -> None:
        """For images of (channels, height, width)."""
        super().__init__()
        self.config = MetaSGDConfig() if config is None else config
        self.classifier = Classifier(image, self.config.inner)
        self.rates = Rates(self.classifier, self.config.rate)

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean query loss of the adapted classifiers."""
        inner = self.config.inner
        return query_loss(self.answers(episode, inner.steps if self.training else inner.test_steps), episode).mean()

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The same, with a clipped gradient."""
        return clipped(self, episode, self.config.inner.clip)

    def answers(self, episode: Episode, steps: int) -> Float[Tensor, "tasks queries ways"]:
        """Logits after `steps`."""
        emphasis = even(episode) if self.config.balance == "images" else inverse_size(episode)
        theta = self.classifier.adapt(self.classifier.start(episode), self.rates(episode), emphasis, episode, steps)
        return self.classifier.answers(theta, episode)

    @torch.no_grad()
    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities after the steps of a test."""
        return self.answers(episode, self.config.inner.test_steps).softmax(-1)
