"""Attention seen from inside: the moments of queries, keys and attention-weighted inputs (BoA 4.1, aespa 3.2 and 3.3).

`transformers` calls one function, chosen by name, for the attention of nearly every model. Ours is ordinary attention
until a module is being observed; then it forms the attention matrix explicitly, a few queries at a time, and adds up
K^T K, Q^T Q and X A^T A X^T. Other implementations copy and edit whole modelling files for this.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smidgen.errors import UserError
from smidgen.quant.families import Attention
from smidgen.quant.stats import Stats, add_gram, exact_products, symmetrize

NAME = "smidgen"  # of our attention function
QUERIES = 128  # rows of the attention matrix formed at once


def autocast_type(x: Tensor) -> Tensor:
    """`x` as a linear layer under autocast will read it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class HeadMoments:
    """K^T K, Q^T Q and X A^T A X^T of every head, summed over tokens while `attention` runs.

    One entry per key/value head; the query heads that share it are summed. `inputs` returns what the projections
    of the running attention were given.
    """

    def __init__(self, attention: nn.Module, family: Attention, inputs: Callable[[], Tensor]) -> None:
        self.attention, self.family, self.inputs = attention, family, inputs
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self.sharing = 1
        _observers[attention] = self

    def close(self) -> None:
        """Detaches from the attention module."""
        _observers.pop(self.attention, None)

    def observe(
        self,
        q: Float[Tensor, "batch heads length dim"],
        k: Float[Tensor, "batch kv_heads length dim"],
        v: Float[Tensor, "batch kv_heads length dim"],
        mask: Tensor | None,
        scaling: float,
    ) -> Float[Tensor, "batch heads length dim"]:
        """Adds one batch; returns the attention output. Causal by construction, and the mask is checked to be so."""
        x = autocast_type(self.inputs())
        batch, heads, length, kv = *q.shape[:3], k.shape[1]
        self.sharing = heads // kv
        self.tokens += batch * length
        self._add("keys", k)
        self._add("queries", q.unflatten(1, (kv, self.sharing)))

        def mixed(a: Tensor, stop: int) -> None:
            self._add("values", (a.flatten(1, 3) @ x[:, :stop]).unflatten(1, (kv, -1)))  # rows of A X^T

        return attend(q, k, v, mask, scaling, x.dtype, mixed)

    def _add(self, name: str, rows: Float[Tensor, "batch kv_heads *n width"]) -> None:
        kv, width = rows.shape[1], rows.shape[-1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(kv, width, width, device=rows.device)
        for head in range(kv):
            add_gram(self.sums[name][head], rows[:, head].reshape(-1, width))

    def stats(self, h_in: Float[Tensor, "1 in in"], angles: tuple[Tensor, Tensor] | None) -> dict[str, Stats]:
        """Statistics of the query, key and value rows; `angles` are the tables of cosines and sines, if there are any."""
        means = {name: symmetrize(total) / self.tokens for name, total in self.sums.items()}
        keys, queries, values = means["keys"], means["queries"] / self.sharing, means["values"] / self.sharing
        switch = self.family.rotary_switch
        if angles is not None and (switch is None or vars(self.attention)[switch]):
            keys, queries = (rotary_mean(t, *angles) for t in (keys, queries))
        keys = with_gain(keys, self.attention, self.family.query_norm)
        queries = with_gain(queries, self.attention, self.family.key_norm)
        return {
            "query": Stats(h_in, keys.repeat_interleave(self.sharing, 0), self.tokens),
            "key": Stats(h_in, queries, self.tokens),
            "value": Stats(values, None, self.tokens),
        }


def with_gain(h_out: Float[Tensor, "heads dim dim"], attention: nn.Module, norm: str | None) -> Float[Tensor, "heads dim dim"]:
    """The row factor seen through a QK-norm's gain.

    The authors' code ignores the norm. Its gain scales each coordinate; its division by the root mean square is
    left out, as theirs is.
    """
    if norm is None:
        return h_out
    gain = attention.get_parameter(f"{norm}.weight").float()
    return h_out * gain[:, None] * gain


def attend(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"],
    v: Float[Tensor, "batch kv_heads length dim"],
    mask: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    visit: Callable[[Tensor, int], None] | None = None,
) -> Float[Tensor, "batch heads length dim"]:
    """Attention with its matrix formed explicitly, `QUERIES` rows at a time; keys after a row's query are never read.

    `visit(a, stop)` sees every part of the matrix in `dtype`, (batch, kv_heads, sharing, queries, stop).
    """
    length, kv = q.shape[2], k.shape[1]
    mask = causal(mask, length, q.device)
    plain = bool(mask.sum() == mask.shape[0] * length * (length + 1) // 2)  # nothing hidden but the future
    grouped = q.unflatten(1, (kv, -1))
    out = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        rows = mask[:, :, start:stop, :stop]
        a = probabilities(grouped[..., start:stop, :], k[:, :, :stop], rows, scaling, start if plain else 0).to(dtype)
        out.append((a.flatten(2, 3) @ v[:, :, :stop].to(dtype)).unflatten(2, (-1, stop - start)).flatten(1, 2))
        if visit is not None:
            visit(a, stop)
    return torch.cat(out, 2)


def causal(mask: Tensor | None, length: int, device: torch.device) -> Bool[Tensor, "batch 1 length length"]:
    """The attention mask, True where a query may look; an error if it may look ahead."""
    triangle = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    if mask is None:
        return triangle
    if mask.dtype != torch.bool:
        raise UserError("attention mask of an unknown kind; this architecture is not supported")
    if bool((mask & ~triangle).any()):
        raise UserError("attention is not causal: a query would see later tokens, and its statistics would be wrong")
    return mask


def probabilities(
    q: Float[Tensor, "batch kv sharing queries dim"],
    k: Float[Tensor, "batch kv keys dim"],
    mask: Bool[Tensor, "some 1 queries keys"],
    scaling: float,
    seen: int = 0,
) -> Float[Tensor, "batch kv sharing queries keys"]:
    """Rows of the attention matrix, in float32, of queries and keys as the forward pass reads them.

    Every query may look at the first `seen` keys, so the mask is not read there.
    """
    q, k = autocast_type(q), autocast_type(k)
    with torch.autocast(q.device.type, enabled=False), exact_products(q.dtype == torch.bfloat16 and not q.is_cuda):
        scores = (q.float() @ k.float()[:, :, None].mT).mul_(scaling)
        scores[..., seen:].masked_fill_(~mask[:, :, None, :, seen:], -torch.inf)
        return scores.softmax(-1)


def rotary_mean(
    m: Float[Tensor, "heads dim dim"], cos: Float[Tensor, "batch length rotated"], sin: Float[Tensor, "batch length rotated"]
) -> Float[Tensor, "heads dim dim"]:
    """Mean over positions t of R_t^T m R_t, R_t the rotary rotation (aespa 3.3), without forming any R_t.

    R_t = C_t + S_t P with C, S diagonal and P the signed permutation of `rotate_half`, so the mean needs only the
    mean outer products of the tables:  m*CC + (m*CS) P + P^T (m*SC) + P^T (m*SS) P.  Coordinates beyond the
    rotated ones have cos = 1, sin = 0.
    """
    dim, rotated = m.shape[-1], cos.shape[-1]
    c, s = (pad(t[0].double(), (0, dim - rotated), value=fill) for t, fill in ((cos, 1.0), (sin, 0.0)))
    cc, cs, ss = c.T @ c / len(c), c.T @ s / len(c), s.T @ s / len(c)
    half = rotated // 2
    p = torch.zeros(dim, dim, dtype=torch.float64, device=m.device)
    i = torch.arange(half, device=m.device)
    p[i, i + half], p[i + half, i] = -1.0, 1.0
    d = m.double()
    return (d * cc + (d * cs) @ p + p.T @ (d * cs.T) + p.T @ (d * ss) @ p).to(m.dtype)


_observers: dict[nn.Module, HeadMoments] = {}


def attention_forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What `transformers` calls (so are its arguments); returns (batch, length, heads, dim)."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError("models with soft-capped scores or attention sinks are not supported")
    factor = q.shape[-1] ** -0.5 if scaling is None else scaling
    observer = _observers.get(module)
    if observer is not None:
        out = observer.observe(q, k, v, mask, factor)
    elif q.is_cuda:
        q, k, v = (autocast_type(t) for t in (q, k, v))
        return sdpa_attention_forward(module, q, k, v, mask, scaling=factor, **kwargs)[0], None
    else:  # twice as fast on a processor as its fused kernel
        out = attend(q, k, v, mask, factor, autocast_type(q).dtype)
    return out.transpose(1, 2).contiguous(), None


def explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """A boolean mask, always there: `None` would leave causality to a flag."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, explicit_mask)
