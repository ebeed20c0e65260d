"""The folder of a model on its device: its files, which `smidgen/search/__init__.py` describes, and how one is replaced."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from smidgen.errors import UserError
from smidgen.search.features import FEATURES

TOKENIZER, DESCRIPTION, NETWORK, TABLE = "tokenizer.json", "encoder.json", "encoder.onnx", "encoder.npz"
INDEX, SETTINGS = "index.smi", "config.json"
FILES = (FEATURES, TOKENIZER, DESCRIPTION, NETWORK, TABLE, INDEX, SETTINGS)
INNER = "artifact"  # in the folder of a run


def model_folder(folder: Path) -> Path:
    """Where the model lies: the folder itself, or artifact in that of a run."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    return next((f for f in (folder, folder / INNER) if (f / INDEX).is_file()), folder)


def present(path: Path) -> None:
    """Refuses a folder without one of its files."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name} in it; give a folder that smidgen search distill wrote")


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file that a device needs."""
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).is_file()}


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write: it gets its name once it is whole and on the disk, so a reader has the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
