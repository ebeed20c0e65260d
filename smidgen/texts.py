"""Text for calibration and evaluation: a SOURCE becomes windows of tokens.

SOURCE is one of
    path/to/file.txt                     a text file
    path/to/file.jsonl:field             a field of every line
    hf:NAME[:CONFIG[:SPLIT[:FIELD]]]     a data set of the hub, through `datasets` when that is installed
    docstrings:PACKAGE                   the docstrings of an installed package: real English, offline, everywhere
    self                                 sequences the model itself writes (calibration only)
"""

import ast
import inspect
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SELF = "self"


def read_text(source: str) -> str:
    """The text of a SOURCE, documents separated by blank lines."""
    if source == SELF:
        raise UserError("'self' is text written by the model, for --calibration only")
    if source.startswith("docstrings:"):
        text = _docstrings(source.removeprefix("docstrings:"))
    elif source.startswith("hf:"):
        text = _hub(source.removeprefix("hf:"))
    elif ".jsonl:" in source:
        path, field = source.rsplit(":", 1)
        text = _jsonl(Path(path), field)
    else:
        text = _file(Path(source))
    if not text.strip():
        raise UserError(f"{source}: the text is empty")
    return text


def check_source(source: str) -> None:
    """Refuses at once a file or a package that is not there, before long work; what is in it is seen when it is read."""
    if source.startswith("docstrings:"):
        _folder(source.removeprefix("docstrings:"))
    elif source != SELF and not source.startswith("hf:"):
        _existing(Path(source.rsplit(":", 1)[0] if ".jsonl:" in source else source))


def windows(source: str, tokenizer: Any, length: int, count: int | None = None, seed: int | None = None) -> "Tensor":
    """Non-overlapping windows of `length` tokens, without special tokens, shape (count, length).

    The first ones in order, or with a `seed` a random choice. All of them if `count` is None.
    """
    import torch

    if length < 2:
        raise UserError(f"--length must be at least 2 tokens, got {length}")
    if count is not None and count < 1:
        raise UserError(f"{source}: one window at least must be read, got {count}; ask for more, or leave the number out")
    ids = torch.tensor(tokenizer(read_text(source), add_special_tokens=False, verbose=False)["input_ids"])
    found = len(ids) // length
    if found == 0:
        raise UserError(f"{source}: {len(ids)} tokens are less than one window of {length}; use a longer text or a smaller --length")
    if count is not None and found < count and seed is not None:
        raise UserError(
            f"{source}: {len(ids)} tokens make {found} windows of {length}, {count} were asked for; use fewer --sequences or a longer text"
        )
    chosen = ids[: found * length].view(found, length)
    if seed is not None:
        chosen = chosen[torch.randperm(found, generator=torch.Generator().manual_seed(seed))]
    return chosen[:count]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"no such text: {path} (a text file, file.jsonl:field, docstrings:PACKAGE, hf:NAME or self)")
    return path


def _file(path: Path) -> str:
    _existing(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _jsonl(path: Path, field: str) -> str:
    texts = []
    for number, line in enumerate(_file(path).splitlines(), start=1):
        if line.strip():
            try:
                texts.append(str(json.loads(line)[field]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: no JSON object with a field '{field}'") from error
    return "\n\n".join(texts)


def _hub(name: str) -> str:
    if find_spec("datasets") is None:
        raise UserError(f"hf:{name} needs the datasets package: pip install datasets")
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]  an optional package

    dataset, config, split, field = (name.split(":") + [""] * 3)[:4]
    try:
        rows = load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:  # datasets raises many kinds, none of its own base
        raise UserError(f"hf:{name} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if (field or "text") not in rows.column_names:
        raise UserError(f"hf:{name} has no field '{field or 'text'}'; it has {', '.join(rows.column_names)}")
    return "\n\n".join(rows[field or "text"])


def _folder(package: str) -> Path:
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"docstrings:{package}: no package of that name is installed")
    return Path(spec.submodule_search_locations[0])


def _docstrings(package: str) -> str:
    """Docstrings of every module in a package, in path order, each once; the package is read, not imported."""
    seen: dict[str, None] = {}
    for file in sorted(_folder(package).rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue  # test fixtures of parsers are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    seen[inspect.cleandoc(text)] = None
    return "\n\n".join(seen)
