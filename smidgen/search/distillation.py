"""From a teacher's vectors to a small student of queries.

Only queries are encoded on the device, so only their encoder has to be small: features keep the vectors the teacher gave them (asymmetric;
S. Wang, C. Macdonald et al., Query Encoder Distillation via Embedding Alignment, arXiv 2306.11550). The student starts as the teacher with
layers left out, or as a table of its pieces (static.py).

    u_S, u_T    vectors of a text by student and teacher; where the student is narrower, u_T, v_f and e_f are cut to the directions in
                which texts and features are greatest, and brought to length 1 again
    s_f = max(u . v_f, u . e_f)                          relevance.py
    L = a (1 - u_S . u_T) + b KL( softmax(s_T/t) || softmax(s_S/t) ) + c InfoNCE(s_S, P; t)                             minimised

The first two terms need no labels, so any text will do. Besides queries and features' texts it is made of: queries with a word lost or
half of another query, queries with a word from the vocabulary in place of one, and misspelt queries, for which u_T is that of the right
spelling. Words in pieces, which the smaller vocabulary makes more of, are learnt this way too. InfoNCE is over the rows with labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smidgen.fit import Batches, Loss
from smidgen.search.bert import Encoder
from smidgen.search.contrastive import labels
from smidgen.search.features import Feature, Query
from smidgen.search.losses import alignment, info_nce, list_kl
from smidgen.search.relevance import relevance
from smidgen.search.typos import misspelt

SHARES = {"query": 8 / 18, "misspelt": 3 / 18, "spliced": 4 / 18, "replaced": 3 / 18}  # of what is made of queries


@dataclass(frozen=True)
class Distillation:
    """The method's numbers."""

    alignment: float = 1.0
    "a, the weight of the vectors' alignment."
    list_kl: float = 1.0
    "b, the weight of the scores of all features."
    labels: float = 0.3
    "c, the weight of the labels."
    temperature: float = 0.05
    "t, of the scores."
    texts: float = 0.1
    "Share of what is learnt from that is texts without labels, as they are."


class Batch(NamedTuple):
    """Texts as both networks read them; `labelled` rows have positives."""

    ids: Int[Tensor, "n length"]
    mask: Int[Tensor, "n length"]
    teacher_ids: Int[Tensor, "n other"]
    teacher_mask: Int[Tensor, "n other"]
    labelled: Bool[Tensor, "n"]
    positive: Bool[Tensor, "n features"]
    masked: Bool[Tensor, "n features"]


@dataclass(frozen=True)
class Material:
    """What texts are made of."""

    queries: tuple[Query, ...]
    "With labels."
    texts: tuple[str, ...]
    "Without."
    words: tuple[str, ...]
    "To put into queries."

    @staticmethod
    def of(features: Sequence[Feature], queries: Sequence[Query], more: Sequence[str], teacher: Encoder) -> "Material":
        """`more`: texts besides those of the features."""
        texts = dict.fromkeys([view for feature in features for view in feature.views()] + list(more))
        words = sorted(piece for piece in teacher.tokenizer.get_vocab() if piece.isascii() and piece.isalpha() and len(piece) > 2)
        return Material(tuple(queries), tuple(texts), tuple(words))

    def draw(self, random: np.random.Generator, plain: float = Distillation.texts) -> tuple[str, str, int]:
        """What the student reads, what the teacher reads, and the number of the query whose labels hold, or -1; `plain`: share of texts."""
        if random.random() < plain or not self.queries:
            text = self.texts[random.integers(len(self.texts))]
            return text, text, -1
        kind = random.choice(list(SHARES), p=list(SHARES.values()))
        number = int(random.integers(len(self.queries)))
        text = self.queries[number].query
        if kind == "query":
            return text, text, number
        if kind == "misspelt":
            return misspelt(text, random, int(random.integers(1, 3))), text, number
        words = text.split()
        at = int(random.integers(len(words)))
        if kind == "replaced":
            words[at] = str(self.words[random.integers(len(self.words))])
        else:
            other = self.queries[random.integers(len(self.queries))].query.split()
            words = words[:at] + words[at + 1 :] if random.random() < 0.5 and len(words) > 1 else words[: at + 1] + other[len(other) // 2 :]
        changed = " ".join(words)
        return changed, changed, -1


def batches(
    student: Encoder, teacher: Encoder, material: Material, features: Sequence[Feature], size: int, seed: int, plain: float
) -> Batches:
    """Batches of `size` texts for `fit`, the same for a seed; `plain` is the share of texts without labels."""
    positive, masked = labels(material.queries, features, torch.device("cpu"))

    def batch(i: int) -> Batch:
        random = np.random.default_rng((seed, i))
        read, meant, numbers = zip(*(material.draw(random, plain) for _ in range(size)), strict=True)
        rows = torch.tensor([number for number in numbers if number >= 0], dtype=torch.int64)
        labelled = torch.tensor(numbers) >= 0
        return Batch(*student.tokens(read), *teacher.tokens(meant), labelled, positive[rows], masked[rows])

    return batch


def objective(
    method: Distillation, teacher: Encoder, bank: Float[Tensor, "features 2 narrow"], basis: Float[Tensor, "width narrow"] | None
) -> Loss:
    """L of a batch; `bank` holds v_f and e_f, `basis` the directions that are kept of u_T."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = narrowed(teacher.model(batch.teacher_ids, batch.teacher_mask), basis)
        u = model(batch.ids, batch.mask)
        scores = relevance(u, bank)
        value = method.alignment * alignment(u, target) + method.list_kl * list_kl(scores, relevance(target, bank), method.temperature)
        if method.labels == 0 or not batch.labelled.any():
            return value
        supervised = info_nce(scores[batch.labelled], batch.positive, method.temperature, batch.masked)
        return value + method.labels * batch.labelled.float().mean() * supervised

    return loss


def narrowed(vectors: Float[Tensor, "*n width"], basis: Float[Tensor, "width narrow"] | None) -> Float[Tensor, "*n narrow"]:
    """The components of vectors in a basis, as long as the vectors were."""
    if basis is None:
        return vectors
    with torch.autocast(vectors.device.type, enabled=False):
        return F.normalize(vectors.float() @ basis, dim=-1) * vectors.float().norm(dim=-1, keepdim=True)


def spread(kept: int, layers: int) -> list[int]:
    """Layers to keep: the first, the last, and evenly between.

    >>> spread(3, 6), spread(2, 6)
    ([0, 2, 5], [0, 5])
    """
    return [0] if kept == 1 else [round(i * (layers - 1) / (kept - 1)) for i in range(kept)]
