"""An exported model at work: onnxruntime and numpy, no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from smidgen.errors import UserError
from smidgen.quant.runtimes.onnxruntime import options
from smidgen.symbolic.answering import Said
from smidgen.symbolic.card import Card
from smidgen.symbolic.decoders import log_softmax, read
from smidgen.symbolic.tasks import Batch

CARD_KEY = "smidgen"  # of the card, in the file's metadata
INTEGER_KEY = "smidgen.integer"  # there if the network's products are integers (smidgen quantize)
ARTIFACT, FILE = "artifact", "model.onnx"


@dataclass(frozen=True)
class Exported:
    """A file with its card: a `Network`."""

    session: Any
    card: Card

    def __call__(self, tokens: Int[np.ndarray, "tokens"]) -> Said:
        """One question."""
        logits, actions = self.session.run(["logits", "actions"], {"tokens": tokens})
        log_probabilities = log_softmax(logits.astype(np.float64))
        best, chosen = log_probabilities.max(-1)[None], log_probabilities.argmax(-1)[None]
        symbols, log_probability = read(best, chosen, slots=chosen.ndim == 2)
        return Said(np.asarray(symbols[0]), float(log_probability[0]), actions)

    def many(self, batch: Batch) -> list[Said]:
        """One after the other."""
        return [self(tokens[:length]) for tokens, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)]


def exported_file(path: Path) -> Path | None:
    """The .onnx file that a path means: itself, or the one in a run of `smidgen symbolic export`."""
    if path.suffix == ".onnx":
        return path
    return next((file for file in (path / FILE, path / ARTIFACT / FILE) if file.is_file()), None)


def open_exported(path: Path, threads: int = 1) -> Exported:
    """Loads an exported model; more than one thread rarely helps one so small."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    session = _session(path, threads, integers=False)
    if INTEGER_KEY in session.get_modelmeta().custom_metadata_map:
        session = _session(path, threads, integers=True)
    try:
        card = Card.of(session.get_modelmeta().custom_metadata_map[CARD_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by smidgen symbolic export, or by another version") from error
    return Exported(session, card)


def _session(path: Path, threads: int, integers: bool) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("an exported model needs the package onnxruntime: pip install onnxruntime") from error
    chosen = options(threads, exact=integers)
    if not integers:
        chosen.add_session_config_entry("session.disable_quant_qdq", "1")  # int8 weights become floats once, not at every question
    try:
        return onnxruntime.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type of their own
        raise UserError(f"{path}: not an ONNX model, or damaged") from error
