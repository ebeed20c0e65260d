"""Label propagation: labels flow from the support to all queries at once, through a graph of neighbours.

    Zhou et al., Learning with Local and Global Consistency, NIPS 2004; as Liu et al. use it, TPN, ICLR 2019

    W_ij = exp( -1/2 d( f_i / sigma_i , f_j / sigma_j ) )      d: squared Euclidean distance divided by the number of features
    W <- W_ij where among the k largest of row i or of row j   the diagonal, 1, takes one of the k places
    S = D^-1/2 W D^-1/2                                        D_ii = sum_j W_ij
    F* = (I - alpha S)^-1 Y                                    Y: one-hot rows of the support, zero rows of the queries
    p_i = softmax_n F*_in

f_i are embeddings of all n nodes of a task, support first. Here sigma is one number, to be chosen on validation tasks (prototypes.choose);
in tpn.py a network gives each node its own. F* is the limit of F <- alpha S F + (1 - alpha) Y without the factor 1 - alpha: the class is
the same, but the logits are 100 times larger, which the loss of TPN counts on. I - alpha S is symmetric positive definite (the spectrum of
S lies in [-1, 1]), hence the Cholesky solve.

Worked by hand: two nodes alike, the first labelled class 0, k = 2. W = [[1 1] [1 1]], S = 1/2 W, and with alpha = 0.5
F* = [[0.75 0.25] [0.25 0.75]]^-1 [1 0]^T = [1.5 0.5]^T.

sigma matters more than anything else here. Where it is too wide all nodes are joined, F*_in hangs on the degree of class n's support
node for every i, and one class takes all queries: 5 Gaussian classes, 1 shot, 16 features: 0.82 correct with a fifth of the `spread`,
0.36 with half of it, 0.71 with prototypes. Choose it on validation tasks of the size of those to come.

Padding has no edges. Balanced queries flatter heads like this: see `rebalanced`, our correction, off by default.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, capturing
from smidgen.fewshot.methods.prototypes import cross_entropy, embedded, full_precision, one_hot, real_nodes, squared_distances

Solve = Callable[[Tensor, Tensor, float], Tensor]
"(S, Y, alpha) -> F*"

ROUNDS = 10  # of estimating class shares
REMAINDER = 1e-8  # of `doubling`, relative


def affinity(
    x: Float[Tensor, "tasks n width"], sigma: Float[Tensor, "tasks n"], real: Bool[Tensor, "tasks n"]
) -> Float[Tensor, "tasks n n"]:
    """W before neighbours are chosen; rows and columns of padding are 0."""
    x = x / sigma[..., None]
    other = 1 - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.exp(-0.5 * squared_distances(x, x) * other / x.shape[2])
    return w * (real[:, None] & real[..., None]).to(x.dtype)


def sparse(w: Float[Tensor, "tasks n n"], k: int) -> Float[Tensor, "tasks n n"]:
    """W with the k largest entries of each row, or of each column (union rule, of the authors' code): symmetric."""
    first = (torch.arange(w.shape[-1], device=w.device) < k).to(w.dtype)
    order = w.detach().argsort(dim=-1, descending=True)
    among = torch.zeros_like(w).scatter(-1, order, first.expand(w.shape))
    return w * torch.maximum(among, among.mT)


def normalized(w: Float[Tensor, "tasks n n"]) -> Float[Tensor, "tasks n n"]:
    """S; zero rows, of padding, stay zero."""
    degree = w.sum(-1)
    scale = torch.where(degree > 0, degree, 1).rsqrt()
    return scale[..., None] * w * scale[:, None]


def cholesky(s: Float[Tensor, "tasks n n"], y: Float[Tensor, "tasks n ways"], alpha: float) -> Float[Tensor, "tasks n ways"]:
    """F* = (I - alpha S)^-1 Y."""
    matrix = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) - alpha * s
    return torch.cholesky_solve(y, torch.linalg.cholesky(matrix))


def doubling(s: Float[Tensor, "tasks n n"], y: Float[Tensor, "tasks n ways"], alpha: float) -> Float[Tensor, "tasks n ways"]:
    """F* by products of matrices alone ("Neumann doubling"), for ONNX and CUDA graphs, which have no solver. With A = alpha S

        (I - A)^-1 Y = (I + A^(2^(K-1))) ... (I + A^4) (I + A^2) (I + A) Y + remainder

    The product is sum_{j < 2^K} A^j Y, and the remainder A^(2^K) (I - A)^-1 Y is at most alpha^(2^K) of the solution in the Euclidean
    norm, S being symmetric with its spectrum in [-1, 1]. K is the least that makes it 1e-8: 11 for alpha = 0.99; conjugate gradients
    would need 120 steps of ten small operators each. What single precision loses besides, a step of iterative refinement wins back.
    """
    powers = [alpha * s]
    for _ in range(doublings(alpha) - 1):
        powers.append(powers[-1] @ powers[-1])

    def inverse(b: Tensor) -> Tensor:
        for power in powers:
            b = b + power @ b
        return b

    f = inverse(y)
    return f + inverse(y - (f - alpha * s @ f))


def doublings(alpha: float) -> int:
    """K: the least with alpha^(2^K) <= 1e-8."""
    return 0 if alpha == 0 else max(0, math.ceil(math.log2(math.log(REMAINDER) / math.log(alpha))))


def iterated(s: Float[Tensor, "tasks n n"], y: Float[Tensor, "tasks n ways"], alpha: float, steps: int) -> Float[Tensor, "tasks n ways"]:
    """F of `steps` times F <- alpha S F + (1 - alpha) Y from F = Y; tends to (1 - alpha) F*. The papers' ten steps cost 0.7 points."""
    f = y
    for _ in range(steps):
        f = alpha * s @ f + (1 - alpha) * y
    return f


def rebalanced(f: Float[Tensor, "tasks n ways"], asked: Bool[Tensor, "tasks n"], strength: float) -> Float[Tensor, "tasks n ways"]:
    """Scores corrected for unequal shares of the classes among the queries; of our own, in no paper.

    Labels of every class spread one mass over the nodes, as if queries came in equal shares: where they do not, a rare class's mass leaks
    into the common ones. Read F_in, divided by its sum over nodes, as the density of class n at node i. What all classes have at a node,
    the background of walks that forgot where they started, is no evidence and taken off. Then votes and shares are found in turn,

        G_in = F_in / sum_j F_jn - min_m F_im / sum_j F_jm
        pi_n = 0.9 (share of queries i with n = argmax_m pi_m^strength G_im) + 0.1 / ways           from equal shares

    and G pi^strength, brought back to the size of F, are the scores. Strength 0 is plain propagation. The estimate is only as good as the
    votes: take a strength from validation tasks with shares like those to come (prototypes.choose), 0 among the candidates. Gradients pass
    the scores, not the shares. A query without a path from the support keeps zero scores and no vote.

    In our tests, with few neighbours and a moderate alpha, it wins back more than half of what Dirichlet queries cost with 5 shots and a
    third with 1. With k = 20, alpha = 0.99 and a good sigma they cost about a point, and there is little to win.
    """
    ways = f.shape[-1]
    mass = f.sum(1, keepdim=True)  # (tasks, 1, ways)
    density = f / mass.clamp(min=1e-12)
    evidence = density - density.amin(-1, keepdim=True)
    voters = (asked & (f.sum(-1) > 0))[..., None].to(f.dtype)
    count = voters.sum(1, keepdim=True).clamp(min=1)
    shares = torch.full_like(mass, 1 / ways)
    classes = torch.arange(ways, device=f.device)
    for _ in range(ROUNDS):
        votes = ((evidence.detach() * shares**strength).argmax(-1, keepdim=True) == classes) * voters
        shares = 0.9 * votes.sum(1, keepdim=True) / count + 0.1 / ways
    return evidence * (ways * shares) ** strength * mass.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Propagation:
    """From embeddings of a task's nodes to scores F*."""

    k: int = 20
    "Neighbours of a node, itself among them."
    alpha: float = 0.99
    "Share of a node's score that comes from its neighbours."
    balance: float = 0.0
    "Strength of the correction for unbalanced queries (`rebalanced`), 0 .. 1; 0 is the paper's method."

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"a node needs at least 1 neighbour, itself; got k = {self.k}")
        if not 0 <= self.alpha < 1:
            raise UserError(f"alpha must be in 0 .. 1, and below 1 for labels to be told apart; got {self.alpha}")
        if not 0 <= self.balance <= 1:
            raise UserError(f"the strength of the balance correction must be in 0 .. 1; got {self.balance}")

    def __call__(
        self,
        x: Float[Tensor, "tasks n width"],
        sigma: Float[Tensor, "tasks n"],
        y: Float[Tensor, "tasks n ways"],
        real: Bool[Tensor, "tasks n"],
        solve: Solve | None = None,
    ) -> Float[Tensor, "tasks n ways"]:
        """`y` are one-hot rows of labelled nodes, zeros of the others; `real` is False where padded."""
        y = y.to(x.dtype)
        solve = solve or (doubling if capturing(x) else cholesky)
        f = solve(normalized(sparse(affinity(x, sigma, real), self.k)), y, self.alpha)
        return rebalanced(f, real & (y.sum(-1) == 0), self.balance) if self.balance else f


class Propagating(nn.Module, ABC):
    """A backbone, a sigma for every node, and propagation: what label propagation and TPN have in common.

    A batch holds the support and all queries that are to inform each other; unlabelled images may come besides (`unlabelled`): they carry
    labels on, but have none in the loss. For a single query prefer prototypes.py.
    """

    def __init__(self, backbone: nn.Module, propagation: Propagation | None = None) -> None:
        """`backbone`: (images, *image) -> (images, *map)."""
        super().__init__()
        self.backbone, self.propagation = backbone, propagation or Propagation()

    @abstractmethod
    def sigma(self, maps: Float[Tensor, "tasks n *map"], real: Bool[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
        """Of every node; of padding anything but 0."""

    def loss(self, episode: Episode, unlabelled: Float[Tensor, "tasks extra *image"] | None = None) -> Float[Tensor, ""]:
        """Mean cross-entropy over support and queries."""
        return cross_entropy(self.scores(episode, unlabelled), torch.cat([episode.support_y, episode.query_y], 1))

    def predict(
        self, episode: Episode, unlabelled: Float[Tensor, "tasks extra *image"] | None = None, alone: bool = False
    ) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities of the queries. `alone`: each query enters a graph of its own, without the others (TPN-semi)."""
        support = episode.support_y.shape[1]
        if alone:
            return one_by_one(lambda e, u: self.scores(e, u)[:, support:], episode, unlabelled).softmax(-1)
        return self.scores(episode, unlabelled)[:, support:].softmax(-1)

    def scores(self, episode: Episode, unlabelled: Float[Tensor, "tasks extra *image"] | None = None) -> Float[Tensor, "tasks n ways"]:
        """F* of support and queries."""
        maps, y, real = nodes(self.backbone, episode, unlabelled)
        with full_precision(maps):
            return self.head(maps, y, real)[:, : y.shape[1] - extra(unlabelled)]

    def head(
        self,
        maps: Float[Tensor, "tasks n *map"],
        y: Float[Tensor, "tasks n ways"],
        real: Bool[Tensor, "tasks n"],
        solve: Solve | None = None,
    ) -> Float[Tensor, "tasks n ways"]:
        """F* from what the backbone made; what is exported behind it."""
        return self.propagation(maps.flatten(2), self.sigma(maps, real), y, real, solve)

    @torch.no_grad()
    def insides(self, episode: Episode) -> dict[str, Tensor]:
        """For reports: the graph W after neighbours are chosen, and sigma."""
        maps, _, real = nodes(self.backbone, episode)
        with full_precision(maps):
            sigma = self.sigma(maps, real)
            return {"graph": sparse(affinity(maps.flatten(2), sigma, real), self.propagation.k), "sigma": sigma}


class LabelPropagation(Propagating):
    """Label propagation with one sigma over a backbone, or over frozen features (`nn.Identity()`).

    Nothing of it needs training but the backbone, and one trained otherwise (a ProtoNet's, a frozen one) will do.
    """

    def __init__(self, backbone: nn.Module, sigma: float | None = None, propagation: Propagation | None = None) -> None:
        """`sigma` in units of the features; None: a quarter of each task's `spread`, ours, for want of validation tasks."""
        super().__init__(backbone, propagation)
        if sigma is not None and not sigma > 0:
            raise UserError(f"sigma must be positive, got {sigma}")
        self.chosen = sigma

    def sigma(self, maps: Float[Tensor, "tasks n *map"], real: Bool[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
        """The same of every node."""
        x = maps.flatten(2)
        sigma = 0.25 * spread(x, real) if self.chosen is None else x.new_full(x.shape[:1], self.chosen)
        return sigma[:, None].expand(x.shape[:2])


def nodes(
    backbone: nn.Module, episode: Episode, unlabelled: Float[Tensor, "tasks extra *image"] | None = None
) -> tuple[Float[Tensor, "tasks n *map"], Float[Tensor, "tasks n ways"], Bool[Tensor, "tasks n"]]:
    """Maps, labels and reality of support, queries and unlabelled images, in this order; labels of all but the support are zeros."""
    joint = episode
    if unlabelled is not None:
        zeros = episode.query_y.new_zeros(unlabelled.shape[:2])
        joint = replace(episode, query_x=torch.cat([episode.query_x, unlabelled], 1), query_y=torch.cat([episode.query_y, zeros], 1))
    support, query = embedded(backbone, joint)
    y = one_hot(episode.support_y, episode.ways)
    return torch.cat([support, query], 1), nn.functional.pad(y, (0, 0, 0, query.shape[1])), real_nodes(joint)


def one_by_one(
    scores: Callable[[Episode, Tensor | None], Float[Tensor, "_ one ways"]], episode: Episode, unlabelled: Tensor | None
) -> Float[Tensor, "tasks queries ways"]:
    """Scores of queries, each in a task of its own beside the support and the unlabelled images."""
    queries = episode.query_y.shape[1]
    singles = Episode(
        episode.support_x.repeat_interleave(queries, 0),
        episode.support_y.repeat_interleave(queries, 0),
        episode.query_x.flatten(0, 1)[:, None],
        episode.query_y.flatten()[:, None].clamp(min=0),
        episode.ways,
    )
    beside = None if unlabelled is None else unlabelled.repeat_interleave(queries, 0)
    return scores(singles, beside).unflatten(0, episode.query_y.shape).squeeze(2)


def extra(unlabelled: Tensor | None) -> int:
    """Unlabelled nodes of a task."""
    return 0 if unlabelled is None else unlabelled.shape[1]


def spread(x: Float[Tensor, "tasks n width"], real: Bool[Tensor, "tasks n"]) -> Float[Tensor, "tasks"]:
    """Root of the mean squared distance d between two nodes of a task: candidates for sigma are fractions of it.

    It is the root of twice the variance, mean over features: sum_i |x_i - m|^2 = sum_{i<j} |x_i - x_j|^2 / n.
    """
    weight = real[..., None].to(x.dtype)
    count = weight.sum(1, keepdim=True)
    centred = (x - (x * weight).sum(1, keepdim=True) / count) * weight
    variance = centred.square().mean(-1).sum(1) / (count[:, 0, 0] - 1).clamp(min=1)
    return (2 * variance).clamp(min=1e-24).sqrt()
