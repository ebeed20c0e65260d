"""Rotations fused into the weights (QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, sections 3 and 4; names R1, R2 as in
SpinQuant, Liu et al., ICLR 2025, arXiv 2405.16406, section 3.1).

RMSNorm divides by a length, and a rotation keeps lengths: RMSNorm(R^T x) = R^T RMSNorm(x) once the gain is out of the way. So the
residual stream can be turned as a whole, and heads too, since attention only averages values. With weights (out, in), y = W x + b:

    every norm    gain g       W <- W diag(g) in the layers it feeds, g <- 1; the last norm's goes into the head
    R1 (d, d)     stream       W <- W R1 in layers that read it and the head; W <- R1^T W, b <- R1^T b in those that write it; E <- E R1
    R2 (dim, dim) one a block  W <- R2^T W, b <- R2^T b for each head of the values; W <- W R2 for each head of the output projection

The output stays what it was, but a channel of outliers, which would stretch the grid of every row, is now spread over all channels.

R = diag(s) H^T / sqrt(n) with a Hadamard matrix H and random signs s: a channel is turned into H diag(s) x / sqrt(n). The signs come before
the mixing; after it they would only negate columns, which rounding hardly notices. R3 and R4, which need a multiplication at run time, and
learned rotations are left out, so the inputs of down_proj keep their outliers. Why a new checkpoint instead of a step per block, like
`zfold.py`: R1 ties all blocks to the embedding and the head.
"""

import json
import math
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smidgen.errors import UserError
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.families import FAMILIES, Family
from smidgen.quant.shards import Shards
from smidgen.quant.writing import writing

RMSNORM = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # families with plain RMSNorm: x / rms(x) * gain
FINAL_NORM = "norm"  # in all of them, inside the base model
ROWS = 8192  # of an embedding turned at a time, in float64

Weights = dict[str, Tensor]


@torch.no_grad()
def rotate(checkpoint: Checkpoint, folder: Path, seed: int = 0) -> Checkpoint:
    """Writes the rotated model into `folder`, every tensor in its own type; the same seed gives the same rotations."""
    _check(checkpoint, folder)
    model: Any = checkpoint.skeleton(torch.device("cpu"))
    pieces = rotated(checkpoint, model, *rotations(model, seed))
    folder.mkdir(parents=True, exist_ok=True)
    shards = Shards(folder)
    for name, tensor in pieces:
        shards.add({name: tensor})
    shards.finish()
    config = checkpoint.config.to_diff_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(checkpoint.dtype()).removeprefix("torch.")
    config["tie_word_embeddings"] = False  # the head holds the last gain, the embedding does not
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    if (checkpoint.folder / "generation_config.json").is_file():
        shutil.copyfile(checkpoint.folder / "generation_config.json", folder / "generation_config.json")
    with writing(folder):
        checkpoint.tokenizer().save_pretrained(folder)
    return Checkpoint(folder, checkpoint.name)


def _check(checkpoint: Checkpoint, folder: Path) -> None:
    kind = checkpoint.config.model_type
    if kind not in RMSNORM:
        raise UserError(f"rotation needs RMSNorm, which these families have: {', '.join(RMSNORM)}; this model is of the family '{kind}'")
    if "quantization_config" in checkpoint.config.to_dict():
        raise UserError(f"{checkpoint.folder} is quantized already; rotate the model it was made from")
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds weights already; write the rotated model elsewhere")


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """A Hadamard matrix: entries +-1, H H^T = n I. Kronecker product of the smallest matrices `orders` finds."""
    sizes = orders(n)
    if sizes is None:
        raise UserError(f"width {n} cannot be rotated: no Hadamard matrix of order {n} by Sylvester's or Paley's constructions")
    h = torch.ones(1, 1, dtype=torch.float64)
    for m in sizes:
        h = torch.kron(h, SYLVESTER if m == 2 else paley(_prime(m)))
    return h


@cache
def orders(n: int) -> tuple[int, ...] | None:
    """Factors of n that are each the order of one construction, as many twos as can be: 576 = 2 2 2 2 36; None if there are none."""
    if n == 1:
        return ()
    for m in (2, *range(4, n + 1, 4)):
        if n % m == 0 and (m == 2 or _prime(m)):
            rest = orders(n // m)
            if rest is not None:
                return (m, *rest)
    return None


def _prime(m: int) -> int:
    """The prime q from which `paley` makes order m, a multiple of 4; 0 if there is none."""
    found = [q for q, rest in ((m - 1, 3), (m // 2 - 1, 1)) if q % 4 == rest and _is_prime(q)]
    return found[0] if found else 0


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, math.isqrt(q) + 1))


SYLVESTER = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
PALEY_II = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)


def paley(q: int) -> Float[Tensor, "n n"]:
    """Paley's Hadamard matrix from a prime q: order q + 1 if q % 4 is 3, else 2 (q + 1).

    chi(a) is 0 for a = 0, 1 for squares modulo q, -1 for the others; Q_ij = chi(i - j). Bordered with ones, Q gives S with
    S S^T = q I; H is S + I if S is skew (q % 4 = 3). Example, q = 3, where 1 is the only square:

              0 -1  1           1  1  1  1
        Q =   1  0 -1     H =  -1  1 -1  1
             -1  1  0          -1  1  1 -1
                               -1 -1  1  1
    """
    i = torch.arange(q)
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[i * i % q] = 1
    chi[0] = 0
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:] = 1
    s[1:, 0] = -1 if q % 4 == 3 else 1
    s[1:, 1:] = chi[(i[:, None] - i) % q]
    eye = torch.eye(q + 1, dtype=torch.float64)
    return s + eye if q % 4 == 3 else torch.kron(s, SYLVESTER) + torch.kron(eye, PALEY_II)


def rotation(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """A randomized Hadamard rotation, R = diag(s) H^T / sqrt(n), float64."""
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    return signs * hadamard(n).T / math.sqrt(n)


def rotations(model: Any, seed: int) -> tuple[Float[Tensor, "d d"], list[Float[Tensor, "dim dim"]]]:
    """R1, and R2 of every block."""
    generator = torch.Generator().manual_seed(seed)
    attention = FAMILIES[model.config.model_type].attention.module
    _, blocks = decoder_list(model)
    r1 = rotation(model.config.hidden_size, generator)
    return r1, [rotation(vars(block.get_submodule(attention))["head_dim"], generator) for block in blocks]


def rotated(
    checkpoint: Checkpoint, model: Any, r1: Float[Tensor, "d d"], r2: list[Float[Tensor, "dim dim"]]
) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the rotated model, by and by: the embedding, each block, the last norm and the head."""
    paths = {module: path for path, module in model.named_modules()}
    embedding, head = (f"{paths[m]}.weight" for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    norm = f"{model.base_model_prefix}.{FINAL_NORM}.weight"
    yield embedding, turned_rows(_tied(checkpoint, model, embedding, head), r1)

    path, blocks = decoder_list(model)
    for i, block in enumerate(blocks):
        names = {name: f"{path}.{i}.{name}" for name, _ in block.named_parameters()}
        values = checkpoint.read(names.values())
        new = rotated_block({n: values[full] for n, full in names.items()}, FAMILIES[model.config.model_type], r1, r2[i])
        yield from ((names[n], _stored(w, values[names[n]].dtype, names[n])) for n, w in new.items())

    gain = checkpoint.read([norm])[norm]
    yield norm, torch.ones_like(gain)
    yield head, turned_rows(_tied(checkpoint, model, head, embedding), gain.double()[:, None] * r1)


def _tied(checkpoint: Checkpoint, model: Any, name: str, twin: str) -> Tensor:
    """Reads `name`, or its twin where they are tied and only that one is stored."""
    if name not in checkpoint.keys and {name, twin} & set(model.all_tied_weights_keys):
        name = twin
    return checkpoint.read([name])[name]


def rotated_block(weights: Weights, family: Family, r1: Float[Tensor, "d d"], r2: Float[Tensor, "dim dim"]) -> Weights:
    """A block's parameters, by their names in it, as float64; norms inside the attention stay as they are."""
    w = {name: value.to(torch.float64, copy=True) for name, value in weights.items()}
    for site in family.folds:
        if site.before not in family.residual.values():
            continue
        gain = w[f"{site.before}.weight"]
        for reader in site.after:
            w[f"{reader}.weight"] *= gain
            turn_inputs(w, reader, r1)
        gain.fill_(1)
    for writer in family.residual:
        turn_outputs(w, writer, r1)
    names = family.attention
    turn_outputs(w, f"{names.module}.{names.value}", r2)
    turn_inputs(w, f"{names.module}.{names.output}", r2)
    return w


def turn_inputs(w: Weights, layer: str, r: Float[Tensor, "n n"]) -> None:
    """W R, in place in the dictionary; a layer with several times n inputs takes them head by head."""
    w[f"{layer}.weight"] = turned(w[f"{layer}.weight"], r)


def turn_outputs(w: Weights, layer: str, r: Float[Tensor, "n n"]) -> None:
    """R^T W and R^T b, likewise."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in w:
            w[name] = turned(w[name].movedim(0, -1), r).movedim(-1, 0)


def turned(x: Float[Tensor, "*rows heads_n"], r: Float[Tensor, "n n"]) -> Float[Tensor, "*rows heads_n"]:
    """Every n numbers of a row, as a row vector, times r."""
    return (x.unflatten(-1, (-1, len(r))) @ r).flatten(-2)


def turned_rows(x: Float[Tensor, "rows d"], r: Float[Tensor, "d d"]) -> Float[Tensor, "rows d"]:
    """x r in the type of x, with few rows at a time in float64: an embedding is larger than any block."""
    return torch.cat([_stored(part.double() @ r, x.dtype, "the embedding or head") for part in x.split(ROWS)])


def _stored(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    value = value.to(dtype).contiguous()
    if not bool(value.isfinite().all()):
        raise UserError(f"{name}, rotated, holds NaN or values beyond {str(dtype).removeprefix('torch.')}")
    return value
