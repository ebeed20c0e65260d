"""Text to numbers and back, for networks; needs numpy alone, so a device reads questions with it too.

Id 0 pads, id 1 ends every text, symbols follow from 2. The ids of a target are counted the same way over its own, shorter list of symbols:
the paper's 258 bytes on both sides cost parameters and buy nothing. A label is one of a list and has neither end nor padding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from smidgen.errors import UserError

PAD, END = 0, 1
RESERVED = 2  # ids before the first symbol
Unit = Literal["characters", "words", "labels"]


@dataclass(frozen=True)
class Vocabulary:
    """Symbols in the order of their ids.

    >>> digits = Vocabulary(tuple("0123456789"))
    >>> ids, mask = digits.encode(["40", "7"])
    >>> ids.tolist(), mask.sum(1).tolist()
    ([[6, 2, 1], [9, 1, 0]], [3, 2])
    >>> digits.decode(ids[0])
    '40'
    """

    symbols: tuple[str, ...]
    unit: Unit = "characters"
    "What a symbol is: a character, a word or sign, or a whole text."

    def __len__(self) -> int:
        return len(self.symbols) + (0 if self.unit == "labels" else RESERVED)

    @cached_property
    def index(self) -> dict[str, int]:
        """Symbol -> id."""
        first = len(self) - len(self.symbols)
        return {symbol: first + i for i, symbol in enumerate(self.symbols)}

    def split(self, text: str) -> Sequence[str]:
        """The symbols of a text."""
        return text if self.unit == "characters" else words(text) if self.unit == "words" else [text]

    def unknown(self, text: str) -> list[str]:
        """Symbols of a text that are not in the vocabulary, each once."""
        return [symbol for symbol in dict.fromkeys(self.split(text)) if symbol not in self.index]

    def encode(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n length"], Bool[np.ndarray, "n length"]]:
        """Ids of texts, each ended and padded to the longest, and where they are no padding."""
        flat, lengths = self._characters(texts) if self.unit == "characters" else self._words(texts)
        mask = np.arange(1 + lengths.max(initial=0)) <= lengths[:, None]
        ids = np.where(mask, END, PAD)
        ids[mask & (np.arange(mask.shape[1]) < lengths[:, None])] = flat
        return ids, mask

    def labels(self, texts: Sequence[str]) -> Int[np.ndarray, "n"]:
        """Ids of labels."""
        return np.array([self._known(text) for text in texts], np.int64)

    def decode(self, ids: Int[np.ndarray, "length"]) -> str:
        """The text before the end; padding is skipped."""
        if self.unit == "labels":
            raise ValueError("a label is symbols[id]")
        ended = np.flatnonzero(ids == END)
        kept = ids[: ended[0]] if len(ended) else ids
        return (" " if self.unit == "words" else "").join(self.symbols[i - RESERVED] for i in kept.tolist() if i >= RESERVED)

    def _characters(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
        """Ids of all characters one after the other, and the texts' lengths; by table, for training asks for millions."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        flat = self._table[np.minimum(codes, len(self._table) - 1)]
        if not flat.all():
            self._known(chr(int(codes[np.flatnonzero(flat == PAD)[0]])))
        return flat, np.fromiter(map(len, texts), np.int64, len(texts))

    @cached_property
    def _table(self) -> Int[np.ndarray, "codes"]:
        """Code point -> id; the last entry stands for all beyond."""
        codes = [ord(symbol) for symbol in self.symbols]
        table = np.full(max(codes, default=0) + 2, PAD)
        table[codes] = np.arange(RESERVED, len(self))
        return table

    def _words(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "n"]]:
        found = [words(text) for text in texts]
        flat = np.array([self._known(word) for text in found for word in text], np.int64)
        return flat, np.array([len(text) for text in found], np.int64)

    def _known(self, symbol: str) -> int:
        if symbol not in self.index:
            raise UserError(f"{symbol!r} is not among the {len(self.symbols)} {self.unit} the model or task knows")
        return self.index[symbol]


def words(text: str) -> list[str]:
    """Words and signs.

    >>> words("Where is Mary?")
    ['Where', 'is', 'Mary', '?']
    """
    return re.findall(r"\w+|[^\w\s]", text)
