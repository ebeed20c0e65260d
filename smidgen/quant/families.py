"""What a family of models calls its attention. Data only: a new family is a new line.

Everything else (the decoder list, its linear layers, heads, rotary angles) is found by structure in `blocks.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Names inside a decoder block."""

    module: str
    "The attention module."
    query: str
    key: str
    value: str
    "Projections inside it. Three times the same name: one fused layer, rows in the order query, key, value."
    query_norm: str | None = None
    key_norm: str | None = None
    "Norms of each head's queries and keys before the scores (QK-norm)."
    rotary_switch: str | None = None
    "Attribute of the attention module that is false where a layer leaves rotary angles unused."


_LLAMA = Attention("self_attn", "q_proj", "k_proj", "v_proj")
_QWEN3 = Attention("self_attn", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm")

ATTENTION = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "smollm3": Attention("self_attn", "q_proj", "k_proj", "v_proj", rotary_switch="use_rope"),
    "opt": _LLAMA,
    "gpt2": Attention("attn", "c_attn", "c_attn", "c_attn"),
}
