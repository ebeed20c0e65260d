"""Contrastive fine-tuning of a relevance model.

In the shape of: J. Kim, K. Lee, H. Shin, H. Lee, S. Kang, B. Choi, D. Shin, J. Lee, Intuitive Access to Smartphone Settings Using
Relevance Model Trained by Contrastive Learning, AAAI 2023 (arXiv 2307.09177): a pre-trained language model becomes one encoder of queries
and of features, whose vectors are computed beforehand. What the paper says of losses and data we do not know; what follows is ours.

    u_i                 vector of query i, of length 1
    v_f                 mean of the vectors of feature f's views (features.py), brought to length 1
    V                   all v_f, from a bank of views as they were at the last refresh; of every feature that a batch needs one view,
                        drawn at random, is computed anew, with gradients
    s_if = u_i . v_f
    L = InfoNCE(s, P; t) + a KL( softmax(s/t) || softmax(s'/t) )                  minimised; s' are the scores of the misspelt queries

InfoNCE is over all features, an exact softmax. Positives P are the labelled features. Features of the same title, which only their place
tells apart from a positive, are left out of the row. Needed are the batch's positives and its hard negatives: of every query the
`hard` best-scored features that score below 0.95 of its positive; above that they may well be answers nobody labelled (TopK-PercPos of
NV-Retriever, arXiv 2407.15831). The second term is self-teaching (arXiv 2204.00716): a slip of the thumb changes WordPiece's pieces
wholesale, and must not change the answers.

Besides people's queries, the features' own titles, keywords and options are queries, each for its feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smidgen.fit import Batches, Loss, shuffled
from smidgen.search.bert import Encoder
from smidgen.search.features import Feature, Query
from smidgen.search.losses import info_nce, list_kl
from smidgen.search.typos import corrupted

FILTER = 0.95  # of the positive's score


@dataclass(frozen=True)
class Contrastive:
    """The method's numbers."""

    temperature: float = 0.05
    "t, of the scores."
    hard: int = 1
    "Hard negatives of a query that are computed anew."
    filter: float = FILTER
    "Of the positive's score, above which a feature is no hard negative."
    teaching: float = 1.0
    "a, the weight of self-teaching; 0: none."
    misspelt: float = 0.25
    "Share of a batch that self-teaching is done with."
    refresh: int = 25
    "Updates between refreshes of the bank."


class Batch(NamedTuple):
    """Queries and what answers them."""

    ids: Int[Tensor, "n length"]
    mask: Int[Tensor, "n length"]
    typo_ids: Int[Tensor, "k other"]
    "The first k queries, misspelt."
    typo_mask: Int[Tensor, "k other"]
    positive: Bool[Tensor, "n features"]
    masked: Bool[Tensor, "n features"]


class Views:
    """Views of all features as one table of tokens, and what an encoder makes of them."""

    def __init__(self, encoder: Encoder, features: Sequence[Feature]) -> None:
        texts = [feature.views() for feature in features]
        counts = torch.tensor([len(views) for views in texts], device=encoder.device)
        self.owner = torch.arange(len(features), device=encoder.device).repeat_interleave(counts)
        self.counts, self.first = counts, counts.cumsum(0) - counts
        self.ids, self.mask = (t.to(encoder.device) for t in encoder.tokens([text for views in texts for text in views]))

    def one_each(self, chosen: Int[Tensor, "k"]) -> Int[Tensor, "k"]:
        """The number of a view of every chosen feature, at random."""
        return self.first[chosen] + (torch.rand(len(chosen), device=chosen.device) * self.counts[chosen]).long()

    def encode(self, model: nn.Module, rows: Int[Tensor, "k"] | None = None, size: int = 48) -> Float[Tensor, "k width"]:
        """Vectors of some views or of all, in groups of like length, so that there is little padding."""
        rows = torch.arange(len(self.owner), device=self.owner.device) if rows is None else rows
        order = self.mask[rows].sum(1).argsort(stable=True)
        parts = []
        for part in rows[order].split(size):
            mask = self.mask[part]
            length = int(mask.sum(1).max())
            parts.append(model(self.ids[part, :length], mask[:, :length]))
        return torch.cat(parts)[order.argsort()]

    def means(self, vectors: Float[Tensor, "views width"]) -> Float[Tensor, "features width"]:
        """v_f of all features from the vectors of all views."""
        sums = torch.zeros(len(self.counts), vectors.shape[1], device=vectors.device)
        return F.normalize(sums.index_add(0, self.owner, vectors), dim=-1)

    @torch.no_grad()
    def bank(self, model: nn.Module) -> Float[Tensor, "views width"]:
        """Vectors of all views, in evaluation mode."""
        training = model.training
        model.eval()
        vectors = self.encode(model)
        model.train(training)
        return vectors


def labels(queries: Sequence[Query], features: Sequence[Feature], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positives, and unlabelled features that share a positive's title, both bool (queries, features)."""
    number = {f.id: i for i, f in enumerate(features)}
    positive = torch.zeros(len(queries), len(features), dtype=torch.bool)
    for i, query in enumerate(queries):
        positive[i, [number[name] for name in query.relevant]] = True
    title = {name: i for i, name in enumerate(dict.fromkeys(f.title.casefold() for f in features))}
    titles = torch.tensor([title[f.title.casefold()] for f in features])
    same = titles[:, None] == titles
    masked = (positive.float() @ same.float() > 0) & ~positive
    return positive.to(device), masked.to(device)


def own_queries(features: Sequence[Feature]) -> tuple[Query, ...]:
    """Titles, keywords and options as queries; what several features are called counts for all of them."""
    answers: dict[str, dict[str, None]] = {}
    for feature in features:
        for text in (feature.title, *feature.keywords, *feature.options):
            answers.setdefault(text, {})[feature.id] = None
    return tuple(Query(text, tuple(names), "keyword") for text, names in answers.items())


def batches(encoder: Encoder, queries: Sequence[Query], features: Sequence[Feature], size: int, misspelt: float, seed: int) -> Batches:
    """Batches of `size` queries for `fit`, a share of them with a misspelt twin."""
    positive, masked = labels(queries, features, torch.device("cpu"))
    order = shuffled(torch.arange(len(queries)), min(size, len(queries)), seed)

    def batch(i: int) -> Batch:
        rows = order(i)
        texts = [queries[r].query for r in rows.tolist()]
        wrong = encoder.tokens(corrupted(texts[: round(misspelt * len(texts))], seed=seed * 1_000_003 + i))
        return Batch(*encoder.tokens(texts), *wrong, positive[rows], masked[rows])

    return batch


def objective(method: Contrastive, views: Views) -> Loss:
    """L of a batch, with a bank of its own that is refreshed as it goes."""
    bank = torch.zeros(0)
    calls = 0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal bank, calls
        if calls % method.refresh == 0:
            bank = views.bank(model)
        calls += 1
        u = model(batch.ids, batch.mask)
        chosen = computed_anew(cosines(u.detach(), views.means(bank)), batch.positive, batch.masked, method)
        rows = views.one_each(chosen)
        fresh = views.encode(model, rows)
        v = views.means(bank.index_copy(0, rows, fresh))
        bank = bank.index_copy(0, rows, fresh.detach())
        value = info_nce(cosines(u, v), batch.positive, method.temperature, batch.masked)
        if method.teaching == 0 or not len(batch.typo_ids):
            return value
        wrong, right = model(batch.typo_ids, batch.typo_mask), u[: len(batch.typo_ids)]
        return value + method.teaching * list_kl(cosines(wrong, v), cosines(right, v), method.temperature)

    return loss


def cosines(u: Float[Tensor, "n width"], v: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """Of vectors of length 1; in float32 under autocast too: bfloat16 would round a cosine to 0.004, which is 0.08 of a logit."""
    with torch.autocast(u.device.type, enabled=False):
        return u.float() @ v.float().T


def computed_anew(
    scores: Float[Tensor, "n features"], positive: Bool[Tensor, "n features"], masked: Bool[Tensor, "n features"], method: Contrastive
) -> Int[Tensor, "k"]:
    """The batch's positives and hard negatives, ascending.

    >>> scores = torch.tensor([[0.90, 0.80, 0.79, 0.10]])
    >>> positive = torch.tensor([[False, True, False, False]])  # 0.90 and 0.79 are above 0.95 * 0.80
    >>> computed_anew(scores, positive, torch.zeros_like(positive), Contrastive(hard=1)).tolist()
    [1, 3]
    """
    chosen = positive.any(0)
    bound = method.filter * scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    allowed = scores.masked_fill(positive | masked | (scores > bound), -torch.inf)
    best = allowed.topk(min(method.hard, scores.shape[1]), 1)
    chosen[best.indices[best.values > -torch.inf]] = True
    return chosen.nonzero()[:, 0]


def interpolated(start: dict[str, Tensor], end: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """(1 - w) start + w end (WiSE-FT, arXiv 2109.01903): w = 0 the start, 1 the trained network, bit for bit."""
    return {name: torch.lerp(start[name], end[name], weight) for name in start}


def groups(model: nn.Module, rate: float, decay: float, weight_decay: float = 0.01) -> list[dict]:
    """Parameter groups: the table of words stays, every layer learns `decay` times as fast as the one above.

    Norms and biases are not drawn to 0.
    """
    depth = len(model.get_submodule("layers")._modules)
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name == "words.weight":
            continue
        below = depth - 1 - int(name.split(".")[1]) if name.startswith("layers.") else depth
        found.setdefault((below, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "lr": rate * decay**below, "weight_decay": weight_decay if matrix else 0.0}
        for (below, matrix), members in found.items()
    ]
