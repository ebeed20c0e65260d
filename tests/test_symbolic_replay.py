"""Training by CUDA graphs: which models have them, how many, and that they train as their kernels do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from smidgen.run import Run
from smidgen.symbolic import replay
from smidgen.symbolic.models import MODELS, Sizes, make
from smidgen.symbolic.replay import LENGTHS, Losses, has_fixed_shapes
from smidgen.symbolic.train import Config, main

WHOLE = {
    "gru-attention": {"width": 16},
    "transformer": {"width": 16, "layers": 1, "dropout": 0.0},
    "universal-transformer": {"width": 16, "steps": 3, "dropout": 0.0},
}
SEVERAL = 4, 12
SIZES = Sizes(9, 9, 5)


def test_which_models_have_graphs():
    have = [name for name in MODELS if has_fixed_shapes(make(name, Sizes(9, 9, None if "textcnn" in name else 5), {}))]
    assert have == ["s2g-cnn", "s2g-acnn", *WHOLE]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("slots", [5, None])
def test_no_shape_and_no_decision_depends_on_data(name, slots):
    """What a CUDA graph cannot have is found without a GPU: tensors without values, of which nothing can be asked."""
    model = make(name, SIZES._replace(slots=slots), WHOLE[name])
    target = torch.ones(4 if slots is None else (4, slots), dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = model.loss(torch.ones(SEVERAL, dtype=torch.long), torch.ones(SEVERAL, dtype=torch.bool), torch.ones_like(target))  # pyright: ignore
        gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert [g.shape for g in gradient] == [p.shape for p in model.parameters()]


def test_an_lstm_asks_for_lengths():
    model = make("lstm", SIZES, {"width": 16})
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DynamicOutputShapeException, match="pack_padded"):
        ones = torch.ones(SEVERAL, dtype=torch.long)
        model.loss(ones, ones > 0, torch.ones(4, 5, dtype=torch.long))  # pyright: ignore


@pytest.mark.parametrize("name", WHOLE)
def test_few_lengths_and_the_same_loss_and_gradient(name, monkeypatch):
    """Without a GPU: what would be captured is called instead."""
    torch.manual_seed(0)
    model = make(name, SIZES, WHOLE[name]).double()
    losses = Losses(model, 61)
    captured = []
    monkeypatch.setattr(replay, "captured", lambda loss, given, pool: captured.append(given[0].shape) or loss)
    for length in range(1, 62, 3):
        mask = torch.arange(length) < torch.tensor([[length], [1 + length // 2]])
        tokens, target = torch.randint(2, 9, (2, length)) * mask, torch.randint(2, 9, (2, 5))
        found = []
        for loss in (losses, replay._Loss(model)):
            value = loss(tokens, mask, target)
            found.append([value, *torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert len(captured) == LENGTHS == len(set(captured)) and captured[-1] == (2, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["s2g-cnn", *WHOLE])
def test_graphs_train_as_their_kernels_do(name, tmp_path):
    """Loss by loss; the tails come from sums in another order and from products in TF32."""
    option = WHOLE.get(name, {"dim": 8, "layers": 1, "blocks": 1})
    config = Config(task="addition", model=name, option=option, questions=300, steps=20, batch=8, learning_rate=1e-3)
    config = replace(config, validate_every=10, validation_questions=50, device="cuda", precision="float32", buckets=4)
    rows = []
    for graph in (False, True):
        with Run("symbolic train", config, tmp_path / str(graph)) as run:
            main(replace(config, graph=graph), run)
        logged = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
        rows.append([row["loss"] for row in logged if "loss" in row])
    assert rows[0][-1] < rows[0][0]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-2)


@pytest.mark.gpu
def test_dropout_in_a_graph_is_drawn_anew():
    """The same batch would have the same loss if it were not."""
    torch.manual_seed(0)
    model = make("transformer", SIZES, {"width": 16, "layers": 1, "dropout": 0.5}).cuda().train()
    losses, tokens = Losses(model, 12), torch.randint(2, 9, SEVERAL, device="cuda")
    target = torch.randint(2, 9, (4, 5), device="cuda")
    found = [float(losses(tokens, tokens > 0, target).detach()) for _ in range(8)]
    assert len(set(found)) == 8
