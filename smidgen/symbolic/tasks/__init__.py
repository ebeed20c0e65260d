"""Questions and answers as text, drawn by seed; what every task offers, and the tasks by name.

A task draws examples of a split: `train` and `dev` to learn and choose with, `id` to test with questions like those, `ood` to test with
longer ones. Draws depend on task, split, number and seed alone. Nothing is ever cut: the longest input and target are stated, and what to
do with long ones is the model's business.

    sequence task     target (n, slots): symbols in reading order, then END, then PAD
    label task        target (n,): indices into answers.symbols

Everything here is numpy; networks take `torch.from_numpy` of it.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from smidgen.errors import UserError
from smidgen.symbolic.vocabulary import Vocabulary

TLU, NLP, NOOP = 0, 1, 2  # list actions in the paper's order: top-list-update, new-list-push, no-op
NAMES = ("number-sequence", "word-problem", "addition", "subtraction", "program", "babi:joint", "babi:N (1 to 20)", "FILE.jsonl")


@dataclass(frozen=True)
class Examples:
    """Questions and answers as text."""

    inputs: list[str]
    targets: list[str]
    groups: list[int]
    "Of each example: an index into the task's groups."
    actions: list[list[int]] = field(default_factory=list)
    "Of each example: the list action of each of its tokens, the end included, where the task gives them; else none."

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Sequence[int]) -> "Examples":
        """Some of them."""
        return Examples(*([part[i] for i in index] if part else [] for part in self._parts()))

    def __add__(self, other: "Examples") -> "Examples":
        return Examples(*(ours + theirs for ours, theirs in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple[list, ...]:
        return self.inputs, self.targets, self.groups, self.actions


@dataclass(frozen=True)
class Batch:
    """Examples as networks read them, int64, padded behind."""

    tokens: Int[np.ndarray, "n length"]
    mask: Bool[np.ndarray, "n length"]
    "Where tokens are no padding."
    target: Int[np.ndarray, "n *slots"]
    group: Int[np.ndarray, "n"]
    "Indices into the task's groups."
    actions: Int[np.ndarray, "n length"] | None = None
    "TLU, NLP or NOOP, where the task gives them; padding is NOOP."

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Tokens of each input, the end included."""
        return self.mask.sum(1)

    def take(self, index: np.ndarray) -> "Batch":
        """Some of its examples, padded no longer than they need."""
        longest = int(self.lengths[index].max(initial=1))
        actions = None if self.actions is None else self.actions[index, :longest]
        return Batch(self.tokens[index, :longest], self.mask[index, :longest], self.target[index], self.group[index], actions)

    def by_length(self, tokens: int, seed: int = 0) -> list["Batch"]:
        """Batches of inputs of like length, at most `tokens` tokens each with their padding (one input may have more), in drawn order."""
        order = np.argsort(self.lengths, kind="stable")
        cuts = [0]
        for place, length in enumerate(self.lengths[order].tolist()):
            if place > cuts[-1] and length * (place + 1 - cuts[-1]) > tokens:
                cuts.append(place)
        batches = [self.take(part) for part in np.split(order, cuts[1:])]
        return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


Draw = Callable[[str, int, np.random.Generator], Examples]


@dataclass(frozen=True)
class Task:
    """A source of examples."""

    name: str
    tokens: Vocabulary
    "Of inputs."
    answers: Vocabulary
    "Of targets; its unit says whether they are sequences or labels."
    length: int
    "No input has more tokens, the end included."
    slots: int
    "No target has more symbols, the end included; 1 for labels."
    splits: Mapping[str, int | None]
    "Split -> number of its examples; none: without end."
    draw: Draw
    "(split, n, generator) -> n examples."
    groups: tuple[str, ...] = ("all",)
    "Kinds of examples that are worth a figure of their own."
    notes: tuple[str, ...] = ()
    "What has to be said beside any result."

    @property
    def classifies(self) -> bool:
        """Whether targets are labels."""
        return self.answers.unit == "labels"

    def examples(self, split: str, n: int | None = None, seed: int = 0) -> Examples:
        """`n` examples as text; of a finite split, different ones in drawn order, and without `n` all in their own order."""
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        size = self.splits[split]
        if n is None and size is None:
            raise UserError(f"split {split} of {self.name} has no end; say how many examples")
        if n is not None and (n < 1 or n > (size or n)):
            raise UserError(f"split {split} of {self.name} has {size or 'endless'} examples, {n} cannot be drawn")
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), zlib.crc32(split.encode()), seed])
        return self.draw(split, size if n is None and size is not None else n or 0, rng)

    def sample(self, split: str, n: int | None = None, seed: int = 0) -> Batch:
        """The same as numbers."""
        return self.encode(self.examples(split, n, seed))

    def encode(self, examples: Examples) -> Batch:
        """Text as numbers."""
        tokens, mask = self.tokens.encode(examples.inputs)
        target = self.answers.labels(examples.targets) if self.classifies else self.answers.encode(examples.targets)[0]
        actions = None
        if examples.actions:
            actions = np.full(tokens.shape, NOOP)
            actions[mask] = np.concatenate([np.array(row) for row in examples.actions])
        return Batch(tokens, mask, target, np.array(examples.groups, np.int64), actions)


def hashed(split: str, n: int, draw: Callable[[int], Examples]) -> Examples:
    """`n` examples whose inputs belong to the split: CRC-32 modulo 3 is 0 in training, 1 in dev, 2 in tests, so no question is in two.

    The authors take Python's own hash, which differs from process to process.
    """
    part = {"train": 0, "dev": 1}.get(split, 2)
    found = Examples([], [], [])
    while len(found) < n:
        drawn = draw(3 * (n - len(found)) + 8)
        mine = [i for i, text in enumerate(drawn.inputs) if zlib.crc32(text.encode()) % 3 == part]
        found = found + drawn.take(mine[: n - len(found)])
    return found


def open_task(name: str, data: Path | None = None) -> Task:
    """A task by its name; `data` is where bAbI lies, an archive or a folder."""
    from smidgen.symbolic.tasks import addition, babi, file, number_sequence, program, word_problem

    made: dict[str, Callable[[], Task]] = {
        "number-sequence": number_sequence.task,
        "word-problem": word_problem.task,
        "addition": lambda: addition.task("addition"),
        "subtraction": lambda: addition.task("subtraction"),
        "program": program.task,
    }
    if name.split(":")[0] == "babi":
        return babi.task(name, data)
    if data is not None:
        raise UserError(f"--data is where bAbI lies; --task {name} needs none")
    if name in made:
        return made[name]()
    if name.endswith(".jsonl"):
        return file.task(Path(name))
    raise UserError(f"there is no task {name!r}; there are {', '.join(NAMES)}")
