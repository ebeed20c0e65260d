"""Factors of a whole model: found block by block, kept, attached to the simulated model and folded into its weights.

Why a driver over blocks and not a step inside `smidgen quantize`: blocks get the float model's inputs and are matched to its outputs, so
what one block learned does not depend on the others, and a run that was interrupted goes on with the block it was at.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.errors import UserError
from smidgen.quant.blocks import decoder_list, walk
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.simulate import QuantLinear, Scheme, activations_of
from smidgen.quant.transforms.alpha import Adapted, adapted, bare, check, released, share, source_of
from smidgen.quant.transforms.zfold import move
from smidgen.run import PARTIAL, Run


@dataclass
class Factors:
    """What was found, by full name: of sites the producer's, of activations the first reader's."""

    a: dict[str, Float[Tensor, "_"]] = field(default_factory=dict)
    low: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    high: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    "Mean ranges of the batches as scaled, and clipped where the method clips; infinite where every token has its own."
    shrink: dict[str, Float[Tensor, "out groups 1"]] = field(default_factory=dict)
    "Logarithms of what the largest weights are multiplied by to make a range, of layers that clip."

    @classmethod
    def of(cls, found: Adapted) -> "Factors":
        """Of one block."""
        path = found.block.name
        activations = [(f"{path}.{name}", activation) for name, activation in activations_of(found.layers)]
        return cls(
            {f"{path}.{s.fold.before}": s.a.detach().cpu().clone() for s in found.sites},
            {name: activation.low.cpu().clone() for name, activation in activations},
            {name: activation.high.cpu().clone() for name, activation in activations},
            {f"{path}.{name}": q.shrink.detach().cpu().clone() for name, q in found.layers.items() if q.shrink is not None},
        )

    def add(self, other: "Factors") -> None:
        """Of another block."""
        self.a |= other.a
        self.low |= other.low
        self.high |= other.high
        self.shrink |= other.shrink

    def save(self, file: Path, about: dict[str, str]) -> None:
        """Writes a file in one move."""
        partial = file.with_name(file.name + PARTIAL)
        tensors = {f"{key}/{name}": t for key, part in vars(self).items() for name, t in part.items()}
        save_file(tensors, partial, metadata=about)
        partial.rename(file)

    @classmethod
    def load(cls, file: Path, about: dict[str, str]) -> "Factors":
        """Reads it back; a UserError where it was made with other options."""
        found = cls()
        with safe_open(file, "pt") as tensors:
            if tensors.metadata() != about:
                raise UserError(f"{file} was made with other options or other text; choose another --output or remove it")
            for key in tensors.keys():  # noqa: SIM118, not a dictionary
                part, name = key.split("/", 1)
                vars(found)[part][name] = tensors.get_tensor(key)
        return found


def calibrate(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokens: Int[Tensor, "n length"],
    method: Callable[[Adapted], dict[str, float]],
    scheme: Scheme,
    run: Run,
    device: torch.device,
    kinds: tuple[str, ...] = ("norm",),
    folder: Path | None = None,
) -> Factors:
    """Finds factors of every block with `method` (Quadapter, SmoothQuant, Equalization, Clip), which sets `a` of every site it is given.

    `model` is the checkpoint's skeleton; blocks are loaded one at a time, see the float model's inputs and are to return its outputs.
    A finished block is kept in `folder`, by default RUN/factors, and skipped by a run with the same options that finds it there. A row per
    block is logged.
    """
    check(model, kinds)
    folder = run.folder / "factors" if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    text = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    about = {"method": repr(method), "scheme": repr(scheme), "kinds": repr(kinds), "tokens": text, "model": checkpoint.name}
    found = Factors()
    blocks = walk(checkpoint, model, tokens, device, torch.float32, "float")
    for block in run.track(blocks, "factors", len(decoder_list(model)[1])):
        file = folder / f"{block.index}.safetensors"
        if file.is_file():
            found.add(Factors.load(file, about))
            for batch in block.hidden:
                batch.copy_(block.run(batch))
            continue
        one = adapted(block, scheme, kinds)
        try:
            row = method(one)
            for site in one.sites:
                site.store(checkpoint.dtype())
            row["error"], row["energy"] = one.error(), one.energy  # of the factors as stored, and their ranges
        finally:
            released(one)
        factors = Factors.of(one)
        factors.save(file, about)
        found.add(factors)
        run.log(block=block.index, stage="factors", method=type(method).__name__, **row)
        block.hidden.copy_(one.targets)
    return found


def attach(model: PreTrainedModel, layers: dict[str, QuantLinear], factors: Factors) -> None:
    """Gives a whole simulated model what `calibrate` found: a, the ranges of activations, and what clips the weights'."""
    with bare(model, layers) as blocks:
        sources = {f"{b.name}.{f.before}": (b.name, f, source_of(b, f)) for b in blocks if b.family for f in b.family.folds}
    for name, a in factors.a.items():
        if name not in sources:
            raise UserError(f"{name} has factors, but this model has no such site; were they found for another model?")
        path, fold, source = sources[name]
        if int(source.max()) + 1 != len(a):
            raise UserError(f"{name} has {int(source.max()) + 1} channels, but {len(a)} factors; were they found for another model?")
        share([layers[f"{path}.{after}"] for after in fold.after], nn.Parameter(a.to(source.device)), source)
    for name, activation in activations_of(layers):
        if name in factors.low:
            activation.low.copy_(factors.low[name])
            activation.high.copy_(factors.high[name])
    for name, shrink in factors.shrink.items():
        layers[name].shrink = nn.Parameter(shrink.to(layers[name].weight.device))


@torch.no_grad()
def fold(model: PreTrainedModel, layers: dict[str, QuantLinear], dtype: torch.dtype) -> None:
    """Folds the factors of a simulated model into its weights, in place: producer times alpha, consumers' columns divided by it.

    The model goes on being simulated, without alpha, and its outputs are what they were; gains are rounded to `dtype`, the type the model
    is to be stored in, and the columns get the inverses of the factors the rounded gains imply, so the float output stays exact.
    """
    with bare(model, layers) as blocks:
        for block in blocks:
            for site in block.family.folds if block.family else ():
                consumers = [layers[f"{block.name}.{name}"] for name in site.after]
                a = consumers[0].alpha
                if a is None:
                    continue
                if any(q.alpha is not a for q in consumers):
                    raise UserError(f"{block.name}.{site.before}: its consumers have factors of their own, which cannot be folded into it")
                before = layers.get(f"{block.name}.{site.before}")
                if before is not None and before.range is not None:
                    raise UserError(f"{block.name}.{site.before} has a learned weight range, which factors would leave behind; fold first")
                move(block, site, a.exp(), {}, dtype)
                for quant in consumers:
                    quant.alpha, quant.source = None, None
    left = [name for name, quant in layers.items() if quant.alpha is not None]
    if left:
        raise UserError(f"{left[0]} has factors that nothing before it can take; the family has no such site")
