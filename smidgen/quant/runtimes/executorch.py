"""ExecuTorch's own runtime, from Python: what phones run, on this machine's processor. See export/executorch.py for the program."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from smidgen.errors import UserError
from smidgen.quant.runtimes.tokenizer import TokenizerFile


class ExecuTorch:
    """One loaded program."""

    def __init__(self, name: str, program: Any, texts: TokenizerFile, length: int) -> None:
        self.name = name
        self.program: Any = program
        self.forward: Any = program.load_method("forward")
        self.encode, self.decode, self.ends = texts.encode, texts.decode, texts.ends
        self.length, self.position = length, 0

    @classmethod
    def open(cls, artifact: Path, length: int = 1024, threads: int | None = None) -> "ExecuTorch":
        """Loads a folder for up to `length` tokens; a UserError if it holds no program, or a damaged one."""
        if threads is not None:
            raise UserError("executorch's Python runtime takes as many threads as it likes; leave out --threads")
        for file in ("model.pte", "tokenizer.json", "config.json"):
            if not (artifact / file).is_file():
                raise UserError(f"{artifact} is not an executorch artifact: it has no {file}")
        try:
            from importlib.metadata import version

            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"running .pte files needs {error.name}: pip install 'smidgen[executorch]'") from error
        try:
            program: Any = Runtime.get().load_program(artifact / "model.pte")
            most = program.load_method("get_max_seq_len").execute(())[0]
            end = json.loads((artifact / "config.json").read_text())["eos_token_id"]
        except (RuntimeError, ValueError, KeyError) as error:  # of the program; of its configuration
            raise UserError(f"{artifact} cannot be loaded: {' '.join(str(error).split())}") from error
        if length > most:
            raise UserError(f"{artifact} reads up to {most} tokens, not {length}; use --length {most}")
        return cls(f"executorch {version('executorch')}", program, TokenizerFile.read(artifact, end), most)

    def logits(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Of every position of one text, from an empty cache."""
        self.position = 0
        return self._read(tokens)

    def start(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        """Empties the cache, reads a prompt, and returns the logits after its last token."""
        return self.logits(tokens)[-1]

    def step(self, token: int) -> Float32[np.ndarray, "vocab"]:
        """Reads one more token."""
        return self._read(np.array([token]))[-1]

    def close(self) -> None:
        """Frees what the runtime holds."""
        self.forward = self.program = None

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        import torch  # the runtime's tensors are torch's

        end = self.position + len(tokens)
        if end > self.length:
            raise UserError(f"{end} tokens are more than the {self.length} the program was made for")
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]
        (found,) = self.forward.execute((ids, torch.arange(self.position, end)))
        self.position = end
        return found[0].numpy().copy()
