"""bAbI questions: Weston et al., "Towards AI-Complete Question Answering", version 1.2, read from where the user has it.

Input: a start marker, the question, an end marker, all earlier sentences of its story, word by word and sign by sign. The question comes
first, so that whoever lays words out knows what to look for. The answer is one label, a list of answers ("football,milk") one label too.

`data` is the archive as distributed (.tar, .tar.gz, .tar.xz) or its folder; where it has the 10,000 training questions of a task these are
taken, else the 1,000. Every twentieth training story is dev. Long stories, up to 1,300 tokens in task 3, are all kept; the authors
train without those over 256. What a copy lacks, and tests that repeat training, are in `Task.notes`.

Given actions, "an oracle alignment": question words TLU, of supporting sentences the first word NLP, the others TLU, all else
no-op.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from lzma import LZMAError
from pathlib import Path

import numpy as np

from smidgen.errors import UserError
from smidgen.symbolic.tasks import NLP, NOOP, TLU, Examples, Task
from smidgen.symbolic.vocabulary import Vocabulary, words

START, STOP = "«", "»"  # of the question
TASKS = 20
DEV = 20  # every so many-th story
FOLDERS = ("en-10k", "en", "en-10k-extra")  # the large training files; the small ones; the end of a large one whose whole is missing
FILE = re.compile(r"(?:^|/)(en|en-10k|en-10k-extra)/qa(\d+)_[^/]*?(train|test)[^/]*\.txt$")


@dataclass(frozen=True)
class Question:
    """One, with its story up to there."""

    number: int
    "1 .. 20"
    words: tuple[str, ...]
    story: tuple[tuple[str, ...], ...]
    support: frozenset[int]
    "Sentences of the story that the answer follows from."
    answer: str

    @property
    def text(self) -> str:
        """The input."""
        return " ".join([START, *self.words, STOP, *(word for sentence in self.story for word in sentence)])

    @property
    def actions(self) -> list[int]:
        """Of its tokens, the end included."""
        told = [
            [NOOP] * len(sentence) if i not in self.support else [NLP] + [TLU] * (len(sentence) - 1)
            for i, sentence in enumerate(self.story)
        ]
        return [NOOP, *[TLU] * len(self.words), NOOP, *(action for sentence in told for action in sentence), NOOP]


Story = list[Question]  # in the order they are asked


def task(name: str, data: Path | None) -> Task:
    """`babi` and `babi:joint`: all twenty; `babi:N`: one."""
    chosen = numbers(name)
    if data is None:
        raise UserError(f"--task {name} needs --data, the bAbI archive or folder (tasks_1-20_v1-2)")
    files = read(data)
    splits: dict[str, list[Question]] = {"train": [], "dev": [], "id": []}
    notes = []
    for number in chosen:
        training, test, lacking = of_task(files, number, data)
        splits["train"] += [q for i, story in enumerate(training) if i % DEV != DEV - 1 for q in story]
        splits["dev"] += [q for story in training[DEV - 1 :: DEV] for q in story]
        splits["id"] += [q for story in test for q in story]
        notes += lacking + repeated(number, training, test)
    every = [q for part in splits.values() for q in part]

    def draw(split: str, n: int, rng: np.random.Generator) -> Examples:
        questions = splits[split]
        index = range(n) if n == len(questions) and split != "train" else rng.choice(len(questions), n, replace=False).tolist()
        picked = [questions[i] for i in index]
        places = [chosen.index(q.number) for q in picked]
        return Examples([q.text for q in picked], [q.answer for q in picked], places, [q.actions for q in picked])

    return Task(
        name="babi" if len(chosen) == TASKS else name,
        tokens=Vocabulary(vocabulary(every), "words"),
        answers=Vocabulary(tuple(sorted({q.answer for q in every})), "labels"),
        length=max(len(q.words) + sum(map(len, q.story)) for q in every) + 3,
        slots=1,
        splits={split: len(questions) for split, questions in splits.items()},
        draw=draw,
        groups=tuple(f"qa{number}" for number in chosen),
        notes=tuple(notes),
    )


def numbers(name: str) -> list[int]:
    """The tasks a name stands for."""
    part = name.removeprefix("babi").removeprefix(":")
    if part in ("", "joint"):
        return list(range(1, TASKS + 1))
    if not part.isdecimal() or not 1 <= int(part) <= TASKS:
        raise UserError(f"--task {name}: bAbI has the tasks babi:1 to babi:{TASKS}, and babi:joint")
    return [int(part)]


def read(data: Path) -> dict[tuple[str, int, str], str]:
    """(folder, task, train or test) -> text of the file."""
    if not data.exists():
        raise UserError(f"--data: no such file or folder: {data}")
    files = {}
    for name, content in members(data):
        if match := FILE.search(name):
            folder, number, part = match.groups()
            files[folder, int(number), part] = content.decode("ascii", "replace")
    if not files:
        raise UserError(f"--data {data}: no files like en/qa1_..._train.txt in it; give the bAbI archive or its folder")
    return files


def members(data: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the text files in a folder or archive."""
    if data.is_dir():
        yield from ((path.resolve().as_posix(), path.read_bytes()) for path in sorted(data.rglob("qa*.txt")))
        return
    try:
        with tarfile.open(data) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)) is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, LZMAError) as error:
        raise UserError(f"--data {data}: not an archive, or damaged; give the bAbI archive or its folder") from error


def of_task(files: dict[tuple[str, int, str], str], number: int, data: Path) -> tuple[list[Story], list[Story], list[str]]:
    """Stories of training and test, and what there is to say of the copy."""
    test = files.get(("en-10k", number, "test")) or files.get(("en", number, "test"))
    parts = [files[key] for folder in FOLDERS if (key := (folder, number, "train")) in files]
    if ("en-10k", number, "train") in files:
        parts = parts[:1]
    if test is None or not parts:
        raise UserError(f"--data {data}: task {number} lacks its {'test' if test is None else 'training'} file")
    training = [story for text in parts for story in stories(text, number)]
    count = sum(map(len, training))
    large = any(folder == "en-10k" for folder, _, _ in files)
    return training, stories(test, number), [f"qa{number}: {count:,} training questions, not 10,000"] if large and count < 10_000 else []


def stories(text: str, number: int) -> list[Story]:
    """The questions of each story of a file."""
    found: list[Story] = []
    sentences: list[tuple[str, ...]] = []
    places: dict[str, int] = {}  # a line's number in its story -> the sentence's
    for line in text.splitlines():
        place, _, told = line.strip("\n").partition(" ")
        if place == "1":
            found, sentences, places = [*found, []], [], {}
        if "\t" not in told:
            places[place] = len(sentences)
            sentences.append(sentence(told))
            continue
        asked, answer, support = (told.split("\t") + [""])[:3]
        supporting = frozenset(places[s] for s in support.split())
        found[-1].append(Question(number, sentence(asked), tuple(sentences), supporting, answer))
    return found


@cache
def sentence(text: str) -> tuple[str, ...]:
    """Its words, one object however often it is told: the million sentences of the joint task are a few thousand different ones."""
    return tuple(words(text))


def repeated(number: int, training: list[Story], test: list[Story]) -> list[str]:
    """Says how many whole stories of the test occur in training."""

    def whole(story: Story) -> tuple:
        return story[-1].story, tuple(q.words for q in story)

    known = {whole(story) for story in training}
    count = sum(whole(story) in known for story in test)
    return [f"qa{number}: {count} of {len(test):,} test stories are training stories too"] if count else []


def vocabulary(questions: list[Question]) -> tuple[str, ...]:
    """All words and signs, sorted."""
    sentences = {told for q in questions for told in q.story} | {q.words for q in questions}
    return tuple(sorted({START, STOP}.union(*sentences)))


def phrased(text: str) -> str:
    """A story and one question, in any order, as the task has them; what has markers, or not one question, stays as it is."""
    sentences = [part.strip() for part in re.findall(r"[^.?]+[.?]?", text)]
    asked = [part for part in sentences if part.endswith("?")]
    if START in text or len(asked) != 1:
        return text
    return " ".join([START, asked[0], STOP, *(part for part in sentences if part not in asked)])
