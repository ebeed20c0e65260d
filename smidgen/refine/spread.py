"""Independent work over processes: those of `torchrun`, or of joblib. The results do not depend on how many there are."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from smidgen.errors import UserError

T = TypeVar("T")


def spread(work: Callable[[int], T], items: Sequence[int], processes: int = 1) -> list[T]:
    """[work(i) for i in items]; under torchrun every process gets the whole list, and `processes` is not looked at."""
    if processes < 1:
        raise UserError(f"work needs at least one process, got {processes}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState()
        shares = gather_object([_share(work, items[state.process_index :: state.num_processes], None)])
        return _woven(shares, len(items))
    if processes == 1:
        return [work(i) for i in items]
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError as error:
        raise UserError("several processes need the package joblib: pip install joblib, or use torchrun") from error
    shares: Any = Parallel(n_jobs=processes)(delayed(_share)(work, items[r::processes], 1) for r in range(processes))
    return _woven(list(shares), len(items))


def _share(work: Callable[[int], T], items: Sequence[int], threads: int | None) -> list[T]:
    if threads is not None:
        torch.set_num_threads(threads)  # each process would use all cores
    return [work(i) for i in items]


def _woven(shares: list[list[T]], count: int) -> list[T]:
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]
