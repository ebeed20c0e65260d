"""Tasks: that targets are right, that sizes are the stated ones, that splits and seeds hold, and files read or refused."""

import doctest
import io
import json
import re
import tarfile
from contextlib import redirect_stdout

import numpy as np
import pytest

import smidgen.symbolic.decoders
import smidgen.symbolic.vocabulary
from smidgen.errors import UserError
from smidgen.symbolic.tasks import NLP, NOOP, TLU, Examples, open_task
from smidgen.symbolic.tasks.addition import given
from smidgen.symbolic.tasks.babi import stories
from smidgen.symbolic.tasks.program import GROUPS
from smidgen.symbolic.tasks.word_problem import ADD, DISTANCE, TEMPLATES
from smidgen.symbolic.vocabulary import END, PAD, Vocabulary

MADE = ("number-sequence", "word-problem", "addition", "subtraction", "program")


def printed(program: str) -> str:
    """What Python makes of it."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("split", ["train", "dev", "id", "ood"])
def test_examples_depend_on_split_and_seed_alone_and_keep_the_stated_lengths(name, split):
    task = open_task(name)
    batch = task.sample(split, 2000, seed=3)
    again, other = open_task(name).sample(split, 2000, seed=3), task.sample(split, 2000, seed=4)
    assert np.array_equal(batch.tokens, again.tokens) and np.array_equal(batch.target, again.target)
    assert batch.tokens.shape != other.tokens.shape or not np.array_equal(batch.tokens, other.tokens)
    assert len(batch) == 2000 and batch.tokens.dtype == np.int64 == batch.target.dtype
    assert batch.tokens.shape[1] <= task.length and batch.target.shape[1] <= task.slots
    assert (batch.mask == (batch.tokens != PAD)).all() and ((batch.tokens == END).sum(1) == 1).all()
    assert batch.tokens.max() < len(task.tokens) and batch.target.max() < len(task.answers)
    assert 0 <= batch.group.min() and batch.group.max() < len(task.groups)


@pytest.mark.parametrize("name", [name for name in MADE if name != "word-problem"])
def test_no_question_is_in_two_splits(name):
    task = open_task(name)
    train, dev, test = (set(task.examples(split, 3000).inputs) for split in ("train", "dev", "id"))
    assert not train & dev and not train & test and not dev & test


def test_number_sequences_follow_the_recurrence():
    task = open_task("number-sequence")
    for split, digits, terms in (("train", 4, {4, 5, 6}), ("ood", 6, {10, 11, 12})):
        examples = task.examples(split, 500)
        counts = set()
        for text, target, group in zip(examples.inputs, examples.targets, examples.groups, strict=True):
            a = [*map(int, text.split(" ")), int(target)]
            assert all(a[k] == 2 * a[k - 1] - a[k - 2] + a[k - 3] for k in range(3, len(a)))
            assert all(0 < abs(x) < 10**digits for x in a[:3])
            assert group == (len({x < 0 for x in a[-4:-1] if x}) > 1)
            counts.add(len(a) - 1)
        assert counts == terms


def test_number_sequences_have_the_measured_lengths():
    """Input with its end, train mean 23, ID 28, OOD 92, at most 113; the last three terms are of one sign in 69 % and 99.8 %."""
    task = open_task("number-sequence")
    for split, mean, share in (("train", 23, None), ("id", 28, 0.69), ("ood", 92, 0.998)):
        batch = task.sample(split, 10_000)
        assert batch.lengths.mean() == pytest.approx(mean, abs=0.6)
        if share is not None:
            assert (batch.group == 0).mean() == pytest.approx(share, abs=0.02)
    assert task.sample("ood", 10_000).tokens.shape[1] in range(108, 116)


def test_word_problems_are_answered_as_they_are_asked():
    """Numbers and operation are read back from the sentence."""
    task = open_task("word-problem")
    seen = set()
    for split in ("train", "ood"):
        examples = task.examples(split, 3000)
        for text, target, group in zip(examples.inputs, examples.targets, examples.groups, strict=True):
            template, p, q = read_back(text)
            seen.add(template)
            assert int(target) == (p + q if template in ADD else p - q), text
            assert template not in DISTANCE or p >= q
            assert group == ((p < 0) == (q < 0) if template not in ADD else (p < 0) != (q < 0))
            if split == "ood":
                assert all(16 <= len(str(abs(x))) <= 20 for x in (p, q))
    assert seen == set(TEMPLATES)


def read_back(text: str) -> tuple[str, int, int]:
    """The template and numbers of a problem; "distance between" may be asked either way, and is read as the one with p >= q."""
    for template in TEMPLATES:
        pattern = re.escape(template).replace(r"\{p\}", r"(?P<p>-?\d+)").replace(r"\{q\}", r"(?P<q>-?\d+)")
        if found := re.fullmatch(pattern, text):
            p, q = int(found["p"]), int(found["q"])
            if template in DISTANCE and p < q:
                continue
            return template, p, q
    raise AssertionError(text)


def test_word_problems_have_the_measured_lengths():
    """Input mean 27 (ID), 53 (OOD), at most 80; target with its end 8.7 and 20.3, at most 23."""
    task = open_task("word-problem")
    assert (task.length, task.slots) == (80, 23)
    for split, inputs, targets in (("id", 27, 8.7), ("ood", 53, 20.3)):
        batch = task.sample(split, 10_000)
        assert batch.lengths.mean() == pytest.approx(inputs, abs=0.6)
        assert (batch.target != PAD).sum(1).mean() == pytest.approx(targets, abs=0.15)


def test_programs_print_their_targets():
    task = open_task("program")
    for split, n in (("id", 2000), ("ood", 500), ("train", 500)):
        examples = task.examples(split, n)
        for program, target in zip(examples.inputs, examples.targets, strict=True):
            assert printed(program) == target, program


def test_programs_have_the_measured_shape():
    """Input mean 29 in training, 41 ID, 47 OOD, at most 77 and 83; 24 % negative; 1 in 36 a bare number."""
    task = open_task("program")
    for split, mean in (("train", 29), ("id", 41), ("ood", 47)):
        assert task.sample(split, 3000).lengths.mean() == pytest.approx(mean, abs=1.0)
    examples = task.examples("id", 6000)
    assert np.mean([target.startswith("-") for target in examples.targets]) == pytest.approx(0.24, abs=0.02)
    bare = [GROUPS[group] == "identity, identity" for group in examples.groups]
    assert np.mean(bare) == pytest.approx(1 / 36, abs=0.008)
    assert all(text == f"print({target})" for text, target, is_bare in zip(examples.inputs, examples.targets, bare, strict=True) if is_bare)


def test_the_toy_comes_with_its_alignment():
    """ "582 13" and its end: TLU everywhere, NLP at the 1."""
    task = open_task("addition")
    assert given("582 13") == [TLU, TLU, TLU, TLU, NLP, TLU, TLU]
    batch = task.sample("train", 300)
    assert batch.actions is not None and (batch.actions[~batch.mask] == NOOP).all()
    assert ((batch.actions == NLP).sum(1) == 1).all()
    for name, sign in (("addition", 1), ("subtraction", -1)):
        examples = open_task(name).examples("ood", 300)
        for text, target in zip(examples.inputs, examples.targets, strict=True):
            a, b = map(int, text.split(" "))
            assert int(target) == a + sign * b and len(str(a)) == len(str(b)) in (6, 7, 8)


def test_batches_of_like_length_lose_nothing():
    batch = open_task("word-problem").sample("train", 500)
    parts = batch.by_length(512, seed=1)
    assert sum(map(len, parts)) == 500
    assert all(part.tokens.size <= 512 or len(part) == 1 for part in parts)
    rows = sorted(tuple(row[row != PAD]) for part in parts for row in part.tokens)
    assert rows == sorted(tuple(row[row != PAD]) for row in batch.tokens)


STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel got the milk there.
5 What is Daniel carrying? \tmilk,apple\t4 2
1 Sandra is here.
2 Where is Sandra? \there\t1
"""


@pytest.fixture
def babi(tmp_path):
    """An archive of all tasks, 40 stories each in training; the test of task 4 is among them."""
    told = "".join(STORY.replace("Mary", f"Mary{i}") for i in range(20))
    with tarfile.open(tmp_path / "babi.tar.gz", "w:gz") as tar:
        for number in range(1, 21):
            files = {"train": told, "test": STORY.replace("Mary", "Mary3" if number == 4 else "Mary")}
            for part, text in files.items():
                add(tar, f"tasks/en/qa{number}_some-name_{part}.txt", text)
                if (number, part) != (3, "train"):
                    add(tar, f"tasks/en-10k/qa{number}_some-name_{part}.txt", text * (1 if part == "test" else 2))
        add(tar, "tasks/en-10k-extra/qa3_some-name_train_last1000.txt", told)
    return tmp_path / "babi.tar.gz"


def add(tar: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    tar.addfile(info, io.BytesIO(text.encode()))


def test_stories_are_read_up_to_their_question():
    first, second, third = (q for story in stories(STORY, 7) for q in story)
    assert first.text == "« Where is Mary ? » Mary moved to the bathroom . John went to the hallway ."
    assert second.text.endswith("the hallway . Daniel got the milk there .") and second.answer == "milk,apple"
    assert third.text == "« Where is Sandra ? » Sandra is here ."
    asked, noop = [NOOP, *[TLU] * 4, NOOP], [NOOP] * 6
    assert first.actions == [*asked, NLP, *[TLU] * 5, *noop, NOOP]
    assert second.support == {1, 2} and len(second.actions) == len(second.text.split()) + 1


def test_babi_is_read_whole(babi):
    task = open_task("babi:joint", babi)
    assert task.classifies and task.slots == 1 and task.groups[19] == "qa20"
    assert task.splits == {"train": 20 * 116, "dev": 20 * 4, "id": 20 * 3}
    batch = task.sample("id")
    assert batch.tokens.shape[1] <= task.length and batch.target.shape == (60,) and batch.actions is not None
    assert [task.groups[g] for g in batch.group[:6]] == ["qa1"] * 3 + ["qa2"] * 3
    assert any("qa4: 2 of 2 test stories" in note for note in task.notes) and any("qa3: 120 training" in note for note in task.notes)
    one = open_task("babi:3", babi)
    assert one.groups == ("qa3",) and one.splits["train"] == 116
    drawn = task.sample("train", 64, seed=1)
    assert len(np.unique(drawn.tokens, axis=0)) > 20


def test_a_folder_is_as_good_as_an_archive(babi, tmp_path):
    with tarfile.open(babi) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    a, b = open_task("babi:2", babi), open_task("babi:2", tmp_path / "out")
    assert a.splits == b.splits and np.array_equal(a.sample("id").tokens, b.sample("id").tokens)


def test_own_tasks(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"input": f"{a} apples", "target": str(2 * a)} for a in range(100)]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    task = open_task(str(path))
    assert not task.classifies and task.splits == {"train": 80, "dev": 10, "id": 11} or sum(task.splits.values()) == 101
    parts = [set(task.examples(split).inputs) for split in task.splits]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 100, "an input repeated stays in one split"
    labelled = [
        {"input": "turn the light on!", "label": "on", "split": "train"},
        {"input": "dark, please", "label": "off", "split": "train"},
    ]
    path.write_text("\n".join(map(json.dumps, [*labelled, labelled[0] | {"split": "dev"}, labelled[1] | {"split": "ood"}])))
    task = open_task(str(path))
    assert task.classifies and task.answers.symbols == ("off", "on") and task.splits == {"train": 2, "dev": 1, "ood": 1}
    assert task.sample("ood").target.tolist() == [0] and task.length == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ('{"input": "a"}', 'line 1: needs "input" and either'),
        ('{"input": "a", "target": "1"}\n{"input": "b", "label": "x"}', "some lines have a label"),
        ('{"input": "a", "target": "1"}\nnonsense', "line 2: not JSON"),
        ('{"input": "", "target": "1"}', '"input" must be text that is not empty'),
        ('{"input": "a", "target": 1}', '"target" must be text'),
        ('{"input": "a", "target": "1", "split": "test"}', '"split" is train, dev'),
        ('{"input": "a", "target": "1", "split": "train"}', "no example is left for dev"),
        ('{"input": "a", "target": "1", "split": "train"}\n{"input": "b", "target": "1"}', "some lines name a split"),
    ],
)
def test_bad_files_are_refused(text, words, tmp_path):
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        open_task(str(tmp_path / "own.jsonl"))


def test_bad_requests_are_refused(tmp_path, babi):
    (tmp_path / "not.tar").write_text("no archive")
    for name, data, words in (
        ("sums", None, "there is no task 'sums'; there are number-sequence"),
        ("babi:21", babi, "babi:1 to babi:20"),
        ("babi", None, "needs --data"),
        ("babi", tmp_path / "none", "no such file or folder"),
        ("babi", tmp_path / "not.tar", "not an archive"),
        ("program", babi, "--data is where bAbI lies"),
        (str(tmp_path / "none.jsonl"), None, "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            open_task(name, data)
    with pytest.raises(UserError, match="no split 'test'; it has train, dev, id, ood"):
        open_task("program").examples("test", 3)
    with pytest.raises(UserError, match="61 cannot be drawn"):
        open_task("babi", babi).examples("id", 61)


def test_vocabularies_round_trip_and_name_what_they_lack():
    vocabulary = Vocabulary(tuple("0123456789-é"))
    texts = ["-40", "", "7é"]
    ids, mask = vocabulary.encode(texts)
    assert [vocabulary.decode(row) for row in ids] == texts and mask.sum(1).tolist() == [4, 1, 3]
    assert vocabulary.unknown("4 4€-") == [" ", "€"]
    with pytest.raises(UserError, match="'€' is not among the 12 characters"):
        vocabulary.encode(["4", "€"])
    told = Vocabulary(("?", "Mary", "Where", "is"), "words")
    ids, _ = told.encode(["Where is Mary?", "Mary"])
    assert ids.tolist() == [[4, 5, 3, 2, 1], [3, 1, 0, 0, 0]] and told.decode(ids[0]) == "Where is Mary ?"
    assert Examples([], [], []).take([]) == Examples([], [], [])


@pytest.mark.parametrize("module", [smidgen.symbolic.vocabulary, smidgen.symbolic.decoders], ids=["vocabulary", "decoders"])
def test_docstrings_hold(module):
    tests = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    assert tests and all(doctest.DocTestRunner().run(t).failed == 0 for t in tests)
