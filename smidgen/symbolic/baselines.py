"""What seq2grid is measured against: sequence models that write the answer symbol by symbol, and its own grid
networks without the module.

    lstm                    reads the input backwards, decodes from the last state (Sutskever, Vinyals, Le 2014)
    gru-attention           additive attention over the encoder's states (Bahdanau, Cho, Bengio 2015)
    transformer             2 layers, 128 wide, feed-forward 512, 4 heads: the authors' "tiny"
    universal-transformer   one layer of that width applied 8 times, with adaptive halting (Dehghani et al. 2019)
    cnn, textcnn            the network over the text laid out as one row, newest token first

The first four are an encoder and a decoder, taught with the true answer so far and used with their own; for labels a dense layer reads the
encoder instead. The authors tried LSTM sizes from 1 x 512 to 3 x 1024 and we know of no winner: `layers` and `width` are options.
"""

import math
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pack_padded_sequence

from smidgen.symbolic.networks import Embedding, TextCNN, TopList, dense, sinusoids
from smidgen.symbolic.seq2grid import cells, place
from smidgen.symbolic.tasks import NOOP, TLU
from smidgen.symbolic.vocabulary import END, PAD

Tokens = Int[Tensor, "batch time"]
Mask = Bool[Tensor, "batch time"]
THRESHOLD = 0.99  # of adaptive halting


class Memory(NamedTuple):
    """What an encoder leaves to a decoder or a classifier."""

    states: Float[Tensor, "batch time width"] | None
    mask: Mask
    last: tuple[Tensor, ...]
    "Of the LSTM: its state and cell after the last token, (layers, batch, width) each."
    summary: Float[Tensor, "batch width"]
    "The whole input in one vector: the last state, or that of the first position."


class Decoder(Protocol):
    """States that come after a memory and the symbols written so far."""

    def __call__(self, memory: Memory, previous: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """`previous` starts with PAD; state j has seen its symbols 0 .. j."""
        ...


class Seq2Seq(nn.Module):
    """Writes the answer in reading order, at most `slots` symbols."""

    columns = None  # not a grid

    def __init__(self, encoder: nn.Module, decoder: nn.Module, width: int, symbols: int, slots: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.decoder, self.dense = encoder, decoder, dense(width, symbols)
        self.slots, self.smoothing = slots, smoothing

    def forward(self, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch length symbols"]:
        """Logits of the most probable symbol each time; after the end they mean nothing."""
        memory = self.encoder(tokens, mask)
        written, logits = tokens.new_full((len(tokens), 1), PAD), []
        while len(logits) < self.slots and not bool((written == END).any(1).all()):
            logits.append(self.dense(self.decoder(memory, written)[:, -1]))
            written = torch.cat([written, logits[-1].argmax(-1, keepdim=True)], 1)
        return torch.stack(logits, 1)

    def loss(self, tokens: Tokens, mask: Mask, target: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Mean over the symbols of the target, given those before; padding does not count."""
        logits = self.dense(self.decoder(self.encoder(tokens, mask), pad(target[:, :-1], (1, 0), value=PAD)))
        return cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=self.smoothing)


class Classifier(nn.Module):
    """A label from an encoder's summary."""

    columns = None

    def __init__(self, encoder: nn.Module, width: int, labels: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.dense, self.smoothing = encoder, dense(width, labels), smoothing

    def forward(self, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch labels"]:
        """Logits."""
        return self.dense(self.encoder(tokens, mask).summary)

    def loss(self, tokens: Tokens, mask: Mask, target: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """Mean over the batch."""
        return cross_entropy(self(tokens, mask), target, label_smoothing=self.smoothing)


class Recurrent(nn.Module):
    """LSTM that reads backwards, or GRU that reads forwards."""

    def __init__(self, kind: str, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.backwards = kind == "lstm"
        self.embedding = Embedding(vocabulary, width)
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(width, width, layers, batch_first=True)

    def forward(self, tokens: Tokens, mask: Mask) -> Memory:
        """Padding is not read."""
        x, lengths = self.embedding(tokens, mask), mask.sum(1)
        if not self.backwards:  # what comes after the last token is not seen by it
            states = self.rnn(x)[0]
            return Memory(states, mask, (), states[torch.arange(len(x), device=x.device), lengths - 1])
        order = (lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device)).clamp_min(0)
        x = x.gather(1, order[..., None].expand_as(x))
        _, last = self.rnn(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))
        return Memory(None, mask, last, last[0][-1])


class LSTMDecoder(nn.Module):
    """Goes on from the encoder's last state."""

    def __init__(self, symbols: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = Embedding(symbols, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, memory: Memory, previous: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """States."""
        hidden, cell = memory.last
        return self.rnn(self.embedding(previous, previous != PAD), (hidden, cell))[0]


class AttentionDecoder(nn.Module):
    """One GRU cell; before each symbol it looks at the encoder's states by scores v.tanh(W h + U s)."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embedding = Embedding(symbols, width)
        self.cell = nn.GRUCell(2 * width, width)
        self.query, self.key, self.score = dense(width, width), dense(width, width), dense(width, 1)
        self.mix = dense(2 * width, width)

    def forward(self, memory: Memory, previous: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """States."""
        assert memory.states is not None
        hidden, keys, found = memory.summary, self.key(memory.states), []
        for x in self.embedding(previous, previous != PAD).unbind(1):
            scores = self.score((self.query(hidden)[:, None] + keys).tanh())[..., 0].masked_fill(~memory.mask, -math.inf)
            context = (scores.softmax(-1)[:, None] @ memory.states)[:, 0]
            hidden = self.cell(torch.cat([x, context], -1), hidden)
            found.append(self.mix(torch.cat([hidden, context], -1)).tanh())
        return torch.stack(found, 1)


class Attentive(nn.Module):
    """A Transformer's encoder over tokens; `stack` is its layers."""

    def __init__(self, vocabulary: int, width: int, stack: nn.Module) -> None:
        super().__init__()
        self.embedding, self.stack = Embedding(vocabulary, width), stack

    def forward(self, tokens: Tokens, mask: Mask) -> Memory:
        """Every position sees all."""
        states = self.stack(self.embedding(tokens, mask), src_key_padding_mask=~mask)
        return Memory(states, mask, (), states[:, 0])


class AttentiveDecoder(nn.Module):
    """A Transformer's decoder."""

    def __init__(self, symbols: int, width: int, stack: nn.Module) -> None:
        super().__init__()
        self.embedding, self.stack = Embedding(symbols, width), stack

    def forward(self, memory: Memory, previous: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Every position sees those before it, and all of the input."""
        length = previous.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=previous.device).triu(1)
        x = self.embedding(previous, previous != PAD)
        return self.stack(x, memory.states, tgt_mask=future, memory_key_padding_mask=~memory.mask)


class Deep(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(width)

    def forward(self, x: Tensor, *memory: Tensor, **masks: Tensor) -> Tensor:
        """(batch, length, width), and what the layers take besides."""
        x = x + sinusoids(x.shape[1], x)
        for layer in self.layers:
            x = layer(x, *memory, **masks)
        return self.norm(x)


class Universal(nn.Module):
    """One layer again and again, each position until it halts (adaptive computation time, Graves 2016), 8 times at most.

    s^k = layer(s^{k-1} + position + step), weight w^k = p^k while the sum of the halting probabilities p stays under 0.99, the rest to 1
    when it would not; the result is the running mixture w^k s^k + (1 - w^k) (the mixture so far). Time spent pondering costs nothing here.
    """

    def __init__(self, layer: nn.Module, width: int, steps: int = 8) -> None:
        super().__init__()
        self.layer, self.steps, self.norm = layer, steps, nn.LayerNorm(width)
        self.halt = dense(width, 1)
        nn.init.ones_(self.halt.bias)

    def forward(self, x: Tensor, *memory: Tensor, **masks: Tensor) -> Tensor:
        """(batch, length, width), and what the layer takes besides."""
        positions, times = sinusoids(x.shape[1], x), sinusoids(self.steps, x)
        mixture, spent = torch.zeros_like(x), torch.zeros_like(x[..., :1])
        for k in range(self.steps):
            x = x + positions + times[k]
            p = self.halt(x).sigmoid()
            stops = spent + p > THRESHOLD
            w = torch.where(stops, 1 - spent, p) if k < self.steps - 1 else 1 - spent
            w = torch.where(spent >= 1, 0, w)
            x = self.layer(x, *memory, **masks)
            mixture, spent = w * x + (1 - w) * mixture, torch.where(stops, 1, spent + w)
        return self.norm(mixture)


class Line(nn.Module):
    """The bottleneck network over the text as one row, newest token in slot 0; the first `columns` slots answer."""

    def __init__(self, vocabulary: int, dim: int, blocks: nn.Module, readout: TopList, columns: int) -> None:
        super().__init__()
        self.embedding, self.blocks, self.readout, self.columns = Embedding(vocabulary, dim), blocks, readout, columns

    def forward(self, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch columns symbols"]:
        """Logits of every slot."""
        row = line(self.embedding(tokens, mask), mask, self.columns)
        return self.readout(self.blocks(row)[:, :, : self.columns])

    def loss(self, tokens: Tokens, mask: Mask, target: Int[Tensor, "batch columns"]) -> Float[Tensor, ""]:
        """Mean over all slots, padding included, as the paper's."""
        return cross_entropy(self(tokens, mask).flatten(0, 1), target.flatten())


class LineClassifier(nn.Module):
    """TextCNN over the text as one row."""

    columns = None

    def __init__(self, vocabulary: int, dim: int, network: TextCNN, labels: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.embedding, self.network, self.smoothing = Embedding(vocabulary, dim), network, smoothing
        self.dense = dense(network.features, labels)

    def forward(self, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch labels"]:
        """Logits."""
        return self.dense(self.network(line(self.embedding(tokens, mask), mask, 1)))

    def loss(self, tokens: Tokens, mask: Mask, target: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """Mean over the batch."""
        return cross_entropy(self(tokens, mask), target, label_smoothing=self.smoothing)


def line(x: Float[Tensor, "batch time dim"], mask: Mask, columns: int) -> Float[Tensor, "batch 1 slots dim"]:
    """What seq2grid makes of top-list-updates alone: all tokens in one row, from the last to the first, `columns` slots at least."""
    slots = max(columns, x.shape[1])
    return place(cells(torch.where(mask, TLU, NOOP), 1, slots), x, 1, slots)
