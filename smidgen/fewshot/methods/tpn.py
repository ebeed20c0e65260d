"""TPN, the transductive propagation network: label propagation whose graph is learned, end to end with the embedding.

    Liu, Lee, Park, Kim, Kim, Yang, Hwang, Learning to Propagate Labels, ICLR 2019, arXiv 1805.10002

    sigma_i = g(f(x_i))         one number per node, support and queries; f the embedding, g the graph module
    F*, p                       as propagation.py has them, with these sigma, k = 20 and alpha = 0.99
    loss                        cross-entropy of p over all nodes, support included, with F* lacking the factor 1 - alpha (100 times larger)

The paper writes the loss as a sum over nodes, the authors' code takes the mean, and so do we; distances divided by the number of features
and the union rule of neighbours are the code's too. "Higher shot" training is a matter of the sampler: 5 shots to be tested with 1, 10 to
be tested with 5. Recipe: Adam, 1e-3, halved every 10,000 episodes, 15 queries a class.

sigma is unconstrained, as in the paper: it may come near zero, and a negative one flips the features of its node. `guard` makes it
softplus(sigma) + 0.01; ours, off by default.

With one shot and embeddings that tell little yet, a small sigma, which joins no node to another, is a trap: such queries cost ln N, less
than confident mistakes do, and their gradient vanishes. Of three seeds one
learned 32 x 32 photographs from there. Ways out: to start from one larger sigma for all nodes (`started`), to train with more shots, or to
let a ProtoNet's loss teach the embedding as well (`prototypes`, off by default); the first and the last are ours.

The graph module is sized from the map it reads, pooling rounding up: of Conv-4 and 84 x 84 images

    map 64 x 5 x 5 -> conv 3x3 64, BN, ReLU, pool -> 64 x 3 x 3 -> conv 3x3 1, BN, ReLU, pool -> 1 x 2 x 2 -> fc 8, ReLU -> fc 1

Over a frozen backbone's flat features g is a small perceptron (`FlatGraph`), which is ours.
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, full
from smidgen.fewshot.methods.propagation import Propagating, Propagation, nodes
from smidgen.fewshot.methods.prototypes import cross_entropy, full_precision, nearest_mean

FLOOR = 0.01  # least sigma with `guard`


class ConvGraph(nn.Sequential):
    """g of the paper: a map to sigma.

    >>> sum(p.numel() for p in ConvGraph((64, 5, 5)).parameters())
    37684
    """

    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        """`shape` of the map it reads: (channels, height, width)."""
        if len(shape) != 3:
            raise UserError(f"the graph module of convolutions reads maps (channels, height, width), not {tuple(shape)}; flat: FlatGraph")
        channels, height, across = shape
        left = ((height + 3) // 4) * ((across + 3) // 4)  # two poolings, each rounding up
        super().__init__(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.BatchNorm2d(1),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(left, 8),
            nn.ReLU(),
            nn.Linear(8, 1),
        )


class FlatGraph(nn.Module):
    """g over flat features, ours: sigma = scale * MLP(f), which starts at `scale` for every node, that is as plain label propagation."""

    scale: Tensor

    def __init__(self, width: int, scale: float = 1.0, hidden: int = 64) -> None:
        """`scale`: a sigma that suits the features, see propagation.spread."""
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)

    def forward(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n 1"]:
        """sigma of every node."""
        return self.scale * self.layers(x / self.scale)


def graph_for(shape: Sequence[int], scale: float = 1.0) -> nn.Module:
    """The graph module for what a backbone makes of one image: a map of 3 axes, or flat features, where sigma starts at `scale`."""
    return ConvGraph(shape) if len(shape) == 3 else FlatGraph(prod(shape), scale)


def started(graph: nn.Module, sigma: float) -> nn.Module:
    """A graph module whose first answer is `sigma` for every node, as plain label propagation has it; ours. 0 leaves it as drawn.

    As drawn, sigma is whatever the last layer makes of noise: where it is small, no nodes are joined, and there is little to learn from.
    One shot of 32 x 32 photographs is not learned at all then (benchmarks/fewshot.py).
    """
    if sigma:
        last = list(graph.modules())[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, sigma)
    return graph


class TPN(Propagating):
    """Propagation with a sigma for every node."""

    def __init__(
        self,
        backbone: nn.Module,
        graph: nn.Module,
        propagation: Propagation | None = None,
        guard: bool = False,
        prototypes: float = 0.0,
    ) -> None:
        """`backbone`: (images, *image) -> (images, *map); `graph`: (images, *map) -> (images, 1)."""
        super().__init__(backbone, propagation)
        self.graph, self.guard, self.prototypes = graph, guard, prototypes

    def loss(self, episode: Episode, unlabelled: Float[Tensor, "tasks extra *image"] | None = None) -> Float[Tensor, ""]:
        """Mean cross-entropy over support and queries, and `prototypes` times that of a ProtoNet on the same embeddings."""
        if not self.prototypes:
            return super().loss(episode, unlabelled)
        maps, y, real = nodes(self.backbone, episode, unlabelled)
        labels, support = torch.cat([episode.support_y, episode.query_y], 1), episode.support_y.shape[1]
        with full_precision(maps):
            x, known = maps.flatten(2)[:, : labels.shape[1]], y[:, :support]
            nearest = nearest_mean(x[:, :support], known, x[:, support:])
            beside = cross_entropy(nearest, episode.query_y)
            return cross_entropy(self.head(maps, y, real)[:, : labels.shape[1]], labels) + self.prototypes * beside

    def sigma(self, maps: Float[Tensor, "tasks n *map"], real: Bool[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
        """Of every node; 1 where padded, which no batch norm sees."""
        if torch.compiler.is_exporting() or full(real):
            sigma = self.graph(maps.flatten(0, 1)).view(real.shape)
        else:
            sigma = maps.new_ones(real.shape).index_put((real,), self.graph(maps[real]).squeeze(1))
        if self.guard:
            sigma = nn.functional.softplus(sigma) + FLOOR
        return sigma
