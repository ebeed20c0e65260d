"""The models by name, what they answer, and trained ones in a folder.

FOLDER/model.json           name, options, task, vocabularies, longest question trained on
FOLDER/model.safetensors    parameters and buffers

Every model is a torch module with

    model(tokens, mask)                logits (n, columns, symbols) of slots, (n, length, symbols) in reading order, or (n, labels)
    model.loss(tokens, mask, target)   scalar; target in that order
    model.columns                      slots of its top list, or None: it answers in reading order, or with a label

A model's options are the keyword arguments of its entry in MODELS; modules are imported only when theirs is made.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from smidgen.errors import UserError
from smidgen.symbolic.decoders import read
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.networks import ENCODERS, Blocks, Embedding, TextCNN, TopList, dense
from smidgen.symbolic.seq2grid import Seq2Grid
from smidgen.symbolic.tasks import Batch, Task
from smidgen.symbolic.vocabulary import Vocabulary

TRAINED = "trained"  # folder of a run of `smidgen symbolic train`
DESCRIPTION, TENSORS = "model.json", "model.safetensors"


class Sizes(NamedTuple):
    """What a task asks of a model."""

    vocabulary: int
    "Ids of inputs, padding and end among them."
    symbols: int
    "Ids of targets, or labels."
    slots: int | None
    "Longest target, its end included; none: labels."


def s2g(
    kind: Literal["cnn", "acnn"],
    sizes: Sizes,
    dim: int,
    rows: int,
    columns: int,
    encoder: str,
    layers: int,
    blocks: int,
    carry: bool,
    no_leak: bool,
    guided: bool,
) -> nn.Module:
    """S2G-CNN and S2G-ACNN."""
    module = Seq2Grid(dim, rows, columns, encoder_of(encoder, dim, layers), no_leak=no_leak)
    network = Blocks(dim, dim, blocks, kind)
    readout = TopList(network.channels, sizes.symbols, carry)
    return GridModel(Embedding(sizes.vocabulary, dim), module, network, readout, guided=guided)


def s2g_cnn(
    sizes: Sizes,
    *,
    dim: int = 128,
    rows: int = 3,
    columns: int = 25,
    encoder: str = "gru",
    layers: int = 3,
    blocks: int = 3,
    carry: bool = False,
    no_leak: bool = False,
    guided: bool = False,
) -> nn.Module:
    """Bottleneck CNN over the grid.

    >>> sum(p.numel() for p in s2g_cnn(Sizes(258, 258, 25)).parameters() if p.requires_grad)
    1845765
    """
    return s2g("cnn", sequences(sizes, columns), dim, rows, columns, encoder, layers, blocks, carry, no_leak, guided)


def s2g_acnn(
    sizes: Sizes,
    *,
    dim: int = 128,
    rows: int = 3,
    columns: int = 25,
    encoder: str = "gru",
    layers: int = 3,
    blocks: int = 3,
    carry: bool = False,
    no_leak: bool = False,
    guided: bool = False,
) -> nn.Module:
    """Local attention over the grid.

    >>> sum(p.numel() for p in s2g_acnn(Sizes(258, 258, 25)).parameters() if p.requires_grad)
    1552005
    """
    return s2g("acnn", sequences(sizes, columns), dim, rows, columns, encoder, layers, blocks, carry, no_leak, guided)


def s2g_textcnn(
    sizes: Sizes,
    *,
    dim: int = 128,
    rows: int = 4,
    columns: int = 8,
    encoder: str = "gru",
    layers: int = 2,
    filters: int = 128,
    dropout: float = 0.4,
    smoothing: float = 0.1,
    no_leak: bool = False,
    guided: bool = False,
) -> nn.Module:
    """TextCNN over the grid."""
    labels(sizes)
    if min(rows, columns) < 4:
        raise UserError(f"TextCNN's convolutions reach over 4 x 4 cells, the grid has {rows} x {columns}; raise --option.rows or columns")
    module = Seq2Grid(dim, rows, columns, encoder_of(encoder, dim, layers), no_leak=no_leak)
    network = TextCNN(dim, filters, dropout=dropout)
    readout = dense(network.features, sizes.symbols)
    return GridModel(Embedding(sizes.vocabulary, dim), module, network, readout, smoothing, guided)


def lstm(sizes: Sizes, *, width: int = 512, layers: int = 1, smoothing: float = 0.1) -> nn.Module:
    """Reads backwards."""
    from smidgen.symbolic.baselines import Classifier, LSTMDecoder, Recurrent, Seq2Seq

    encoder = Recurrent("lstm", sizes.vocabulary, width, layers)
    if sizes.slots is None:
        return Classifier(encoder, width, sizes.symbols, smoothing)
    return Seq2Seq(encoder, LSTMDecoder(sizes.symbols, width, layers), width, sizes.symbols, sizes.slots, smoothing)


def gru_attention(sizes: Sizes, *, width: int = 256, layers: int = 1, smoothing: float = 0.1) -> nn.Module:
    """Additive attention."""
    from smidgen.symbolic.baselines import AttentionDecoder, Classifier, Recurrent, Seq2Seq

    encoder = Recurrent("gru", sizes.vocabulary, width, layers)
    if sizes.slots is None:
        return Classifier(encoder, width, sizes.symbols, smoothing)
    return Seq2Seq(encoder, AttentionDecoder(sizes.symbols, width), width, sizes.symbols, sizes.slots, smoothing)


def transformer(sizes: Sizes, *, width: int = 128, layers: int = 2, dropout: float = 0.1, smoothing: float = 0.1) -> nn.Module:
    """The authors' tiny one."""
    from smidgen.symbolic.baselines import Deep

    def stack(layer: Callable[[], nn.Module]) -> nn.Module:
        return Deep([layer() for _ in range(layers)], width)

    return attentive(sizes, stack, width, dropout, smoothing)


def universal_transformer(sizes: Sizes, *, width: int = 128, steps: int = 8, dropout: float = 0.1, smoothing: float = 0.1) -> nn.Module:
    """One layer, 8 times at most."""
    from smidgen.symbolic.baselines import Universal

    return attentive(sizes, lambda layer: Universal(layer(), width, steps), width, dropout, smoothing)


def attentive(
    sizes: Sizes, stack: Callable[[Callable[[], nn.Module]], nn.Module], width: int, dropout: float, smoothing: float
) -> nn.Module:
    """A Transformer of some stack of layers."""
    from smidgen.symbolic.baselines import Attentive, AttentiveDecoder, Classifier, Seq2Seq

    if width % 8:
        raise UserError(f"--option.width must be a multiple of 8 for 4 heads and sinusoids, got {width}")
    shape = {"dropout": dropout, "batch_first": True, "norm_first": True}
    encoder = Attentive(sizes.vocabulary, width, stack(lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, **shape)))
    if sizes.slots is None:
        return Classifier(encoder, width, sizes.symbols, smoothing)
    decoder = AttentiveDecoder(sizes.symbols, width, stack(lambda: nn.TransformerDecoderLayer(width, 4, 4 * width, **shape)))
    return Seq2Seq(encoder, decoder, width, sizes.symbols, sizes.slots, smoothing)


def cnn(sizes: Sizes, *, dim: int = 128, columns: int = 25, blocks: int = 3, carry: bool = False) -> nn.Module:
    """S2G-CNN without the module."""
    from smidgen.symbolic.baselines import Line

    network = Blocks(dim, dim, blocks, "cnn")
    readout = TopList(network.channels, sequences(sizes, columns).symbols, carry)
    return Line(sizes.vocabulary, dim, network, readout, columns)


def textcnn(sizes: Sizes, *, dim: int = 128, filters: int = 128, dropout: float = 0.4, smoothing: float = 0.1) -> nn.Module:
    """S2G-TextCNN without the module."""
    from smidgen.symbolic.baselines import LineClassifier

    network = TextCNN(dim, filters, flat=True, dropout=dropout)
    return LineClassifier(sizes.vocabulary, dim, network, labels(sizes).symbols, smoothing)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "s2g-cnn": s2g_cnn,
    "s2g-acnn": s2g_acnn,
    "s2g-textcnn": s2g_textcnn,
    "lstm": lstm,
    "gru-attention": gru_attention,
    "transformer": transformer,
    "universal-transformer": universal_transformer,
    "cnn": cnn,
    "textcnn": textcnn,
}


def encoder_of(name: str, dim: int, layers: int) -> nn.Module:
    """By name."""
    if name not in ENCODERS:
        raise UserError(f"--option.encoder is one of {', '.join(ENCODERS)}, got {name}")
    return ENCODERS[name](dim, layers)


def sequences(sizes: Sizes, columns: int) -> Sizes:
    """Refuses labels, and answers longer than the top list."""
    if sizes.slots is None:
        raise UserError("this model answers with sequences, the task wants labels: take s2g-textcnn, textcnn, or a sequence model")
    if sizes.slots > columns:
        raise UserError(
            f"answers have up to {sizes.slots} symbols with their end, the grid {columns} slots: add --option.columns {sizes.slots}"
        )
    return sizes


def labels(sizes: Sizes) -> Sizes:
    """Refuses sequences."""
    if sizes.slots is not None:
        raise UserError("this model answers with labels, the task wants sequences: take s2g-cnn, s2g-acnn, cnn, or a sequence model")
    return sizes


@dataclass(frozen=True)
class Description:
    """What a folder says of the model in it."""

    name: str
    task: str
    tokens: Vocabulary
    answers: Vocabulary
    slots: int | None
    "Longest target of the task, its end included; none: labels."
    length: int
    "Tokens of the longest input trained on."
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """An untrained model."""
        return make(self.name, Sizes(len(self.tokens), len(self.answers), self.slots), self.options)


def sizes_of(task: Task) -> Sizes:
    """What a task asks of a model."""
    return Sizes(len(task.tokens), len(task.answers), None if task.classifies else task.slots)


def make(name: str, sizes: Sizes, options: Mapping[str, Any]) -> nn.Module:
    """An untrained model."""
    if name not in MODELS:
        raise UserError(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    defaults = {p.name: p.default for p in inspect.signature(MODELS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"--option.{option}: {name} has no such option; it has {', '.join(defaults)}")
        default = defaults[option]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"--option.{option} {value}: not a value like the default, {default}")
        if isinstance(value, int | float) and not isinstance(value, bool) and (value < 0 or (isinstance(default, int) and value < 1)):
            raise UserError(f"--option.{option} must be positive, got {value}")
    return MODELS[name](sizes, **options)


def save(folder: Path, model: nn.Module, description: Description) -> None:
    """Writes a model that `load` makes again."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}, folder / TENSORS)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(folder: Path) -> Description:
    """What a folder, or a run's, holds."""
    folder = trained_folder(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder} holds no trained model: it has no {DESCRIPTION} and {TENSORS}; give a run of smidgen symbolic train")
    try:
        read = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        vocabularies = {name: Vocabulary(tuple(read[name]["symbols"]), read[name]["unit"]) for name in ("tokens", "answers")}
        return Description(**read | vocabularies)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / DESCRIPTION}: damaged, or of another version") from error


def load(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save` wrote, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = trained_folder(folder)
    model = describe(folder).make()
    try:
        model.load_state_dict(load_file(folder / TENSORS))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / TENSORS}: damaged, or not of the model {DESCRIPTION} tells of") from error
    return model.to(device).eval()


def trained_folder(path: Path) -> Path:
    """Where the model is, of a run or of its folder."""
    return path / TRAINED if (path / TRAINED).is_dir() else path


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
