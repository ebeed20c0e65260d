"""Bayesian TAML (Lee, Lee, Na, Kim, Park, Yang, Hwang 2020): learning to balance, for tasks and classes of any number of shots.

Meta-SGD whose inner loop is balanced by three variables per task, which an encoder reads from the support set:

    omega~_c  per class               w = softmax(omega~) weighs the classes' losses          (classes of unequal size)
    gamma~_l  per layer               rate of layer l = exp(gamma~_l) alpha_l                  (tasks of unequal size)
    z~        per filter, twice       theta_0: weight (1 + z~_weight), bias + z~_bias          (tasks unlike those seen; not of the head)

    theta_k = theta_{k-1} - exp(gamma~_l) alpha grad sum_c w_c C / N sum_{i in c} ce_i(theta_{k-1})

All three are random, phi = (omega~, gamma~, z~) with prior N(0, 1) on every entry and q(phi | support) = N(mu, softplus(s)^2). Minimised
over theta, alpha and the encoder, per task of N support and M query images:

    mean query cross-entropy of theta_K(phi), phi ~ q      +      KL(q || p) / (N + M)

with one sample in training, reparameterised (phi = mu + sigma eps, or the encoder would hear of the KL alone and fall back to the prior),
none in evaluation mode (phi = mu), and at test the softmax outputs of S = 10 samples averaged, each with an inner loop of its own.
mu = 0 without sampling is Meta-SGD exactly.

Train it as Meta-SGD (maml.py). Use it where the number of shots varies, or new tasks look unlike those trained on; at one fixed number of
shots omega and gamma have little to tell apart.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import MOST, Episode
from smidgen.fewshot.methods.inner import BLOCKS, Classifier, Inner, Layers, Rates, clipped, even, query_loss

FEATURES = 64  # of an image, in the encoder
INITIAL = 0.02  # standard deviation of the encoder's initial weights
LOG2 = math.log(2)  # softplus(0)
TOGETHER = {"cuda": 4000}  # support images up to which samples of phi are predicted with at once, as many kernels as one; else one by one

Normal = tuple[Tensor, Tensor]
"Mean and standard deviation of independent normals, (tasks, *entries)."


@dataclass(frozen=True)
class BTAMLConfig:
    """What is balanced and how."""

    omega: bool = True
    "Weigh the classes."
    gamma: bool = True
    "Scale the steps of each layer."
    z: bool = True
    "Shift the initial weights."
    bayesian: bool = True
    "Draw phi and keep q near its prior; without, phi is what the encoder says (deterministic TAML)."
    direct_omega: bool = False
    "omega from the class's statistics by one dense layer, without a hidden one: the authors' run over several data sets."
    rate: float = 0.01
    "Initial alpha."
    spread: float = LOG2
    "Initial standard deviation of phi. Less is ours: training begins near Meta-SGD, and the KL widens what may be wide."
    samples: int = 10
    "Of phi at test; 0 uses its mean, which costs a tenth and is less accurate, mostly on unlike tasks."
    seed: int = 0
    "Of the samples at test."
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.spread <= 0:
            raise UserError(f"--spread of Bayesian TAML must be positive, got {self.spread}")
        if self.samples < 0:
            raise UserError(f"--samples of Bayesian TAML must not be negative, got {self.samples}")


class BTAML(nn.Module):
    """Meta-SGD with a balanced inner loop."""

    def __init__(self, image: tuple[int, int, int], config: BTAMLConfig | None = None) -> None:
        """For images of (channels, height, width)."""
        super().__init__()
        self.config = BTAMLConfig() if config is None else config
        self.classifier = Classifier(image, self.config.inner)
        self.rates = Rates(self.classifier, self.config.rate)
        self.encoder = Encoder(image, self.config)

    def forward(self, episode: Episode) -> Float[Tensor, ""]:
        """The objective above, mean over tasks; phi is sampled in training mode, otherwise its mean."""
        q = self.encoder(episode)
        phi = sample(q) if self.training and self.config.bayesian else {name: mu for name, (mu, _) in q.items()}
        steps = self.config.inner.steps if self.training else self.config.inner.test_steps
        loss = query_loss(self.answers(episode, phi, steps), episode)
        if not self.config.bayesian:
            return loss.mean()
        images = (episode.support_y >= 0).sum(1) + (episode.query_y >= 0).sum(1)
        return (loss + divergence(q, len(images)) / images).mean()

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The same, with a clipped gradient."""
        return clipped(self, episode, self.config.inner.clip)

    def answers(self, episode: Episode, phi: dict[str, Tensor], steps: int) -> Float[Tensor, "tasks queries ways"]:
        """Logits after `steps` of the inner loop balanced by `phi`."""
        return self.classifier.answers(self.adapt(episode, phi, steps), episode)

    def adapt(self, episode: Episode, phi: dict[str, Tensor], steps: int) -> Layers:
        """theta_K of every task; what `phi` lacks is not balanced."""
        theta, rates, emphasis = self.classifier.start(episode), self.rates(episode), even(episode)
        if "z" in phi:
            theta = modulated(theta, phi["z"])
        if "gamma" in phi:
            factors = phi["gamma"].exp().unbind(1)  # per layer: (tasks,)
            rates = [(_times(factor, w), _times(factor, b)) for factor, (w, b) in zip(factors, rates, strict=True)]
        if "omega" in phi:
            emphasis = phi["omega"].softmax(1)
        return self.classifier.adapt(theta, rates, emphasis, episode, steps)

    def insides(self, episode: Episode) -> dict[str, Tensor]:
        """What the mean of phi says: omega, the weights w of the classes, and gamma, the factors of the layers' rates."""
        q = self.encoder(episode)
        shown = {"omega": lambda mu: mu.softmax(1), "gamma": torch.exp}
        return {name: shown[name](mu) for name, (mu, _) in q.items() if name in shown}

    @torch.no_grad()
    def validate(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities by the mean of phi: a tenth of the work, for choosing among states in training."""
        q = self.encoder(episode)
        return self.answers(episode, {name: mu for name, (mu, _) in q.items()}, self.config.inner.test_steps).softmax(-1)

    @torch.no_grad()
    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities, averaged over samples of phi.

        The samples' noise comes from `seed` and is the same for every task, so a task's answer does not depend on its company.
        """
        samples, q = self.config.samples, self.encoder(episode)
        if samples == 0 or not q or not self.config.bayesian:
            return self.validate(episode)
        random = torch.Generator().manual_seed(self.config.seed)
        noise = [{name: torch.randn(mu.shape[1:], generator=random).to(mu) for name, (mu, _) in q.items()} for _ in range(samples)]
        together = max(1, TOGETHER.get(episode.query_x.device.type, 0) // episode.support_y.numel())
        total = episode.query_x.new_zeros((*episode.query_y.shape, episode.ways))
        for some in (noise[i : i + together] for i in range(0, samples, together)):
            drawn = [sample(q, each) for each in some]
            phi = {name: torch.cat([one[name] for one in drawn]) for name in q}
            answers = self.answers(repeated(episode, len(some)), phi, self.config.inner.test_steps).softmax(-1)
            total += answers.unflatten(0, (len(some), -1)).sum(0)
        return total / samples


def repeated(episode: Episode, times: int) -> Episode:
    """All tasks, and all of them again."""
    tensors = episode.support_x, episode.support_y, episode.query_x, episode.query_y
    support_x, support_y, query_x, query_y = (x.repeat(times, *[1] * (x.ndim - 1)) for x in tensors)
    return replace(episode, support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y)


class Encoder(nn.Module):
    """A set of sets, read class by class: images -> statistics of each class -> statistics of the classes.

    Classes enter through pooling and shared weights: their order permutes omega and nothing else, and any number of them will do.

        images      (tasks, support, *image)    NN1       -> (tasks, support, 64)
        pool 1      mean, variance, n_c         interact  -> s: (tasks, ways, 256)    -> omega
        classes     s                           NN2       -> (tasks, ways, 32)
        pool 2      mean, variance, mean n_c    interact  -> v: (tasks, 128)          -> gamma, z

    with n_c = (N_c - 1) / 49. Variances are biased: of a single image 0, where the unbiased one is 0/0.
    """

    def __init__(self, image: tuple[int, int, int], config: BTAMLConfig) -> None:
        """For images of (channels, height, width); heads for what `config` balances."""
        super().__init__()
        channels, height, width = image
        self.images = nn.Sequential(
            *(nn.Conv2d(channels, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(10 * (height // 4) * (width // 4), FEATURES)),
        )
        self.interact1 = nn.Linear(3, 4)
        self.classes = nn.Sequential(nn.Linear(4 * FEATURES, 128), nn.ReLU(), nn.Linear(128, 32))
        self.interact2 = nn.Linear(3, 4)
        self.heads = nn.ModuleDict()
        self.filters = config.inner.width
        if config.omega:
            self.heads["omega"] = nn.Linear(4 * FEATURES, 2) if config.direct_omega else _head(4 * FEATURES, 1)
        if config.gamma:
            self.heads["gamma"] = _head(128, BLOCKS + 1)
        if config.z:
            self.heads["z"] = _head(128, 2 * BLOCKS * self.filters)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=INITIAL, a=-2 * INITIAL, b=2 * INITIAL)
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=INITIAL)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for head in self.heads.values():
            *_, bias = head.parameters()  # of the last layer; its second half is s
            nn.init.constant_(bias[len(bias) // 2 :], math.log(math.expm1(config.spread)))  # the inverse of softplus

    def forward(self, episode: Episode) -> dict[str, Normal]:
        """q(phi | support): omega (tasks, ways), gamma (tasks, layers), z (tasks, 2, blocks, filters); those switched on."""
        s, v = self.statistics(episode)
        q = {}
        for name, head in self.heads.items():
            mu, scale = head(s if name == "omega" else v).chunk(2, -1)
            if name == "omega":
                mu, scale = mu.squeeze(-1), scale.squeeze(-1)
            if name == "z":
                mu, scale = (t.unflatten(1, (2, BLOCKS, self.filters)) for t in (mu, scale))
            q[name] = mu, F.softplus(scale)
        return q

    def statistics(self, episode: Episode) -> tuple[Float[Tensor, "tasks ways 256"], Float[Tensor, "tasks 128"]]:
        """s, of every class, and v, of every task. Padding belongs to no class, so to none of them."""
        x, (tasks, support) = episode.support_x, episode.support_y.shape
        h = self.images(x.flatten(0, 1)).unflatten(0, (tasks, support))
        member = F.one_hot(episode.support_y + 1, episode.ways + 1)[..., 1:].to(h.dtype)  # (tasks, support, ways)
        shots = member.sum(1)
        size = (shots - 1) / (MOST - 1)
        share = member / shots.clamp(min=1)[:, None]
        mean = share.mT @ h  # (tasks, ways, 64)
        variance = share.mT @ (h - member @ mean).square()
        pooled = torch.stack([mean, variance, size[..., None].expand_as(mean)], -1)
        s = F.relu(self.interact1(pooled)).flatten(2)
        c = self.classes(s)
        mean, variance = c.mean(1), c.var(1, correction=0)
        pooled = torch.stack([mean, variance, size.mean(1, keepdim=True).expand_as(mean)], -1)
        return s, F.relu(self.interact2(pooled)).flatten(1)


def sample(q: dict[str, Normal], noise: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """phi = mu + sigma eps, through which the gradient reaches mu and sigma; eps drawn anew, or `noise`."""
    if noise is None:
        noise = {name: torch.randn_like(mu) for name, (mu, _) in q.items()}
    return {name: mu + sigma * noise[name] for name, (mu, sigma) in q.items()}


def divergence(q: dict[str, Normal], tasks: int) -> Float[Tensor, "tasks"] | float:
    """KL(q || N(0, 1)) of every task: sum over all entries of (mu^2 + sigma^2 - 1 - ln sigma^2) / 2; 0 if nothing is balanced.

    >>> divergence({"gamma": (torch.ones(1, 3), torch.ones(1, 3))}, 1)
    tensor([1.5000])
    """
    parts = [(mu.square() + sigma.square() - 1 - 2 * sigma.log()).reshape(tasks, -1).sum(1) / 2 for mu, sigma in q.values()]
    return torch.stack(parts).sum(0) if parts else 0.0


def modulated(theta: Layers, z: Float[Tensor, "tasks 2 blocks filters"]) -> Layers:
    """theta_0 with weight (1 + z_weight) along the filters and bias + z_bias; the head as it is."""
    convolutions = [
        (w * (1 + z_weight)[..., None, None, None], b + z_bias)
        for (w, b), z_weight, z_bias in zip(theta[:BLOCKS], z[:, 0].unbind(1), z[:, 1].unbind(1), strict=True)
    ]
    return [*convolutions, theta[BLOCKS]]


def _times(factor: Float[Tensor, "tasks"], x: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (x.ndim - 1)) * x


def _head(inputs: int, entries: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 2 * entries))
