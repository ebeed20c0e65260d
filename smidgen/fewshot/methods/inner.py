"""The inner loop shared by MAML, Meta-SGD and Bayesian TAML (notes 3.2, 3.5): a classifier, and its adaptation to a batch of tasks.

    theta_k = theta_{k-1} - rate * grad L(theta_{k-1}),   k = 1 .. K,       L(theta) = sum_c w_c C / N sum_{i in class c} ce_i(theta)

elementwise, with C classes and N support images in a task. w_c = 1/C makes L the plain mean of the cross-entropies. A method is a choice of
theta_0, rate and w; each may differ from task to task, and the outer gradient goes through all of them (second order, in full).

Tasks are adapted side by side: torch.func.vmap turns one convolution per task into one grouped convolution, where a loop over tasks would
start as many small kernels. Weights are passed as arguments and not held by layers, because every task ends with its own.

Rows of padding (label -1) have no part in the loss, in N, or in the statistics of batch norm. `faithful_padding` counts them in the latter
two, as the authors' code does (notes 3.7): for comparison only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode

BLOCKS = 4
SMALLEST = 2**BLOCKS  # pixels a side, of which the last pooling leaves one
EPSILON = 1e-3  # of batch norm; not in the notes, the default of TensorFlow's layer that has a shift alone

Layers = list[tuple[Tensor, Tensor]]
"Weight and bias of four convolutions and the head; of their steps; of their gradients."


@dataclass(frozen=True)
class Inner:
    """What the three methods have in common."""

    width: int = 32
    "Filters of a convolution."
    steps: int = 5
    "Inner steps in training."
    test_steps: int = 10
    "Inner steps at validation and test."
    clip: float = 3.0
    "Largest entry of the outer gradient of a batch of tasks."
    faithful_padding: bool = False
    "Padding counts in batch norm and in N, as in the authors' code."

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("steps", self.steps), ("test-steps", self.test_steps), ("clip", self.clip)):
            if value <= 0:
                raise UserError(f"--{name} of the inner loop must be positive, got {value}")


class Classifier(nn.Module):
    """Conv-4 with a linear head, as Bayesian TAML has it (notes 3.5).

    Convolutions have a bias; batch norm has a shift and no scale, uses the statistics of the batch always (queries inform each other), and
    its shift is learned but not adapted. The head starts at zero, not learned: any number of ways works, and classes are exchangeable.
    Initial convolutions: Glorot's uniform, which is ours; the notes do not say.
    """

    def __init__(self, image: tuple[int, int, int], inner: Inner | None = None) -> None:
        """`image` is (channels, height, width)."""
        super().__init__()
        self.image, self.inner = image, Inner() if inner is None else inner
        channels, height, width = image
        if min(height, width) < SMALLEST:
            raise UserError(f"images of {height} x {width} are too small for four poolings; use at least {SMALLEST} x {SMALLEST}")
        filters = self.inner.width
        self.features = filters * (height // SMALLEST) * (width // SMALLEST)
        self.weights = nn.ParameterList(torch.empty(filters, channels if b == 0 else filters, 3, 3) for b in range(BLOCKS))
        self.biases = nn.ParameterList(torch.zeros(filters) for _ in range(BLOCKS))
        for weight in self.weights:
            nn.init.xavier_uniform_(weight)
        self.shift = nn.Parameter(torch.zeros(BLOCKS, filters))

    def start(self, episode: Episode) -> Layers:
        """theta_0, of every task alike: (tasks, *shape)."""
        if episode.support_x.shape[2:] != self.image:
            raise UserError(f"the network was made for images of {self.image}, got {tuple(episode.support_x.shape[2:])}")
        head = (self.shift.new_zeros(episode.ways, self.features), self.shift.new_zeros(episode.ways))
        return per_task([*zip(self.weights, self.biases, strict=True), head], len(episode.support_x))

    def adapt(self, theta: Layers, rates: Layers, emphasis: Float[Tensor, "tasks ways"], episode: Episode, steps: int) -> Layers:
        """theta_K of every task. `theta`, `rates`: (tasks, *shape); `emphasis` is w."""

        def task(theta: Layers, rates: Layers, x: Tensor, y: Tensor, weight: Tensor, counted: Tensor) -> Layers:
            for _ in range(steps):
                gradient = grad(self._support_loss)(theta, x, y, weight, counted)
                theta = [
                    (w - rate_w * g_w, b - rate_b * g_b)
                    for (w, b), (rate_w, rate_b), (g_w, g_b) in zip(theta, rates, gradient, strict=True)
                ]
            return theta

        y, counted = episode.support_y, self._counted(episode.support_y)
        weight = emphasis.gather(1, y.clamp(min=0)) * (y >= 0) * episode.ways / counted.sum(1, keepdim=True)
        return vmap(task)(theta, rates, episode.support_x, y, weight, counted)

    def answers(self, theta: Layers, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Logits of the queries, normalized with the statistics of one another."""
        return vmap(self.logits)(theta, episode.query_x, self._counted(episode.query_y))

    def logits(self, theta: Layers, x: Float[Tensor, "n channels height width"], counted: Float[Tensor, "n"]) -> Float[Tensor, "n ways"]:
        """Of one task. `counted`: 1 for images that enter the statistics of batch norm, otherwise 0."""
        for (weight, bias), shift in zip(theta[:BLOCKS], self.shift, strict=True):
            x = normalized(F.conv2d(x, weight, bias, padding=1), counted) + shift[:, None, None]
            x = F.max_pool2d(F.relu(x), 2)
        weight, bias = theta[BLOCKS]
        return F.linear(x.flatten(1), weight, bias)

    def _support_loss(self, theta: Layers, x: Tensor, y: Tensor, weight: Tensor, counted: Tensor) -> Float[Tensor, ""]:
        """L of one task; `weight` is w_c C / N of every image, 0 for padding."""
        return (weight * cross_entropy(self.logits(theta, x, counted), y)).sum()

    def _counted(self, y: Int[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
        real = torch.ones_like(y) if self.inner.faithful_padding else y >= 0
        return real.to(self.shift.dtype)


class Rates(nn.Module):
    """The learned step sizes of Meta-SGD, one for every weight.

    Of the head, one row over the features and one number for the bias, repeated for every class (notes 3.5).
    """

    def __init__(self, classifier: Classifier, initial: float = 0.01) -> None:
        """Of a classifier's weights, all starting at `initial`."""
        super().__init__()
        self.weights = nn.ParameterList(torch.full(w.shape, initial) for w in classifier.weights)
        self.biases = nn.ParameterList(torch.full(b.shape, initial) for b in classifier.biases)
        self.weights.append(torch.full((1, classifier.features), initial))
        self.biases.append(torch.full((1,), initial))

    def forward(self, episode: Episode) -> Layers:
        """(tasks, *shape) for every weight and bias."""
        ways, pairs = episode.ways, list(zip(self.weights, self.biases, strict=True))
        weight, bias = pairs[BLOCKS]
        return per_task([*pairs[:BLOCKS], (weight.expand(ways, -1), bias.expand(ways))], len(episode.support_x))


def normalized(x: Float[Tensor, "n channels height width"], counted: Float[Tensor, "n"]) -> Float[Tensor, "n channels height width"]:
    """Batch norm without scale and shift, by mean and biased variance of the images counted."""
    share = counted / (counted.sum() * x.shape[2] * x.shape[3])
    x = x - torch.einsum("n,nchw->c", share, x)[:, None, None]
    variance = torch.einsum("n,nchw->c", share, x.square())
    return x * (variance + EPSILON).rsqrt()[:, None, None]


def cross_entropy(logits: Float[Tensor, "*n ways"], y: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Of every row; of padding anything finite, to be weighted by 0."""
    return -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)


def query_loss(logits: Float[Tensor, "tasks queries ways"], episode: Episode) -> Float[Tensor, "tasks"]:
    """Mean cross-entropy of each task's queries."""
    real = (episode.query_y >= 0).to(logits.dtype)
    return (cross_entropy(logits, episode.query_y) * real).sum(1) / real.sum(1)


def even(episode: Episode) -> Float[Tensor, "tasks ways"]:
    """w_c = 1/C: every support image weighs the same."""
    return episode.support_x.new_full((len(episode.support_x), episode.ways), 1 / episode.ways)


def inverse_size(episode: Episode) -> Float[Tensor, "tasks ways"]:
    """w_c = N / (C^2 N_c): L becomes the mean over classes of a class's mean cross-entropy.

    The "1/N_c" baseline of notes 3.6; its constant is our reading, chosen so that equal shots give `even`.

    >>> from smidgen.fewshot.episodes import Episode
    >>> y = torch.tensor([[0, 0, 0, 1]])
    >>> inverse_size(Episode(torch.zeros(1, 4, 1), y, torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long), 2))
    tensor([[0.3333, 1.0000]])
    """
    shots = episode.shots().to(episode.support_x.dtype)
    return shots.sum(1, keepdim=True) / (episode.ways**2 * shots.clamp(min=1))


def per_task(layers: Layers, tasks: int) -> Layers:
    """The same for every task, without copies: (tasks, *shape)."""
    return [(w.expand(tasks, *w.shape), b.expand(tasks, *b.shape)) for w, b in layers]


def clipped(module: nn.Module, episode: Episode, bound: float) -> Float[Tensor, ""]:
    """module(episode), whose backward pass gives each parameter a gradient within [-bound, bound], entry by entry.

    The clamp sits in the graph, between the parameters and all their uses, so it needs nothing of the optimizer and survives copies of the
    module, which hooks of parameters do not. Gradients of several micro-batches are clipped one by one, before they are added.
    """

    def clamp(gradient: Tensor) -> Tensor:
        return gradient.clamp(-bound, bound)

    views = {}
    for name, parameter in module.named_parameters():
        views[name] = parameter.view_as(parameter)
        if views[name].requires_grad:
            views[name].register_hook(clamp)
    return functional_call(module, views, (episode,))
