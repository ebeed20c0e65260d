"""What a checkpoint keeps unquantized, read once and written as it is stored."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint


@dataclass
class Rest:
    """The parameters nobody has written yet: 16-bit types as they are, float32 matrices as float16."""

    checkpoint: Checkpoint
    done: set[str] = field(default_factory=set)
    "Names of what is written, quantized or not."

    def of_block(self, module: nn.Module, path: str) -> dict[str, Tensor]:
        """Those of a block, with the values they have in `module`; what is on the meta device there is read."""
        parameters = {f"{path}.{n}": p for n, p in module.named_parameters()}
        return self._read(list(parameters), {n: p for n, p in parameters.items() if not p.is_meta})

    def of_model(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Those that belong to no block; tied ones once."""
        tied = model.all_tied_weights_keys
        return self._read([n for n, _ in model.named_parameters(remove_duplicate=False) if n not in tied], {})

    def _read(self, names: list[str], changed: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [n for n in names if n not in self.done]
        self.done |= set(names)
        read = self.checkpoint.read(names)
        return {n: half(changed[n].to("cpu", value.dtype) if n in changed else value, n) for n, value in read.items()}


def half(value: Tensor, name: str) -> Tensor:
    """float32 matrices as float16; vectors (norms, biases) and 16-bit tensors unchanged."""
    if value.dtype != torch.float32 or value.ndim < 2:
        return value.clone()
    if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
        raise UserError(f"{name} holds NaN or values beyond float16")
    return value.half()
