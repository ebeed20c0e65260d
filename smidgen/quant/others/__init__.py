"""Models that are no language models, as `smidgen quantize --activations 8` takes them: one place that says which folder is what.

images       efficientnet-lite0                                     --calibration: a folder of images, a .npz, or glyphs
sentences    minilm-l6, a folder of smidgen search train,           --calibration: text, one a line
             or of sentence-transformers (BERT)
questions    a run of smidgen symbolic train                        its own task's questions
tasks        a run of smidgen fewshot train                         --calibration: images in classes, as for training
"""

import json
from pathlib import Path
from typing import Literal

from smidgen.errors import UserError
from smidgen.quant.others.other import Other

Kind = Literal["images", "sentences", "questions", "tasks"]
NAMES: dict[str, Kind] = {"efficientnet-lite0": "images", "minilm-l6": "sentences"}  # packaged; their modules are not always installed


def kind_of(model: str) -> Kind | None:
    """What a name or folder is; None: a language model, or nothing we know."""
    if model in NAMES:
        return NAMES[model]
    files: dict[str, Kind] = {"model.json": "questions", "method.json": "tasks"}
    for name, kind in files.items():
        if (trained(Path(model)) / name).is_file():
            return kind
    return "sentences" if _is_encoder(Path(model)) else None


def open_other(model: str, kind: Kind, source: str | None) -> Other:
    """The model, on the processor, and inputs of `source` for it; None: the kind's own, where it has any."""
    if kind == "images":
        from smidgen.quant.others.images import efficientnet_lite

        return efficientnet_lite(source)
    if kind == "questions":
        from smidgen.quant.others.questions import grid_model

        return grid_model(Path(model), source)
    if kind == "tasks":
        from smidgen.quant.others.tasks import few_shot

        return few_shot(Path(model), source)
    from smidgen.quant.others.sentences import sentence_encoder
    from smidgen.search.bert import find

    return sentence_encoder(find(str(encoder_folder(Path(model)))), model, source)


def trained(path: Path) -> Path:
    """Where the model is, of a run of smidgen fewshot train or symbolic train, or of its folder."""
    return path / "trained" if (path / "trained").is_dir() else path


def encoder_folder(path: Path) -> Path:
    """Where the encoder is, of a run of smidgen search train or of its folder."""
    from smidgen.search.folder import INNER

    return path / INNER if (path / INNER / "config.json").is_file() or (path / INNER / "encoder.json").is_file() else path


def _is_encoder(path: Path) -> bool:
    """Whether a folder is one of sentence-transformers, or a BERT; what smidgen search distill wrote is refused."""
    folder = encoder_folder(path)
    if (folder / "encoder.json").is_file():
        raise UserError(f"{path}: a distilled encoder, written as ONNX already; quantize the folder of smidgen search train it came from")
    if (folder / "modules.json").is_file():
        return True
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "bert"
    except (OSError, ValueError, AttributeError):
        return False  # no folder of ours; whoever opens it as a language model says what is wrong
