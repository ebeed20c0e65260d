"""A few-shot predictor as one ONNX file; the support travels with every call, so new classes need no new model.

    support_images   float32 (support, *image)     as the backbone reads them: (channels, height, width) in [0, 1], or features
    support_labels   float32 (support, ways)       one-hot rows
    query_images     float32 (queries, *image)
    probabilities    float32 (queries, ways)

`support`, `queries` and `ways` are free. Of the methods whose prediction is a backbone and a head in closed form: ProtoNet, SimpleShot,
LabelPropagation, TPN.

ONNX has no operator that solves linear systems, so (I - alpha S) F = Y becomes products of matrices (propagation.doubling).

Eight bits: ONNX Runtime's static quantization (QDQ) of the backbone's convolutions and matrix products, weights per channel, ranges from
calibration tasks. The graph module of TPN and the heads stay float: a rounding error of sigma moves whole rows of the graph.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode
from smidgen.fewshot.methods.propagation import Propagating, doubling
from smidgen.fewshot.methods.prototypes import ProtoNet, one_hot

if TYPE_CHECKING:
    import onnx
    import onnxruntime

INPUTS = ("support_images", "support_labels", "query_images")
OUTPUT = "probabilities"
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules it comes from
QUANTIZED = ("Conv", "Gemm", "MatMul")
Exportable = ProtoNet | Propagating


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from torch."""

    path: Path
    size_bytes: int
    deviation: float
    "Largest difference of a probability from torch's, over the queries of all given tasks."
    agreement: float
    "Share of these queries that get the same class."


class Predictor(nn.Module):
    """One task, as the file has it."""

    def __init__(self, method: Exportable) -> None:
        super().__init__()
        self.method = method

    def forward(
        self,
        support_images: Float[Tensor, "support *image"],
        support_labels: Float[Tensor, "support ways"],
        query_images: Float[Tensor, "queries *image"],
    ) -> Float[Tensor, "queries ways"]:
        """Probabilities of the queries."""
        return self.logits(support_images, support_labels, query_images).softmax(-1)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Of the queries."""
        n = support.shape[0]
        maps = self.method.backbone(torch.cat([support, query]))
        if isinstance(self.method, ProtoNet):
            x = maps.flatten(1)
            return self.method.head(x[None, :n], labels[None], x[None, n:])[0]
        y = torch.cat([labels, labels.new_zeros(query.shape[0], labels.shape[1])])
        real = torch.ones_like(y[:, 0], dtype=torch.bool)
        return self.method.head(maps[None], y[None], real[None], doubling)[0, n:]


def export(method: nn.Module, path: Path, episodes: Sequence[Episode], bits: int | None = None) -> Exported:
    """Writes the predictor and compares it with torch on the episodes' tasks.

    `episodes` give the shape of images; with `bits` 8 they are calibration data too, so let there be some ten tasks of real images.
    The method is left as it was; what is written is its evaluation mode.
    """
    method = exportable(method)
    if bits not in (None, 8):
        raise UserError(f"the backbone is exported in float or 8 bits, not {bits}")
    feeds = [feed for episode in episodes for feed in tasks(episode)]
    if not feeds:
        raise UserError("an export needs at least one episode, for the shape of its images")
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch imports it late)
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime") from error
    predictor = inductive(Predictor(copy.deepcopy(method).cpu())).eval()
    model = graph(predictor, feeds[0])
    if bits == 8:
        model = quantized(model, feeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    ours, theirs = answers(predictor, opened(path), feeds)
    return Exported(path, path.stat().st_size, *difference(ours, theirs))


def exportable(method: nn.Module) -> Exportable:
    """The method, if a file can hold it."""
    if isinstance(method, ProtoNet | Propagating):
        return method
    raise UserError(f"a {type(method).__name__} cannot be exported to ONNX: its prediction is not a backbone with a head in closed form")


def inductive(predictor: Predictor) -> Predictor:
    """The predictor, if its features of an image are the same whatever lies beside it."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats for m in predictor.modules()):
        raise UserError(
            "transductive batch norm takes statistics of the batch, which the file would get wrong; export an inductive network"
        )
    return predictor


def tasks(episode: Episode) -> list[dict[str, np.ndarray]]:
    """Every task as the file takes it, without padding."""
    labels = one_hot(episode.support_y, episode.ways)
    found = []
    for i in range(len(labels)):
        support, query = episode.support_y[i] >= 0, episode.query_y[i] >= 0
        tensors = episode.support_x[i][support], labels[i][support], episode.query_x[i][query]
        found.append({name: t.float().cpu().numpy() for name, t in zip(INPUTS, tensors, strict=True)})
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No advice of the exporter and the quantizer: of packages this needs not, and of steps that are done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def graph(predictor: Predictor, feed: dict[str, np.ndarray]) -> "onnx.ModelProto":
    """The predictor's graph."""
    support, queries, ways = (torch.export.Dim(name, min=least) for name, least in (("support", 2), ("queries", 1), ("ways", 2)))
    shapes = {"support_images": {0: support}, "support_labels": {0: support, 1: ways}, "query_images": {0: queries}}
    # a task of 1 or 2 would be taken for a constant: traced with sizes of its own
    example = [np.repeat(feed[name], 3, 0) for name in INPUTS]
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec")  # torch.export about its own classes
            warnings.filterwarnings("ignore", "# The axis name")  # two inputs share the axis "support"; meant so
            program = torch.onnx.export(
                predictor,
                tuple(torch.from_numpy(x) for x in example),
                dynamo=True,
                opset_version=20,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = next((line for line in reversed(str(error).splitlines()) if line.startswith("<class")), str(error).splitlines()[0])
        raise UserError(f"torch cannot export {type(predictor.method.backbone).__name__} to ONNX: {first}") from error
    assert program is not None
    return program.model_proto


def quantized(model: "onnx.ModelProto", feeds: list[dict[str, np.ndarray]]) -> "onnx.ModelProto":
    """The backbone in eight bits."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Feeds(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self.rest, None)

    chosen = [node.name for node in model.graph.node if node.op_type in QUANTIZED and in_backbone(node)]
    if not chosen:
        raise UserError("the backbone has no convolution or matrix product to quantize; leave out the bits")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # has its shapes; spares a warning that it has none
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Feeds(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


def in_backbone(node: "onnx.NodeProto") -> bool:
    """Whether the node was traced in `method.backbone`."""
    return any(p.key == SCOPES and "method.backbone" in p.value for p in node.metadata_props)


def opened(path: Path) -> "onnxruntime.InferenceSession":
    """In the runtime, on the processor."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def answers(
    predictor: "Predictor", session: "onnxruntime.InferenceSession", feeds: Iterable[dict[str, np.ndarray]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Probabilities of every task's queries, by torch and by the file."""
    ours, theirs = [], []
    for feed in feeds:
        with torch.no_grad():
            ours.append(predictor(*(torch.from_numpy(feed[name]) for name in INPUTS)).numpy())
        theirs.append(np.asarray(session.run([OUTPUT], feed)[0]))
    return ours, theirs


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float]:
    """Largest difference of a probability, and the share of queries that get the same class."""
    pairs = list(zip(ours, theirs, strict=True))
    agreed = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return max(float(np.abs(a - b).max()) for a, b in pairs), float(agreed.mean())
