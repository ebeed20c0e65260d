"""Other models on integers: what EfficientNet-Lite0 and MiniLM-L6 lose in 8 bits, how small and how fast they get.

    python benchmarks/quantize_modules.py                          # a quarter of an hour on two cores
    python benchmarks/quantize_modules.py --tables sentences

    images       EfficientNet-Lite0, ranges from CIFAR-FS's training classes: accuracy of the nearest prototype, 5-way, over the same
                 episodes of CIFAR-FS's test classes and of Flowers; features on the sphere, as they are and less their mean
    sentences    MiniLM-L6, ranges from the features' own texts: rank of the right feature for the development queries, scores the mean
                 of the cosines with its title and with all its fields, nothing trained

Every row is a file in ONNX Runtime on one thread: `float`, the methods of `smidgen quantize --activations 8`, and as peers what ONNX
Runtime makes of the float file with the same images (`quantize_static`, minimum and maximum, weights per channel; `quantize_dynamic` for
MiniLM, which `smidgen search distill` uses). Times are processor time, which others on the machine hardly change.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import append, provenance, rounded

from smidgen.fewshot.episodes import Sampler
from smidgen.images import load
from smidgen.quant.others import command, open_other
from smidgen.quant.others.other import GRAPH, Other, Sample
from smidgen.quant.quantize import Config
from smidgen.run import Run
from smidgen.search import export as search_export
from smidgen.search.bert import MINILM, find
from smidgen.search.bert import load as load_encoder
from smidgen.search.features import read_features, read_queries
from smidgen.search.metrics import by_kind

RESULTS = Path(__file__).parent / "results" / "quantize_modules.csv"
METHODS = ("min-max", "mse", "clip")
CALLS = 100  # timed
SETS = {"cifar_fs": ("cifar_fs/cifar_fs_100.npz", "test"), "flowers12": ("flowers12/flowers12_48.npz", None)}
COLUMNS = [
    "table", "model", "method", "inputs", "seed", "measure", "value", "interval", "cosine", "cosine_least", "size_megabytes",
    "cpu_ms_p50", "seconds", "commit", "machine", "date",
]  # fmt: skip
Embed = Callable[[Sequence[Sample]], np.ndarray]


def artifacts(model: str, source: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(method, folder with the graph, figures of the command) of our methods; the float file first."""
    kind = "images" if model == "efficientnet-lite0" else "sentences"
    other = open_other(model, kind, source)
    (folder / "float").mkdir(exist_ok=True)
    command.written_float(other, other.samples(1, 0)[0], folder / "float")
    yield "float", folder / "float", {"seconds": 0.0}
    for method in METHODS:
        config = Config(model, method=method, bits=8, activations=8, calibration=source, sequences=options.sequences, seed=options.seed)
        with Run("quantize", config, folder / method) as run:
            found = command.main(config, run, kind)
        yield method, folder / method / "onnx", {"seconds": found["quantize_seconds"]}


def static_peer(other: Other, source: Path, folder: Path, count: int, seed: int) -> None:
    """ONNX Runtime's own static quantization of the float file."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Feeds(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter([dict(sample.feed) for sample in other.samples(count, seed)])

        def get_next(self) -> Any:
            return next(self.rest, None)

    folder.mkdir(exist_ok=True)
    whole = onnx.load(source / GRAPH)
    onnx.save(whole, folder / "float.onnx")
    logging.disable(logging.WARNING)
    quantize_static(
        folder / "float.onnx", folder / GRAPH, Feeds(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)


def embedder(folder: Path, output: str) -> Embed:
    """Outputs of a file for samples, one row each."""
    session = command.opened(folder)
    return lambda samples: np.concatenate([session.run([output], dict(sample.feed))[0] for sample in samples])


def common(folder: Path, output: str, sample: Sample) -> dict[str, float]:
    """Size and time."""
    return {
        "size_megabytes": command.size(folder) / 1e6,
        "cpu_ms_p50": cpu_milliseconds(folder, output, sample),
    }


def cpu_milliseconds(folder: Path, output: str, sample: Sample) -> float:
    """Processor time of a call, the median; on one thread of an idle machine that is how long it takes."""
    session, taken = command.opened(folder), []
    for _ in range(CALLS):
        started = time.thread_time()
        session.run([output], dict(sample.feed))
        taken.append(time.thread_time() - started)
    return 1000 * float(np.median(taken))


def alike(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Cosines of rows."""
    found = [command.cosine(x, y) for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True)]
    return {"cosine": float(np.mean(found)), "cosine_least": min(found)}


# --- images ----------------------------------------------------------------------------------------------------------


def images(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Accuracy of the nearest prototype."""
    data = options.data / "fewshot"
    training = load(data / SETS["cifar_fs"][0], "train")
    source = folder / "calibration.npz"
    chosen = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(0))[:512]
    np.savez(source, images=training.pixels[chosen].numpy(), labels=np.zeros(512, np.int64), class_names=np.array(["any"]))
    sets = {name: (load(data / file, split), inputs(data / file, split)) for name, (file, split) in SETS.items()}
    reference: dict[str, np.ndarray] = {}
    for method, place, figures in with_peer("efficientnet-lite0", str(source), options, folder):
        embed = embedder(place, "features")
        for name, (labelled, samples) in sets.items():
            started = time.perf_counter()
            features = embed(samples)
            reference.setdefault(name, features)
            shared = common(place, "features", samples[0]) | alike(features, reference[name]) | figures
            print(f"{method} {name}: features in {time.perf_counter() - started:.0f} s", flush=True)
            for shots in (5, 1):
                for centred in (False, True):
                    accuracy, interval = prototypes(labelled, torch.from_numpy(features), shots, centred, options.episodes)
                    measure = f"{name} 5-way {shots}-shot{' centred' if centred else ''}"
                    yield {
                        "model": "efficientnet-lite0",
                        "method": method,
                        "measure": measure,
                        "value": accuracy,
                        "interval": interval,
                    } | shared


def with_peer(model: str, source: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Our files and ONNX Runtime's."""
    yield from artifacts(model, source, options, folder)
    started = time.perf_counter()
    other = open_other(model, "images", source)
    static_peer(other, folder / "float", folder / "peer", options.sequences, options.seed)
    (folder / "peer" / "float.onnx").unlink()
    yield "onnxruntime quantize_static", folder / "peer", {"seconds": time.perf_counter() - started}


def inputs(file: Path, split: str | None) -> list[Sample]:
    """All images of a set as the network reads them, in order."""
    from smidgen.backbones import EfficientNetLite, efficientnet_lite_of

    found, fitted = load(file, split), efficientnet_lite_of(EfficientNetLite()).fitted
    return [Sample.of(images=fitted(found.floats(torch.tensor([i])))) for i in range(len(found.labels))]


def prototypes(labelled: Any, features: torch.Tensor, shots: int, centred: bool, episodes: int) -> tuple[float, float]:
    """Mean accuracy of the nearest mean and 1.96 standard errors; the same episodes for the same images."""
    features = features - features.mean(0) if centred else features
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    numbered = type(labelled)(
        labelled.name, torch.arange(len(unit))[:, None, None, None], labelled.labels, labelled.classes, labelled.members
    )
    sampler, found = Sampler(numbered, 5, shots, 15, seed=0), []
    for number in range(episodes):
        episode = sampler(number)
        support, query = (unit[(x[0].flatten() * 255).round().long()] for x in (episode.support_x, episode.query_x))
        means = torch.stack([support[episode.support_y[0] == c].mean(0) for c in range(5)])
        found.append(float((torch.cdist(query, means).argmin(1) == episode.query_y[0]).double().mean()))
    return float(np.mean(found)), 1.96 * float(np.std(found)) / episodes**0.5


# --- sentences -------------------------------------------------------------------------------------------------------


def sentences(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Hits among the development queries."""
    features = read_features(options.data / "search" / "android_settings.jsonl")
    queries = read_queries(options.data / "search" / "dev_queries.jsonl", features)
    source = folder / "texts.txt"
    source.write_text("\n".join(feature.everything().replace("\n", " ") for feature in features))
    encoder = load_encoder(find(MINILM), 128)
    texts = [*(f.title for f in features), *(f.everything() for f in features), *(q.query for q in queries)]
    samples = [Sample.of(input_ids=ids, attention_mask=mask) for ids, mask in (encoder.tokens([text]) for text in texts)]
    reference = None
    for method, place, figures in with_dynamic(source, options, folder, encoder):
        vectors = embedder(place, "vectors")(samples)
        reference = vectors if reference is None else reference
        titles, everything, asked = np.split(vectors, [len(features), 2 * len(features)])
        figures = figures | common(place, "vectors", samples[-1]) | alike(asked, reference[2 * len(features) :])
        for kind, row in by_kind(asked @ (titles + everything).T / 2, queries, features).items():
            for figure in ("hit@10", "mrr@10"):
                if kind in ("contextual", "all") and figure in row:
                    yield {"model": MINILM, "method": method, "measure": f"{kind} {figure}", "value": float(row[figure])} | figures


def with_dynamic(source: Path, options: argparse.Namespace, folder: Path, encoder: Any) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Our files and that of `smidgen search distill`."""
    yield from artifacts(MINILM, str(source), options, folder)
    started = time.perf_counter()
    (folder / "dynamic").mkdir()
    search_export.export(encoder, folder / "dynamic").rename(folder / "dynamic" / GRAPH)
    yield "onnxruntime quantize_dynamic", folder / "dynamic", {"seconds": time.perf_counter() - started}


TABLES = {"images": images, "sentences": sentences}


def main() -> None:
    """Appends rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--sequences", type=int, default=32, help="calibration inputs")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="chooses the calibration inputs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for table in options.tables:
        with tempfile.TemporaryDirectory() as folder:
            for row in TABLES[table](options, Path(folder)):
                row |= {"table": table, "inputs": options.sequences, "seed": options.seed} | provenance()
                append(options.results, COLUMNS, [rounded(row, COLUMNS)])
                print({k: v for k, v in rounded(row, COLUMNS).items() if k not in ("commit", "machine", "date")}, flush=True)


if __name__ == "__main__":
    main()
