"""A model's weights as safetensors files of bounded size, written while they are being made."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from smidgen.quant.writing import writing

SHARD = 256 * 2**20  # bytes that wait in memory before a file is written


class Shards:
    """The weights of a folder: `add` tensors, then `finish`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors that belong in one file; those before them are written if all are too many."""
        if self.waiting and sum(t.nbytes for group in (self.waiting, tensors) for t in group.values()) > SHARD:
            self._flush()
        self.waiting |= tensors

    def finish(self) -> None:
        """Writes what waits, gives the files their usual names, and writes the index if there are several."""
        if self.waiting:
            self._flush()
        names: dict[str, str] = {}
        for i, tensors in enumerate(self.written):
            several = len(self.written) > 1
            file = f"model-{i + 1:05}-of-{len(self.written):05}.safetensors" if several else "model.safetensors"
            self._file(i).rename(self.folder / file)
            names |= dict.fromkeys(tensors, file)
        if len(self.written) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": names}
            with writing(self.folder):
                (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        file = self._file(len(self.written))
        with writing(file):
            save_file(self.waiting, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes through a private temporary file
        self.bytes += sum(t.nbytes for t in self.waiting.values())
        self.written.append(list(self.waiting))
        self.waiting = {}

    def _file(self, i: int) -> Path:
        return self.folder / f"shard-{i}.safetensors"
