"""Artifacts in the program that will run them on a device: what `smidgen run` and `smidgen bench` drive, and proofs measure.

A runtime needs no torch. `logits` reads a whole text at once; `start` and `step` are generation, with the runtime's own cache.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

from smidgen.errors import UserError

RUNTIMES = {  # what an artifact holds -> who runs it
    "*.gguf": "smidgen.quant.runtimes.llamacpp:LlamaCpp",
    "*.onnx": "smidgen.quant.runtimes.onnxruntime:OnnxRuntime",
    "*.pte": "smidgen.quant.runtimes.executorch:ExecuTorch",
    "config.json": "smidgen.quant.runtimes.transformers:Transformers",
}
FOLDERS = "artifact", "gguf", "onnx", "executorch"  # of a run, in the order they are looked for


@runtime_checkable
class Runtime(Protocol):
    """One loaded model."""

    name: str
    "The program and its version, as reports print it."

    @classmethod
    def open(cls, artifact: Path, length: int = 1024, threads: int | None = None) -> "Runtime":
        """Loads a file or folder for up to `length` tokens; a UserError if it is none of this runtime's, or damaged."""
        ...

    def logits(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Of every position of one text, from an empty cache."""
        ...

    def start(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        """Empties the cache, reads a prompt, and returns the logits after its last token."""
        ...

    def step(self, token: int) -> Float32[np.ndarray, "vocab"]:
        """Reads one more token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, by the tokenizer that travels with the artifact; no special tokens."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The opposite."""
        ...

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        ...

    def close(self) -> None:
        """Frees what the runtime holds."""
        ...


def find(artifact: Path) -> tuple[Path, Callable[..., Runtime]]:
    """What a runtime loads, and the runtime's `open`: of a file, its folder, or the folder of a run."""
    if not artifact.exists():
        raise UserError(f"no such artifact: {artifact}")
    folder = next((artifact / name for name in FOLDERS if (artifact / name).is_dir()), artifact)
    for pattern, where in RUNTIMES.items():
        if folder.match(pattern) if folder.is_file() else any(folder.glob(pattern)):
            module, name = where.split(":")
            return folder, vars(import_module(module))[name].open
    raise UserError(f"{artifact} holds nothing a runtime here loads ({', '.join(RUNTIMES)})")
