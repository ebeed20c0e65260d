"""The inner loop shared by MAML, Meta-SGD and Bayesian TAML: a classifier, and its adaptation to a batch of tasks.

    theta_k = theta_{k-1} - rate * grad L(theta_{k-1}),   k = 1 .. K,       L(theta) = sum_c w_c C / N sum_{i in class c} ce_i(theta)

elementwise, with C classes and N support images in a task. w_c = 1/C makes L the plain mean of the cross-entropies. A method is a choice of
theta_0, rate and w; each may differ from task to task, and the outer gradient goes through all of them (second order, in full).

Tasks are adapted side by side: every operation has a leading axis of tasks, and as no task's loss knows another's weights, the gradient of
their sum is each one's own. Weights are passed as arguments and not held by layers, because every task ends with its own.

What makes it fast is the layout of maps, (parts, channels, images of a part, height, width), where a part is eight images of one task: a
convolution is a matrix product per part, whose result needs no transposing. With all images of a task in one product, the gradient of the
weights would be a sum of a quarter million terms by a handful of the GPU's processors, two thirds of all time. Tasks that are shorter than
others have fewer parts, so padding costs next to nothing. Pooling comes before batch norm, which has no scale here, so that larger
stays larger: the same numbers from a quarter of the entries. And the first convolution, whose maps are the largest, is linear in images
that stay the same from step to step: their windows are cut out once, and batch norm's statistics W m and diag(W C W^T) follow from the
windows' mean m and covariance C without a look at the maps. On a GPU, where starting a torch operation takes longer than most of these run,
convolutions and what follows them are kernels with first and second derivatives (convolution.py, normal.py).

Rows of padding (label -1) have no part in the loss, in N, or in the statistics of batch norm. `faithful_padding` counts them in the latter
two, as the authors' code does: for comparison only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode
from smidgen.fewshot.methods.convolution import Owners, by_kernels, columns, convolved
from smidgen.fewshot.methods.normal import Affine, Pooled, Sums

BLOCKS = 4
SMALLEST = 2**BLOCKS  # pixels a side, of which the last pooling leaves one
PART = 8  # images of a task in one matrix product; see above
EPSILON = 1e-3  # of batch norm; the default of TensorFlow's layer that has a shift alone

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
    """Conv-4 with a linear head, as Bayesian TAML has it.

    Convolutions have a bias; batch norm has a shift and no scale, uses the statistics of the batch always (queries inform each other), and
    its shift is learned but not adapted. The head starts at zero, not learned: any number of ways works, and classes are exchangeable.
    Initial convolutions: Glorot's uniform, which is ours.
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
        y = episode.support_y
        parts = Parts.of(episode.support_x, self.counted(y), episode.room[0] if episode.room else None)
        weight = parts.cut(emphasis.gather(1, y.clamp(min=0)) * (y >= 0) * episode.ways / parts.images)
        y, outer = parts.cut(y), torch.is_grad_enabled()
        moved = [w for w, _ in theta] + [theta[BLOCKS][1]]  # batch norm takes the other biases away: their gradient is 0
        by = [-rate for rate, _ in rates] + [-rates[BLOCKS][1]]
        with torch.enable_grad():
            for _ in range(steps):
                moved = [_tracked(w, outer) for w in moved]
                loss = (weight * cross_entropy(self.logits(moved, parts), y)).sum()  # L of every task, added up
                gradients = torch.autograd.grad(loss, moved, create_graph=outer)
                moved = [w + rate * g for w, rate, g in zip(moved, by, gradients, strict=True)]
        biases = [b - 0 * rate for (_, b), (_, rate) in zip(theta[:BLOCKS], rates[:BLOCKS], strict=True)]
        return list(zip(moved[:-1], [*biases, moved[-1]], strict=True))

    def answers(self, theta: Layers, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Logits of the queries, normalized with the statistics of one another.

        Biases of convolutions are added, and taken away by batch norm, so that they and their rates have a gradient, of 0: training by
        several processes asks for one.
        """
        parts = Parts.of(episode.query_x, self.counted(episode.query_y), episode.room[1] if episode.room else None)
        biases = [b for _, b in theta]
        return parts.joined(self.logits([w for w, _ in theta] + biases[BLOCKS:], parts, biases))[:, : episode.query_y.shape[1]]

    def logits(self, weights: list[Tensor], parts: "Parts", biases: Sequence[Tensor] = ()) -> Float[Tensor, "parts part ways"]:
        """Of every image by its own task's weights: of the convolutions and the head, and the head's bias."""
        x = parts.maps
        for i, (weight, shift) in enumerate(zip(weights[:BLOCKS], self.shift, strict=True)):
            maps = convolved(x, weight, parts.owners) if i else parts.first(weight)
            mean, variance = moments(maps, parts) if i else parts.windows.moments(weight)
            if biases:
                mean = mean + biases[i] - biases[i]
            x = activated(maps, mean, variance, shift, parts)
        weight, bias = weights[BLOCKS:]
        return torch.baddbmm(parts.each(bias)[:, None], x.transpose(1, 2).flatten(2), parts.each(weight).mT)

    def counted(self, y: Int[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
        """1 for images that have a part in the statistics and in N."""
        real = torch.ones_like(y) if self.inner.faithful_padding else y >= 0
        return real.to(self.shift.dtype)


class Rates(nn.Module):
    """The learned step sizes of Meta-SGD, one for every weight.

    Of the head, one row over the features and one number for the bias, repeated for every class.
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


@dataclass(frozen=True)
class Parts:
    """Images of several tasks, each task's cut into parts of one size, filled up with zeros; parts without an image are left out."""

    index: Int[Tensor, "parts"]
    "Which they are of the parts there could be."
    shape: tuple[int, int]
    "Of the parts there could be: (tasks, most)."
    member: Float[Tensor, "tasks parts"]
    "1 where a part is of a task."
    x: Float[Tensor, "parts part channels height width"]
    counted: Float[Tensor, "parts part"]
    "1 for images that enter the statistics of batch norm, otherwise 0."

    @staticmethod
    def of(x: Float[Tensor, "tasks n channels height width"], counted: Float[Tensor, "tasks n"], room: int | None = None) -> "Parts":
        """All images that are counted, and what shares a part with them; with `room` for more, parts of none, which change nothing."""
        kept = _eights(counted).any(-1)
        present = kept.flatten()
        index = present.nonzero()[:, 0] if room is None else (~present).int().argsort(stable=True)[:room]
        member = F.one_hot(index // kept.shape[1], len(kept)).T.to(counted.dtype)
        return Parts(index, (len(kept), kept.shape[1]), member, _taken(x, index), _taken(counted, index))

    @staticmethod
    def least(counted: Float[Tensor, "tasks n"]) -> int:
        """The room that parts need."""
        return int(_eights(counted).any(-1).sum())

    @cached_property
    def owners(self) -> Owners:
        """Whose they are."""
        return Owners(self.member, self.index // self.shape[1])

    @cached_property
    def images(self) -> Float[Tensor, "tasks 1"]:
        """Those that are counted; N."""
        return self.total(self.counted.sum(1))[:, None]

    @cached_property
    def shares(self) -> Float[Tensor, "tasks parts"]:
        """What an image is of its task's mean."""
        return self.member / self.images

    @cached_property
    def windows(self) -> "Windows":
        """What the first convolution sees."""
        cut = columns(self.maps)
        height, width = self.x.shape[3:]
        weight = self.counted.repeat_interleave(height * width, 1)[..., None]
        places = self.total(weight.sum((1, 2)))
        mean = self.total((cut @ weight).squeeze(2)) / places[:, None]
        centred = cut - self.each(mean)[..., None]
        return Windows(cut, mean, self.total((centred * weight.mT) @ centred.mT) / places[:, None, None])

    @cached_property
    def maps(self) -> Float[Tensor, "parts channels part height width"]:
        """The images in the layout of maps."""
        return self.x.transpose(1, 2).contiguous()

    def first(self, weight: Float[Tensor, "tasks filters channels 3 3"]) -> Float[Tensor, "parts filters part height width"]:
        """The first convolution: of windows that are cut out, but by kernels from the images, which are smaller to read."""
        if by_kernels(weight):
            return convolved(self.maps, weight, self.owners)
        return (self.each(weight).flatten(2) @ self.windows.columns).unflatten(2, self.maps.shape[2:])

    def cut(self, values: Shaped[Tensor, "tasks n"]) -> Shaped[Tensor, "parts part"]:
        """A number per image, cut alike."""
        return _taken(values, self.index)

    def joined(self, values: Float[Tensor, "parts part *rest"]) -> Float[Tensor, "tasks most_n *rest"]:
        """The way back; zeros where no part was."""
        tasks, most = self.shape
        whole = values.new_zeros(tasks * most, *values.shape[1:])
        return whole.index_copy(0, self.index, values).unflatten(0, self.shape).flatten(1, 2)

    def total(self, values: Float[Tensor, "parts *rest"]) -> Float[Tensor, "tasks *rest"]:
        """Sums over each task's parts."""
        return (self.member @ values.flatten(1)).unflatten(1, values.shape[1:]) if values.ndim > 1 else self.member @ values

    def each(self, values: Float[Tensor, "tasks *rest"]) -> Float[Tensor, "parts *rest"]:
        """To every part what is its task's; a product of matrices, whose gradient is one too, and always the same."""
        return (self.member.T @ values.flatten(1)).unflatten(1, values.shape[1:])


@dataclass(frozen=True)
class Windows:
    """The 3 x 3 windows of images, flat, and their first two moments over all places of a task's counted images."""

    columns: Float[Tensor, "parts entries places"]
    mean: Float[Tensor, "tasks entries"]
    covariance: Float[Tensor, "tasks entries entries"]

    def moments(self, weight: Float[Tensor, "tasks filters channels 3 3"]) -> tuple[Tensor, Tensor]:
        """Mean and variance of the convolution by `weight`, each (tasks, filters)."""
        w = weight.flatten(2)
        return (w @ self.mean[..., None]).squeeze(2), ((w @ self.covariance) * w).sum(2)


def _eights(x: Shaped[Tensor, "tasks n *rest"]) -> Shaped[Tensor, "tasks most part *rest"]:
    missing = -x.shape[1] % PART
    return F.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing)).unflatten(1, (-1, PART))


def _taken(x: Shaped[Tensor, "tasks n *rest"], index: Int[Tensor, "parts"]) -> Shaped[Tensor, "parts part *rest"]:
    return _eights(x).flatten(0, 1).index_select(0, index)


def moments(x: Float[Tensor, "parts channels part height width"], parts: Parts) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over a task's counted images, each (tasks, channels)."""
    if by_kernels(x):
        mean, square = (parts.shares @ Sums.apply(x, parts.counted)).chunk(2, 1)
        return mean, square - mean * mean
    counted = parts.counted[:, None]
    variances, means = torch.var_mean(x, (3, 4), correction=0)  # of every image
    mean = parts.total((means * counted).sum(2)) / parts.images
    return mean, parts.total(((variances + (means - parts.each(mean)[..., None]).square()) * counted).sum(2)) / parts.images


def activated(
    x: Float[Tensor, "parts channels part height width"],
    mean: Float[Tensor, "tasks channels"],
    variance: Float[Tensor, "tasks channels"],
    shift: Float[Tensor, "channels"],
    parts: Parts,
) -> Float[Tensor, "parts channels part half_height half_width"]:
    """ReLU of the maximum over 2 x 2, after batch norm by mean and variance."""
    if by_kernels(x):
        return Pooled.apply(x, *Affine.apply(mean, variance, shift.expand_as(mean), EPSILON), *parts.owners)
    scale = (variance + EPSILON).rsqrt()
    shift = shift - mean * scale
    most = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
    return torch.addcmul(parts.each(shift)[..., None, None, None], most, parts.each(scale)[..., None, None, None]).relu()


def cross_entropy(logits: Float[Tensor, "*n ways"], y: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Of every row; of padding anything finite, to be weighted by 0."""
    return -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)


def _tracked(weight: Tensor, outer: bool) -> Tensor:
    """A weight that the inner gradient can be taken of; with an `outer` gradient in its graph, otherwise without a past."""
    return weight if outer and weight.requires_grad else weight.detach().requires_grad_()


def query_loss(logits: Float[Tensor, "tasks queries ways"], episode: Episode) -> Float[Tensor, "tasks"]:
    """Mean cross-entropy of each task's queries."""
    real = (episode.query_y >= 0).to(logits.dtype)
    return (cross_entropy(logits, episode.query_y) * real).sum(1) / real.sum(1)


def even(episode: Episode) -> Float[Tensor, "tasks ways"]:
    """w_c = 1/C: every support image weighs the same."""
    return episode.support_x.new_full((len(episode.support_x), episode.ways), 1 / episode.ways)


def inverse_size(episode: Episode) -> Float[Tensor, "tasks ways"]:
    """w_c = N / (C^2 N_c): L becomes the mean over classes of a class's mean cross-entropy.

    The "1/N_c" baseline that Bayesian TAML is compared with; its constant is our reading, chosen so that equal shots give `even`.

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
