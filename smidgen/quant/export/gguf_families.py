"""What GGUF files say of a model: llama.cpp's names of its parts, and the sizes, rope and norms it computes with.

Where they differ from transformers', the table FAMILIES says so, a row for each `model_type`:

    names           model.layers.3.self_attn.q_proj.weight  ->  blk.3.attn_q.weight
    rows of q, k    llama's rope turns neighbours (2i, 2i+1), transformers' turns (i, i + d/2): within each head row i moves to 2i and
                    row i + d/2 to 2i + 1. Codes, scales and zeros of a row move together. Other families rope as transformers does.
    norms of Gemma  multiply by 1 + w; the sum is what is stored.

A configuration that llama.cpp would compute otherwise is refused: it has no field for many of transformers'.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError

GEMMA_27B = 62  # layers by which llama.cpp knows the one Gemma 3 that scales scores by width / heads and not by the head


@dataclass(frozen=True)
class Family:
    """How llama.cpp calls and stores the parts of one `model_type`."""

    arch: str
    "general.architecture."
    blocks: str
    "Path of the decoder list."
    layers: dict[str, str]
    "Linear layers of a block."
    others: dict[str, str]
    "Modules of a block with vectors only."
    rest: dict[str, str]
    "Modules outside the blocks."
    permuted: bool = False
    "Whether rows of q and k are reordered for the rope."
    gain_offset: float = 0.0
    "What norms add to their weights before they multiply by them."

    def gguf(self, name: str) -> str:
        """llama.cpp's name of a parameter."""
        module, _, kind = name.rpartition(".")
        if module in self.rest:
            return f"{self.rest[module]}.{kind}"
        index, _, local = module.removeprefix(f"{self.blocks}.").partition(".")
        names = self.layers | self.others
        if local not in names:
            raise UserError(f"gguf has no name for {name} in {self.arch} models")
        return f"blk.{index}.{names[local]}.{kind}"

    def layer(self, name: str) -> str | None:
        """Our full name of a block's Linear layer from llama.cpp's name of its weight; None for anything else."""
        parts = name.split(".")
        ours = {theirs: ours for ours, theirs in self.layers.items()}
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in ours or parts[3] != "weight":
            return None
        return f"{self.blocks}.{parts[1]}.{ours[parts[2]]}"

    def heads(self, name: str, heads: int, kv_heads: int) -> int | None:
        """Heads whose rows are reordered in a parameter; None if they stay."""
        return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2]) if self.permuted else None


ATTENTION = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FAMILIES = {
    "llama": Family("llama", "model.layers", ATTENTION | MLP, NORMS, REST, permuted=True),
    "mistral": Family("llama", "model.layers", ATTENTION | MLP, NORMS, REST, permuted=True),
    "qwen2": Family("qwen2", "model.layers", ATTENTION | MLP, NORMS, REST),
    "qwen3": Family("qwen3", "model.layers", ATTENTION | MLP, NORMS | QK_NORMS, REST),
    "phi3": Family(
        "phi3",
        "model.layers",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        NORMS,
        REST,
    ),
    "gemma3_text": Family(
        "gemma3",
        "model.layers",
        ATTENTION | MLP,
        QK_NORMS
        | {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        REST,
        gain_offset=1.0,
    ),
    "gpt2": Family(
        "gpt2",
        "transformer.h",
        {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        {"ln_1": "attn_norm", "ln_2": "ffn_norm"},
        {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"},
    ),
}


def family_of(model: PreTrainedModel) -> Family:
    """The table's row for a model."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UserError(f"gguf export does not know '{kind}' models; it knows {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def rope_order(rows: int, heads: int) -> Tensor:
    """Rows in llama's order.

    >>> rope_order(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(rows).view(heads, 2, -1).mT.flatten()


def add_architecture(writer: Any, config: Any, name: str) -> None:
    """Sizes, rope and norm."""
    gpt2 = config.model_type == "gpt2"
    head = config.hidden_size // config.num_attention_heads if gpt2 else head_size(config)
    length, window = config.max_position_embeddings, None if gpt2 else config.to_dict().get("sliding_window")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length((config.n_inner or 4 * config.hidden_size) if gpt2 else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "phi3":
        writer.add_sliding_window(window or 0)
    elif config.model_type == "gemma3_text":
        if "sliding_attention" in config.layer_types:
            writer.add_sliding_window(window)
            writer.add_sliding_window_pattern(full_period(config.layer_types))
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window is not None:  # llama.cpp knows no window for these: right as long as texts are no longer
        length = min(length, window)
    writer.add_context_length(length)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    angles = rope(config)
    assert angles is not None
    writer.add_rope_dimension_count(int(head * angles.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(angles["rope_theta"])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if angles["rope_type"] == "linear":
        from gguf import RopeScalingType  # the writer is of that package too

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(angles["factor"])


def rope(config: Any) -> dict[str, Any] | None:
    """The parameters of the rotary angles, in Gemma those of layers without a window; a UserError for kinds that are not written."""
    if config.model_type == "gpt2":
        return None
    parameters = config.rope_parameters
    if config.model_type == "gemma3_text":
        local, parameters = parameters["sliding_attention"], parameters["full_attention"]
        if local["rope_type"] != "default":
            raise UserError(f"gguf export knows the default rope in layers with a sliding window, not {local['rope_type']}")
    if parameters["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(f"gguf export knows default, linear and llama3 ropes, not {parameters['rope_type']}")
    return parameters


def check_gemma(config: Any) -> None:
    """Raises a UserError for a Gemma 3 that llama.cpp would compute otherwise."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "attention_bias"):
        if value := config.to_dict()[name]:
            raise UserError(f"gguf export holds gemma3 models without {name}, this one has {value}")
    if config.hidden_activation != "gelu_pytorch_tanh":
        raise UserError(f"gguf export holds gemma3 models with gelu_pytorch_tanh, this one has {config.hidden_activation}")
    full_period(config.layer_types)
    scalar = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == GEMMA_27B else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        raise UserError(f"llama.cpp takes query_pre_attn_scalar for {scalar} in this gemma3 model, not {config.query_pre_attn_scalar}")


def full_period(layer_types: list[str]) -> int:
    """Every how many layers one has no sliding window, the only pattern llama.cpp has for Gemma.

    >>> full_period(["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
    3
    """
    period = layer_types.index("full_attention") + 1 if "full_attention" in layer_types else len(layer_types) + 1
    if any((kind == "full_attention") != (i % period == 0) for i, kind in enumerate(layer_types, 1)):
        raise UserError(f"gguf holds gemma3 models where one layer in every {period} has no sliding window; layer_types say otherwise")
    return period


def rope_factors(config: Any) -> np.ndarray | None:
    """llama3: by how much each angle is divided, (head / 2,).

    Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor are stretched by `factor`, between
    the two the frequencies are mixed.
    """
    p = rope(config)
    if p is None or p["rope_type"] != "llama3":
        return None
    size = head_size(config)
    wavelength = 2 * np.pi * p["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    original, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / p["factor"] + smooth)).astype(np.float32)


def head_size(config: Any) -> int:
    """Columns of one head."""
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """Key/value heads."""
    return config.to_dict().get("num_key_value_heads") or config.num_attention_heads
