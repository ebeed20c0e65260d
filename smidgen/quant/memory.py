"""Peak memory of a stretch of work on a device, and keeping it level."""

import ctypes

import torch

from smidgen import process


def reset_peak(device: torch.device) -> None:
    """Forgets earlier peaks, as far as `process.reset_peak` can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        process.reset_peak()


def peak_bytes(device: torch.device) -> int:
    """Most memory held at once: of the device where there is one, else resident memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process.peak_bytes()


def release() -> None:
    """Gives freed memory back to the system (glibc; elsewhere nothing).

    A block's matrices come and go between small things that stay, and the holes they leave add up over many blocks.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    trim(0)
