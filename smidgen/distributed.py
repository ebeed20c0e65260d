"""A command that may be one of many processes: torchrun and accelerate launch start them and number them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smidgen.run import Run


@contextmanager
def process_run(job: str, config: Any, folder: Path | None = None, label: str = "") -> Iterator[Run]:
    """The first process's Run; the others write where nobody looks, silently."""
    if is_first_process():
        with Run(job, config, folder, label) as run:
            yield run
        return
    with tempfile.TemporaryDirectory() as scratch, Run(job, config, Path(scratch) / "run") as run:
        run.console.quiet = True
        yield run


def is_first_process() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: torch.device) -> torch.device:
    """This process's one of the devices of that type on its host."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
