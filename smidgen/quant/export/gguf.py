"""GGUF: one file with weights, architecture and tokenizer, loaded by llama.cpp and what is built on it.

The integers of a layer become llama.cpp's blocks as they are (ggml_blocks.py), under its names and in its order of rows
(gguf_families.py). Embeddings and head are rounded to q8_0, or float16 where their width is no multiple of 32; norms and biases
stay float32.

Tensors are spooled to a temporary file block by block ($TMPDIR, beyond 256 MiB), since the header, which comes first, lists them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smidgen.errors import UserError
from smidgen.grid import Grid, QWeight
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.export.ggml_blocks import SIZES, pack, type_of, unpack
from smidgen.quant.export.gguf_families import (
    FAMILIES,
    add_architecture,
    check_gemma,
    family_of,
    kv_heads,
    rope,
    rope_factors,
    rope_order,
)
from smidgen.quant.export.gguf_tokenizer import add_tokenizer
from smidgen.quant.linear import LINEAR, weight_of
from smidgen.quant.writing import writing

FILE = "model.gguf"
FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q2_k": 10, "q3_k": 11, "q4_k": 14}  # llama.cpp's LLAMA_FTYPE_MOSTLY_...
CHUNK = 4096  # rows of an embedding rounded at once


@dataclass
class Gguf:
    """Writes `model.gguf` into `folder`: `add` per block, then `finish`."""

    folder: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    "The skeleton: says which parameters exist."
    done: set[str] = field(default_factory=set)
    kinds: dict[str, int] = field(default_factory=dict)
    "Weights of every block type."

    def __post_init__(self) -> None:
        self.family = family_of(self.model)
        self.config = self.model.config
        writer = gguf_package().GGUFWriter
        self.writer = writer(self.folder / FILE, self.family.arch, use_temp_file=True)
        add_architecture(self.writer, self.config, self.checkpoint.name)
        add_tokenizer(self.writer, self.checkpoint.tokenizer(), self.config.vocab_size)

    @staticmethod
    def check(model: PreTrainedModel, layers: list[str], grid: Grid) -> None:
        """Raises a UserError before any work if the format cannot hold these layers on this grid."""
        gguf_package()
        family = family_of(model)
        type_of(grid)
        rope(model.config)
        if model.config.model_type == "gemma3_text":
            check_gemma(model.config)
        for name in layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, LINEAR):
                raise UserError(f"gguf holds linear layers only, {name} is a {type(layer).__name__}")
            family.gguf(f"{name}.weight")
            try:
                grid.groups(weight_of(layer).shape[1])
            except UserError as error:
                raise UserError(f"{name}: {error}") from error

    def add(self, weights: dict[str, QWeight], module: nn.Module, path: str) -> None:
        """Takes a block: its quantized layers by full name, and through `module` at `path` its other parameters."""
        for name, q in weights.items():
            try:
                kind = type_of(q.grid)
                rows = pack(q.at(self._order(f"{name}.weight", len(q.codes))))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            self.kinds[kind] = self.kinds.get(kind, 0) + q.codes.numel()
            self._write(f"{name}.weight", rows, kind)
        names = {f"{path}.{n}": p for n, p in module.named_parameters() if f"{path}.{n}" not in self.done}
        stored = self.checkpoint.read([n for n, p in names.items() if p.is_meta])
        for name, parameter in names.items():
            value = stored[name] if parameter.is_meta else parameter.detach().cpu()
            if value.ndim == 2 and isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D):
                value = value.T
            value = value[self._order(name, len(value))]
            self._write(name, self._vector(name, value) if value.ndim == 1 else finite16(value, name))

    def finish(self) -> None:
        """Writes what belongs to no block, and the file itself."""
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            if name not in self.done and name not in self.model.all_tied_weights_keys:
                self._rest(name, self.checkpoint.read([name])[name])
        factors = rope_factors(self.config)
        if factors is not None:
            self.writer.add_tensor("rope_freqs.weight", factors)
        self.writer.add_quantization_version(2)
        self.writer.add_file_type(FILE_TYPES[max(self.kinds, key=lambda k: self.kinds[k], default="f16")])
        with self._writing(self.folder / FILE):
            self.writer.write_header_to_file()
            self.writer.write_kv_data_to_file()
            self.writer.write_tensors_to_file()
            self.writer.close()

    @contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        """As `writing`; the writer's files are closed, since nobody finishes them."""
        try:
            with writing(place):
                yield
        except UserError:
            for file in (self.writer.temp_file, *(self.writer.fout or [])):
                with suppress(OSError):  # what it still holds cannot be written either
                    if file is not None:
                        file.close()
            raise

    def _order(self, name: str, rows: int) -> Tensor:
        heads = self.family.heads(name, self.config.num_attention_heads, kv_heads(self.config))
        return torch.arange(rows) if heads is None else rope_order(rows, heads)

    def _rest(self, name: str, value: Tensor) -> None:
        """An embedding, the head or the last norm."""
        if value.ndim == 1 or self.family.gguf(name).startswith("position_embd"):
            self._write(name, self._vector(name, value))
        elif value.shape[1] % 32:
            self._write(name, finite16(value, name))
        else:
            self._write(name, np.concatenate([nearest_q8(part) for part in value.split(CHUNK)]), "q8_0")

    def _vector(self, name: str, value: Tensor) -> np.ndarray:
        """A bias, positions, or a norm, with all it multiplies by."""
        return (value.float() + (self.family.gain_offset if name.endswith("norm.weight") else 0.0)).numpy()

    def _write(self, name: str, value: np.ndarray, kind: str | None = None) -> None:
        types = gguf_package().GGMLQuantizationType
        self.done.add(name)
        with self._writing(Path(gettempdir())):
            self.writer.add_tensor(self.family.gguf(name), value, raw_dtype=None if kind is None else types[kind.upper()])


def write_float(folder: Path, checkpoint: Checkpoint) -> Path:
    """The model unquantized, layers as float16: what llama.cpp's own quantization starts from."""
    model = checkpoint.skeleton(torch.device("cpu"))
    exporter = Gguf(folder, checkpoint, model)
    path, blocks = decoder_list(model)
    for i, block in enumerate(blocks):
        exporter.add({}, block, f"{path}.{i}")
    exporter.finish()
    return folder / FILE


def read(file: Path) -> dict[str, QWeight]:
    """The quantized layers of a file that `Gguf` wrote, by our names and in transformers' order of rows."""
    fields, tensors = contents(file)
    arch = fields.get("general.architecture")
    family = next((f for f in FAMILIES.values() if f.arch == arch), None)
    if family is None:
        raise UserError(f"{file}: architecture {arch} is not known; only {', '.join(sorted({f.arch for f in FAMILIES.values()}))} are")
    heads = fields.get(f"{arch}.attention.head_count")
    if not isinstance(heads, int):
        raise UserError(f"{file}: no {arch}.attention.head_count")
    weights = {}
    for tensor in tensors:
        name, kind = family.layer(tensor.name), tensor.tensor_type.name.lower()
        if name is None:
            continue
        if kind not in SIZES:
            raise UserError(f"{file}: {tensor.name} is {kind}; smidgen reads {', '.join(SIZES)}")
        try:
            q = unpack(np.array(tensor.data), kind)
        except UserError as error:
            raise UserError(f"{file}: {tensor.name}: {error}") from error
        permuted = family.heads(f"{name}.weight", heads, fields.get(f"{arch}.attention.head_count_kv", heads))
        weights[name] = q if permuted is None else q.at(rope_order(len(q.codes), permuted).argsort())
    if not weights:
        raise UserError(f"{file} holds no quantized layers")
    return weights


def contents(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """Metadata, without the tokenizer's, and the tensors of a GGUF file."""
    reader = gguf_package().GGUFReader
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    try:
        found = reader(file)
        return {name: f.contents() for name, f in found.fields.items() if not name.startswith("tokenizer.")}, found.tensors
    except Exception as error:  # it slices the file as the file's own bytes say, and numpy raises whatever a damaged one makes it
        raise UserError(f"{file} is not a GGUF file, or damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def nearest_q8(value: Tensor) -> np.ndarray:
    """Rows rounded to q8_0, (rows, bytes)."""
    package = gguf_package()
    return package.quants.quantize(value.float().numpy(), package.GGMLQuantizationType.Q8_0)


def finite16(value: Tensor, name: str) -> np.ndarray:
    """float16, which must not overflow."""
    stored = value.half()
    if not bool(stored.isfinite().all()):
        raise UserError(f"{name} holds NaN or values beyond float16")
    return stored.numpy()


def gguf_package() -> Any:
    """The library that writes the container."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'smidgen[quant]'") from error
    return gguf
