"""What a model answers to many questions, and what of it is right."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from smidgen.symbolic.decoders import read
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.tasks import Batch


class Answers(NamedTuple):
    """What a model said."""

    symbols: Int[np.ndarray, "n *length"]
    "In reading order, each with its end, then padding; or labels, (n,)."
    log_probability: Float[np.ndarray, "n"]
    "Of the whole answer, as the model has it: of every slot, of every symbol up to the end, or of the label."


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, size: int = 512) -> Answers:
    """Answers to all questions of a batch, `size` at a time, on the model's device; the model is in evaluation mode."""
    assert not model.training
    device = next(model.parameters()).device
    symbols, certain = [], []
    order = np.argsort(batch.lengths, kind="stable")  # those of like length together
    parts = [order[i : i + size] for i in range(0, len(batch), size)]
    for part in (batch.take(index) for index in parts):
        tokens, mask = (torch.from_numpy(array).to(device) for array in (part.tokens, part.mask))
        actions = None if part.actions is None else torch.from_numpy(part.actions).to(device)
        logits = model(tokens, mask, actions) if isinstance(model, GridModel) else model(tokens, mask)
        best, chosen = (t.cpu().numpy() for t in logits.double().log_softmax(-1).max(-1))
        answer, probability = read(best, chosen, slots=model.columns is not None)
        symbols.append(answer)
        certain.append(probability)
    longest = max(s.shape[-1] for s in symbols) if symbols and symbols[0].ndim == 2 else None
    found = np.concatenate([s if longest is None else np.pad(s, ((0, 0), (0, longest - s.shape[1]))) for s in symbols])
    back = np.argsort(np.concatenate(parts), kind="stable")
    return Answers(found[back], np.concatenate(certain)[back])


def right(answers: Answers, batch: Batch) -> Bool[np.ndarray, "n"]:
    """Which answers are the target, every symbol of it."""
    ours, theirs = answers.symbols, batch.target
    if ours.ndim == 1:
        return ours == theirs
    longest = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in (ours, theirs))
    return (ours == theirs).all(1)
