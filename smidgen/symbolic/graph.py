"""An ONNX graph, node by node, of a model that lays questions out on a grid.

Written out rather than traced: torch 2.13's exporter fixes the length of a GRU's input, the recurrence of the soft layout it would unroll,
and a device needs less than training does. Batch norm is folded into convolutions; of the last blocks only the rows that the answer
on row 0 depends on are computed, 36 % fewer products on a grid of three rows.

    tokens    int64 (length,)             a question with its end
    logits    float32 (columns, symbols) or (labels,)
    actions   float32 (length, 3)         probabilities of TLU, NLP, no-op

Eight bits are of the weights behind the grid: int8 with a scale per output channel behind DequantizeLinear, which a runtime folds when it
loads the file; products stay float, so that answers stay those of torch. What lays the grid out has float16 weights: rounding a close
decision between two actions moves whole rows.
"""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.networks import GRU, OUTSIDE, Blocks, Bottleneck, LocalAttention, TextCNN, TopList
from smidgen.symbolic.seq2grid import Seq2Grid
from smidgen.symbolic.tasks import NLP, NOOP, TLU

if TYPE_CHECKING:
    import onnx

OPSET, IR = 20, 9
OFFSETS = [(i, j) for i in range(3) for j in range(3)]  # of neighbours, row by row
SMALL = 1024  # numbers of a weight that stays float
Mode = Literal["soft", "hard"]


class Graph:
    """Nodes and constants so far; an operation returns the name of its output."""

    def __init__(self, eight_bits: bool = False) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.eight_bits = eight_bits

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Adds a node; the name of its first output."""
        import onnx

        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(onnx.helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        """Numbers."""
        import onnx

        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value, kind), name))
        return name

    def integers(self, *values: int) -> str:
        """A vector."""
        return self.constant(values, np.int64)

    def weight(self, value: Float[np.ndarray, "*shape"], axis: int) -> str:
        """A matrix or kernel, in eight bits if they are asked for and it is worth it; `axis` counts its output channels."""
        if not self.eight_bits or value.size < SMALL:
            return self.constant(value)
        other = tuple(i for i in range(value.ndim) if i != axis)
        scale = np.maximum(np.abs(value).max(other), 1e-12) / 127
        shape = [-1 if i == axis else 1 for i in range(value.ndim)]
        codes = np.rint(value / scale.reshape(shape))
        return self("DequantizeLinear", self.constant(codes, np.int8), self.constant(scale), axis=axis)

    def precise(self, value: Float[np.ndarray, "*shape"]) -> str:
        """A weight that rounding has to spare: float16 where others have eight bits."""
        return self("Cast", self.constant(value, np.float16), to=1) if self.eight_bits else self.constant(value)

    def model(self, outputs: dict[str, tuple[str, list[int | str]]], opset: int = OPSET, ir: int = IR) -> "onnx.ModelProto":
        """All of it; `outputs` are names, which values they are, and their shapes."""
        import onnx
        from onnx import TensorProto, helper

        for name, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        given = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["length"])]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()]
        graph = helper.make_graph(self.nodes, "seq2grid", given, made, self.constants)
        found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir, producer_name="smidgen")
        onnx.checker.check_model(found, full_check=True)
        return found


def build(model: GridModel, mode: Mode, eight_bits: bool) -> "onnx.ModelProto":
    """The graph of a trained model in evaluation mode."""
    graph, module = Graph(eight_bits), model.module
    grid, actions = laid_out(graph, model, mode)
    network = model.network
    if isinstance(network, TextCNN) and isinstance(model.readout, nn.Linear):
        logits = dense(graph, model.readout, textcnn(graph, network, grid))
        shape: list[int | str] = [model.readout.out_features]
    elif isinstance(network, Blocks) and isinstance(model.readout, TopList):
        logits = top_list(graph, model.readout, blocks(graph, network, grid, module.rows, module.columns))
        shape = [module.columns, model.readout.dense.out_features]
    else:
        raise UserError(f"a {type(network).__name__} with a {type(model.readout).__name__} cannot be exported")
    return graph.model({"logits": (logits, shape), "actions": (actions, ["length", 3])})


def front(model: GridModel, mode: Mode, eight_bits: bool, opset: int, ir: int) -> "onnx.ModelProto":
    """What lays the grid out alone, tokens -> cells (1, dim, rows, columns) and actions, to be joined with a network drawn elsewhere."""
    graph, module = Graph(eight_bits), model.module
    grid, actions = laid_out(graph, model, mode)
    shape: list[int | str] = [1, model.embedding.table.shape[1], module.rows, module.columns]
    return graph.model({"cells": (grid, shape), "actions": (actions, ["length", 3])}, opset, ir)


def laid_out(graph: Graph, model: GridModel, mode: Mode) -> tuple[str, str]:
    """The grid, (1, dim, rows, columns), and the actions that laid it out."""
    table = array(model.embedding.table) * model.embedding.table.shape[1] ** 0.5
    x = graph("Gather", graph.precise(table), "tokens")
    actions = probabilities(graph, model.module, x)
    return (hard if mode == "hard" else soft)(graph, model.module, x, actions), actions


def array(parameter: Tensor) -> Float[np.ndarray, "*shape"]:
    """Of a parameter, float64 for folding."""
    return parameter.detach().double().cpu().numpy()


def dense(graph: Graph, layer: nn.Linear, x: str) -> str:
    """Over the last axis."""
    product = graph("MatMul", x, graph.weight(array(layer.weight).T, 1))
    return product if layer.bias is None else graph("Add", product, graph.constant(array(layer.bias)))


def probabilities(graph: Graph, module: Seq2Grid, x: str) -> str:
    """(length, dim) -> (length, 3)"""
    if not isinstance(module.encoder, GRU):
        raise UserError(f"only models with the GRU encoder are exported, this one has {type(module.encoder).__name__}")
    states = gru(graph, module.encoder.rnn, graph("Unsqueeze", x, graph.integers(1)))
    p = graph("Softmax", dense(graph, module.action, graph("Squeeze", states, graph.integers(1))), axis=-1)
    return graph("Pad", p, graph.integers(0, 0, 0, 1)) if module.no_leak else p


def gru(graph: Graph, rnn: nn.GRU, x: str) -> str:
    """All layers: (length, 1, inputs) -> (length, 1, directions hidden). ONNX has the update gate first, torch the reset gate."""

    def reordered(value: np.ndarray) -> np.ndarray:
        reset, update, new = np.split(value, 3)
        return np.concatenate([update, reset, new])

    directions = ["", "_reverse"] if rnn.bidirectional else [""]
    for layer in range(rnn.num_layers):
        found = {
            part: np.stack([reordered(array(rnn.get_parameter(f"{part}_l{layer}{d}"))) for d in directions])
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        w, r = (graph.precise(found[part]) for part in ("weight_ih", "weight_hh"))
        b = graph.constant(np.concatenate([found["bias_ih"], found["bias_hh"]], 1))
        direction = "bidirectional" if rnn.bidirectional else "forward"
        y = graph("GRU", x, w, r, b, hidden_size=rnn.hidden_size, linear_before_reset=1, direction=direction)
        x = graph("Reshape", graph("Transpose", y, perm=[0, 2, 1, 3]), graph.integers(0, 0, -1))
    return x


def hard(graph: Graph, module: Seq2Grid, x: str, actions: str) -> str:
    """The grid of the likeliest actions, by the counters of `seq2grid.cells`; every token is written by one column of a product.

    The updates between a token and the next push are those after it with as many pushes before them as it has.
    """
    rows, columns = module.rows, module.columns
    action = graph("ArgMax", actions, axis=-1, keepdims=0)
    push, update = (graph("Cast", graph("Equal", action, graph.integers(a)), to=1) for a in (NLP, TLU))
    pushes = graph("CumSum", push, graph.constant(0, np.int64))
    row = graph("Sub", graph("ReduceSum", push, keepdims=1), pushes)
    same = graph("Equal", graph("Unsqueeze", pushes, graph.integers(1)), graph("Unsqueeze", pushes, graph.integers(0)))
    later = graph("Trilu", graph("Cast", same, to=1), graph.constant(1, np.int64), upper=1)
    slot = graph("Squeeze", graph("MatMul", later, graph("Unsqueeze", update, graph.integers(1))), graph.integers(1))
    kept = graph("Not", graph("Equal", action, graph.integers(NOOP)))
    for value, bound in ((row, rows), (slot, columns)):
        kept = graph("And", kept, graph("Less", value, graph.constant(bound)))
    cell = graph("Add", graph("Mul", row, graph.constant(columns)), slot)
    cell = graph("Cast", graph("Where", kept, cell, graph.constant(rows * columns)), to=7)
    m = graph("OneHot", cell, graph.integers(rows * columns + 1), graph.constant([0, 1]), axis=0)
    m = graph("Slice", m, graph.integers(0), graph.integers(rows * columns), graph.integers(0))
    return written(graph, module, m, x)


def soft(graph: Graph, module: Seq2Grid, x: str, actions: str) -> str:
    """The expected grid: the recurrence of `seq2grid.weights` over places, from the last token back, as a Scan."""
    from onnx import TensorProto, helper

    rows, columns = module.rows, module.columns
    places = rows + columns
    u, p, n = (graph("Gather", actions, graph.integers(i), axis=1) for i in (TLU, NLP, NOOP))  # (length, 1)
    ones = graph.constant(np.ones((1, places)))
    waiting, entering = np.arange(places) < rows, np.arange(places) == rows
    u_stays, walks = graph.constant(waiting[None]), graph.constant((np.arange(places) > rows)[None])
    a = graph("Add", graph("Mul", n, ones), graph("Mul", u, u_stays))
    c = graph("Add", graph("Mul", p, graph.constant((waiting | entering)[None])), graph("Mul", u, walks))
    start = np.zeros((rows, places))
    start[np.arange(rows), rows - np.arange(rows)] = 1
    body = helper.make_graph(
        [
            helper.make_node("Slice", ["y", "zero", "last", "axis"], ["up_to"]),
            helper.make_node("Pad", ["up_to", "before"], ["shifted"]),
            helper.make_node("Mul", ["a_now", "y"], ["stayed"]),
            helper.make_node("Mul", ["c_now", "shifted"], ["moved"]),
            helper.make_node("Add", ["stayed", "moved"], ["next"]),
            helper.make_node("Identity", ["y"], ["seen"]),
        ],
        "step",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("y", [rows, places]), ("a_now", [places]), ("c_now", [places]))
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, places]) for name in ("next", "seen")],
        [
            helper.make_tensor(name, TensorProto.INT64, [len(v)], v)
            for name, v in (("zero", [0]), ("last", [places - 1]), ("axis", [1]), ("before", [0, 1, 0, 0]))
        ],
    )
    final = graph(
        "Scan",
        graph.constant(start),
        a,
        c,
        outputs=2,
        body=body,
        num_scan_inputs=2,
        scan_input_directions=[1, 1],
        scan_output_directions=[1],
    )
    y = graph("Slice", final.removesuffix("0") + "1", graph.integers(rows), graph.integers(places), graph.integers(2))
    m = graph("Mul", graph("Add", u, p), graph("Reshape", y, graph.integers(0, rows * columns)))
    return written(graph, module, graph("Transpose", m, perm=[1, 0]), x)


def written(graph: Graph, module: Seq2Grid, m: str, x: str) -> str:
    """(rows columns, length) and (length, dim) -> (1, dim, rows, columns)"""
    grid = graph("Transpose", graph("MatMul", m, x), perm=[1, 0])
    return graph("Reshape", grid, graph.integers(1, -1, module.rows, module.columns))


def textcnn(graph: Graph, network: TextCNN, grid: str) -> str:
    """Features of the grid; dropout is over."""
    found = []
    for part in network.convolutions:
        assert isinstance(part, nn.Conv2d) and part.bias is not None
        y = graph("Conv", grid, graph.weight(array(part.weight), 0), graph.constant(array(part.bias)))
        found.append(graph("ReduceMax", graph("Relu", y), graph.integers(0, 2, 3), keepdims=0))
    return graph("Concat", *found, axis=0)


def blocks(graph: Graph, network: Blocks, x: str, rows: int, columns: int) -> str:
    """The top row after all blocks, (columns, channels); the i-th from the end needs i + 1 rows of its input."""
    for i, block in enumerate(network):
        assert isinstance(block, Bottleneck)
        above = min(rows, len(network) - i)
        read = min(rows, above + 1)
        x = bottleneck(graph, block, rows_of(graph, x, read), above, columns, read == above)
    return graph("Transpose", graph("Squeeze", x, graph.integers(0, 2)), perm=[1, 0])


def rows_of(graph: Graph, x: str, count: int) -> str:
    """The first rows."""
    return graph("Slice", x, graph.integers(0), graph.integers(count), graph.integers(2))


def bottleneck(graph: Graph, block: Bottleneck, x: str, rows: int, columns: int, below: bool) -> str:
    """`rows` rows of a block; `below`: whether the next row is outside the grid. The last 1x1 and the shortcut are one convolution."""
    first, norm1, _, middle, norm2, _, last, norm3 = block.main
    y = graph("Relu", convolution(graph, [(first, norm1)], [x]))
    if isinstance(middle, LocalAttention):
        y = graph("Relu", folded(graph, norm2, attention(graph, middle, y, rows, columns, below)))
    else:
        y = graph("Relu", convolution(graph, [(middle, norm2)], [y], [1, 1, int(below), 1]))
    shortcut, norm = block.shortcut
    return graph("Relu", convolution(graph, [(last, norm3), (shortcut, norm)], [y, rows_of(graph, x, rows)]))


def convolution(graph: Graph, layers: list[Any], inputs: list[str], pads: list[int] | None = None) -> str:
    """The sum of convolutions, each with its batch norm folded in, as one over the inputs' channels together."""
    kernels, bias = [], np.zeros(1)
    for layer, norm in layers:
        scale, shift = affine(norm)
        kernels.append(array(layer.weight) * scale[:, None, None, None])
        bias = bias + shift
    x = inputs[0] if len(inputs) == 1 else graph("Concat", *inputs, axis=1)
    return graph("Conv", x, graph.weight(np.concatenate(kernels, 1), 0), graph.constant(bias), pads=pads or [0, 0, 0, 0])


def affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """What batch norm multiplies by and adds in evaluation."""
    scale = array(norm.weight) / np.sqrt(array(norm.running_var) + norm.eps)
    return scale, array(norm.bias) - array(norm.running_mean) * scale


def folded(graph: Graph, norm: Any, x: str) -> str:
    """Batch norm on its own."""
    scale, shift = affine(norm)
    return graph("Add", graph("Mul", x, graph.constant(scale[:, None, None])), graph.constant(shift[:, None, None]))


def attention(graph: Graph, layer: LocalAttention, x: str, rows: int, columns: int, below: bool) -> str:
    """(1, width, read, columns) -> (1, width, rows, columns), each cell from its nine neighbours."""

    def around(y: str) -> str:
        padded = graph("Pad", y, graph.integers(0, 0, 1, 1, 0, 0, int(below), 1))
        parts = []
        for i, j in OFFSETS:
            start, stop = graph.integers(i, j), graph.integers(i + rows, j + columns)
            parts.append(graph("Slice", padded, start, stop, graph.integers(2, 3)))
        return graph("Concat", *parts, axis=0)  # (9, width, rows, columns)

    q, k, v = (graph("Conv", x, graph.weight(array(part.weight), 0)) for part in (layer.query, layer.key, layer.value))
    offset = np.stack([np.concatenate([array(layer.row)[i], array(layer.column)[j]]) for i, j in OFFSETS])[:, :, None, None]
    keys = graph("Add", graph("Mul", around(k), graph.constant(layer.width**-0.5)), graph.constant(offset))
    scores = graph("ReduceSum", graph("Mul", rows_of(graph, q, rows), keys), graph.integers(1))  # (9, 1, rows, columns)
    inside = np.pad(np.ones((rows + (not below), columns)), ((1, int(below)), (1, 1)))
    outside = np.stack([inside[i : i + rows, j : j + columns] == 0 for i, j in OFFSETS])[:, None]
    p = graph("Softmax", graph("Add", scores, graph.constant(np.where(outside, OUTSIDE, 0))), axis=0)
    return graph("ReduceSum", graph("Mul", p, around(v)), graph.integers(0))


def top_list(graph: Graph, readout: TopList, top: str) -> str:
    """(columns, channels) -> (columns, symbols)"""
    if readout.scan is not None and readout.back is not None:
        seen = gru(graph, readout.scan, graph("Unsqueeze", top, graph.integers(1)))
        top = graph("Relu", graph("Add", top, dense(graph, readout.back, graph("Squeeze", seen, graph.integers(1)))))
    return dense(graph, readout.dense, top)
