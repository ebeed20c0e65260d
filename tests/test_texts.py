import sys
from types import ModuleType

import pytest
import torch

from smidgen.errors import UserError
from smidgen.texts import check_source, read_text, windows


class Characters:
    """A tokenizer whose tokens are code points."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def file(tmp_path):
    """(name, content) -> path as text."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# --- sources ---------------------------------------------------------------------------------------------------------


def test_text_file(file):
    assert read_text(file("a.txt", "Grüße\nworld")) == "Grüße\nworld"


def test_field_of_every_json_line(file):
    lines = '{"id": 1, "text": "one"}\n\n{"text": "zwei\\u00df", "id": 2}\n'
    source = file("a.jsonl", lines)
    assert read_text(f"{source}:text") == "one\n\nzweiß"
    assert read_text(f"{source}:id") == "1\n\n2"
    assert read_text(source) == lines  # without a field a file is a file


@pytest.mark.parametrize("bad", ['{"text": "cut', '{"other": 1}', '["text"]', "3", "null"])
def test_a_bad_json_line_is_named_by_its_number(bad, file):
    source = file("a.jsonl", '{"text": "one"}\n\n' + bad + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: .*'text'"):
        read_text(f"{source}:text")


def test_docstrings_of_a_package_in_path_order_each_once(tmp_path, monkeypatch):
    package = tmp_path / "sample_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Top."""\nraise RuntimeError("imported, not read")\n')
    (package / "b.py").write_text('def f():\n    r"""\n    Two\n        lines.\n    """\n\ndef g():\n    "Top."\n\nx = "no docstring"\n')
    (package / "a.py").write_text('class A:\n    "A class."\n    async def m(self):\n        "Bad \\escape."\n')
    (package / "inner" / "__init__.py").write_text('"""Inner."""')
    (package / "broken.py").write_text("def (:")
    (package / "bytes.py").write_bytes(b'"""\xff"""\x00')
    monkeypatch.syspath_prepend(tmp_path)
    assert read_text("docstrings:sample_package") == "Top.\n\nA class.\n\nBad \\escape.\n\nTwo\n    lines.\n\nInner."
    assert "sample_package" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package", "os/path", "textwrap", ""])
def test_docstrings_need_an_installed_package(name):
    with pytest.raises(UserError, match=f"docstrings:{name}: no package of that name"):
        read_text(f"docstrings:{name}")


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the `datasets` package; returns what it was asked for."""
    asked = []

    class Rows(dict):
        column_names = ("text", "title")

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "missing":
            raise ValueError("no such data set\nand much more")
        return Rows(text=["one", "two"], title=["eins", "zwei"])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("smidgen.texts.find_spec", lambda name: object())
    return asked


def test_hub_data_set(datasets):
    assert read_text("hf:org/name") == "one\n\ntwo"
    assert read_text("hf:org/name:small:test:title") == "eins\n\nzwei"
    assert datasets == [("org/name", None, "train"), ("org/name", "small", "test")]


def test_hub_errors_are_one_line(datasets):
    with pytest.raises(UserError, match="hf:missing cannot be loaded: no such data set$"):
        read_text("hf:missing")
    with pytest.raises(UserError, match="has no field 'body'; it has text, title"):
        read_text("hf:org/name:::body")


def test_hub_needs_the_datasets_package(monkeypatch):
    monkeypatch.setattr("smidgen.texts.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install datasets"):
        read_text("hf:org/name")


def test_missing_and_empty_texts_are_refused(file, tmp_path):
    for source in (str(tmp_path / "none.txt"), str(tmp_path), str(tmp_path / "none.jsonl") + ":text"):
        for reads in (read_text, check_source):
            with pytest.raises(UserError, match="no such text"):
                reads(source)
    for source in (file("empty.txt", ""), file("blank.txt", " \n\t\n"), file("empty.jsonl", "\n") + ":text"):
        with pytest.raises(UserError, match="the text is empty"):
            read_text(source)


def test_bytes_that_are_no_text_are_refused(file):
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 2\)"):
        read_text(file("latin.txt", b"Gr\xfc\xdfe"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(file("latin.jsonl", b'{"text": "\xfc"}') + ":text")


def test_self_is_not_a_text_to_read():
    with pytest.raises(UserError, match="--calibration"):
        read_text("self")


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(file):
    """A text of 100 different characters: its tokens are 200..299."""
    return file("long.txt", "".join(chr(200 + i) for i in range(100)))


def test_windows_follow_each_other(long):
    found = windows(long, Characters(), 7)
    assert torch.equal(found, torch.arange(200, 298).view(14, 7))  # the incomplete last window is left out
    assert torch.equal(windows(long, Characters(), 7, count=3), found[:3])
    assert torch.equal(windows(long, Characters(), 7, count=50), found)


def test_a_seed_chooses_windows_without_overlap(long):
    whole = {tuple(w) for w in windows(long, Characters(), 7).tolist()}
    chosen = windows(long, Characters(), 7, count=10, seed=3)
    rows = [tuple(w) for w in chosen.tolist()]
    assert len(set(rows)) == 10 and set(rows) < whole and rows != sorted(rows)
    assert torch.equal(windows(long, Characters(), 7, count=10, seed=3), chosen)
    assert not torch.equal(windows(long, Characters(), 7, count=10, seed=4), chosen)
    before = torch.random.get_rng_state()
    windows(long, Characters(), 7, count=10, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_windows_that_cannot_be_had_are_refused(long):
    with pytest.raises(UserError, match="100 tokens are less than one window of 101"):
        windows(long, Characters(), 101)
    with pytest.raises(UserError, match="100 tokens make 14 windows of 7, 15 were asked for"):
        windows(long, Characters(), 7, count=15, seed=0)
    with pytest.raises(UserError, match="at least 2"):
        windows(long, Characters(), 1)
    for count in (0, -2):  # a slice would take none, or all but two
        with pytest.raises(UserError, match=f"one window at least must be read, got {count}"):
            windows(long, Characters(), 7, count=count)


def test_real_tokenizers_add_nothing_of_their_own(tokenizer, file):
    source = file("a.txt", "Some words, and <more> words. " * 40)
    ids = windows(source, tokenizer, 8).flatten()
    assert ("Some words, and <more> words. " * 40).startswith(tokenizer.decode(ids))
