"""What a feature is compared by: what it says of itself, and what people said who wanted it.

    v_f     mean of the vectors of its views (features.py), brought to length 1
    e_f     mean of the vectors of its example queries, brought to length 1
    s_f = max(u . v_f, u . e_f)

People who want the same thing say it alike, and a title is no sentence: of Android's settings, untrained MiniLM finds 61% of the contextual
development queries among its first ten by v_f, and 96% with e_f beside it. Examples have a price: a feature without them competes with
others that are spoken for. Its e_f is therefore guessed from those of the others (expected.py), and both its vectors are made longer by a
factor, the lift: the larger, the sooner they are found, and the sooner they stand before others.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smidgen.search.bert import Encoder
from smidgen.search.contrastive import Views, cosines
from smidgen.search.expected import expected
from smidgen.search.features import Feature, Query

LIFT = 1.15  # the least by which features left out lose less than 8 points of hit@10; chosen on development queries (docs/search.md)


def sides(
    encoder: Encoder, features: Sequence[Feature], examples: Sequence[Query], lift: float = LIFT
) -> Float[Tensor, "features 2 width"]:
    """v_f and e_f of every feature; where there are no examples v_f and the expected e_f, or v_f again, times `lift`."""
    views = Views(encoder, features)
    return with_examples(views.means(views.bank(encoder.model)), encoder, features, examples, lift)


def with_examples(
    texts: Float[Tensor, "features width"], encoder: Encoder, features: Sequence[Feature], examples: Sequence[Query], lift: float
) -> Float[Tensor, "features 2 width"]:
    """The same from v_f; an example counts for all features that answer it."""
    number = {feature.id: i for i, feature in enumerate(features)}
    pairs = [(number[name], i) for i, query in enumerate(examples) for name in query.relevant]
    if not pairs:
        return torch.stack([texts, texts], 1)
    feature, query = torch.tensor(pairs, device=texts.device).T
    said = encoder.encode([q.query for q in examples])[query]
    sums = torch.zeros_like(texts).index_add(0, feature, said)
    spoken_for = torch.zeros(len(texts), 1, dtype=torch.bool, device=texts.device).index_fill(0, feature, True)
    e = F.normalize(sums, dim=-1)
    known = spoken_for[:, 0].cpu().numpy()
    guess = expected(texts.cpu().numpy(), e.cpu().numpy()[known], known)
    guess = texts if guess is None else torch.from_numpy(guess).to(texts)
    return torch.stack([torch.where(spoken_for, texts, lift * texts), torch.where(spoken_for, e, lift * guess)], 1)


def relevance(u: Float[Tensor, "n width"], bank: Float[Tensor, "features 2 width"]) -> Float[Tensor, "n features"]:
    """s of queries and features."""
    return cosines(u, bank.flatten(0, 1)).unflatten(1, bank.shape[:2]).amax(-1)
