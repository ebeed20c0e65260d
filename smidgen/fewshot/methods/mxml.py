"""MxML, a mixture of meta-learners: M members, each trained on tasks of its own data set, and a network that weights them.

A new task may come from none of the members' data sets. The weight prediction network looks at how each member embeds the task; the
mixture of the members' predictions by its weights is the answer. N ways, T queries, F features; shapes with tasks in front:

    p_m(c | q)          prediction of member m; the normalised ProtoNet of 4.2, or anything that is a `Member`
    E_m[q, c, :]      = (prototype_c - query_q)^2 element-wise                             (tasks, M, T, N, F)           4.3
    a_m               = network(E_m), one network for all members                          (tasks, M, 1) or, inductive, (tasks, M, T)
    score(c | q)      = sum_m w_m p_m(c | q),  w_m = 100 sigmoid(a_m)

The network exists twice: `authors`, a 1 x N convolution, for a fixed N and dependent on the order of classes; and `invariant`, our own.
So does the mixture: `normalise="none"` is the authors' code, whose scores go through a softmax in the loss, so that the weights are an
inverse temperature too; "sum" and "softmax" are the textbook's mixture, whose weights sum to one and whose logarithm is the loss. Which
of the two the published paper writes is not known to us. "product", our own, adds up logarithms instead: members of length-10 features are
so sure that a sum of their probabilities is little more than a vote, which forgets how sure each was.

    score(c | q)      = sum_m w_m log p_m(c | q),  w_m = softplus(a_m) / 100                "product"

Training (4.2, 4.4; mxml_stages.py) has two stages: members, each on its data set (`train_members`); then, members frozen with all their
statistics, the network on tasks of classes that no member has seen, of data sets drawn uniformly (`train_weights` with a
`sets.SetsSampler`). All data sets must have images of one shape. Baselines: each member; one learner trained on all sets, which is
`train_members([learner], [SetsSampler(...)], ...)`; the members' mean, `Ensemble`.

In the mixture members are in evaluation mode. A transductive mixture sees all queries at once, and so its accuracy depends on their number
and balance; the inductive one judges every query alone, provided that members do (batch norm with running statistics).
"""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode
from smidgen.fewshot.methods.prototypes import cross_entropy, full_precision, one_hot, real_nodes

SCALE = 10.0  # length of a member's features
MOST = 100.0  # bound of a weight
Form = Literal["authors", "invariant"]
Normalise = Literal["none", "softmax", "sum", "product"]
Episodes = Callable[[int], Episode]  # numbered batches of tasks: a Sampler, a SetsSampler


@runtime_checkable
class Embedding(Protocol):
    """A network that embeds a batch of tasks, Conv4 for one."""

    def embed(self, x: Float[Tensor, "tasks n *image"]) -> Float[Tensor, "tasks n features"]:
        """Flat features."""
        ...


@runtime_checkable
class Member(Protocol):
    """A method that classifies by features, all the mixture asks of a member; it is a torch module besides."""

    def embed(self, x: Float[Tensor, "tasks n *image"]) -> Float[Tensor, "tasks n features"]:
        """Features, as many as those of the other members, and of their scale."""
        ...

    def classify(self, embedded: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Logits, from an episode that holds features in the place of images."""
        ...

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Of stage one."""
        ...


class NormalisedProtoNet(nn.Module):
    """The authors' member (4.2): prototypes of features of length 10.

        feature     f = 10 h / (|h| + 1e-8),   h = network(x)
        prototype   mean of a class's support features; shorter than 10 where they differ, and left so
        logit       -sum of squared differences, in [-400, 0]

    >>> net = NormalisedProtoNet(Conv4(1))
    >>> net.embed(torch.rand(1, 2, 1, 28, 28)).norm(dim=-1).round(decimals=3).tolist()
    [[10.0, 10.0]]
    """

    def __init__(self, network: Embedding) -> None:
        super().__init__()
        self.network = network

    def embed(self, x: Float[Tensor, "tasks n *image"]) -> Float[Tensor, "tasks n features"]:
        """Features of length 10."""
        h = self.network.embed(x)
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return SCALE * h / (h.norm(dim=-1, keepdim=True) + 1e-8)

    def classify(self, embedded: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Logits, from features."""
        return -differences(embedded).sum(-1)

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean cross-entropy of the queries."""
        return cross_entropy(self._logits(episode), episode.query_y)

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities."""
        return self._logits(episode).softmax(-1)

    def _logits(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        return self.classify(embedded(self, episode))


class WeightNetwork(nn.Module):
    """The weight prediction network (4.3): E -> a, from which weights are made. Sizes, of N ways and F features:

        authors      conv 1 x N, 512, ReLU     (T, N F) -> (T, 512)      a linear layer over all classes of one query, in their order
                     conv 1 x 1, 128, ReLU     (T, 512) -> (T, 128)
        invariant    per query and class: linear 512, ReLU, linear 128, ReLU; mean and maximum over classes     (T, N, F) -> (T, 256)

        transductive mean over the queries     -> (1, .);  inductive: every query stays
        both         dense 1                   -> a

    Members are stacked in the batch axis: one network reads them all, so it does not know their order and its size does not depend on
    their number. `authors` has N F 512 + 512 + 65,664 + 129 parameters.

    >>> sum(p.numel() for p in WeightNetwork(features=1600, ways=10).parameters())
    8258305
    """

    def __init__(self, features: int, ways: int | None = None, form: Form = "authors", transductive: bool = True) -> None:
        """`ways`: N, which the authors' form fixes; the invariant form takes any and must not be given one."""
        super().__init__()
        if form == "authors" and ways is None:
            raise UserError("the authors' weight network is made for a fixed number of ways; give it, or choose the invariant form")
        if form == "invariant" and ways is not None:
            raise UserError("the invariant weight network takes any number of ways; leave the number out")
        self.ways, self.transductive = ways, transductive
        self.cell = nn.Sequential(nn.Linear(features * (ways or 1), 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU())
        self.dense = nn.Linear(128 if ways else 256, 1)

    def forward(
        self, e: Float[Tensor, "tasks members queries ways features"], real: Float[Tensor, "tasks queries"]
    ) -> Float[Tensor, "tasks members weighted"]:
        """One a per task or per query; `real` is 0 for padding, else 1."""
        if self.ways is None:
            h = self.cell(e)
            h = torch.cat([h.mean(-2), h.amax(-2)], -1)  # (tasks, members, queries, 256)
        elif self.ways != e.shape[-2]:
            raise UserError(f"the weight network was made for {self.ways} ways, the task has {e.shape[-2]}; the invariant form takes any")
        else:
            h = self.cell(e.flatten(-2))  # (tasks, members, queries, 128)
        if self.transductive:
            share = (real / real.sum(-1, keepdim=True))[:, None, :, None]
            h = (h * share).sum(-2, keepdim=True)
        return self.dense(h).squeeze(-1).float()


class MxML(nn.Module):
    """The mixture. In it members are frozen: no gradient reaches them, and they stay in evaluation mode while the network is trained."""

    def __init__(self, members: Iterable[Member], network: WeightNetwork, normalise: Normalise = "none") -> None:
        super().__init__()
        self.members, self.network = listed(members), network
        self.normalise: Normalise = normalise
        self.train(self.training)

    def train(self, mode: bool = True) -> "MxML":
        """Of the network alone."""
        super().train(mode)
        self.members.eval()
        return self

    def weights(self, episode: Episode) -> Float[Tensor, "tasks members weighted"]:
        """Per task, or, inductive, per query: in (0, 100), summing to one over members, or ("product") positive."""
        return self._parts(episode)[1].exp()

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean cross-entropy of the queries."""
        return cross_entropy(self._logits(episode), episode.query_y)

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities; the authors' code takes the largest score, which is the largest of these as well."""
        return self._logits(episode).softmax(-1)

    def insides(self, episode: Episode) -> dict[str, Float[Tensor, "..."]]:
        """For reports: `weights` (tasks, members); inductive ones, the mean over queries."""
        w, real = self.weights(episode), (episode.query_y >= 0).float()[:, None]  # real (tasks, 1, queries)
        return {"weights": w[..., 0] if self.network.transductive else (w * real).sum(-1) / real.sum(-1)}

    def _logits(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        return mixed(*self._parts(episode), self.normalise)

    def _parts(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Logarithms of the members' predictions and of the weights."""
        log_p, e = _read(self.members, episode)
        return log_p, log_weights(self.network(e, (episode.query_y >= 0).float()), self.normalise)


class Ensemble(nn.Module):
    """The members' mean prediction, without a network: the baseline."""

    def __init__(self, members: Iterable[Member]) -> None:
        super().__init__()
        self.members = listed(members)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Ensemble":
        """Nothing here is trained."""
        super().train(mode)
        self.members.eval()
        return self

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """To compare with; it has no gradient."""
        return cross_entropy(self._log_mean(episode), episode.query_y)

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities."""
        return self._log_mean(episode).exp()

    def _log_mean(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        log_p, _ = _read(self.members, episode)
        return log_p.logsumexp(1) - np.log(len(self.members))


def log_weights(a: Float[Tensor, "tasks members weighted"], normalise: Normalise) -> Float[Tensor, "tasks members weighted"]:
    """Logarithms of the weights.

    none      w = 100 sigmoid(a)                (4.3)
    sum       w = sigmoid(a_m) / sum sigmoid(a)
    softmax   w = exp(a_m) / sum exp(a)         of a, before the sigmoid, which would bound the ratio of two weights
    product   w = softplus(a) / 100             features of length 10 make logarithms down to -400, and these small again
    """
    if normalise == "product":
        return torch.where(a < -15, a, F.softplus(a.clamp(min=-15)).log()) - 2 * np.log(SCALE)
    if normalise == "softmax":
        return a.log_softmax(1)
    log_w = F.logsigmoid(a)
    return log_w + np.log(MOST) if normalise == "none" else log_w - log_w.logsumexp(1, keepdim=True)


def mixed(
    log_p: Float[Tensor, "tasks members queries ways"], log_w: Float[Tensor, "tasks members weighted"], normalise: Normalise
) -> Float[Tensor, "tasks queries ways"]:
    """Logits of the mixture: its scores as they are ("none", "product"), or its logarithm, whose softmax it is.

    Two members that say (0.9, 0.1) and (0.2, 0.8), weighted 3 and 1: scores (2.9, 1.1); by weights 0.75 and 0.25, (0.725, 0.275).
    Logarithms throughout, since a member's probability of e^-400 is 0 in float32 and has no gradient.
    """
    if normalise == "product":
        return (log_p * log_w.exp()[..., None]).sum(1)
    log_mixture = (log_p + log_w[..., None]).logsumexp(1)
    return log_mixture.exp() if normalise == "none" else log_mixture


def prototypes(features: Float[Tensor, "tasks n features"], y: Int[Tensor, "tasks n"], ways: int) -> Float[Tensor, "tasks ways features"]:
    """Class means; padding, y = -1, is in none."""
    belongs = one_hot(y, ways).to(features.dtype)  # (tasks, n, ways)
    with full_precision(features):
        return (belongs / belongs.sum(1, keepdim=True).clamp(min=1)).mT @ features


def differences(embedded: Episode) -> Float[Tensor, "tasks queries ways features"]:
    """E of 4.3: squared differences of every query's features and every prototype's."""
    means = prototypes(embedded.support_x, embedded.support_y, embedded.ways)
    return (embedded.query_x[:, :, None] - means[:, None]).square()


def embedded(member: Member, episode: Episode) -> Episode:
    """The episode as a member sees it, support and queries in one batch; padding, left out of batch statistics, has features 0."""
    x, real = torch.cat([episode.support_x, episode.query_x], 1), real_nodes(episode)
    if episode.full:
        features = member.embed(x)
    else:
        seen = member.embed(x[real][None])[0]
        features = seen.new_zeros(*real.shape, seen.shape[-1]).index_put((real,), seen)
    support = episode.support_y.shape[1]
    return episode.with_features(features[:, :support], features[:, support:])


def listed(members: Iterable[Member]) -> nn.ModuleList:
    """As modules; one at least."""
    modules = nn.ModuleList(members)  # pyright: ignore[reportArgumentType]  members are modules
    if not modules:
        raise UserError("a mixture needs at least one member")
    return modules


def _read(members: nn.ModuleList, episode: Episode) -> tuple[Tensor, Tensor]:
    """Of all members, log p (tasks, M, T, N) and E (tasks, M, T, N, F)."""
    log_p, e = [], []
    with torch.no_grad():
        for member in members:
            seen = embedded(member, episode)  # pyright: ignore[reportArgumentType]
            log_p.append(member.classify(seen).log_softmax(-1))  # pyright: ignore
            e.append(differences(seen))
    widths = [part.shape[-1] for part in e]
    if len(set(widths)) > 1:
        raise UserError(
            f"members give {', '.join(map(str, widths))} features; the one network that reads them needs the same number of all"
        )
    return torch.stack(log_p, 1), torch.stack(e, 1)
