"""`smidgen quantize --activations`, through the command line: methods, artifact in ONNX Runtime, refusals."""

import json

import numpy as np
import pytest

from smidgen.cli import main
from smidgen.quant.runtimes import find

pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
FEW = {"--quadapter.steps": "60", "--sequences": "16", "--length": "64", "--eval-windows": "8"}


@pytest.fixture
def quantize(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> metrics of a run, as printed; its folder is tmp_path / name."""

    def command(model, *options: str, name: str = "run") -> dict:
        assert main(arguments(model, train_text, test_text, tmp_path / name, options)) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.fixture
def refused(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> the one line with which the command refuses."""

    def command(model, *options: str) -> str:
        assert main(arguments(model, train_text, test_text, tmp_path / "refused", options)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and not (tmp_path / "refused" / "metrics.json").exists()
        return captured.err.splitlines()[-1]

    return command


def arguments(model, train_text, test_text, output, options):
    given = {"--calibration": str(train_text), "--evaluate": str(test_text), "--output": str(output), "--weights": "8"} | FEW
    if "quadapter" not in options and "--method" in options:
        given.pop("--quadapter.steps")
    left = [part for pair in given.items() if pair[0] not in options for part in pair]
    return ["quantize", str(model), *left, *options]


def test_w8a8_runs_on_integers_and_loses_little(tiny_llama, quantize, tmp_path):
    m = quantize(tiny_llama, "--activations", "8", "--finetune", "6")
    (simulated,), (measured,), (unquantized,) = (m[k].values() for k in ("perplexity_simulated", "perplexity", "perplexity_float"))
    assert measured == pytest.approx(simulated, rel=0.01) and measured < 1.03 * unquantized
    assert m["method"] == "quadapter" and m["sites"] == ["norm", "heads", "product"] and m["size_bytes"] > 0
    location, opened = find(tmp_path / "run")
    runtime = opened(location, 32)
    assert runtime.logits(np.arange(16)).shape[0] == 16 and "onnxruntime" in runtime.name
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ranges of activations" in page and "Perplexity against steps" in page


def test_factors_beat_plain_ranges_at_few_bits(tiny_llama, quantize):
    found = {}
    for method in ("min-max", "mse", "smoothquant", "quadapter"):
        m = quantize(tiny_llama, "--method", method, "--activations", "4", "--export", "none", name=method)
        (found[method],) = m["perplexity"].values()
    assert found["quadapter"] < found["min-max"] and found["mse"] < found["min-max"], found


def test_rounding_on_quantized_inputs_beats_the_nearest_code(tiny_llama, quantize, tmp_path):
    found = {}
    for rounding in ("nearest", "adaround", "gptq", "boa"):
        m = quantize(
            tiny_llama,
            "--method",
            "mse",
            "--weights",
            "3",
            "--activations",
            "8",
            "--sequences",
            "48",
            "--rounding",
            rounding,
            name=rounding,
        )
        (found[rounding],), (simulated,) = m["perplexity"].values(), m["perplexity_simulated"].values()
        assert found[rounding] == pytest.approx(simulated, rel=0.01)  # the integers that were solved are those that run
        assert not (tmp_path / rounding / "folded.partial").exists()
    assert max(found["gptq"], found["boa"]) < found["nearest"] and found["adaround"] < 1.02 * found["nearest"], found


@pytest.mark.parametrize(("name", "sites"), [("tiny_gpt2", ("norm",)), ("tiny_opt", ("norm", "relu"))])
def test_both_phases_of_families_without_a_cache(request, quantize, tmp_path, name, sites):
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    m = quantize(request.getfixturevalue(name), "--activations", "8", "--sites", *sites, "--finetune", "6")
    (simulated,), (measured,), (unquantized,) = (m[k].values() for k in ("perplexity_simulated", "perplexity", "perplexity_float"))
    assert measured == pytest.approx(simulated, rel=0.01) and measured < 1.05 * unquantized
    assert (tmp_path / "run" / "onnx" / "model.onnx").is_file()


def test_equalization_at_pairs_of_layers(tiny_llama, quantize):
    m = quantize(tiny_llama, "--method", "equalize", "--sites", "heads", "product", "--activations", "8", "--export", "none")
    (after,), (before,) = m["perplexity"].values(), m["perplexity_float"].values()
    assert m["sites"] == ["heads", "product"] and after < 1.05 * before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--activations", "9"), "--activations must lie between 2 and 8"),
        (("--activations", "8", "--method", "boa"), "--method boa quantizes weights alone"),
        (("--method", "quadapter"), "give their bits with --activations"),
        (("--activations", "8", "--target-bpw", "3"), "--target-bpw does not go with --activations"),
        (("--activations", "8", "--export", "gguf"), "are written as onnx, not gguf"),
        (("--activations", "8", "--method", "equalize", "--sites", "norm"), "choose other sites"),
        (("--activations", "8", "--sites", "relu"), "no site of kind 'relu'"),
        (("--activations", "8", "--method", "mse", "--finetune", "5"), "--method quadapter's second phase"),
        (("--method", "rtn", "--finetune", "5"), "--finetune is for quantized activations"),
    ],
)
def test_one_line_says_what_is_wrong(tiny_llama, refused, options, words):
    assert words in refused(tiny_llama, *options)
