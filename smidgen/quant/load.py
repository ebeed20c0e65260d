"""Models and artifacts, as they run."""

from pathlib import Path
from typing import Any

import torch

from smidgen.quant.checkpoint import load_model
from smidgen.quant.export.compressed_tensors import is_mixed, load_mixed


def load_artifact(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """As plain `from_pretrained` would; only artifacts with layers of unequal bits, which it cannot unpack, are read by ourselves."""
    if is_mixed(folder):
        return load_mixed(folder, dtype).to(device).eval()
    return load_model(folder, dtype, device)
