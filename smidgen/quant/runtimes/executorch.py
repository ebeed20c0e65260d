"""ExecuTorch's own runtime, from Python: what phones run, on this machine's processor. See export/executorch.py for the program."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from smidgen.errors import UserError


class ExecuTorch:
    """One loaded program."""

    def __init__(self, name: str, program: Any, tokenizer: Any, length: int, end: set[int]) -> None:
        self.name = name
        self.program: Any = program
        self.forward: Any = program.load_method("forward")
        self.tokenizer = tokenizer
        self.length, self.end = length, end
        self.position = 0

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
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(f"running .pte files needs {error.name}: pip install smidgen[executorch]") from error
        try:
            program: Any = Runtime.get().load_program(artifact / "model.pte")
            most = program.load_method("get_max_seq_len").execute(())[0]
            tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
            ends = json.loads((artifact / "config.json").read_text())["eos_token_id"]
            runtime = cls(f"executorch {version('executorch')}", program, tokenizer, most, set(ends if isinstance(ends, list) else [ends]))
        except Exception as error:  # RuntimeError for a damaged program; tokenizers raises plain Exception
            raise UserError(f"{artifact} cannot be loaded: {str(error).splitlines()[0]}") from error
        if length > most:
            raise UserError(f"{artifact} reads up to {most} tokens, not {length}; use --length {most}")
        return runtime

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

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, by the tokenizer that travels with the artifact; no special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The opposite."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return token in self.end

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
