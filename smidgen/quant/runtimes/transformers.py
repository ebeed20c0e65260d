"""Checkpoints through transformers: compressed-tensors artifacts and float models, on the processor. This one needs torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.load import load_artifact


class Transformers:
    """One loaded folder, in float32."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model, self.tokenizer = model, tokenizer
        self.cache: Any = None
        ends = model.generation_config.eos_token_id
        self.end = set(ends if isinstance(ends, list) else [ends])

    @classmethod
    def open(cls, artifact: Path, length: int = 1024, threads: int | None = None) -> "Transformers":
        """Loads a model folder; its cache grows as it needs to, so `length` is not asked for."""
        if not (artifact / "config.json").is_file():
            raise UserError(f"{artifact} is not a model folder: it has no config.json")
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = Checkpoint(artifact, artifact.resolve().name)
        return cls(load_artifact(artifact, torch.float32, torch.device("cpu")), checkpoint.tokenizer())

    @torch.inference_mode()
    def logits(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Of every position of one text."""
        return self.model(ids(tokens), use_cache=False).logits[0].float().numpy()

    def start(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        """Reads a prompt; the logits after its last token."""
        self.cache = None
        return self._read(tokens)

    def step(self, token: int) -> Float32[np.ndarray, "vocab"]:
        """Reads one more token."""
        return self._read(np.array([token]))

    @torch.inference_mode()
    def _read(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        out = self.model(ids(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        """The opposite."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return token in self.end

    def close(self) -> None:
        """Frees weights and cache."""
        del self.model, self.cache


def ids(tokens: Int[np.ndarray, "length"]) -> Int[Tensor, "1 length"]:
    """A batch of one text."""
    return torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]
