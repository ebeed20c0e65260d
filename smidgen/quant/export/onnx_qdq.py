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

A convolution is drawn with quantizers behind it too, for which ONNX Runtime has one kernel from codes to codes (QLinearConv):

    x -> QuantizeLinear -> DequantizeLinear -> Conv -> QuantizeLinear -> DequantizeLinear ->
                  W, bias -> DequantizeLinear ---'

    weight                    (out, in / groups, height, width) int8
    bias                      (out,) int32, its scale input.scale * weight.scale
    output.scale, .zero       of what leaves; a zero point of 0 is the ReLU, which is not drawn any more

Zeros around an image are codes `input.zero`, which the kernel pads with; a Pad that puts them there becomes part of the convolution.

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

`write` draws decoders with their cache, as `onnx.py` does; onnx_module.py any module that torch can export, without one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.codes import Codes, StaticLayer
from smidgen.quant.export.onnx import fields, genai_config, graph_of, must_be_decoder
from smidgen.quant.export.onnx_graph import GRAPH, DataFile, Decoder, Drawing, angles, biased, library, matrix, vector
from smidgen.quant.linear import Kernel, is_product
from smidgen.quant.runtimes.onnxruntime import PRECISE
from smidgen.quant.simulate import QuantLinear
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

STATIC = "smidgen.static"  # metadata key of a quantized node


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


@dataclass
class Qdq:
    """Layers between quantizers; a layer that is not in `layers` is a float32 product."""

    layers: dict[str, StaticLayer]
    drawn: "dict[tuple[ir.Value, Codes], ir.Value]" = field(default_factory=dict)
    "Tensors as rounded."

    def __call__(self, draw: Drawing, name: str, x: "ir.Value") -> "ir.Value":
        """One layer, its bias included."""
        if name not in self.layers:
            return biased(draw, name, draw.op(name, "MatMul", [x, draw.initializer(f"{name}.weight")]))
        layer, made = self.layers[name], draw.ir.Value(name=f"{name}.product")
        rounded = self._rounded(draw, f"{name}.input", x, Codes(layer.input_scale, layer.input_zero, layer.input_bits))
        if layer.kernel is None or layer.output is None:
            node = draw.node(name, "MatMul", [rounded, self._weight(draw, name, 1)], [made])
            y = biased(draw, name, made)
            y = draw.op(f"{name}.rows", "Squeeze", [y, draw.integers("first", [0])]) if _is_matrix(x) else y
        else:
            node = draw.node(name, "Conv", [rounded, *self._operands(draw, name)], [made], **layer.kernel._asdict())
            y = self._rounded(draw, f"{name}.output", made, layer.output)
            self.drawn[y, layer.output] = y
        node.metadata_props[STATIC] = json.dumps({"weight_bits": layer.weight_bits, "input_bits": layer.input_bits})
        return y

    def _rounded(self, draw: Drawing, name: str, x: "ir.Value", codes: Codes) -> "ir.Value":
        """`x` as rounded, drawn for the first of its readers."""
        if (x, codes) not in self.drawn:
            scale = draw.constant(f"{name}.scale", np.array(codes.scale, np.float32))
            zero = draw.constant(f"{name}.zero", np.array(codes.zero, np.uint8))
            given = draw.op(f"{name}.rows", "Unsqueeze", [x, draw.integers("first", [0])]) if _is_matrix(x) else x
            values = draw.op(f"{name}.codes", "QuantizeLinear", [given, scale, zero])
            if codes.bits < 8:
                ends = [draw.constant(f"codes.{end}", np.array(end, np.uint8)) for end in (0, 2**codes.bits - 1)]
                values = draw.op(f"{name}.clipped", "Clip", [values, *ends])
            self.drawn[x, codes] = draw.op(f"{name}.rounded", "DequantizeLinear", [values, scale, zero])
        return self.drawn[x, codes]

    def _weight(self, draw: Drawing, name: str, axis: int) -> "ir.Value":
        """As rounded; `axis` counts rows."""
        codes = draw.initializer(f"{name}.weight")
        if codes.dtype == draw.ir.DataType.INT4:
            codes = draw.op(f"{name}.weight.int8", "Cast", [codes], to=draw.ir.DataType.INT8)
        return draw.op(f"{name}.weight.rounded", "DequantizeLinear", [codes, draw.initializer(f"{name}.weight.scale")], axis=axis)

    def _operands(self, draw: Drawing, name: str) -> "list[ir.Value]":
        """Weight and bias of a convolution."""
        weight = self._weight(draw, name, 0)
        if f"{name}.bias" not in draw.tensors:
            return [weight]
        bias = [draw.initializer(f"{name}.bias"), draw.initializer(f"{name}.bias.scale")]
        return [weight, draw.op(f"{name}.bias.rounded", "DequantizeLinear", bias, axis=0)]


def _is_matrix(x: "ir.Value") -> bool:
    """Whether `x` has two axes, as far as is known."""
    return x.shape is not None and x.shape.rank() == 2


def check(module: nn.Module, layers: dict[str, StaticLayer]) -> None:
    """Raises a UserError before any work if these layers cannot be written."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    for name, layer in layers.items():
        found = modules.get(name)
        found = found.layer if isinstance(found, QuantLinear) else found
        if found is None or not is_product(found) or isinstance(found, nn.Conv2d) != (layer.kernel is not None):
            kind = "missing" if found is None else f"a {type(found).__name__}"
            what = "linear layers" if layer.kernel is None else "plain convolutions"
            raise UserError(f"only {what} can be exported as such integers, and {name} is {kind}")
        if not 2 <= layer.weight_bits <= 8 or not 2 <= layer.input_bits <= 8:
            raise UserError(f"{name}: ONNX QDQ holds 2 to 8 bits, not W{layer.weight_bits}A{layer.input_bits}")
        largest = 2 ** (layer.weight_bits - 1) - 1
        if int(layer.codes.min()) < -largest or int(layer.codes.max()) > largest or not 0 <= layer.input_zero < 2**layer.input_bits:
            raise UserError(f"{name}: codes or the input's zero point exceed W{layer.weight_bits}A{layer.input_bits}")
        scales = torch.cat(
            [layer.scale.flatten(), layer.scale.new_tensor([layer.input_scale, layer.output.scale if layer.output else 1.0])]
        )
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise UserError(f"{name}: a scale is NaN, infinite or not positive; calibrate it again")


def can_saturate(layers: dict[str, StaticLayer]) -> bool:
    """Whether two products of codes can pass 2^15, as 16-bit sums must not."""
    return any(2 * (2**layer.input_bits - 1) * int(layer.codes.int().abs().max()) >= 2**15 for layer in layers.values())


def store(data: DataFile, name: str, layer: StaticLayer) -> None:
    """Appends one layer's tensors."""
    ir = library()
    codes = layer.codes.cpu().numpy()
    codes = codes.T if layer.kernel is None else codes
    if layer.weight_bits <= 4:
        packed = fields(codes.flatten().view(np.uint8) & 15, 4)  # two in a byte, low bits first
        data.store(f"{name}.weight", packed, ir.DataType.INT4, codes.shape)
    else:
        data.store(f"{name}.weight", np.ascontiguousarray(codes))
    data.store(f"{name}.weight.scale", vector(layer.scale))
    if layer.bias is not None and layer.kernel is None:
        data.store(f"{name}.bias", vector(layer.bias)[None, None])
    elif layer.bias is not None:
        unit = vector(layer.scale) * np.float32(layer.input_scale)
        data.store(f"{name}.bias", np.rint(vector(layer.bias) / unit).astype(np.int32))
        data.store(f"{name}.bias.scale", unit)


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
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    layers = {}
    for node in graph:
        if STATIC not in node.metadata_props:
            continue
        try:
            layers[str(node.name)] = _layer(node, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / GRAPH}: {node.name} is damaged: {error}") from error
    if not layers:
        raise UserError(f"{folder / GRAPH} has no layers with static activations that smidgen quantized")
    return layers


def _layer(node: "ir.Node", tensors: dict[str, Any]) -> StaticLayer:
    """One layer of a graph."""
    bits = json.loads(node.metadata_props[STATIC])
    (_, input_scale, input_zero), (codes, scale) = (_operand(value) for value in node.inputs[:2])
    bias, unit = (tensors.get(f"{node.name}.{part}") for part in ("bias", "bias.scale"))
    bias = None if bias is None else torch.from_numpy(bias.numpy().flatten())
    convolution = node.op_type == "Conv"
    codes = codes.astype(np.int8)
    return StaticLayer(
        codes=torch.from_numpy(np.ascontiguousarray(codes if convolution else codes.T)),
        scale=torch.from_numpy(scale.copy()),
        bias=bias if bias is None or unit is None else bias.float() * torch.from_numpy(unit.numpy().copy()),
        weight_bits=bits["weight_bits"],
        input_scale=float(input_scale),
        input_zero=int(input_zero),
        input_bits=bits["input_bits"],
        kernel=_kernel(node) if convolution else None,
        output=_output(node, bits["input_bits"]) if convolution else None,
    )


def _kernel(node: "ir.Node") -> Kernel:
    return Kernel(*(node.attributes[name].value for name in Kernel._fields))


def _output(node: "ir.Node", bits: int) -> Codes:
    """How what a convolution makes is rounded."""
    (quantizer,) = node.outputs[0].consumers()
    scale, zero = (value.const_value.numpy() for value in quantizer.inputs[1:])  # pyright: ignore[reportOptionalMemberAccess]
    return Codes(float(scale), int(zero), bits)


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
