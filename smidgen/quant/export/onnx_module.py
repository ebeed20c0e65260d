"""Any module that `torch.onnx.export` can trace, its layers between quantizers: GPT-2 and OPT without a cache, BERT, a CNN.

While torch traces, a node stands for every layer; `trace` finds what surrounds it, `write` draws the layer (onnx_qdq.py) in its place.

Tensors, not layers, have quantizers: one for all readers of a tensor, also where its values are only moved in between (MOVES), and what a
convolution makes is rounded where it is made, behind the ReLU that follows. So two convolutions in a row exchange codes.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.codes import StaticLayer
from smidgen.quant.export.onnx_graph import GRAPH, DataFile, Drawing, library
from smidgen.quant.export.onnx_qdq import Qdq, check, store
from smidgen.quant.linear import product, weight_of
from smidgen.quant.simulate import QuantLinear
from smidgen.quant.writing import writing

if TYPE_CHECKING:
    import onnx_ir as ir

MARK = "smidgen"  # domain of the nodes that stand for layers while torch exports a module
SMALL = 1024  # bytes of a tensor that may stay in the graph
MOVES = {"Pad", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity"}  # no value is new but 0


@dataclass(frozen=True)
class Site:
    """Where a layer stands in the graph."""

    node: "ir.Node"
    "What stands for it."
    source: "ir.Value"
    "The tensor it reads; where a convolution's output is only moved, that output."
    made: "ir.Value"
    "The tensor it makes; of a convolution that a ReLU follows, and nothing else, that of the ReLU."
    bounds: tuple[float, float] | None
    "What that ReLU clamps to."


@dataclass(frozen=True)
class Traced:
    """A module's graph, to be written once."""

    program: "ir.Model"
    sites: dict[str, Site]


def write_module(
    folder: Path,
    module: nn.Module,
    layers: dict[str, StaticLayer],
    example: dict[str, Any],
    outputs: Sequence[str] = ("logits",),
    dynamic: dict[str, dict[int, str]] | None = None,
    tokenizer: Any = None,
) -> None:
    """Traces a module and writes it with these layers; see `trace`."""
    check(module, layers)
    write(folder, trace(module, layers, example, outputs, dynamic), layers, tokenizer)


@torch.no_grad()
def trace(
    module: nn.Module,
    names: Iterable[str],
    example: dict[str, Any],
    outputs: Sequence[str] = ("logits",),
    dynamic: dict[str, dict[int, str]] | None = None,
) -> Traced:
    """The graph of a module in evaluation mode, which is left as it was; `names` are the layers to be drawn.

    `example`     arguments of one call by name; those that are no tensors are passed to every call as they are (use_cache=False)
    `outputs`     keys of what the module returns, or any names for a tensor or tuple
    `dynamic`     axes whose length is free, and its name; by default 0 "batch", and of integers also 1 "length"; the example
                  needs two or more entries along each
    """
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    axes = _axes(tensors, dynamic or {})
    marked = {name: _Marked(name, module.get_submodule(name)) for name in names}
    program = _exported(module, marked, example, tensors, tuple(outputs), axes)
    return Traced(program, _sites(program.graph, marked))


@torch.no_grad()
def write(folder: Path, traced: Traced, layers: dict[str, StaticLayer], tokenizer: Any = None) -> None:
    """Draws the layers in their places, all that were named, and writes the graph."""
    if any(site.node.graph is None for site in traced.sites.values()):
        raise ValueError("these layers are drawn already; a traced graph is written once")
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        with writing(folder):
            tokenizer.save_pretrained(folder)
    data, graph = DataFile(folder), traced.program.graph
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.const_value.nbytes > SMALL:
            data.store(name, value.const_value.numpy())
            value.const_value = data.tensors[name]
    for name, layer in layers.items():
        store(data, name, layer)
    _draw(traced, data, layers)
    with writing(folder):
        library().save(traced.program, folder / GRAPH)


# --- what surrounds a layer ------------------------------------------------------------------------------------------


def _sites(graph: "ir.Graph", marked: "dict[str, _Marked]") -> dict[str, Site]:
    """By layer, in the graph's order."""
    nodes = [node for node in graph if node.domain == MARK]
    names = [node.attributes["name"].as_string() for node in nodes]
    if sorted(names) != sorted(marked):
        wrong = sorted({n for n in [*names, *marked] if names.count(n) != 1})[0]
        raise UserError(f"{wrong} is used {names.count(wrong)} times by the module in the call of the example; once is what can be written")
    sites: dict[str, Site] = {}
    rounded: set[ir.Value] = set()
    for name, node in zip(names, nodes, strict=True):
        made, bounds = _rectified(node.outputs[0]) if marked[name].convolution else (node.outputs[0], None)
        assert node.inputs[0] is not None
        sites[name] = Site(node, _origin(node.inputs[0], rounded), made, bounds)
        rounded |= {made} if marked[name].convolution else set()
    return sites


def _rectified(value: "ir.Value") -> "tuple[ir.Value, tuple[float, float] | None]":
    """What the only reader makes of a tensor and clamps it to, if that is a ReLU of any height; otherwise the tensor itself."""
    readers = value.consumers()
    if len(readers) != 1 or value.is_graph_output():
        return value, None
    if readers[0].op_type == "Relu":
        return readers[0].outputs[0], (0.0, float("inf"))
    if readers[0].op_type == "Clip" and len(readers[0].inputs) == 3:
        low, high = (_constant(end) for end in readers[0].inputs[1:])
        if low is not None and high is not None and low == 0 < high:  # with another low end the quantizer would not do the same
            return readers[0].outputs[0], (0.0, float(high))
    return value, None


def _origin(value: "ir.Value", rounded: "set[ir.Value]") -> "ir.Value":
    """The rounded tensor that `value` holds nothing but entries of, or `value`."""
    found = value
    while found not in rounded:
        node = found.producer()
        if node is None or node.op_type not in MOVES or (node.op_type == "Pad" and _zeros(node) is None):
            return value
        assert node.inputs[0] is not None
        found = node.inputs[0]
    return found


def _zeros(node: "ir.Node") -> list[int] | None:
    """How many zeros a Pad puts where, as its attribute `pads` had it; None if not zeros, or not the same always."""
    pads, value, axes = (*node.inputs[1:], None, None, None)[:3]
    counts = _constant(pads)
    constant = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    if not constant or counts is None or axes is not None or (value is not None and _constant(value) != 0):
        return None
    return [int(n) for n in counts]


def _constant(value: "ir.Value | None") -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw(traced: Traced, data: DataFile, layers: dict[str, StaticLayer]) -> None:
    """Every layer in the place of the node that stands for it."""
    ir, graph = library(), traced.program.graph
    draw, drawn = Drawing(data.tensors), dict(layers)
    linear = Qdq(drawn)
    for name, site in traced.sites.items():
        x, padding = site.node.inputs[0], None
        assert x is not None
        if (kernel := layers[name].kernel) is not None:
            x, padding, pads = _unpadded(x)
            drawn[name] = replace(layers[name], kernel=kernel._replace(pads=tuple(map(sum, zip(kernel.pads, pads, strict=True)))))
        new = linear(draw, name, x)
        new.shape, new.type = site.made.shape, site.made.type
        graph.insert_before(site.node, draw.nodes)
        draw.nodes.clear()
        if site.made.is_graph_output():
            site.made.name, new.name = f"{site.made.name}.traced", site.made.name
        ir.convenience.replace_all_uses_with(site.made, new, replace_graph_outputs=True)
        relu = site.made.producer()
        graph.remove([site.node] if site.bounds is None or relu is None else [relu, site.node], safe=True)
        if padding is not None and not padding.outputs[0].uses() and not padding.outputs[0].is_graph_output():
            graph.remove(padding, safe=True)
    for value in draw.values.values():
        graph.register_initializer(value)
    graph.opset_imports.pop(MARK, None)


def _unpadded(x: "ir.Value") -> "tuple[ir.Value, ir.Node | None, tuple[int, ...]]":
    """An image before zeros were put around it, the Pad that did, and their numbers: top, left, bottom, right."""
    node = x.producer()
    zeros = _zeros(node) if node is not None and node.op_type == "Pad" else None
    if node is None or zeros is None or len(zeros) != 8 or min(zeros) < 0 or any(zeros[i] for i in (0, 1, 4, 5)):
        return x, None, (0, 0, 0, 0)
    assert node.inputs[0] is not None
    return node.inputs[0], node, (zeros[2], zeros[3], zeros[6], zeros[7])


# --- tracing ---------------------------------------------------------------------------------------------------------


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


class _Marked(nn.Module):
    """Stands for a layer while torch exports: one node, which is replaced afterwards."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name, self.layer = name, layer.layer if isinstance(layer, QuantLinear) else layer
        self.convolution = isinstance(self.layer, nn.Conv2d)

    def forward(self, x: Tensor) -> Tensor:
        w = weight_of(self.layer)
        shape = product(self.layer, x, w, None).shape if self.convolution else (*x.shape[:-1], len(w))
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
    marked: dict[str, _Marked],
    example: dict[str, Any],
    tensors: dict[str, Tensor],
    outputs: tuple[str, ...],
    axes: dict[str, dict[int, str]],
) -> "ir.Model":
    """The module's graph with a marked node for every one of the layers; `module` itself is left as it was."""
    library()
    try:
        import onnxscript  # noqa: F401 (torch imports it late, and its own error names no remedy)
    except ImportError as error:
        raise UserError("exporting this model to ONNX needs the package onnxscript: pip install onnxscript") from error
    originals = {name: module.get_submodule(name) for name in marked}
    training = module.training
    call = _Call(module, tuple(tensors), {n: v for n, v in example.items() if n not in tensors}, outputs)
    lengths = {name: torch.export.Dim(name) for named in axes.values() for name in named.values()}
    shapes = tuple({axis: lengths[name] for axis, name in axes[n].items()} for n in tensors)
    try:
        for name, mark in marked.items():
            _put(module, name, mark)
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
