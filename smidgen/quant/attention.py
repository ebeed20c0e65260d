"""Attention seen from inside: the moments of queries, keys and attention-weighted inputs (BoA 4.1, aespa 3.2 and 3.3).

`transformers` calls one function, chosen by name, for the attention of nearly every model. Ours is ordinary attention
until a module is being observed; then it forms the attention matrix explicitly, a few queries at a time, and adds up
K^T K, Q^T Q and X A^T A X^T. Other implementations copy and edit whole modelling files for this.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smidgen.errors import UserError
from smidgen.quant.linear import weight_of
from smidgen.quant.stats import Moments, Stats, exact_products

if TYPE_CHECKING:
    from smidgen.quant.blocks import Block, Matrix
    from smidgen.quant.families import Family

NAME = "smidgen"  # of our attention function
QUERIES = 128  # rows of the attention matrix formed at once
ON_CUDA = 8  # times as many there, where the time goes into starting kernels
SAMPLED = 16  # one query in so many is enough for the first-order factor


def autocast_type(x: Tensor) -> Tensor:
    """`x` as a linear layer under autocast will read it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class HeadMoments:
    """K^T K, Q^T Q and X A^T A X^T of every head, summed over tokens while `attention` runs.

    One entry per key/value head; the query heads that share it are summed. `inputs` returns what the projections
    of the running attention were given.
    """

    def __init__(self, block: "Block", moments: Moments, inputs: Callable[[], Tensor], needs: frozenset[str]) -> None:
        assert block.family is not None
        self.family = block.family.attention
        self.attention = block.module.get_submodule(self.family.module)
        self.moments, self.inputs, self.needs = moments, inputs, needs
        self.angles = self._angles(block.arguments.get("position_embeddings"))
        self.output = weight_of(self.attention.get_submodule(self.family.output))
        self.sharing = 1
        self.query_factor: Tensor | None = None
        _observers[self.attention] = self

    def _angles(self, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, where this layer uses them."""
        switch = self.family.rotary_switch
        return tables if switch is None or vars(self.attention)[switch] else None

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
        self.sharing, tokens = heads // kv, batch * length
        keys = k - k.mean(2, keepdim=True) if "centred" in self.needs else k
        self.moments.add("keys", rows_of(keys), tokens, paired=False)
        self.moments.add("queries", rows_of(q.unflatten(1, (kv, self.sharing))), tokens * self.sharing, paired=False)

        def visit(a: Tensor, stop: int) -> None:
            mixed = (a.flatten(1, 3) @ x[:, :stop]).unflatten(1, (kv, -1))  # rows of A X^T
            self.moments.add("values", rows_of(mixed), batch * a.shape[3] * self.sharing)
            if "first_order" in self.needs and not self.moments.reference:
                self._add_first_order(a, k[:, :, :stop].float(), v[:, :, :stop].float(), stop)

        return attend(q, k, v, mask, scaling, x.dtype, visit)

    def _add_first_order(self, a: Float[Tensor, "batch kv sharing queries stop"], k: Tensor, v: Tensor, stop: int) -> None:
        """Adds R_t^T M_t^T W_O^T W_O M_t R_t of a few queries t.

        M_t = sum_u p_u (v_u - v_mean)(k_u - k_mean)^T is how attention output t moves with its query, to first order.
        """
        queries = torch.arange(0, a.shape[3], SAMPLED, device=a.device)
        p = a[..., queries, :].float()
        with torch.autocast(a.device.type, enabled=False):
            m = torch.einsum("bkgtu,bkuv,bkud->bkgtvd", p, v, k) - (p @ v[:, :, None])[..., None] * (p @ k[:, :, None])[..., None, :]
            if self.angles is not None:
                cos, sin = (t[0, stop - a.shape[3] + queries].float()[:, None] for t in self.angles)
                m = rotated_back(m, cos, sin)
            seen = self._output_gram(a.shape[1])[:, :, None] @ m  # of what the output projection makes of it
            factor = (m.mT @ seen).sum((0, 3))
        factor = factor.flatten(0, 1)
        self.query_factor = factor if self.query_factor is None else self.query_factor + factor

    def _output_gram(self, kv: int) -> Float[Tensor, "kv sharing dim dim"]:
        """W_O^T W_O of every query head's columns of the output projection."""
        heads = self.output.unflatten(1, (kv, self.sharing, -1)).permute(1, 2, 0, 3)
        return heads.mT @ heads

    def stats(self, query: Stats) -> dict[str, Stats]:
        """Statistics of the query, key and value rows; `query` are those of the queries' inputs, which the keys share."""
        means = {name: self.moments.stats(name) for name in ("keys", "queries", "values")}
        keys, queries, values = means["keys"].h_in, means["queries"].h_in, means["values"].per(self.sharing)
        if self.angles is not None:
            keys, queries = (rotary_mean(t, *self.angles) for t in (keys, queries))
        keys = keys.repeat_interleave(self.sharing, 0) if self.query_factor is None else self.query_factor
        keys = with_gain(keys, self.attention, self.family.query_norm, self.family.gain_offset)
        queries = with_gain(queries, self.attention, self.family.key_norm, self.family.gain_offset)
        if "value_rows" in self.needs:
            values = replace(values, h_out=self._output_gram(len(queries)).sum(1))
        return {"query": replace(query, h_out=keys), "key": replace(query, h_out=queries), "value": values}


class Replay:
    """Attention that, once its projections are solved, is computed once per batch: what follows can be run again, changed, without it.

    What it keeps of a batch is what the output projection reads, and once that is solved as well, what it returns.
    """

    def __init__(self, block: nn.Module, family: "Family | None") -> None:
        self.batch = 0
        self.mixed: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.projected = False
        self.attention = None
        if family is not None:
            self.attention = block.get_submodule(family.attention.module)
            self.projection = self.attention.get_submodule(family.attention.output)
            self.name = f"{family.attention.module}.{family.attention.output}"
            self.original = self.attention.forward

    def solved(self, matrices: "list[Matrix]") -> None:
        """From now on these are final."""
        if self.attention is None:
            return
        if any(m.role for m in matrices):
            _observers[self.attention] = self
            self.attention.forward = self.forward
        self.projected |= any(m.layer == self.name for m in matrices)

    def close(self) -> None:
        """Detaches from the attention module."""
        if self.attention is not None and _observers.get(self.attention) is self:
            del _observers[self.attention], self.attention.forward

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What the attention module returns for the current `batch`, in every family: its output, and no weights."""
        if self.batch in self.outputs:
            return self.outputs[self.batch], None
        if self.batch not in self.mixed:
            return self.original(*args, **kwargs)
        out = self.projection(self.mixed[self.batch].transpose(1, 2).flatten(2))
        if self.projected:
            self.outputs[self.batch] = out
            del self.mixed[self.batch]
        return out, None

    def observe(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The attention output of the current `batch`."""
        self.mixed[self.batch] = attend(q, k, v, mask, scaling, autocast_type(q).dtype)
        return self.mixed[self.batch]


def rows_of(x: Float[Tensor, "batch kv_heads *n width"]) -> Float[Tensor, "kv_heads rows width"]:
    """The rows of every key/value head, batches one after the other."""
    return x.transpose(0, 1).flatten(1, -2)


def rotated_back(x: Float[Tensor, "*n dim"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*n dim"]:
    """R_t^T x for rows x, the inverse of the rotary rotation where it is orthogonal."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = (turned * sin).chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([second, -first], -1), rest], -1)


def with_gain(
    h_out: Float[Tensor, "heads dim dim"], attention: nn.Module, norm: str | None, offset: float
) -> Float[Tensor, "heads dim dim"]:
    """The row factor seen through a QK-norm's gain, its weight plus `offset`.

    The authors' code ignores the norm. Its gain scales each coordinate; its division by the root mean square is
    left out, as theirs is.
    """
    if norm is None:
        return h_out
    gain = attention.get_parameter(f"{norm}.weight").float() + offset
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
    size = QUERIES * (ON_CUDA if q.is_cuda else 1)
    for start in range(0, length, size):
        stop = min(start + size, length)
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


_observers: dict[nn.Module, HeadMoments | Replay] = {}


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
    if mask is None:
        raise UserError("tokens of this model see those after them: it is an encoder; only decoders, which continue a text, are quantized")
    return mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, explicit_mask)
