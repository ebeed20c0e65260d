"""Artifacts whose products run on integers: written from simulated layers, read back in ONNX Runtime.

written       a language model that was simulated (integers.py, qat.py)
export        any module, an encoder or a CNN say: simulate, calibrate on a few batches, write (modules.py)
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.codes import static_layer
from smidgen.quant.evaluate import exponential
from smidgen.quant.export import onnx_qdq
from smidgen.quant.export.onnx import FAMILIES
from smidgen.quant.export.onnx_module import write_module
from smidgen.quant.modules import W8A8, Method, quantized
from smidgen.quant.runtimes.onnxruntime import OnnxRuntime, options
from smidgen.quant.simulate import QuantLinear, Scheme
from smidgen.run import Run


def export(
    folder: Path,
    module: nn.Module,
    batches: Iterable[dict[str, Any]],
    outputs: tuple[str, ...],
    scheme: Scheme = W8A8,
    ranges: Method = "mse",
    skip: tuple[str, ...] = (),
    tokenizer: Any = None,
) -> None:
    """Writes `module` to `folder` as ONNX with static 8-bit inputs and weights in its layers; see `modules.quantized`.

    `batches` are its calls. The module itself is left as it was.
    """
    quantized(module, batches, outputs, scheme, ranges, skip).write(folder, tokenizer)


def written(source: Checkpoint, model: PreTrainedModel, layers: dict[str, QuantLinear], run: Run) -> Path:
    """The ONNX artifact: a decoder with its cache where we can draw one, else the graph of a whole text without."""
    folder = run.partial("onnx")
    static = {name: static_layer(quant) for name, quant in layers.items()}
    if model.config.model_type in FAMILIES:
        onnx_qdq.write(folder, source, model, static)
    else:
        model.config._attn_implementation = "sdpa"  # ours is not for tracing
        example = {"input_ids": torch.zeros(2, 16, dtype=torch.int64, device=model.device), "use_cache": False}
        write_module(folder, model, static, example, tokenizer=source.tokenizer())
    return run.keep(folder)


def reader(artifact: Path, length: int) -> Callable[[Int[np.ndarray, "length"]], Float32[np.ndarray, "length vocab"]]:
    """Text to logits in ONNX Runtime."""
    if (artifact / "genai_config.json").is_file():
        return OnnxRuntime.open(artifact, length).logits
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact / "model.onnx", options(), providers=["CPUExecutionProvider"])
    return lambda tokens: np.asarray(session.run(["logits"], {"input_ids": tokens[None]})[0])[0]


def in_runtime(artifact: Path, tokens: Int[Tensor, "windows length"], run: Run, label: str) -> float:
    """Perplexity in ONNX Runtime."""
    read = reader(artifact, tokens.shape[1])
    losses = []
    for window in run.track(tokens.numpy(), f"perplexity on {label} after", len(tokens)):
        logits = read(window)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), window[1:]])
    return exponential(float(np.mean(losses)))
