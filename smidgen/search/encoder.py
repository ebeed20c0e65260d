"""The encoder a device runs: text in, vectors of length 1 out. Needs numpy, tokenizers and, for a transformer, onnxruntime.

A transformer is encoder.onnx: pooling and normalisation are inside. The static tier has no layers: the vector of a text is the sum of its
pieces' rows of a table,

    v = sum_t scale[t] codes[t],  u = v / |v|                   so word order says nothing: f("do not") = f("not do")

A text of which the vocabulary knows no piece gets the vector 0, which is like nothing at all: cosine 0 with every feature. A network would
give [CLS] [UNK] [SEP] some direction or other, the same for all such texts.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int8

from smidgen.errors import UserError
from smidgen.search.folder import DESCRIPTION, NETWORK, TABLE, TOKENIZER, present

VERSION = 1
UNKNOWN = "[UNK]"
PACKAGES = "pip install 'smidgen[search]'"


@runtime_checkable
class Encoder(Protocol):
    """Text to vectors."""

    @property
    def width(self) -> int:
        """Of a vector."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Of the library tokenizers."""
        ...

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """A row of length 1 for every text, 0 for one of which nothing is known."""
        ...


@dataclass(frozen=True)
class Transformer:
    """A network in ONNX Runtime; texts go through it one by one, which for short ones is as fast and needs no padding."""

    width: int
    length: int
    "Pieces it reads at most, with [CLS] and [SEP]; the rest of a text is cut off."
    tokenizer: Any = field(repr=False)
    session: Any = field(repr=False)

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """A row for every text."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        for i, text in enumerate(texts):
            encoded = self.tokenizer.encode(text)
            if known(encoded):
                ids = np.array([encoded.ids], np.int64)
                vectors[i] = self.session.run(["vectors"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0]
        return vectors


@dataclass(frozen=True)
class Static:
    """A row of a table for every piece."""

    codes: Int8[np.ndarray, "vocabulary width"]
    scale: Float32[np.ndarray, "vocabulary"]
    tokenizer: Any = field(repr=False)

    @property
    def width(self) -> int:
        """Of a vector."""
        return self.codes.shape[1]

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """A row for every text."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        for i, text in enumerate(texts):
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            if known(encoded):
                ids = np.array(encoded.ids, np.int64)
                v = self.scale[ids] @ self.codes[ids].astype(np.float32)
                vectors[i] = v / max(float(np.linalg.norm(v)), 1e-12)
        return vectors


def whole_words(tokenizer: Any) -> list[str]:
    """Pieces that are words, in the vocabulary's order, commonest first."""
    pieces = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=itemgetter(1))
    return [piece for piece, _ in pieces if piece.isalpha()]


def known(encoded: Any) -> bool:
    """Whether any piece of a text, other than [CLS] and [SEP], is in the vocabulary."""
    return any(token != UNKNOWN and not special for token, special in zip(encoded.tokens, encoded.special_tokens_mask, strict=True))


def open_encoder(folder: Path, threads: int = 1) -> Encoder:
    """The encoder of a model's folder; files that are missing or damaged are refused by name."""
    described = description(folder)
    tokenizer = _tokenizer(folder / TOKENIZER)
    if described["kind"] == "static":
        return _static(folder / TABLE, tokenizer, described["vocabulary"])
    tokenizer.enable_truncation(described["length"])
    return Transformer(described["width"], described["length"], tokenizer, _session(folder / NETWORK, threads))


def description(folder: Path) -> dict[str, Any]:
    """What a folder says of its encoder."""
    path = folder / DESCRIPTION
    present(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON") from error
    wanted = {"static": ("vocabulary", "width"), "onnx": ("length", "width")}
    if not isinstance(found, dict) or found.get("version") != VERSION or found.get("kind") not in wanted:
        raise UserError(f"{path}: describes no encoder this version reads; distil again")
    if not all(isinstance(found.get(name), int) and found[name] > 0 for name in wanted[found["kind"]]):
        raise UserError(f"{path}: damaged, {' and '.join(wanted[found['kind']])} must be positive numbers")
    if not (isinstance(found.get("lift"), int | float) and 0 < found["lift"] < 10):
        raise UserError(f"{path}: damaged, lift must be a positive number")
    return found


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise UserError(f"search needs the package tokenizers: {PACKAGES}") from error
    present(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path}: damaged, no tokenizer ({' '.join(str(error).split())[:120]})") from error


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(f"search needs the package onnxruntime: {PACKAGES}") from error
    present(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they are raised as well
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # a query needs little, and a phone wants it back
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type of their own
        raise UserError(f"{path}: not a network ONNX Runtime can read ({' '.join(str(error).split())[:160]})") from error
    names = {i.name for i in session.get_inputs()}, {o.name for o in session.get_outputs()}
    if not ({"input_ids", "attention_mask"} <= names[0] and "vectors" in names[1]):
        raise UserError(f"{path}: needs inputs input_ids and attention_mask and an output vectors; has {sorted(names[0] | names[1])}")
    return session


def _static(path: Path, tokenizer: Any, vocabulary: int) -> Static:
    present(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # np.load leaves a damaged file open
            codes, scale = arrays["codes"], arrays["scale"].astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, no table of codes and scale") from error
    if (
        codes.dtype != np.int8
        or codes.ndim != 2
        or scale.shape != codes.shape[:1]
        or len(scale) < max(vocabulary, tokenizer.get_vocab_size())
    ):
        raise UserError(f"{path}: its table does not fit the vocabulary")
    return Static(codes, scale, tokenizer)
