"""ONNX with four- and eight-bit weights: loaded by ONNX Runtime and onnxruntime-genai, on processors, phones and GPUs.

Written are `model.onnx` (the graph), `model.onnx.data` (every tensor), the tokenizer and `genai_config.json`. The graph is
the decoder that onnxruntime-genai's own builder draws, which is why both programs run it:

    input_ids, attention_mask (batch, length so far), past_key_values.N.key/value   ->   logits, present.N.key/value

Norms, attention with its cache and the quantized layers are ONNX Runtime's contributed operators; the rest is standard.
Activations are float32 (accuracy_level 1), so logits differ from the dequantized model's only by the order of sums.

A quantized layer is one MatMulNBits node, named as the layer. Per layer, shape (out, in), `f` bits a field:

    B             uint8 (out, groups, group f / 8)       codes
    scales        float32 (out, groups)
    zero_points   uint8 (out, ceil(groups f / 8))        left out where all are 2^(f-1), the operator's default

Fields lie low bits first, rows start on a byte, and unused bits are 0. Four-bit codes 1, 2, 3 of one row:

    bit      0 1 2 3   4 5 6 7   8 9 ...
    code     1 . . .   2 . . .   3 . . .         bytes 0x21 0x03

The operator's fields have 4 or 8 bits: codes of 2 and 3 bits lie in 4-bit fields, of 5 to 7 in 8-bit ones, unchanged and
with their own zero points, hence exact but larger. (It has 2-bit fields too, but ONNX Runtime 1.31 then unpacks
the whole matrix for every token: 100 times slower on a processor.) What the layer's own grid is stands in the node's metadata.

Tensors go to the data file while blocks are being solved; the graph, which alone makes the folder a model, comes last.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.onnx_graph import (
    DATA,
    GRAPH,
    DataFile,
    Decoder,
    Drawing,
    angles,
    biased,
    library,
    matrix,
    vector,
)
from smidgen.quant.formats import must_be_uniform
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # same blocks; what differs is asked of the model
BLOCKS = (16, 32, 64, 128, 256)  # groups that MatMulNBits takes
FIELDS = (4, 8)
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the text's length
GRID = "smidgen.grid"  # metadata key of a quantized node


@dataclass
class Onnx:
    """Writes one model into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton: says which parameters exist, and how the blocks compute."
    grids: dict[str, Grid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library()
        tokenizer = self.checkpoint.tokenizer()
        with writing(self.folder):
            tokenizer.save_pretrained(self.folder)
        if not (self.folder / "tokenizer.json").is_file():
            raise UserError(f"{self.checkpoint.folder}: its tokenizer has no tokenizer.json form, which ONNX runtimes read")
        self.data = DataFile(self.folder)

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        must_be_uniform(grid, "ONNX files")
        library()
        must_be_decoder(model)
        widths = []
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise UserError(f"ONNX export holds Linear layers only, {name} is a {type(layer).__name__}; use --export none")
            widths.append(layer.in_features)
        if grid.group not in BLOCKS or any(width % grid.group for width in widths):
            fitting = [b for b in BLOCKS if not any(width % b for width in widths)]
            if not fitting:
                raise UserError(f"ONNX export needs groups of 16 to 256 (a power of two), and none divides rows of {min(widths)} weights")
            wanted = grid.group or 128  # a scale per row: the usual group is near enough
            nearest = min(fitting, key=lambda b: abs(b - wanted))
            raise UserError(f"ONNX has no --group {'none' if grid.group is None else grid.group} for this model; use --group {nearest}")

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its norms and biases."""
        for name, q in weights.items():
            self.grids[name] = q.grid
            for part, array in packed(q).items():
                self.data.store(f"{name}.{part}", array)
        others = {n: p for n, p in ((f"{path}.{n}", p) for n, p in module.named_parameters()) if n.removesuffix(".weight") not in weights}
        read = self.checkpoint.read(n for n, p in others.items() if p.is_meta)
        for name, parameter in others.items():
            self.data.store(name, vector(read.get(name, parameter)))

    def finish(self) -> None:
        """Writes what belongs to no block, onnxruntime-genai's configuration and the graph."""
        import onnx_ir as ir

        tied = self.model.all_tied_weights_keys
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name not in tied:
                self.data.store(name, matrix(self.checkpoint.read([name])[name], name))
        self.data.store("model.norm.weight", vector(self.checkpoint.read(["model.norm.weight"])["model.norm.weight"]))
        cos, sin = angles(self.model)
        self.data.store("cos_cache", cos)
        self.data.store("sin_cache", sin)
        about = genai_config(self.model, self.checkpoint.folder)
        graph = Decoder(self.model, self.data.tensors, NBits(self.grids)).graph()
        with writing(self.folder):
            (self.folder / "genai_config.json").write_text(json.dumps(about, indent=1))
            ir.save(ir.Model(graph, ir_version=10, producer_name="smidgen"), self.folder / GRAPH)


def must_be_decoder(model: PreTrainedModel) -> None:
    """Raises a UserError if `Decoder` cannot draw this model."""
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise UserError(f"ONNX export knows {', '.join(FAMILIES)} models, not '{config.model_type}'; use --export compressed-tensors")
    if config.hidden_act != "silu":
        raise UserError(f"ONNX export knows the activation silu only, the model has {config.hidden_act}; use --export compressed-tensors")
    rotary: Any = model.get_submodule("model.rotary_emb")
    first: Any = model.get_submodule("model.layers.0.self_attn")
    if rotary.rope_type not in ROPES or 2 * rotary.inv_freq.numel() != first.head_dim:
        raise UserError(
            f"ONNX export knows rotary angles of whole heads ({', '.join(ROPES)}), not this model's {rotary.rope_type}; "
            "use --export compressed-tensors"
        )


def genai_config(model: PreTrainedModel, source: Path, options: dict[str, str] | None = None) -> dict[str, Any]:
    """What onnxruntime-genai asks of a decoder; `options` are entries of its session, `source` is named in errors."""
    config: Any = model.config
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    generation: Any = model.generation_config or config
    end = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    if end is None:
        raise UserError(f"{source}: config.json has no eos_token_id, which onnxruntime-genai needs")
    first = end[0] if isinstance(end, list) else end
    layers, context = config.num_hidden_layers, config.max_position_embeddings
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": first if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": first if config.pad_token_id is None else config.pad_token_id,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **(options or {})},
                "filename": GRAPH,
                "head_size": attention.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {"do_sample": False, "max_length": context, "min_length": 0, "num_beams": 1, "past_present_share_buffer": True},
    }


@dataclass(frozen=True)
class NBits:
    """Layers as MatMulNBits: groups of low-bit weights, float activations."""

    grids: dict[str, Grid]
    "By the layer's name."

    def __call__(self, draw: Drawing, name: str, x: "ir.Value") -> "ir.Value":
        """A quantized layer, and its bias if there is one."""
        rows, groups, _ = draw.tensors[f"{name}.B"].shape.numpy()
        grid = self.grids[name]
        product = draw.ir.Value(name=name)
        node = draw.node(
            name,
            "MatMulNBits",
            [x, *(draw.initializer(f"{name}.{p}") for p in ("B", "scales", "zero_points") if f"{name}.{p}" in draw.tensors)],
            [product],
            N=rows,
            K=groups * block(grid),
            bits=width(grid.bits),
            block_size=block(grid),
            accuracy_level=1,
        )
        node.metadata_props[GRID] = json.dumps(asdict(grid))
        return biased(draw, name, product)


def block(grid: Grid) -> int:
    """Columns per scale; `check` let no other grid pass."""
    if grid.group not in BLOCKS:
        raise UserError(f"ONNX has no --group {'none' if grid.group is None else grid.group}; use one of {', '.join(map(str, BLOCKS))}")
    return grid.group


def width(bits: int) -> int:
    """Bits of the field that holds a code.

    >>> [width(b) for b in (2, 3, 4, 5, 8)]
    [4, 4, 4, 8, 8]
    """
    return next(f for f in FIELDS if f >= bits)


def packed(q: QWeight) -> dict[str, np.ndarray]:
    """The tensors of one layer."""
    f = width(q.grid.bits)
    rows, columns = q.codes.shape
    size = block(q.grid)
    codes = q.codes.cpu().numpy().reshape(rows, columns // size, size)
    tensors = {"B": fields(codes, f), "scales": q.scale.to("cpu", torch.float32).numpy()}
    zero = q.zero.to("cpu", torch.uint8).numpy()
    if not (zero == 2 ** (f - 1)).all():
        tensors["zero_points"] = fields(zero, f)
    return tensors


def fields(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., n) as bytes (..., ceil(n bits / 8)), low bits first.

    >>> fields(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    per = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    packs = padded.reshape(*codes.shape[:-1], -1, per) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(packs, -1)


def codes_of(packs: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of every row of bytes; the opposite of `fields`."""
    codes = packs[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    return codes.reshape(*packs.shape[:-1], -1)[..., :count].astype(np.uint8)


def read(folder: Path) -> dict[str, QWeight]:
    """The quantized layers of an artifact, by their names in the model."""
    nodes = [n for n in graph_of(folder) if n.op_type == "MatMulNBits" and GRID in n.metadata_props]
    if not nodes:
        raise UserError(f"{folder / GRAPH} has no layers that smidgen quantized")
    return {str(node.name): read_layer(node, folder) for node in nodes}


def graph_of(folder: Path) -> "ir.Graph":
    """The graph of an artifact whose data file holds all of its tensors."""
    ir = library()
    from google.protobuf.message import DecodeError

    if not (folder / GRAPH).is_file() or not (folder / DATA).is_file():
        raise UserError(f"{folder} is not an ONNX artifact: it needs {GRAPH} and {DATA}")
    try:
        graph = ir.load(folder / GRAPH).graph
    except (DecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / GRAPH} is not a readable ONNX file: {' '.join(str(error).split())}") from error
    size = (folder / DATA).stat().st_size
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and (tensor.offset or 0) + (tensor.length or 0) > size:
            raise UserError(f"{folder / DATA} is cut off before the end of {name}; export the model again")
    return graph


def read_layer(node: "ir.Node", folder: Path) -> QWeight:
    """One quantized layer."""
    try:
        grid = Grid(**json.loads(node.metadata_props[GRID]))
        parts = [v.const_value.numpy() for v in node.inputs[1:] if v is not None and v.const_value is not None]
        f, columns, size = (node.attributes[k].as_int() for k in ("bits", "K", "block_size"))
        codes = codes_of(parts[0], f, size).reshape(-1, columns)
        scale = torch.from_numpy(parts[1].copy())
        groups = columns // size
        zero = codes_of(parts[2], f, groups) if len(parts) > 2 else np.full(scale.shape, 2 ** (f - 1), np.uint8)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder / GRAPH}: {node.name} is damaged: {error}") from error
    if codes.max() > grid.top or zero.max() > grid.top or scale.shape != (len(codes), groups) or zero.shape != scale.shape:
        raise UserError(f"{folder / DATA}: {node.name} does not fit its grid of {grid.bits} bits; export the model again")
    return QWeight(torch.from_numpy(codes), scale, torch.from_numpy(zero).to(scale.dtype), grid)
