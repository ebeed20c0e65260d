"""The smallest tier: a vector per piece and no layers; a text is the sum of its pieces' vectors, brought to length 1.

After model2vec (S. Tulkens, T. van Dongen, Minish Lab, 2024): every piece goes through a sentence encoder by itself, the vectors are cut to
their principal components, and common pieces are weighed down as Zipf's law says they should be,

    E[p] = a / (a + prob(p)) PCA(f("p")),   prob(p) ~ 1 / (rank of p + 2)                a = 1e-4 (SIF, Arora et al. 2017)

The rank is the piece's number: BERT's uncased vocabulary is ordered by how common words are. Such a table is blind to order; trained on
towards a teacher (distill.py) it learns what a word weighs among the others.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.search.bert import Encoder

SIF = 1e-4


class Table(nn.Module):
    """Piece numbers -> one vector of length 1 a text; 0 for a text without pieces."""

    def __init__(self, rows: Float[Tensor, "vocabulary width"]) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, ids: Int[Tensor, "n length"], mask: Int[Tensor, "n length"]) -> Float[Tensor, "n width"]:
        """`mask` is 1 at real tokens, 0 at padding."""
        return F.normalize((self.rows[ids] * mask[..., None]).sum(1), dim=-1)


def components(vectors: Float[Tensor, "n width"], count: int, centred: bool = False) -> Float[Tensor, "width count"]:
    """Directions of the greatest square sums, or, centred, of the greatest variance."""
    x = (vectors - vectors.mean(0) if centred else vectors).double()
    values, directions = torch.linalg.eigh(x.T @ x)
    return directions[:, values.argsort(descending=True)[:count]].to(vectors.dtype)


def static(encoder: Encoder, width: int = 256, basis: Float[Tensor, "full width"] | None = None) -> Encoder:
    """The table of an encoder's pieces; `basis`: what to keep of their vectors, in place of their own principal components."""
    vocabulary = encoder.tokenizer.get_vocab_size()
    single = pieces(encoder, vocabulary)
    if basis is None:
        single = single - single.mean(0)
        basis = components(single, min(width, single.shape[1]))
    probability = 1 / torch.arange(2, vocabulary + 2, device=single.device)
    weights = SIF / (SIF + probability / probability.sum())
    return replace(encoder, model=Table(single @ basis * weights[:, None]), special=False)


@torch.no_grad()
def pieces(encoder: Encoder, vocabulary: int, batch: int = 256) -> Float[Tensor, "vocabulary width"]:
    """The encoder's vector of every piece by itself, between [CLS] and [SEP]."""
    first, last = encoder.tokenizer.encode("").ids
    parts = []
    for ids in torch.arange(vocabulary, device=encoder.device).split(batch):
        around = torch.stack([torch.full_like(ids, first), ids, torch.full_like(ids, last)], 1)
        parts.append(encoder.model(around, torch.ones_like(around)))
    return torch.cat(parts)
