"""The models by name.

Every model is a torch module with

    model(tokens, mask)                logits (n, columns, symbols) of slots, (n, length, symbols) in reading order, or (n, labels)
    model.loss(tokens, mask, target)   scalar; target in that order
    model.columns                      slots of its top list, or None: it answers in reading order, or with a label

An entry of MODELS is its options with their defaults; called with the sizes of a task it is the untrained model. Modules of baselines are
imported only when one is made.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from smidgen.errors import UserError
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.networks import ENCODERS, Blocks, Embedding, TextCNN, TopList, dense
from smidgen.symbolic.seq2grid import Seq2Grid
from smidgen.symbolic.tasks import Task


class Sizes(NamedTuple):
    """What a task asks of a model."""

    vocabulary: int
    "Ids of inputs, padding and end among them."
    symbols: int
    "Ids of targets, or labels."
    slots: int | None
    "Longest target, its end included; none: labels."


@dataclass(frozen=True)
class S2G:
    """S2G-CNN and S2G-ACNN: a bottleneck network, or one with local attention, over the grid.

    >>> [sum(p.numel() for p in S2G(kind)(Sizes(258, 258, 25)).parameters() if p.requires_grad) for kind in ("cnn", "acnn")]
    [1845765, 1552005]
    """

    kind: Literal["cnn", "acnn"]
    _: KW_ONLY
    dim: int = 128
    rows: int = 3
    columns: int = 25
    encoder: str = "gru"
    layers: int = 3
    blocks: int = 3
    carry: bool = False
    no_leak: bool = False
    guided: bool = False

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        refuse_long(sizes, self.columns)
        module = Seq2Grid(self.dim, self.rows, self.columns, encoder_of(self.encoder, self.dim, self.layers), no_leak=self.no_leak)
        network = Blocks(self.dim, self.dim, self.blocks, self.kind)
        readout = TopList(network.channels, sizes.symbols, self.carry)
        return GridModel(Embedding(sizes.vocabulary, self.dim), module, network, readout, guided=self.guided)


@dataclass(frozen=True)
class S2GText:
    """S2G-TextCNN."""

    _: KW_ONLY
    dim: int = 128
    rows: int = 4
    columns: int = 8
    encoder: str = "gru"
    layers: int = 2
    filters: int = 128
    dropout: float = 0.4
    smoothing: float = 0.1
    no_leak: bool = False
    guided: bool = False

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        refuse_sequences(sizes)
        if min(self.rows, self.columns) < 4:
            reach = f"TextCNN's convolutions reach over 4 x 4 cells, the grid has {self.rows} x {self.columns}"
            raise UserError(f"{reach}; raise --option.rows or columns")
        module = Seq2Grid(self.dim, self.rows, self.columns, encoder_of(self.encoder, self.dim, self.layers), no_leak=self.no_leak)
        network = TextCNN(self.dim, self.filters, dropout=self.dropout)
        readout = dense(network.features, sizes.symbols)
        return GridModel(Embedding(sizes.vocabulary, self.dim), module, network, readout, self.smoothing, self.guided)


@dataclass(frozen=True)
class Recurrent:
    """An LSTM that reads backwards, or a GRU whose decoder attends to what it read."""

    kind: Literal["lstm", "gru"]
    _: KW_ONLY
    width: int = 512
    layers: int = 1
    smoothing: float = 0.1

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        from smidgen.symbolic import baselines

        encoder = baselines.Recurrent(self.kind, sizes.vocabulary, self.width, self.layers)
        if sizes.slots is None:
            return baselines.Classifier(encoder, self.width, sizes.symbols, self.smoothing)
        if self.kind == "lstm":
            decoder = baselines.LSTMDecoder(sizes.symbols, self.width, self.layers)
        else:
            decoder = baselines.AttentionDecoder(sizes.symbols, self.width)
        return baselines.Seq2Seq(encoder, decoder, self.width, sizes.symbols, sizes.slots, self.smoothing)


@dataclass(frozen=True)
class Transformer:
    """The authors' tiny one."""

    _: KW_ONLY
    width: int = 128
    layers: int = 2
    dropout: float = 0.1
    smoothing: float = 0.1

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        from smidgen.symbolic.baselines import Deep

        def stack(layer: Callable[[], nn.Module]) -> nn.Module:
            return Deep([layer() for _ in range(self.layers)], self.width)

        return attentive(sizes, stack, self.width, self.dropout, self.smoothing)


@dataclass(frozen=True)
class UniversalTransformer:
    """One layer, `steps` times at most."""

    _: KW_ONLY
    width: int = 128
    steps: int = 8
    dropout: float = 0.1
    smoothing: float = 0.1

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        from smidgen.symbolic.baselines import Universal

        return attentive(sizes, lambda layer: Universal(layer(), self.width, self.steps), self.width, self.dropout, self.smoothing)


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


@dataclass(frozen=True)
class CNN:
    """S2G-CNN without the module."""

    _: KW_ONLY
    dim: int = 128
    columns: int = 25
    blocks: int = 3
    carry: bool = False

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        from smidgen.symbolic.baselines import Line

        refuse_long(sizes, self.columns)
        network = Blocks(self.dim, self.dim, self.blocks, "cnn")
        return Line(sizes.vocabulary, self.dim, network, TopList(network.channels, sizes.symbols, self.carry), self.columns)


@dataclass(frozen=True)
class LineTextCNN:
    """S2G-TextCNN without the module."""

    _: KW_ONLY
    dim: int = 128
    filters: int = 128
    dropout: float = 0.4
    smoothing: float = 0.1

    def __call__(self, sizes: Sizes) -> nn.Module:
        """The model."""
        from smidgen.symbolic.baselines import LineClassifier

        refuse_sequences(sizes)
        network = TextCNN(self.dim, self.filters, flat=True, dropout=self.dropout)
        return LineClassifier(sizes.vocabulary, self.dim, network, sizes.symbols, self.smoothing)


Model = S2G | S2GText | Recurrent | Transformer | UniversalTransformer | CNN | LineTextCNN
MODELS: dict[str, Model] = {
    "s2g-cnn": S2G("cnn"),
    "s2g-acnn": S2G("acnn"),
    "s2g-textcnn": S2GText(),
    "lstm": Recurrent("lstm"),
    "gru-attention": Recurrent("gru", width=256),
    "transformer": Transformer(),
    "universal-transformer": UniversalTransformer(),
    "cnn": CNN(),
    "textcnn": LineTextCNN(),
}


def encoder_of(name: str, dim: int, layers: int) -> nn.Module:
    """By name."""
    if name not in ENCODERS:
        raise UserError(f"--option.encoder is one of {', '.join(ENCODERS)}, got {name}")
    return ENCODERS[name](dim, layers)


def refuse_long(sizes: Sizes, columns: int) -> None:
    """Labels, and answers longer than the top list."""
    if sizes.slots is None:
        raise UserError("this model answers with sequences, the task wants labels: take s2g-textcnn, textcnn, or a sequence model")
    if sizes.slots > columns:
        raise UserError(
            f"answers have up to {sizes.slots} symbols with their end, the grid {columns} slots: add --option.columns {sizes.slots}"
        )


def refuse_sequences(sizes: Sizes) -> None:
    """Answers that are no labels."""
    if sizes.slots is not None:
        raise UserError("this model answers with labels, the task wants sequences: take s2g-cnn, s2g-acnn, cnn, or a sequence model")


def sizes_of(task: Task) -> Sizes:
    """What a task asks of a model."""
    return Sizes(len(task.tokens), len(task.answers), None if task.classifies else task.slots)


def make(name: str, sizes: Sizes, options: Mapping[str, Any]) -> nn.Module:
    """An untrained model."""
    if name not in MODELS:
        raise UserError(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    model = MODELS[name]
    defaults = {field.name: vars(model)[field.name] for field in fields(model) if field.kw_only}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"--option.{option}: {name} has no such option; it has {', '.join(defaults)}")
        default = defaults[option]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise UserError(f"--option.{option} {value}: not a value like the default, {default}")
        if isinstance(value, int | float) and not isinstance(value, bool) and (value < 0 or (isinstance(default, int) and value < 1)):
            raise UserError(f"--option.{option} must be positive, got {value}")
    return replace(model, **options)(sizes)
