"""The graph of a decoder, as ONNX Runtime and onnxruntime-genai run it, and the file its tensors lie in.

    input_ids, attention_mask (batch, length so far), past_key_values.N.key/value   ->   logits, present.N.key/value

It is the decoder that onnxruntime-genai's own builder draws, which is why both programs run it. Norms and attention with its cache are ONNX
Runtime's contributed operators. What a linear layer is, the format says (`Linear`): onnx.py draws few bits, onnx_qdq.py integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH, DATA = "model.onnx", "model.onnx.data"
PAGE = 4096  # large tensors start at multiples of it, so that a runtime can map them
CONTRIBUTED = "com.microsoft"


def angles(model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position, (positions, head / 2), as the model computes them."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    positions = torch.arange(model.config.max_position_embeddings, dtype=torch.float32)
    turned = positions[:, None] * rotary.inv_freq.to("cpu", torch.float32)
    return (turned.cos() * rotary.attention_scaling).numpy(), (turned.sin() * rotary.attention_scaling).numpy()


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
        parameters = [self._attribute(k, v) for k, v in attributes.items()]
        node = self.ir.Node(CONTRIBUTED if contributed else "", kind, inputs, parameters, outputs=outputs, name=name)
        self.nodes.append(node)
        return node

    def _attribute(self, name: str, value: Any) -> "ir.Attr":
        """An integer, several of them, or a float."""
        if isinstance(value, tuple):
            return self.ir.AttrInt64s(name, value)
        return self.ir.AttrInt64(name, int(value)) if isinstance(value, int) else self.ir.AttrFloat32(name, value)


@runtime_checkable
class Linear(Protocol):
    """How a linear layer is drawn."""

    def __call__(self, draw: Drawing, name: str, x: "ir.Value") -> "ir.Value":
        """The layer `name` of `x`, its bias included."""
        ...


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


def library() -> Any:
    """onnx_ir, which writes the graph."""
    try:
        import onnx_ir
    except ImportError as error:
        raise UserError("ONNX export needs the package onnx_ir: pip install 'smidgen[onnx]'") from error
    return onnx_ir
