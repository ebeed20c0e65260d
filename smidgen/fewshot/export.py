"""`smidgen fewshot export`: a few-shot predictor as one ONNX file; the support travels with every call, so new classes need no new model.

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
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from cyclopts import Parameter
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.data import GLYPHS, load_images, shape_of
from smidgen.fewshot.episodes import Episode, Sampler
from smidgen.fewshot.methods.propagation import Propagating, doubling
from smidgen.fewshot.methods.prototypes import ProtoNet, one_hot
from smidgen.fewshot.models import Description, describe, load, trained_folder
from smidgen.run import Run

if TYPE_CHECKING:
    import onnx
    import onnxruntime

MODEL = "model.onnx"
INPUTS = ("support_images", "support_labels", "query_images")
OUTPUT = "probabilities"
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules it comes from
QUANTIZED = ("Conv", "Gemm", "MatMul")
Exportable = ProtoNet | Propagating


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen fewshot export`."""

    model: Path
    "A run of smidgen fewshot train, or the folder trained in it."
    _: KW_ONLY
    to: Literal["onnx"] = "onnx"
    "For ONNX Runtime, and whatever else reads ONNX."
    bits: int | None = None
    "8: the backbone in eight bits, its ranges from tasks of --data; none: as it is."
    data: str | None = None
    "Images to calibrate on and to compare with torch on, as for training; none: compared on noise."
    calibration_split: str = "train"
    "Its classes that ranges are taken from."
    split: str = "test"
    "Its classes that accuracy is compared on."
    calibration: int = 16
    "Tasks that ranges are taken from."
    episodes: int = 100
    "Tasks that accuracy is compared on."
    queries: int = 15
    "Images of each class to be classified in these tasks."
    output: Path | None = None
    "Folder of the run; by default a new one under runs/fewshot/export."
    seed: int = 0
    "Chooses the tasks."

    def check(self) -> None:
        """Refuses what cannot work."""
        for name, value in (("calibration", self.calibration), ("episodes", self.episodes), ("queries", self.queries)):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if self.bits == 8 and self.data is None:
            raise UserError("--bits 8 takes the ranges of activations from real images: give some with --data, such as those trained on")


def command(config: Config) -> dict[str, Any]:
    """Write a trained method as one file that a device runs, and measure that file."""
    with Run("fewshot export", config, config.output, f"{config.model.name}-{config.to}") as run:
        return main(config, run)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Load, write, read back, compare, time."""
    config.check()
    folder = trained_folder(config.model)
    described, method = describe(folder), exportable(load(folder))
    calibration, tests = drawn(config, described)
    artifact = run.partial("artifact")
    written = export(method, artifact / MODEL, calibration, config.bits)
    session = opened(written.path)
    predictor, feeds = Predictor(copy.deepcopy(method)).eval(), [feed for episode in tests for feed in tasks(episode)]
    ours, theirs = answers(predictor, session, run.track(feeds, "tasks", len(feeds)))
    deviation, agreement = difference(ours, theirs)
    milliseconds = latency(session, feeds[0])
    run.keep(artifact)
    figures = {} if config.data is None else {"accuracy": right(theirs, tests), "accuracy_torch": right(ours, tests)}
    return run.finish(
        **figures,
        deviation=deviation,
        agreement=agreement,
        size_bytes=written.size_bytes,
        latency_ms_per_image=milliseconds / sum(len(feeds[0][name]) for name in ("support_images", "query_images")),
        latency_ms_per_task=milliseconds,
        task_images=[len(feeds[0][name]) for name in ("support_images", "query_images")],
        bits=config.bits or 32,
        episodes=len(feeds),
        method=described.name,
        ways=described.ways,
        data=config.data or "noise",
        model=str(config.model),
        artifact=str(run.folder / "artifact" / MODEL),
        seed=config.seed,
    )


def drawn(config: Config, described: Description) -> tuple[list[Episode], list[Episode]]:
    """Tasks to calibrate on and tasks to compare on, of the size trained on; any-shot ones with 5 shots."""
    shots = described.shots if isinstance(described.shots, int) else 5
    if config.data is None:
        random = torch.Generator().manual_seed(config.seed)
        y = [torch.arange(described.ways).repeat_interleave(n)[None] for n in (shots, config.queries)]
        x = [torch.rand(1, part.shape[1], *described.shape, generator=random) for part in y]
        noise = [Episode(x[0], y[0], x[1], y[1], described.ways)]
        return noise, noise
    channels, height, _ = described.shape
    counts = {config.calibration_split: config.calibration, config.split: config.episodes}
    sets = {split: load_images(config.data, split, *((None, None) if config.data == GLYPHS else (height, channels))) for split in counts}
    for images in sets.values():
        described.check(shape_of(images), config.data)
    samplers = {split: Sampler(images, described.ways, shots, config.queries, seed=config.seed) for split, images in sets.items()}
    calibration, tests = ([samplers[split](i) for i in range(count)] for split, count in counts.items())
    return calibration, tests


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


def right(found: list[np.ndarray], episodes: list[Episode]) -> float:
    """Accuracy, mean over tasks."""
    truth = [episode.query_y[0].numpy() for episode in episodes]
    return float(np.mean([(p.argmax(-1) == y).mean() for p, y in zip(found, truth, strict=True)]))


def latency(session: "onnxruntime.InferenceSession", feed: dict[str, np.ndarray], seconds: float = 1.0) -> float:
    """Milliseconds of a call, the median of as many as fit into the time, three to warm up not counted."""
    taken: list[float] = []
    while len(taken) < 6 or sum(taken) < seconds:
        started = time.perf_counter()
        session.run([OUTPUT], feed)
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken[3:]))


def opened(path: Path) -> "onnxruntime.InferenceSession":
    """In the runtime, on the processor."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


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
    predictor = Predictor(copy.deepcopy(method).cpu()).eval()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats for m in predictor.modules()):
        raise UserError(
            "transductive batch norm takes statistics of the batch, which the file would get wrong; export an inductive network"
        )
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
