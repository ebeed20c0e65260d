"""Quantization-aware training: what it wins back, by which parameters, and the command around it."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from smidgen.cli import app, main
from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, FitConfig
from smidgen.quant.qat import (
    TRAINED, calibrate, clipping, fix, load, prediction_loss, range_groups, split, train, weight_groups,
)  # fmt: skip
from smidgen.quant.ranges import Range
from smidgen.quant.simulate import Scheme, activations_of, set_mode, simulate, static_layer
from smidgen.run import Run

if "qat" not in app:
    app.command("smidgen.quant.qat:command", name="qat")

CPU = torch.device("cpu")
WAYS = [("min-max", "exp"), ("beta-gamma", "identity"), ("beta-gamma", "exp"), ("beta-gamma", "sigmoid"), ("scale-offset", "exp")]
QUICK = FitConfig(steps=60, learning_rate=1e-3, warmup=5, precision="float32")


@pytest.fixture
def run(tmp_path):
    with Run("qat", QUICK, tmp_path / "plain") as run:
        yield run


@pytest.fixture
def simulated(train_tokens):
    """(folder, bits, kind, link) -> a simulated model with ranges fixed, and its layers."""

    def make(folder: Path, bits: int = 4, kind="min-max", link="exp"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        layers = simulate(model, Scheme(bits, bits))
        calibrate(model, layers, train_tokens[:16])
        fix(layers, kind, kind, link)
        return model, layers

    return make


@pytest.fixture
def qat(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> metrics of a run of the command, as printed."""

    def command(model, *options: str) -> dict:
        assert main(["qat", str(model), *given(train_text, test_text, tmp_path / "run", options)]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.fixture
def refused(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> the one line with which the command refuses."""

    def command(model, *options: str) -> str:
        assert main(["qat", str(model), *given(train_text, test_text, tmp_path / "refused", options)]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("smidgen: ")]
        assert captured.out == "" and len(lines) == 1 and captured.err.rstrip().endswith(lines[0])
        assert not (tmp_path / "refused" / "metrics.json").exists()
        return lines[0]

    return command


def given(train_text, test_text, output, options):
    defaults = {
        "--train": str(train_text), "--evaluate": str(test_text), "--output": str(output), "--length": "64", "--sequences": "256",
        "--eval-windows": "16", "--steps": "60", "--calibration": "16", "--learning-rate": "1e-3", "--range-learning-rate": "1e-2",
        "--weights": "4", "--activations": "4", "--evaluate-every": "20", "--precision": "float32",
    }  # fmt: skip
    return [*(part for pair in defaults.items() if pair[0] not in options for part in pair), *options]


# --- what it wins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "link"), WAYS)
def test_wins_back_half_of_what_rounding_lost(tiny_llama, qat, test_text, kind, link):
    metrics = qat(tiny_llama, "--ranges", kind, "--weight-ranges", kind, *(["--link", link] if kind == "beta-gamma" else []))
    print(metrics)
    float_, before, after = (metrics[k][str(test_text)] for k in ("perplexity_float", "perplexity_before", "perplexity"))
    assert before > 1.05 * float_, "4 bits must have cost something to win back"
    assert after < before - 0.5 * (before - float_)
