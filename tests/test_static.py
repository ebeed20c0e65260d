"""Modules that are no language models, written with integer products and read back in ONNX Runtime."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from smidgen.errors import UserError
from smidgen.quant.export.onnx_qdq import read
from smidgen.quant.static import export

pytest.importorskip("onnxscript", reason="needs the package onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


@pytest.fixture(scope="module")
def encoder() -> transformers.BertModel:
    """MiniLM's shape, small."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        initializer_range=0.1,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def calls(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(64, (3, 12), generator=generator), "attention_mask": torch.ones(3, 12, dtype=torch.int64)}
        for _ in range(count)
    ]


def run(folder, call) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in call.items()})[0]


@torch.no_grad()
def test_an_encoder_runs_on_integers_near_its_float_self(encoder, tmp_path):
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    export(tmp_path / "onnx", encoder, calls(8), ("last_hidden_state",))
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    assert not any("Quant" in type(m).__name__ for m in encoder.modules())
    layers = read(tmp_path / "onnx")
    assert len(layers) == 2 * 6 and all(layer.weight_bits == layer.input_bits == 8 for layer in layers.values())
    unseen = calls(9)[-1]
    float_output = encoder(**unseen).last_hidden_state.numpy()
    found = run(tmp_path / "onnx", unseen)
    cosine = (found * float_output).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(float_output, axis=-1)
    assert cosine.min() > 0.999 and np.abs(found - float_output).max() > 1e-4  # near, and really rounded
    other = {name: tensor[:2, :7] for name, tensor in unseen.items()}
    assert run(tmp_path / "onnx", other).shape == (2, 7, 48)


def test_what_cannot_be_written_is_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="no linear layers"):
        export(tmp_path / "a", nn.Sequential(nn.ReLU()), [{"input": torch.ones(2, 3)}], ("out",))
    with pytest.raises(UserError, match="a batch or more"):
        export(tmp_path / "b", encoder, [], ("last_hidden_state",))
    assert not any(tmp_path.iterdir())


def test_a_layer_that_no_call_reaches_is_named(tmp_path):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(UserError, match="unused is not used"):
        export(tmp_path / "c", Half(), [{"x": torch.randn(2, 4)}], ("out",))
