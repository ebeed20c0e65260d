"""ONNX with integer products: the simulator's codes in ONNX Runtime, its integers in the file, int8 kernels in the optimised graph."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.codes import StaticLayer, static_layer
from smidgen.quant.simulate import Activation, QuantLinear, Scheme, activations_of, set_mode, simulate

onnx = pytest.importorskip("onnx", reason="needs smidgen[onnx]")
ir = pytest.importorskip("onnx_ir", reason="needs smidgen[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs smidgen[onnx]")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from smidgen.quant.export.onnx_module import write_module  # noqa: E402 (after the skips)
from smidgen.quant.export.onnx_qdq import STATIC, can_saturate, read, write  # noqa: E402 (after the skips)
from smidgen.quant.runtimes import onnxruntime as runtimes  # noqa: E402 (after the skips)
from smidgen.quant.runtimes.onnxruntime import OnnxRuntime  # noqa: E402 (after the skips)

CPU = torch.device("cpu")


@torch.no_grad()
def calibrated(folder: Path, scheme: Scheme, tokens: torch.Tensor):
    """A model whose activations have the ranges of `tokens`, its QuantLinears, and what a runtime stores of them."""
    model = load_model(folder, torch.float32, CPU)
    if model.config.model_type not in ("gpt2", "opt"):  # a decoder's embedding and head are written as float16
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight.half())
    quants = simulate(model, scheme)
    set_mode(quants, "observe")
    model(tokens, use_cache=False)
    for _, activation in activations_of(quants):
        activation.fix(activation.low, activation.high)
    return model, quants, {name: static_layer(quant) for name, quant in quants.items()}


@pytest.fixture
def decoder(tmp_path, train_tokens):
    """(model folder, scheme) -> simulated model, its layers, the artifact."""

    def export(folder: Path, scheme: Scheme):
        model, quants, layers = calibrated(folder, scheme, train_tokens[:32])
        write(tmp_path / "onnx", Checkpoint(folder, folder.name), model, layers)
        return model, quants, layers, tmp_path / "onnx"

    return export


class Codes:
    """Codes that a simulated model's activations gave, by the name of each of their readers."""

    def __init__(self, quants: dict[str, QuantLinear]) -> None:
        self.tensors = len(list(activations_of(quants)))
        self.by_name: dict[str, np.ndarray] = {}
        for name, quant in quants.items():
            quant.activation.register_forward_hook(lambda module, args, _, name=name: self._keep(module, args[0], name))

    def _keep(self, module, x: torch.Tensor, name: str) -> None:
        self.by_name[name] = module.range.codes(x).numpy()


def optimised(folder: Path, tmp_path: Path, exact: bool = False):
    """The graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    if exact:
        options.add_session_config_entry(runtimes.PRECISE, "1")
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph


def with_codes(folder: Path):
    """A session that returns the input codes too, and their names by first reader."""
    model = ir.load(folder / "model.onnx")
    last = {"QuantizeLinear": ".input.codes", "Clip": ".input.clipped"}
    outputs = {}
    for node in model.graph:
        value = node.outputs[0]
        if node.op_type in last and value.name.endswith(last[node.op_type]):
            value.dtype = ir.DataType.UINT8
            outputs[value.name.removesuffix(last[node.op_type])] = value
    model.graph.outputs.extend(outputs.values())
    ir.save(model, folder / "codes.onnx")
    options = runtimes.options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(folder / "codes.onnx", options, providers=["CPUExecutionProvider"])
    return session, {name: value.name for name, value in outputs.items()}


def assert_same_codes(session, names: dict[str, str], inputs: dict, expected: Codes, top: int) -> None:
    """At least 99.9 % of each tensor's."""
    assert len(names) == expected.tensors
    for name, measured in zip(names, session.run(list(names.values()), inputs), strict=True):
        codes = expected.by_name[name]
        assert measured.max() <= top
        assert (measured.reshape(codes.shape) == codes).mean() >= 0.999, name


def assert_same(read_: dict[str, StaticLayer], layers: dict[str, StaticLayer]) -> None:
    assert list(read_) and set(read_) == set(layers)
    for name, layer in layers.items():
        other = read_[name]
        assert torch.equal(other.codes, layer.codes) and torch.equal(other.scale, layer.scale)
        assert (other.bias is None) == (layer.bias is None) and (layer.bias is None or torch.equal(other.bias, layer.bias))
        for key in ("input_scale", "input_zero", "input_bits", "weight_bits"):
            assert getattr(other, key) == getattr(layer, key)


def kinds(nodes) -> dict[str, int]:
    """How often each operator occurs."""
    return {kind: sum(n.op_type == kind for n in nodes) for kind in {n.op_type for n in nodes}}


# --- decoders with a cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 6)])
@torch.no_grad()
def test_a_decoder_computes_with_the_simulators_codes(decoder, tiny_llama, test_tokens, tmp_path, bits):
    model, quants, layers, folder = decoder(tiny_llama, Scheme(*bits))
    tokens = test_tokens[:16]
    codes = Codes(quants)
    expected = model(tokens, use_cache=False).logits.numpy()
    runtime = OnnxRuntime.open(folder, threads=1)
    measured = np.stack([runtime.logits(text.numpy()) for text in tokens])
    assert tokens.numel() >= 512 and (measured.argmax(-1) == expected.argmax(-1)).mean() >= 0.995
    assert np.abs(measured - expected).mean() < 2e-3  # a code that differs moves a few logits by a hundredth
    session, names = with_codes(folder)
    caches = {i.name: np.zeros((16, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    inputs = {"input_ids": tokens.numpy(), "attention_mask": np.ones(tokens.shape, np.int64), **caches}
    assert_same_codes(session, names, inputs, codes, 2 ** bits[1] - 1)
    assert_same(read(folder), layers)
    counted = kinds(optimised(folder, tmp_path).node)
    assert counted["MatMulIntegerToFloat"] == len(layers) == 14
    assert counted["QuantizeLinear"] == 8  # q, k, v share one, gate and up another
    assert "DequantizeLinear" not in counted and "MatMul" not in counted


def test_no_node_more_than_quantizers(decoder, tiny_llama, tmp_path):
    """T26: nothing is scaled beside the integer products."""
    model, _, layers, folder = decoder(tiny_llama, Scheme())
    write(tmp_path / "float", Checkpoint(tiny_llama, "tiny"), model, {})
    quantized, plain = (kinds(ir.load(f / "model.onnx").graph) for f in (folder, tmp_path / "float"))
    new = {kind: quantized[kind] - plain.get(kind, 0) for kind in quantized}
    assert {kind: count for kind, count in new.items() if count} == {"QuantizeLinear": 8, "DequantizeLinear": 8 + len(layers)}
    with pytest.raises(UserError, match="no layers with static activations"):
        read(tmp_path / "float")


@torch.no_grad()
def test_generation_through_the_cache_is_that_without(decoder, tiny_llama, test_tokens):
    model, _, _, folder = decoder(tiny_llama, Scheme())
    runtime = OnnxRuntime.open(folder, threads=1)
    prompt = test_tokens[0, :16].tolist()
    token, cached = int(runtime.start(np.array(prompt)).argmax()), []
    for _ in range(24):
        cached.append(token)
        token = int(runtime.step(token).argmax())
    whole = list(prompt)
    for _ in range(24):
        whole.append(int(runtime.logits(np.array(whole))[-1].argmax()))
    assert cached == whole[16:]
    assert cached == model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1)[0, 16:].tolist()


def test_layers_left_out_stay_float(decoder, tiny_llama, tmp_path):
    model, _, layers, _ = decoder(tiny_llama, Scheme())
    some = {name: layer for name, layer in layers.items() if not name.endswith("down_proj")}
    write(tmp_path / "some", Checkpoint(tiny_llama, "tiny"), model, some)
    counted = kinds(optimised(tmp_path / "some", tmp_path).node)
    assert counted["MatMulIntegerToFloat"] == 12 and counted["MatMul"] == 2
    assert_same(read(tmp_path / "some"), some)


def test_four_bit_weights_take_half_a_byte(decoder, tiny_llama, tmp_path):
    model, _, layers, folder = decoder(tiny_llama, Scheme(8, 8))
    write(
        tmp_path / "w4",
        Checkpoint(tiny_llama, "tiny"),
        model,
        {n: replace(x, codes=x.codes // 32, weight_bits=4) for n, x in layers.items()},
    )
    sizes = [
        sum(
            v.const_value.nbytes
            for n, v in ir.load(f / "model.onnx").graph.initializers.items()
            if "layers" in n and n.endswith("proj.weight")
        )
        for f in (folder, tmp_path / "w4")
    ]
    assert sizes[0] == sum(layer.codes.numel() for layer in layers.values()) == 2 * sizes[1]


# --- any module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bits, quantizers", [("tiny_gpt2", (8, 8), 8), ("tiny_opt", (4, 8), 8)])
def test_a_module_computes_with_the_simulators_codes(request, train_tokens, test_tokens, tmp_path, name, bits, quantizers):
    model, quants, layers = calibrated(request.getfixturevalue(name), Scheme(*bits), train_tokens[:32])
    tokens = test_tokens[:16]
    codes = Codes(quants)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.numpy()
    write_module(tmp_path / "onnx", model, layers, {"input_ids": tokens[:2, :16], "use_cache": False})
    assert all(model.get_submodule(n) is quant for n, quant in quants.items())  # put back
    session, names = with_codes(tmp_path / "onnx")
    (measured,) = session.run(["logits"], {"input_ids": tokens.numpy()})
    assert (measured.argmax(-1) == expected.argmax(-1)).mean() >= 0.995 and np.abs(measured - expected).mean() < 2e-3
    assert_same_codes(session, names, {"input_ids": tokens.numpy()}, codes, 2 ** bits[1] - 1)
    assert_same(read(tmp_path / "onnx"), layers)
    counted = kinds(optimised(tmp_path / "onnx", tmp_path).node)
    assert counted["MatMulIntegerToFloat"] == len(layers) and counted["QuantizeLinear"] == quantizers


class Small(nn.Module):
    """A convolution and two linear layers; `linear` is also what torch would call a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 32), nn.Linear(32, 5, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.conv(images).relu().mean((2, 3))).relu())


@pytest.fixture
@torch.no_grad()
def small(generator):
    """A module, its layers simulated, images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Small().eval()
    images = torch.randn(64, 1, 8, 8, generator=generator)
    quants = {}
    for name in ("linear", "head"):
        quants[name] = QuantLinear(module.get_submodule(name), Scheme(), Activation(8))
        module._modules[name] = quants[name]
    set_mode(quants, "observe")
    module(images)
    for _, activation in activations_of(quants):
        activation.fix(activation.low, activation.high)
    return module, {name: static_layer(quant) for name, quant in quants.items()}, images


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_convolutional_network(small, tmp_path, static):
    """Static shapes too, for which ONNX Runtime would rather fuse product and bias into a float Gemm."""
    module, layers, images = small
    write_module(tmp_path / "int", module, layers, {"images": images}, dynamic={"images": {} if static else {0: "batch"}})
    session = onnxruntime.InferenceSession(tmp_path / "int" / "model.onnx", runtimes.options(1), providers=["CPUExecutionProvider"])
    (measured,) = session.run(None, {"images": images.numpy()})
    assert np.abs(measured - module(images).numpy()).max() < 1e-5
    assert_same(read(tmp_path / "int"), layers)
    assert kinds(optimised(tmp_path / "int", tmp_path).node)["MatMulIntegerToFloat"] == 2
    assert "Mul" not in kinds(ir.load(tmp_path / "int" / "model.onnx").graph)


def test_refusals_of_modules(small, tmp_path):
    module, layers, images = small
    folder = tmp_path / "onnx"
    with pytest.raises(UserError, match="axis 0 of the example's images has 1 entries; give it two or more"):
        write_module(folder, module, layers, {"images": images[:1]})
    with pytest.raises(UserError, match="conv is a Conv2d"):
        write_module(folder, module, {"conv": layers["head"]}, {"images": images})
    with pytest.raises(UserError, match="tail is missing"):
        write_module(folder, module, {"tail": layers["head"]}, {"images": images})
    with pytest.raises(UserError, match="head: codes or the input's zero point exceed W8A8"):
        write_module(folder, module, {"head": replace(layers["head"], input_zero=256)}, {"images": images})
    with pytest.raises(UserError, match="head: a scale is NaN, infinite or not positive"):
        write_module(folder, module, {"head": replace(layers["head"], input_scale=float("nan"))}, {"images": images})
    with pytest.raises(UserError, match="head: ONNX QDQ holds 2 to 8 bits, not W8A9"):
        write_module(folder, module, {"head": replace(layers["head"], input_bits=9)}, {"images": images})
    assert not folder.exists()


# --- what a processor may do to the sums ----------------------------------------------------------------------------


def test_saturation_is_told_from_the_codes(decoder, tiny_llama, tmp_path, monkeypatch):
    """Pairs of products pass 2^15 with 8 bits on both sides; the file says so, and the option makes weights unsigned."""
    model, _, layers, folder = decoder(tiny_llama, Scheme())
    assert can_saturate(layers)
    assert not can_saturate({n: replace(x, input_bits=7) for n, x in layers.items()})  # 2 * 127 * 127 < 2^15
    assert not can_saturate({n: replace(x, codes=x.codes.clamp(-7, 7)) for n, x in layers.items()})
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"][runtimes.PRECISE] == "1"
    kinds_of = {t.data_type for exact in (False, True) for t in optimised(folder, tmp_path, exact).initializer if len(t.dims) == 2}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.UINT8} <= kinds_of
    monkeypatch.setattr(runtimes, "saturates", lambda: True)
    assert runtimes.options().get_session_config_entry(runtimes.PRECISE) == "1"
    runtime = OnnxRuntime.open(folder, threads=1)
    exact = runtime.logits(np.arange(64))
    monkeypatch.setattr(runtimes, "saturates", lambda: False)
    assert np.abs(OnnxRuntime.open(folder, threads=1).logits(np.arange(64)) - exact).max() < 0.05


def test_a_damaged_artifact(decoder, tiny_llama):
    *_, folder = decoder(tiny_llama, Scheme())
    data = folder / "model.onnx.data"
    model = ir.load(folder / "model.onnx")
    next(n for n in model.graph if STATIC in n.metadata_props).metadata_props[STATIC] = "{}"
    ir.save(model, folder / "model.onnx")
    with pytest.raises(UserError, match=r"model.layers.0.self_attn.q_proj is damaged"):
        read(folder)
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut off"):
        read(folder)
