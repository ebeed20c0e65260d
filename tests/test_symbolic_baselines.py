"""The sequence models: what they may see, what padding does, halting by hand, and that each learns what it should."""

import pytest
import torch
from torch import nn

from smidgen.symbolic.baselines import AttentionDecoder, LSTMDecoder, Memory, Recurrent, Seq2Seq, Universal, line
from smidgen.symbolic.models import MODELS, Sizes, make
from smidgen.symbolic.networks import sinusoids
from smidgen.symbolic.vocabulary import END, PAD

SMALL = {
    "lstm": {"width": 32},
    "gru-attention": {"width": 32},
    "transformer": {"width": 32, "layers": 1, "dropout": 0.0},
    "universal-transformer": {"width": 32, "steps": 3, "dropout": 0.0},
}


def reversals(count: int, seed: int, symbols: int = 4, longest: int = 3):
    """Tokens from 2, ended; the target is them from the last to the first, ended."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count, 1), generator=generator)
    tokens = torch.randint(2, 2 + symbols, (count, longest + 1), generator=generator)
    place = torch.arange(longest + 1)
    tokens = torch.where(place < lengths, tokens, torch.where(place == lengths, END, PAD))
    target = torch.where(place < lengths, tokens.gather(1, (lengths - 1 - place).clamp_min(0)), torch.where(place == lengths, END, PAD))
    return tokens, place <= lengths, target


@pytest.mark.parametrize("name", SMALL)
def test_each_learns_to_reverse(name):
    torch.manual_seed(0)
    model = make(name, Sizes(6, 6, 4), SMALL[name])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(120):
        loss = model.loss(*reversals(32, step, 2, 2))  # pyright: ignore
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, mask, target = reversals(200, 10_000, 2, 2)
    with torch.no_grad():
        said = model.eval()(tokens, mask).argmax(-1)
    said = said.where((said == END).cumsum(1) - (said == END).long() == 0, PAD)
    said = nn.functional.pad(said, (0, target.shape[1] - said.shape[1]))
    assert (said == target).all(1).double().mean() > 0.9


@pytest.mark.parametrize("name", SMALL)
def test_no_symbol_sees_itself_or_later_ones(name):
    torch.manual_seed(0)
    model = make(name, Sizes(6, 6, 4), SMALL[name]).eval()
    assert isinstance(model, Seq2Seq)
    tokens, mask, target = reversals(5, 0)
    previous = nn.functional.pad(target[:, :-1], (1, 0))
    with torch.no_grad():
        states = model.decoder(model.encoder(tokens, mask), previous)
        changed = model.decoder(model.encoder(tokens, mask), torch.cat([previous[:, :2], (previous[:, 2:] + 1) % 6], 1))
    torch.testing.assert_close(states[:, :2], changed[:, :2])
    assert not torch.allclose(states[:, 2:], changed[:, 2:])


@pytest.mark.parametrize("name", SMALL)
def test_decoding_is_teaching_with_its_own_answers(name):
    torch.manual_seed(1)
    model = make(name, Sizes(6, 6, 4), SMALL[name]).eval()
    assert isinstance(model, Seq2Seq)
    tokens, mask, _ = reversals(5, 0)
    with torch.no_grad():
        logits = model(tokens, mask)
        said = logits.argmax(-1)
        taught = model.dense(model.decoder(model.encoder(tokens, mask), nn.functional.pad(said[:, :-1], (1, 0))))
    torch.testing.assert_close(logits, taught)


SEQUENCES = [(name, 9) for name in MODELS if not name.endswith("textcnn")]
LABELS = [(name, None) for name in (*SMALL, "s2g-textcnn", "textcnn")]


@pytest.mark.parametrize("name, slots", SEQUENCES + LABELS)
def test_padding_changes_nothing(name, slots):
    torch.manual_seed(0)
    model = make(name, Sizes(6, 6, slots), SMALL.get(name, {"dim": 8})).eval()
    tokens, mask, _ = reversals(5, 0)
    with torch.no_grad():
        narrow, wide = model(tokens, mask), model(nn.functional.pad(tokens, (0, 7)), nn.functional.pad(mask, (0, 7)))
        alone = model(tokens[:1], mask[:1])
    torch.testing.assert_close(narrow, wide, atol=1e-5, rtol=1e-5)
    shared = alone.shape[1] if slots else None
    torch.testing.assert_close(narrow[:1, :shared], alone, atol=1e-5, rtol=1e-5)


def test_the_lstm_reads_backwards_without_padding():
    torch.manual_seed(0)
    encoder = Recurrent("lstm", 6, 8, 2)
    tokens = torch.tensor([[2, 3, 4, END], [5, END, PAD, PAD]])
    memory = encoder(tokens, tokens != PAD)
    for i, backwards in enumerate([[END, 4, 3, 2], [END, 5]]):
        x = torch.tensor([backwards])
        _, (hidden, cell) = encoder.rnn(encoder.embedding(x, x != PAD))
        torch.testing.assert_close(memory.last[0][:, i], hidden[:, 0])
        torch.testing.assert_close(memory.last[1][:, i], cell[:, 0])
        torch.testing.assert_close(memory.summary[i], hidden[-1, 0])


def test_the_lstm_decodes_from_that_state():
    torch.manual_seed(0)
    decoder = LSTMDecoder(6, 8, 1)
    hidden = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    memory = Memory(None, torch.ones(2, 1, dtype=torch.bool), hidden, hidden[0][0])
    previous = torch.tensor([[PAD, 3], [PAD, 4]])
    expected = decoder.rnn(decoder.embedding.table[previous] * 8**0.5 * (previous != PAD)[..., None], hidden)[0]
    torch.testing.assert_close(decoder(memory, previous), expected)


def test_attention_looks_at_what_scores_highest():
    """With scores that single out one state, the context is that state, and padding never is."""
    torch.manual_seed(0)
    decoder = AttentionDecoder(6, 4)
    states = torch.randn(1, 5, 4)
    mask = torch.tensor([[True, True, True, True, False]])
    memory = Memory(states, mask, (), torch.zeros(1, 4))
    states.requires_grad_()
    decoder(memory._replace(states=states), torch.tensor([[PAD, 3]])).sum().backward()
    assert states.grad is not None and not states.grad[0, 4].any() and bool(states.grad[0, :4].any(1).all())


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.0, 8.0])
def test_halting_by_hand(bias, normal):
    """A position at a time, as it is written in the papers."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = Universal(layer, 4, steps=4).double()
    nn.init.constant_(model.halt.bias, bias)
    x = normal(2, 3, 4)
    positions, times = sinusoids(3, x), sinusoids(4, x)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(3):
            state, spent, mixture = x[b, t], 0.0, torch.zeros(4).double()
            for k in range(4):
                state = state + positions[t] + times[k]
                p = float(model.halt(state).sigmoid().detach())
                last = k == 3 or spent + p > 0.99
                w = 1 - spent if last else p
                state = layer(state)
                mixture = w * state + (1 - w) * mixture
                spent += w
                if last:
                    break
            expected[b, t] = mixture
    torch.testing.assert_close(model(x), model.norm(expected))


def test_a_line_has_the_newest_token_first(normal):
    x = normal(2, 3, 2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    row = line(x, mask, 5)[:, 0]
    torch.testing.assert_close(row[0, :3], x[0].flip(0))
    torch.testing.assert_close(row[1, :2], x[1, :2].flip(0))
    assert not row[0, 3:].any() and not row[1, 2:].any()
    assert line(x, mask, 1).shape == (2, 1, 3, 2), "as wide as the text where that is wider"
