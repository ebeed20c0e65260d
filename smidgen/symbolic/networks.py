"""The networks around seq2grid: encoders in front of it, grid networks behind it, readouts.

    encoder     (batch, time, dim), mask  ->  (batch, time, dim)        GRU, LSTM, Transformer, MLP
    network     (batch, rows, columns, dim) -> (batch, rows, columns, channels)          Blocks
                (batch, rows, columns, dim) -> (batch, features)                         TextCNN
    readout     (batch, rows, columns, channels) -> (batch, columns, symbols)            TopList

Channels come last, as the grid is written; convolutions see the same memory as torch's channels_last format, so nothing is copied.
Sequences are padded behind. Kernels start as the authors' do: Glorot-uniform where dense or recurrent, truncated normal in convolutions.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

Sequence = Float[Tensor, "batch time dim"]
Mask = Bool[Tensor, "batch time"]
Cells = Float[Tensor, "batch rows columns channels"]
OUTSIDE = -1e5  # score of a neighbour outside the grid
TRUNCATED = 0.87962566103423978  # standard deviation of a standard normal cut at -2 and 2


class GRU(nn.Module):
    """The paper's encoder: one direction, `layers` deep.

    It deviates from the paper's in one thing: TensorFlow's cell applies the reset gate before the candidate's recurrent product, torch's
    (and cuDNN's) after it. The second of torch's two biases, of no use then but in the candidate, stays 0: there is one per gate, as in the
    paper, and the gates' starts at 1.
    """

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(dim, dim, layers, batch_first=True)
        for name, p in self.rnn.named_parameters():
            if name.startswith("bias_hh"):
                nn.init.zeros_(p).requires_grad_(False)
            elif name.startswith("bias_ih"):
                nn.init.ones_(p)
                nn.init.zeros_(p[2 * dim :])
            else:  # gates' kernels are one matrix over (input, state) in the paper, and so are candidates'
                nn.init.uniform_(p[: 2 * dim], -math.sqrt(6 / (4 * dim)), math.sqrt(6 / (4 * dim)))
                nn.init.uniform_(p[2 * dim :], -math.sqrt(6 / (3 * dim)), math.sqrt(6 / (3 * dim)))

    def forward(self, x: Sequence, mask: Mask) -> Sequence:
        """States; padding behind does not reach what is before it."""
        return self.rnn(x)[0]


class LSTM(nn.Module):
    """One direction, as torch makes it."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(dim, dim, layers, batch_first=True)

    def forward(self, x: Sequence, mask: Mask) -> Sequence:
        """States."""
        return self.rnn(x)[0]


class Transformer(nn.Module):
    """Encoder with 4 heads and sinusoidal positions; sees the whole sequence."""

    def __init__(self, dim: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout, batch_first=True, norm_first=True),
            layers,
            nn.LayerNorm(dim),
            enable_nested_tensor=False,
        )

    def forward(self, x: Sequence, mask: Mask) -> Sequence:
        """States."""
        return self.layers(x + sinusoids(x.shape[1], x), src_key_padding_mask=~mask)


class MLP(nn.Sequential):
    """Every token on its own, `layers` dense layers with ReLU: actions that depend on the token alone."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__(*(part for _ in range(layers) for part in (dense(dim, dim), nn.ReLU())))

    def forward(self, x: Sequence, mask: Mask) -> Sequence:
        """States."""
        return super().forward(x)


ENCODERS = {"gru": GRU, "lstm": LSTM, "transformer": Transformer, "mlp": MLP}


class Embedding(nn.Module):
    """A table, N(0, 1/sqrt(dim)), times sqrt(dim); padding is embedded as zeros, which on a grid is an empty cell."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, dim) / math.sqrt(dim))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(batch, time) -> (batch, time, dim)"""
        return self.table[tokens] * (math.sqrt(self.table.shape[1]) * mask[..., None])


class Blocks(nn.Sequential):
    """Bottleneck blocks, stride 1: every cell sees `blocks` cells around it in each direction."""

    def __init__(self, dim: int, width: int, blocks: int, kind: Literal["cnn", "acnn"]) -> None:
        super().__init__(*(Bottleneck(dim if i == 0 else 4 * width, width, kind) for i in range(blocks)))
        self.channels = 4 * width

    def forward(self, grid: Cells) -> Float[Tensor, "batch rows columns outputs"]:
        """The same grid with `channels` channels."""
        x = super().forward(grid.movedim(-1, 1))
        return x.movedim(1, -1)


class Bottleneck(nn.Module):
    """1x1, 3x3 or local attention, 1x1, each with batch norm, beside a projection; ReLU of the sum."""

    def __init__(self, inputs: int, width: int, kind: Literal["cnn", "acnn"]) -> None:
        super().__init__()
        self.main = nn.Sequential(
            conv(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width, 3) if kind == "cnn" else LocalAttention(width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, 4 * width, 1),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut = nn.Sequential(conv(inputs, 4 * width, 1), nn.BatchNorm2d(4 * width))

    def forward(self, x: Float[Tensor, "batch inputs rows columns"]) -> Float[Tensor, "batch outputs rows columns"]:
        """Four times as many channels as the width."""
        return (self.main(x) + self.shortcut(x)).relu()


class LocalAttention(nn.Module):
    """One head of self-attention over the 3 x 3 neighbourhood.

    score of the neighbour at (i, j):  q.k / sqrt(width) + q.[e_row(i); e_col(j)],  i, j in -1, 0, 1
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.query, self.key, self.value = (conv(width, width, 1) for _ in range(3))
        self.row, self.column = (nn.Parameter(torch.randn(3, width // 2)) for _ in range(2))

    def forward(self, x: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        """Weighted sums of values; no neighbour is outside the grid."""
        q = self.query(x)[:, None]
        offset = torch.cat([self.row[:, None].expand(3, 3, -1), self.column[None].expand(3, 3, -1)], -1).flatten(0, 1)  # (9, width)
        scores = (q * (neighbours(self.key(x)) / math.sqrt(self.width) + offset[..., None, None])).sum(2)
        outside = neighbours(torch.ones_like(x[:1, :1]))[:, :, 0] == 0
        p = scores.masked_fill(outside, OUTSIDE).softmax(1)
        return (p[:, :, None] * neighbours(self.value(x))).sum(1)


def neighbours(x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch 9 channels rows columns"]:
    """Each cell's 3 x 3 neighbourhood, row by row, zeros outside."""
    padded = pad(x, (1, 1, 1, 1))
    rows, columns = x.shape[2:]
    return torch.stack([padded[:, :, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], 1)


class TextCNN(nn.Module):
    """Parallel convolutions over the grid, 2x2, 3x3 and 4x4, the maximum of each over all places; dropout on what comes out.

    On a grid of one row (`flat`: a text as it is) they are 1x2, 1x3 and 1x4, and as many empty cells follow as the widest spans: an
    empty window is among them whatever the padding.
    """

    def __init__(
        self, dim: int, filters: int = 128, kernels: tuple[int, ...] = (2, 3, 4), flat: bool = False, dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, filters, (1 if flat else k, k)) for k in kernels)
        for part in self.convolutions:
            nn.init.trunc_normal_(part.weight, std=0.1, a=-0.2, b=0.2)  # pyright: ignore  a Conv2d
            nn.init.constant_(part.bias, 0.1)  # pyright: ignore  a Conv2d
        self.dropout = nn.Dropout(dropout)
        self.features = filters * len(kernels)
        self.behind = max(kernels) if flat else 0

    def forward(self, grid: Cells) -> Float[Tensor, "batch features"]:
        """Features."""
        x = pad(grid.movedim(-1, 1), (0, self.behind))
        return self.dropout(torch.cat([c(x).relu().amax((2, 3)) for c in self.convolutions], 1))


class TopList(nn.Module):
    """Symbols of every slot of the top list: one dense layer, the same everywhere.

    Three blocks see three slots to each side, and an answer's digit may hang on a carry from further off, or on which number is the larger.
    `carry` (ours) first runs two layers of GRU over the slots in both directions: the first can bring word from anywhere, the second borrow
    and carry knowing it. What they find is added to the channels, then ReLU.
    """

    def __init__(self, channels: int, symbols: int, carry: bool = False, width: int = 64) -> None:
        super().__init__()
        self.dense = dense(channels, symbols)
        self.scan = nn.GRU(channels, width, 2, batch_first=True, bidirectional=True) if carry else None
        self.back = dense(2 * width, channels) if carry else None

    def forward(self, x: Cells) -> Float[Tensor, "batch columns symbols"]:
        """Logits; slot 0 is the last symbol of the answer."""
        top = x[:, 0]
        if self.scan is not None and self.back is not None:
            top = (top + self.back(self.scan(top)[0])).relu()
        return self.dense(top)


def conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """Same padding, no bias."""
    made = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    std = math.sqrt(1 / (inputs * size * size)) / TRUNCATED
    nn.init.trunc_normal_(made.weight, std=std, a=-2 * std, b=2 * std)
    return made


def dense(inputs: int, outputs: int) -> nn.Linear:
    """Glorot-uniform, bias 0."""
    made = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def sinusoids(length: int, like: Tensor) -> Float[Tensor, "length dim"]:
    """Positions: sines in the first half of the width, cosines in the second, wavelengths from 2 pi to 20,000 pi."""
    half = like.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000) / max(1, half - 1)))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)
