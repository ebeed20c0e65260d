"""The tokens a job calibrates on."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from smidgen.errors import UserError, check_seed
from smidgen.precision import forward_precision
from smidgen.quant.checkpoint import Checkpoint, check_length, load_model
from smidgen.run import Run
from smidgen.texts import SELF, check_source, windows


@dataclass(frozen=True)
class Calibration:
    """What a calibration needs to know of a command's options."""

    source: str
    sequences: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"--sequences must be at least 1, got {self.sequences}")
        check_seed(self.seed)
        check_source(self.source)

    def tokens(self, checkpoint: Checkpoint, width: int, device: torch.device, run: Run) -> Int[Tensor, "n length"]:
        """The sequences; a warning if they are fewer tokens than the `width` inputs of the widest layer."""
        check_length(checkpoint.config, self.length)
        if self.source != SELF:
            tokens = windows(self.source, checkpoint.tokenizer(), self.length, self.sequences, self.seed)
        else:
            run.say(f"sampling {self.sequences} sequences from the model itself")
            tokens = sampled(load_model(checkpoint.folder, torch.float32, device), self.sequences, self.length, self.seed)
        if tokens.numel() < width:
            run.say(f"warning: {tokens.numel()} calibration tokens are fewer than the {width} inputs of a layer; damping decides the rest")
        return tokens


@torch.inference_mode()
def sampled(model: Any, sequences: int, length: int, seed: int) -> Int[Tensor, "n length"]:
    """Sequences the model writes at temperature 1, each from a random first token."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    first = torch.randint(model.config.get_text_config().vocab_size, (sequences, 1), device=device)
    precision = forward_precision(device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        out = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, min_new_tokens=length - 1, max_new_tokens=length - 1,
            pad_token_id=0,
        )  # fmt: skip
    return out.cpu()
