"""ONNX with integer products: static 8-bit activations and 8- or 4-bit weights, on processors through ONNX Runtime's int8 kernels.

A linear layer is drawn as the quantizers around a product that the standard has for this (QDQ):

    x -> QuantizeLinear -> Clip (below 8 bits) -> DequantizeLinear -> MatMul -> Add (bias)
             W -> Cast (INT4 only) -> DequantizeLinear ----------------'

which computes the same in floats wherever it is run; ONNX Runtime fuses the two DequantizeLinear and the MatMul into one
MatMulIntegerToFloat: 8-bit products summed in 32 bits, then scaled. Layers that read the same tensor share its QuantizeLinear. Per layer:

    input.scale, input.zero   float32 and uint8, one of each     code = clip(round(x / scale) + zero, 0, 2^bits - 1), halves to even
    weight                    (in, out) int8, or INT4 up to 4 bits, symmetric
    weight.scale              (out,) float32
    bias                      (1, 1, out) float32

Why so, all of it tried with ONNX Runtime 1.31:

- Below 8 bits the *codes* are clipped, an exact integer operation on a quarter of the bytes a float Clip would read.
- INT4 weights go through a Cast, which is computed once, at load. Without it the product is not fused and runs in float32 (a product of
  256 by 512 weights and 64 rows took tens of times as long).
- Where shapes are known, ONNX Runtime makes a product and a bias vector one Gemm before it looks for quantizers, and runs it in float32.
  It does not for a bias (1, 1, out), so that is how biases are stored, and matrices (n, in) go through as (1, n, in), which copies nothing.
- x86 without VNNI adds pairs of products in 16 bits and saturates silently: 64 products 255 * 127 gave half their sum. The session
  option `session.x64quantprecision` turns weights into uint8, for which the kernel is exact, but 2.2 times slower on a
  processor that has VNNI. So the weights stay int8, `genai_config.json` carries the option where a sum can pass 2^15
  (`can_saturate`: 8-bit weights with 8-bit inputs; never 4-bit weights), and our runtime leaves it out where there is VNNI.

`write` draws decoders with their cache, as `onnx.py` does; `write_module` any module that torch can export, without one.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.onnx import fields, genai_config, graph_of, must_be_decoder
from smidgen.quant.export.onnx_graph import GRAPH, DataFile, Decoder, Drawing, angles, biased, library, matrix, vector
from smidgen.quant.linear import LINEAR
from smidgen.quant.runtimes.onnxruntime import PRECISE
from smidgen.quant.simulate import QuantLinear, StaticLayer
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

STATIC = "smidgen.static"  # metadata key of a quantized node
MARK = "smidgen"  # domain of the nodes that stand for layers while torch exports a module
SMALL = 1024  # bytes of a tensor that may stay in the graph


@torch.no_grad()
def write(folder: Path, checkpoint: Checkpoint, model: PreTrainedModel, layers: dict[str, StaticLayer]) -> None:
    """Writes a decoder of the families of `onnx.py`, with its cache, for `smidgen run` and onnxruntime-genai.

    `model` holds the float weights, into which every transform was folded, in layers or in QuantLinears; those of its blocks' layers
    that `layers` does not name stay float32. Embedding and head become float16.
    """
    ir = library()
    must_be_decoder(model)
    check(model, layers)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = checkpoint.tokenizer()
    with writing(folder):
        tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{checkpoint.folder}: its tokenizer has no tokenizer.json form, which ONNX runtimes read")
    data = DataFile(folder)
    for name, layer in layers.items():
        store(data, name, layer)
    for name, parameter in float_parameters(model):
        owner, _, kind = name.rpartition(".")
        if owner in layers or name in model.all_tied_weights_keys:
            continue
        if not name.startswith("model.layers."):
            data.store(name, matrix(parameter, name) if parameter.ndim == 2 else vector(parameter))
        else:
            data.store(name, np.ascontiguousarray(vector(parameter).T) if kind == "weight" else vector(parameter))
    for name, table in zip(("cos_cache", "sin_cache"), angles(model), strict=True):
        data.store(name, table)
    config = genai_config(model, checkpoint.folder, {PRECISE: "1"} if can_saturate(layers) else {})
    graph = Decoder(model, data.tensors, Qdq(layers)).graph()
    with writing(folder):
        (folder / "genai_config.json").write_text(json.dumps(config, indent=1))
        ir.save(ir.Model(graph, ir_version=10, producer_name="smidgen"), folder / GRAPH)


@torch.no_grad()
def write_module(
    folder: Path,
    module: nn.Module,
    layers: dict[str, StaticLayer],
    example: dict[str, Any],
    outputs: Sequence[str] = ("logits",),
    dynamic: dict[str, dict[int, str]] | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes any module that `torch.onnx.export` can: GPT-2, OPT and BERT without a cache, a CNN with a linear head.

    `example`     arguments of one call by name; those that are no tensors are passed to every call as they are (use_cache=False)
    `outputs`     keys of what the module returns, or any names for a tensor or tuple
    `dynamic`     axes whose length is free, and its name; by default 0 "batch", and of integers also 1 "length"; the example
                  needs two or more entries along each
    """
    ir = library()
    check(module, layers)
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    axes = _axes(tensors, dynamic or {})
    program = _exported(module, layers, example, tensors, tuple(outputs), axes)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        with writing(folder):
            tokenizer.save_pretrained(folder)
    data, graph = DataFile(folder), program.graph
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.const_value.nbytes > SMALL:
            data.store(name, value.const_value.numpy())
            value.const_value = data.tensors[name]
    for name, layer in layers.items():
        store(data, name, layer)
    _replace_marks(graph, data, layers)
    with writing(folder):
        ir.save(program, folder / GRAPH)


@dataclass
class Qdq:
    """Layers between quantizers; a layer that is not in `layers` is a float32 product."""

    layers: dict[str, StaticLayer]
    drawn: "dict[tuple[ir.Value, float, int, int], ir.Value]" = field(default_factory=dict)
    "Inputs as rounded, by tensor, scale, zero point and bits."

    def __call__(self, draw: Drawing, name: str, x: "ir.Value") -> "ir.Value":
        """One layer, its bias included."""
        if name not in self.layers:
            return biased(draw, name, draw.op(name, "MatMul", [x, draw.initializer(f"{name}.weight")]))
        layer, product = self.layers[name], draw.ir.Value(name=f"{name}.product")
        node = draw.node(name, "MatMul", [self._input(draw, name, x, layer), self._weight(draw, name)], [product])
        node.metadata_props[STATIC] = json.dumps({"weight_bits": layer.weight_bits, "input_bits": layer.input_bits})
        y = biased(draw, name, product)
        return draw.op(f"{name}.rows", "Squeeze", [y, draw.integers("first", [0])]) if _is_matrix(x) else y

    def _input(self, draw: Drawing, name: str, x: "ir.Value", layer: StaticLayer) -> "ir.Value":
        """`x` as rounded, drawn for the first of its readers."""
        key = (x, layer.input_scale, layer.input_zero, layer.input_bits)
        if key not in self.drawn:
            scale = draw.constant(f"{name}.input.scale", np.array(layer.input_scale, np.float32))
            zero = draw.constant(f"{name}.input.zero", np.array(layer.input_zero, np.uint8))
            if _is_matrix(x):
                x = draw.op(f"{name}.input.rows", "Unsqueeze", [x, draw.integers("first", [0])])
            codes = draw.op(f"{name}.input.codes", "QuantizeLinear", [x, scale, zero])
            if layer.input_bits < 8:
                ends = [draw.constant(f"codes.{end}", np.array(end, np.uint8)) for end in (0, 2**layer.input_bits - 1)]
                codes = draw.op(f"{name}.input.clipped", "Clip", [codes, *ends])
            self.drawn[key] = draw.op(f"{name}.input.rounded", "DequantizeLinear", [codes, scale, zero])
        return self.drawn[key]

    def _weight(self, draw: Drawing, name: str) -> "ir.Value":
        """(in, out), as rounded."""
        codes = draw.initializer(f"{name}.weight")
        if codes.dtype == draw.ir.DataType.INT4:
            codes = draw.op(f"{name}.weight.int8", "Cast", [codes], to=draw.ir.DataType.INT8)
        return draw.op(f"{name}.weight.rounded", "DequantizeLinear", [codes, draw.initializer(f"{name}.weight.scale")], axis=1)


def _is_matrix(x: "ir.Value") -> bool:
    """Whether `x` has two axes, as far as is known."""
    return x.shape is not None and x.shape.rank() == 2


def check(module: nn.Module, layers: dict[str, StaticLayer]) -> None:
    """Raises a UserError before any work if these layers cannot be written."""
    modules = dict(module.named_modules())
    for name, layer in layers.items():
        if not isinstance(modules.get(name), (*LINEAR, QuantLinear)):
            kind = "missing" if name not in modules else f"a {type(modules[name]).__name__}"
            raise UserError(f"only linear layers can be exported as integers, and {name} is {kind}")
        if not 2 <= layer.weight_bits <= 8 or not 2 <= layer.input_bits <= 8:
            raise UserError(f"{name}: ONNX QDQ holds 2 to 8 bits, not W{layer.weight_bits}A{layer.input_bits}")
        largest = 2 ** (layer.weight_bits - 1) - 1
        if int(layer.codes.min()) < -largest or int(layer.codes.max()) > largest or not 0 <= layer.input_zero < 2**layer.input_bits:
            raise UserError(f"{name}: codes or the input's zero point exceed W{layer.weight_bits}A{layer.input_bits}")
        scales = torch.cat([layer.scale.flatten(), layer.scale.new_tensor([layer.input_scale])])
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise UserError(f"{name}: a scale is NaN, infinite or not positive; calibrate it again")


def can_saturate(layers: dict[str, StaticLayer]) -> bool:
    """Whether two products of codes can pass 2^15, as 16-bit sums must not."""
    return any(2 * (2**layer.input_bits - 1) * int(layer.codes.int().abs().max()) >= 2**15 for layer in layers.values())


def store(data: DataFile, name: str, layer: StaticLayer) -> None:
    """Appends one layer's tensors."""
    ir = library()
    codes = layer.codes.cpu().numpy().T
    if layer.weight_bits <= 4:
        packed = fields(codes.flatten().view(np.uint8) & 15, 4)  # two in a byte, low bits first
        data.store(f"{name}.weight", packed, ir.DataType.INT4, codes.shape)
    else:
        data.store(f"{name}.weight", np.ascontiguousarray(codes))
    data.store(f"{name}.weight.scale", vector(layer.scale))
    if layer.bias is not None:
        data.store(f"{name}.bias", vector(layer.bias)[None, None])


def float_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters of the float model, by full name; those of a layer inside a QuantLinear by the layer's own."""
    if isinstance(module, QuantLinear):
        if module.alpha is not None:
            raise UserError(f"{path} has factors that were not folded into its weight; fold them before the export")
        module = module.layer
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{path}.{name}", parameter
    for name, child in module.named_children():
        yield from float_parameters(child, f"{path}.{name}" if path else name)


def read(folder: Path) -> dict[str, StaticLayer]:
    """The quantized layers of an artifact, by their names in the model."""
    graph = graph_of(folder)
    biases = {name.removesuffix(".bias"): value.const_value for name, value in graph.initializers.items() if name.endswith(".bias")}
    layers = {}
    for node in graph:
        if STATIC not in node.metadata_props:
            continue
        try:
            bits = json.loads(node.metadata_props[STATIC])
            (_, input_scale, input_zero), (codes, scale) = (_operand(value) for value in node.inputs)
            bias = biases.get(str(node.name))
            layers[str(node.name)] = StaticLayer(
                codes=_int8(codes),
                scale=torch.from_numpy(scale.copy()),
                bias=None if bias is None else torch.from_numpy(bias.numpy().flatten()),
                weight_bits=bits["weight_bits"],
                input_scale=float(input_scale),
                input_zero=int(input_zero),
                input_bits=bits["input_bits"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / GRAPH}: {node.name} is damaged: {error}") from error
    if not layers:
        raise UserError(f"{folder / GRAPH} has no layers with static activations that smidgen quantized")
    return layers


def _operand(value: "ir.Value | None") -> list[Any]:
    """What a DequantizeLinear reads: codes (None where they are computed), scale, zero point."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        raise ValueError("an operand is not quantized")
    codes = node.inputs[0]
    cast = None if codes is None else codes.producer()
    if cast is not None and cast.op_type == "Cast":
        codes = cast.inputs[0]
    return [None if v is None or v.const_value is None else v.const_value.numpy() for v in (codes, *node.inputs[1:])]


def _int8(codes: np.ndarray) -> Int8[Tensor, "out in"]:
    """(in, out) of any signed integers."""
    return torch.from_numpy(np.ascontiguousarray(codes.astype(np.int8).T))


def _axes(tensors: dict[str, Tensor], given: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    """Names of the axes whose length is free, of every tensor."""
    axes = {name: {0: "batch"} | ({} if t.is_floating_point() or t.ndim < 2 else {1: "length"}) for name, t in tensors.items()} | given
    for name, named in axes.items():
        if name not in tensors:
            raise UserError(f"`dynamic` names {name}, which is no tensor of the example; there are {', '.join(tensors)}")
        short = [axis for axis in named if tensors[name].shape[axis] < 2]
        if short:
            raise UserError(f"axis {short[0]} of the example's {name} has {tensors[name].shape[short[0]]} entries; give it two or more")
    return axes


def _replace_marks(graph: "ir.Graph", data: DataFile, layers: dict[str, StaticLayer]) -> None:
    """Draws every layer in the place of the node that stands for it."""
    ir = library()
    draw, linear = Drawing(data.tensors), Qdq(layers)
    marks = [node for node in graph if node.domain == MARK]
    names = [node.attributes["name"].as_string() for node in marks]
    if sorted(names) != sorted(layers):
        wrong = sorted({n for n in [*names, *layers] if names.count(n) != 1})[0]
        raise UserError(f"{wrong} is used {names.count(wrong)} times by the module in the call of the example; once is what can be written")
    for node, name in zip(marks, names, strict=True):
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None
        new = linear(draw, name, x)
        new.shape, new.type = old.shape, old.type
        graph.insert_before(node, draw.nodes)
        draw.nodes.clear()
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for value in draw.values.values():
        graph.register_initializer(value)
    graph.opset_imports.pop(MARK, None)


class _Marked(nn.Module):
    """Stands for a layer while torch exports: one node, which is replaced afterwards."""

    def __init__(self, name: str, rows: int) -> None:
        super().__init__()
        self.name, self.rows = name, rows

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.rows)
        return torch.onnx.ops.symbolic(f"{MARK}::Linear", (x,), {"name": self.name}, dtype=x.dtype, shape=shape, version=1)


class _Call(nn.Module):
    """A module whose arguments go by position and whose outputs are a tuple, as torch exports them."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], fixed: dict[str, Any], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names, self.fixed, self.outputs = module, names, fixed, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.module(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        if isinstance(result, Tensor):
            return (result,)
        return tuple(result[name] for name in self.outputs) if isinstance(result, dict) else tuple(result)


def _exported(
    module: nn.Module,
    layers: dict[str, StaticLayer],
    example: dict[str, Any],
    tensors: dict[str, Tensor],
    outputs: tuple[str, ...],
    axes: dict[str, dict[int, str]],
) -> "ir.Model":
    """The module's graph with a marked node for every one of the layers; `module` itself is left as it was."""
    try:
        import onnxscript  # noqa: F401 (torch imports it late, and its own error names no remedy)
    except ImportError as error:
        raise UserError("exporting this model to ONNX needs the package onnxscript: pip install onnxscript") from error
    originals = {name: module.get_submodule(name) for name in layers}
    training = module.training
    call = _Call(module, tuple(tensors), {n: v for n, v in example.items() if n not in tensors}, outputs)
    lengths = {name: torch.export.Dim(name) for named in axes.values() for name in named.values()}
    shapes = tuple({axis: lengths[name] for axis, name in axes[n].items()} for n in tensors)
    try:
        for name, layer in layers.items():
            _put(module, name, _Marked(name, len(layer.codes)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec")  # torch.export about its own classes
            warnings.filterwarnings("ignore", "# The axis name")  # inputs that share a free axis share its name
            program = torch.onnx.export(
                call.eval(),
                tuple(tensors.values()),
                dynamo=True,
                opset_version=21,  # the first with INT4
                input_names=list(tensors),
                output_names=list(outputs),
                dynamic_shapes=(shapes,),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = next((line for line in reversed(str(error).splitlines()) if line.startswith("<class")), str(error).splitlines()[0])
        raise UserError(f"torch cannot export {type(module).__name__} to ONNX: {first}") from error
    finally:
        for name, original in originals.items():
            _put(module, name, original)
        module.train(training)
    assert program is not None
    return program.model


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = layer
