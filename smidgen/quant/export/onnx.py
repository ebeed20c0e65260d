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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.formats import must_be_uniform
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # same blocks; what differs is asked of the model
BLOCKS = (16, 32, 64, 128, 256)  # groups that MatMulNBits takes
FIELDS = (4, 8)
ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the text's length
GRID = "smidgen.grid"  # metadata key of a quantized node
GRAPH, DATA = "model.onnx", "model.onnx.data"
PAGE = 4096  # large tensors start at multiples of it, so that a runtime can map them
CONTRIBUTED = "com.microsoft"


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


def angles(model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position, (positions, head / 2), as the model computes them."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    positions = torch.arange(model.config.max_position_embeddings, dtype=torch.float32)
    turned = positions[:, None] * rotary.inv_freq.to("cpu", torch.float32)
    return (turned.cos() * rotary.attention_scaling).numpy(), (turned.sin() * rotary.attention_scaling).numpy()


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


@dataclass
class DataFile:
    """The tensors of a graph, each appended to the data file in `folder` when it is stored."""

    folder: Path
    tensors: "dict[str, ir.ExternalTensor]" = field(default_factory=dict)
    "By the name in the graph."

    def __post_init__(self) -> None:
        (self.folder / DATA).write_bytes(b"")

    def store(self, name: str, array: np.ndarray, dtype: "ir.DataType | None" = None, shape: Sequence[int] | None = None) -> None:
        """An array as it is, or bytes that hold a tensor of `dtype` and `shape`."""
        import onnx_ir as ir

        with writing(self.folder / DATA), (self.folder / DATA).open("ab") as file:
            start = -(-file.tell() // PAGE) * PAGE if array.nbytes >= PAGE else -(-file.tell() // 64) * 64
            file.write(b"\0" * (start - file.tell()))
            file.write(np.ascontiguousarray(array).data)
        self.tensors[name] = ir.ExternalTensor(
            DATA,
            start,
            array.nbytes,
            dtype or ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape if shape is None else shape),
            name=name,
            base_dir=self.folder,
        )


class Drawing:
    """Nodes of a graph whose tensors are in a data file; a node with one output gives it its own name."""

    def __init__(self, tensors: "dict[str, ir.ExternalTensor]") -> None:
        import onnx_ir as ir

        self.ir, self.tensors = ir, tensors
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}  # initializers used so far

    def value(self, name: str, dtype: "ir.DataType", shape: "list[int | str]") -> "ir.Value":
        """An input or output of the graph."""
        return self.ir.Value(name=name, type=self.ir.TensorType(dtype), shape=self.ir.Shape(shape))

    def initializer(self, name: str) -> "ir.Value":
        """A tensor of the data file."""
        if name not in self.values:
            tensor = self.tensors[name]
            self.values[name] = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        return self.values[name]

    def integers(self, name: str, numbers: int | list[int]) -> "ir.Value":
        """A constant in the graph itself."""
        return self.constant(f"constant.{name}", np.array(numbers, np.int64))

    def constant(self, name: str, array: np.ndarray) -> "ir.Value":
        """The same, of any type."""
        if name not in self.values:
            tensor = self.ir.Tensor(array, name=name)
            self.values[name] = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        return self.values[name]

    def op(self, name: str, kind: str, inputs: "Sequence[ir.Value]", **attributes: Any) -> "ir.Value":
        """A node with one output."""
        output = self.ir.Value(name=name)
        self.node(name, kind, inputs, [output], **attributes)
        return output

    def node(self, name: str, kind: str, inputs: "Sequence[ir.Value]", outputs: "Sequence[ir.Value]", **attributes: Any) -> "ir.Node":
        """Any node."""
        contributed = kind in ("MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization")
        parameters = [self.ir.AttrInt64(k, int(v)) if isinstance(v, int) else self.ir.AttrFloat32(k, v) for k, v in attributes.items()]
        node = self.ir.Node(CONTRIBUTED if contributed else "", kind, inputs, parameters, outputs=outputs, name=name)
        self.nodes.append(node)
        return node


@runtime_checkable
class Linear(Protocol):
    """How a linear layer is drawn."""

    def __call__(self, draw: Drawing, name: str, x: "ir.Value") -> "ir.Value":
        """The layer `name` of `x`, its bias included."""
        ...


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


def biased(draw: Drawing, name: str, product: "ir.Value") -> "ir.Value":
    """`product` and the layer's bias, if it has one."""
    bias = f"{name}.bias"
    return draw.op(f"{name}.sum", "Add", [product, draw.initializer(bias)]) if bias in draw.tensors else product


class Decoder:
    """Draws the graph of a model whose tensors are in the data file.

    Values carry the names of what computes them in `transformers`, so a profile of the graph reads like the model.
    """

    def __init__(self, model: PreTrainedModel, tensors: "dict[str, ir.ExternalTensor]", linear: Linear) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.config: Any = model.config
        self.decoder: Any = model.get_submodule("model")
        self.tied = "lm_head.weight" in model.all_tied_weights_keys
        self.draw, self.linear = Drawing(tensors), linear

    def graph(self) -> "ir.Graph":
        """Embedding, blocks, norm, head."""
        ir = self.ir
        config, layers = self.config, len(self.decoder.layers)
        ids = self.draw.value("input_ids", ir.DataType.INT64, ["batch", "length"])
        mask = self.draw.value("attention_mask", ir.DataType.INT64, ["batch", "total"])
        pasts, presents = self._caches("past_key_values", "past", layers), self._caches("present", "present", layers)
        self.lengths = self._lengths(mask)
        embedded = self.draw.op("model.embed_tokens", "Gather", [self.draw.initializer("model.embed_tokens.weight"), ids])
        residual = self._float("model.embed_tokens.float", embedded, "model.embed_tokens.weight")
        x = self._norm("model.layers.0.input_layernorm", residual)
        for i in range(layers):
            path = f"model.layers.{i}"
            attended = self._attention(f"{path}.self_attn", self.decoder.layers[i].self_attn, i, x, pasts[i], presents[i])
            x, residual = self._add_and_norm(f"{path}.post_attention_layernorm", attended, residual)
            after = f"model.layers.{i + 1}.input_layernorm" if i + 1 < layers else "model.norm"
            x, residual = self._add_and_norm(after, self._mlp(f"{path}.mlp", x), residual)
        logits = self._head(x, ids)
        return ir.Graph(
            [ids, mask, *(v for pair in pasts for v in pair)],
            [logits, *(v for pair in presents for v in pair)],
            nodes=self.draw.nodes,
            initializers=list(self.draw.values.values()),
            opset_imports={"": 21, CONTRIBUTED: 1},
            name=config.model_type,
        )

    def _caches(self, name: str, length: str, layers: int) -> "list[list[ir.Value]]":
        """Keys and values of every layer, (batch, heads, `length`, head)."""
        shape = ["batch", self.config.num_key_value_heads, length, self.decoder.layers[0].self_attn.head_dim]
        return [[self.draw.value(f"{name}.{i}.{kind}", self.ir.DataType.FLOAT, shape) for kind in ("key", "value")] for i in range(layers)]

    def _lengths(self, mask: "ir.Value") -> "list[ir.Value]":
        """What attention asks of the mask: every text's last position (batch,), and how many there are in all, a number."""
        counted = self.draw.op("tokens", "ReduceSum", [mask, self.draw.integers("axis", [1])], keepdims=0)
        last = self.draw.op("last", "Sub", [counted, self.draw.integers("one", 1)])
        total = self.draw.op("total", "Gather", [self.draw.op("mask.shape", "Shape", [mask]), self.draw.integers("one", 1)])
        int32 = self.ir.DataType.INT32
        return [self.draw.op("last.int32", "Cast", [last], to=int32), self.draw.op("total.int32", "Cast", [total], to=int32)]

    def _attention(
        self, path: str, module: Any, layer: int, x: "ir.Value", past: "list[ir.Value]", present: "list[ir.Value]"
    ) -> "ir.Value":
        """(batch, length, width), through the cache."""
        config = self.config
        q, k, v = (self.linear(self.draw, f"{path}.{n}", x) for n in ("q_proj", "k_proj", "v_proj"))
        if config.model_type == "qwen3":
            q, k = (self._head_norm(f"{path}.{n}", value, module.head_dim) for n, value in (("q_norm", q), ("k_norm", k)))
        rotary = config.model_type != "smollm3" or bool(config.no_rope_layers[layer])
        angles = [self.draw.initializer("cos_cache"), self.draw.initializer("sin_cache")] if rotary else []
        attended = self.ir.Value(name=path)
        self.draw.node(
            path,
            "GroupQueryAttention",
            [q, k, v, *past, *self.lengths, *angles],
            [attended, *present],
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=float(module.scaling),
            do_rotary=int(rotary),
            local_window_size=window(config, module),
        )
        return self.linear(self.draw, f"{path}.o_proj", attended)

    def _mlp(self, path: str, x: "ir.Value") -> "ir.Value":
        """SwiGLU: down(silu(gate x) * up x)."""
        gate, up = self.linear(self.draw, f"{path}.gate_proj", x), self.linear(self.draw, f"{path}.up_proj", x)
        silu = self.draw.op(f"{path}.act_fn", "Mul", [gate, self.draw.op(f"{path}.sigmoid", "Sigmoid", [gate])])
        return self.linear(self.draw, f"{path}.down_proj", self.draw.op(f"{path}.product", "Mul", [silu, up]))

    def _norm(self, name: str, x: "ir.Value") -> "ir.Value":
        weight = self.draw.initializer(f"{name}.weight")
        return self.draw.op(name, "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=float(self.config.rms_norm_eps))

    def _head_norm(self, name: str, x: "ir.Value", head: int) -> "ir.Value":
        """Every head's queries or keys normed on their own."""
        split = self.draw.op(f"{name}.split", "Reshape", [x, self.draw.integers("split", [0, 0, -1, head])])
        return self.draw.op(f"{name}.joined", "Reshape", [self._norm(name, split), self.draw.integers("joined", [0, 0, -1])])

    def _add_and_norm(self, name: str, x: "ir.Value", residual: "ir.Value") -> "tuple[ir.Value, ir.Value]":
        """The norm of the sum, and the sum."""
        normed, total = self.ir.Value(name=name), self.ir.Value(name=f"{name}.residual")
        unused = [self.ir.Value(name=""), self.ir.Value(name="")]
        self.draw.node(
            name,
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.draw.initializer(f"{name}.weight")],
            [normed, *unused, total],
            epsilon=float(self.config.rms_norm_eps),
        )
        return normed, total

    def _head(self, x: "ir.Value", ids: "ir.Value") -> "ir.Value":
        """float32 logits (batch, length, vocab). Gemm takes the matrix as it is stored, so a tied one is stored once."""
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        flat = self.draw.op("lm_head.input", "Reshape", [x, self.draw.integers("flat", [-1, self.config.hidden_size])])
        matrix = self._float("lm_head.weight.float", self.draw.initializer(name), name)
        product = self.draw.op("lm_head", "Gemm", [flat, matrix], transB=1)
        vocabulary = self.draw.integers("vocabulary", [self.config.vocab_size])
        shape = self.draw.op("logits.shape", "Concat", [self.draw.op("input_ids.shape", "Shape", [ids]), vocabulary], axis=0)
        logits = self.draw.value("logits", self.ir.DataType.FLOAT, ["batch", "length", self.config.vocab_size])
        self.draw.node("logits", "Reshape", [product, shape], [logits])
        return logits

    def _float(self, name: str, x: "ir.Value", source: str) -> "ir.Value":
        """`x`, which is of the type of the tensor `source`, as float32."""
        float32 = self.ir.DataType.FLOAT
        return x if self.draw.tensors[source].dtype == float32 else self.draw.op(name, "Cast", [x], to=float32)


def window(config: Any, attention: Any) -> int:
    """Tokens that a layer sees, the current one included, or -1: all. ONNX Runtime and transformers count alike."""
    if config.model_type == "llama":
        return -1
    size = config.sliding_window if config.model_type == "mistral" else attention.sliding_window
    return -1 if size is None else size


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


def vector(value: Tensor) -> np.ndarray:
    """A norm's weights or a bias, float32."""
    return value.detach().to("cpu", torch.float32).numpy()


def matrix(value: Tensor, name: str) -> np.ndarray:
    """An embedding or head as float16, as in the other formats; runtimes on processors lack bfloat16."""
    if value.dtype != torch.float16:
        if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
            raise UserError(f"{name} holds NaN or values beyond float16")
        value = value.half()
    return value.cpu().numpy()


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


def library() -> Any:
    """onnx_ir, which writes the graph."""
    try:
        import onnx_ir
    except ImportError as error:
        raise UserError("ONNX export needs the package onnx_ir: pip install smidgen[onnx]") from error
    return onnx_ir
