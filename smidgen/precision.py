"""Where to compute, and the type that device multiplies fastest without losing what matters."""

from functools import cache
from importlib.util import find_spec

import torch

from smidgen.errors import UserError


def forward_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def pick_device(name: str) -> torch.device:
    """The device a command computes on."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


@cache
def has_triton() -> bool:
    """Torch for CUDA brings it on Linux."""
    return find_spec("triton") is not None
