"""What a family of models calls its parts. Data only: a new family is a new entry.

Everything else (the decoder list, its linear layers, heads, rotary angles) is found by structure in `blocks.py`. Paths
are those inside a decoder block.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Attention:
    """Names of the attention."""

    module: str
    "The attention module."
    query: str
    key: str
    value: str
    "Projections inside it. Three times the same name: one fused layer, rows in the order query, key, value."
    output: str
    "The projection of what the heads return."
    query_norm: str | None = None
    key_norm: str | None = None
    "Norms of each head's queries and keys before the scores (QK-norm)."
    gain_offset: float = 0.0
    "What these norms add to their weights before they multiply by them."
    rotary_switch: str | None = None
    "Attribute of the attention module that is false where a layer leaves rotary angles unused."


@dataclass(frozen=True)
class Fold:
    """A place where a factor per channel can move out of some layers' columns into what comes before them."""

    before: str
    "A norm, or a linear layer whose rows are the channels."
    after: tuple[str, ...]
    "The layers fed with them, and nothing else is."
    through: Literal["nothing", "relu", "heads"] = "nothing"
    "What lies between; a relu passes positive factors only, heads copy each key/value head to the query heads that share it."
    offset: float = 0.0
    "What a norm adds to its weight: its gain is the sum."


@dataclass(frozen=True)
class Gated:
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    module: str
    gate: str
    up: str
    down: str
    activation: str


@dataclass(frozen=True)
class Family:
    """One line of the table."""

    attention: Attention
    folds: tuple[Fold, ...]
    gated: Gated | None = None
    residual: dict[str, str] = field(default_factory=dict)
    "Layers whose output is added to the residual stream -> the norm that reads the stream before."
    pre_norm: str | None = None
    "Attribute of the block that is false where norms come after the residual, which nothing can be folded into."


_SWIGLU = Gated("mlp", "gate_proj", "up_proj", "down_proj", "act_fn")
_LLAMA_FOLDS = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",), "heads"),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)
_LLAMA_RESIDUAL = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
_LLAMA = Family(Attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"), _LLAMA_FOLDS, _SWIGLU, _LLAMA_RESIDUAL)
_QWEN3 = Family(Attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"), _LLAMA_FOLDS, _SWIGLU, _LLAMA_RESIDUAL)
_SMOLLM3 = Family(
    Attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", rotary_switch="use_rope"), _LLAMA_FOLDS, _SWIGLU, _LLAMA_RESIDUAL
)
_OPT = Family(
    Attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    (
        Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fold("self_attn.v_proj", ("self_attn.out_proj",), "heads"),
        Fold("final_layer_norm", ("fc1",)),
        Fold("fc1", ("fc2",), "relu"),
    ),
    residual={"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    pre_norm="do_layer_norm_before",
)
_GPT2 = Family(
    Attention("attn", "c_attn", "c_attn", "c_attn", "c_proj"),
    (Fold("ln_1", ("attn.c_attn",)), Fold("attn.c_attn", ("attn.c_proj",), "heads"), Fold("ln_2", ("mlp.c_fc",))),
    residual={"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
)
_GEMMA3 = Family(  # its norms multiply by 1 + weight; what is added to the stream passes a norm first
    Attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", gain_offset=1.0),
    (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), offset=1.0),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "heads"),
        Fold("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), offset=1.0),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
    _SWIGLU,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "smollm3": _SMOLLM3,
    "gemma3_text": _GEMMA3,
    "opt": _OPT,
    "gpt2": _GPT2,
}
