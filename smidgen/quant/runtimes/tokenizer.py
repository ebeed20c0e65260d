"""tokenizer.json beside an artifact, for runtimes that have no tokenizer of their own: needs the package tokenizers only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import UserError


@dataclass(frozen=True)
class TokenizerFile:
    """Text to tokens and back, as the Runtime protocol has it."""

    tokenizer: Any
    end: frozenset[int]
    "Tokens that end a text."

    @classmethod
    def read(cls, folder: Path, end: int | list[int]) -> "TokenizerFile":
        """Of a folder; `end` is the eos_token_id of its configuration."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError("tokenizing needs the package tokenizers: pip install 'smidgen[onnx]'") from error
        file = folder / "tokenizer.json"
        try:
            return cls(Tokenizer.from_file(str(file)), frozenset(end if isinstance(end, list) else [end]))
        except Exception as error:  # which tokenizers raises itself, for every kind of damage
            raise UserError(f"{file} is damaged or no tokenizer: {' '.join(str(error).split())[:200]}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The opposite."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return token in self.end
