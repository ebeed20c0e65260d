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

from smidgen.cli import main
from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, FitConfig
from smidgen.quant.activations import clipping, fix_ranges
from smidgen.quant.activations import observe as calibrate
from smidgen.quant.codes import static_layer
from smidgen.quant.ranges import Range
from smidgen.quant.simulate import Scheme, activations_of, set_mode, simulate
from smidgen.quant.trained import TRAINED, load
from smidgen.quant.training import prediction_loss, range_groups, split, train, weight_groups
from smidgen.run import Run

CPU = torch.device("cpu")
WAYS = [("min-max", "exp"), ("beta-gamma", "identity"), ("beta-gamma", "exp"), ("beta-gamma", "sigmoid"), ("scale-offset", "exp")]
QUICK = FitConfig(steps=40, learning_rate=1e-3, warmup=5, precision="float32")


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
        fix_ranges(layers, "min-max", kind, link)
        for quant in layers.values():
            quant.learn_range(kind, link)
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
        "--train": str(train_text), "--evaluate": str(test_text), "--output": str(output), "--length": "64", "--sequences": "64",
        "--eval-windows": "4", "--steps": "12", "--calibration": "16", "--learning-rate": "1e-3", "--range-learning-rate": "1e-2",
        "--weights": "4", "--activations": "4", "--evaluate-every": "4", "--precision": "float32",
    }  # fmt: skip
    return [*(part for pair in defaults.items() if pair[0] not in options for part in pair), *options]


# --- what it wins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "link"), WAYS)
def test_wins_back_half_of_what_rounding_lost(tiny_llama, simulated, train_tokens, test_tokens, perplexity, run, kind, link):
    model, layers = simulated(tiny_llama, 4, kind, link)
    test = test_tokens[:32]
    rounded = perplexity(model, test)
    set_mode(layers, "float")
    for quant in layers.values():
        quant.quantized = False
    unrounded = perplexity(model, test)
    for quant in layers.values():
        quant.quantized = True
    set_mode(layers, "learned")
    train(model, weight_groups(model, layers) + range_groups(layers, 1e-2), train_tokens, QUICK, run)
    learned = perplexity(model, test)
    assert rounded > 1.1 * unrounded, "4 bits must have cost something to win back"
    assert learned < rounded - 0.5 * (rounded - unrounded)


def test_a_teacher_alone_brings_the_probabilities_back(tiny_llama, simulated, train_tokens, test_tokens, run):
    """Measured by the divergence from the float model, which fine-tuning on the text alone would not lower."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model, layers = simulated(tiny_llama)
    divergence = prediction_loss(teacher, 1.0)
    with torch.no_grad():
        before = divergence(model, test_tokens[:32]).item()
        assert divergence(teacher, test_tokens[:4]).item() == pytest.approx(0, abs=1e-6)
    train(model, weight_groups(model, layers) + range_groups(layers, 1e-2), train_tokens, QUICK, run, teacher=teacher, share=1.0)
    with torch.no_grad():
        assert divergence(model, test_tokens[:32]).item() < 0.55 * before


def test_ranges_alone_help_and_leave_the_weights_alone(tiny_llama, simulated, train_tokens, test_tokens, perplexity, run):
    model, layers = simulated(tiny_llama)
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "range" not in n}
    rounded = perplexity(model, test_tokens[:32])
    train(model, range_groups(layers, 1e-2), train_tokens, QUICK, run)
    assert perplexity(model, test_tokens[:32]) < 0.95 * rounded
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


def test_a_loss_is_entropy_and_divergence_per_token():
    """Against sums written out in float64, with a model that is a table of logits."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    tokens = torch.randint(7, (2, 5))
    p, q = (F.softmax(t.double(), -1) for t in (teacher, student))
    entropy = divergence = 0.0
    for b in range(2):
        for t in range(4):
            entropy -= math.log(q[b, t, tokens[b, t + 1]]) / 8
            divergence += sum(float(p[b, t, v] * (p[b, t, v] / q[b, t, v]).log()) for v in range(7)) / 8
    assert prediction_loss(Table(teacher), 0.3)(Table(student), tokens).item() == pytest.approx(0.7 * entropy + 0.3 * divergence, rel=1e-5)
    assert prediction_loss()(Table(student), tokens).item() == pytest.approx(entropy, rel=1e-5)


class Table(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens, use_cache):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.logits)


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "link"), WAYS)
def test_gradients_reach_every_range(tiny_llama, simulated, train_tokens, kind, link):
    model, layers = simulated(tiny_llama, 3, kind, link)
    for _, activation in activations_of(layers):  # where nothing is clipped the offset has no gradient
        activation.fix(activation.low / 2, activation.high / 2, kind, link)
    prediction_loss()(model, train_tokens[:8]).backward()
    ranges = [m for m in model.modules() if isinstance(m, Range)]
    assert len(ranges) == 2 * (4 + 7)  # per block: 4 tensors are read by 7 layers
    for r in ranges:
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in r.parameters())


@pytest.mark.parametrize(("kind", "link"), WAYS)
def test_one_step_moves_a_range_by_its_learning_rate_whatever_its_size(tiny_llama, simulated, train_tokens, run, kind, link):
    model, layers = simulated(tiny_llama, 4, kind, link)
    before = {name: torch.stack(a.range.ends()) for name, a in activations_of(layers)}
    config = replace(QUICK, steps=1, warmup=0, schedule="constant")
    train(model, range_groups(layers, 1e-2), train_tokens, config, run)
    slope = {"identity": 1.0, "exp": 1.0, "sigmoid": 0.018 / 0.982}[link] if kind == "beta-gamma" else 1.0
    sizes = []
    for name, activation in activations_of(layers):
        ends = torch.stack(activation.range.ends())
        size = (before[name][1] - before[name][0]).item()
        sizes.append(size)
        moved = (ends - before[name]).abs().max().item() / size
        step = (ends[1] - ends[0]).item() / 15 / size  # realised ends of scale-offset lie on codes
        assert 0.3 * 1e-2 * slope < moved < 1.1 * 1e-2 * slope + (step + 1e-2 if kind == "scale-offset" else 0)
    assert max(sizes) > 3 * min(sizes)


def test_groups_hold_every_parameter_once_and_only_matrices_decay(simulated, tmp_path):
    """Of a model with tied embeddings and one fused layer."""
    config = transformers.GPT2Config(vocab_size=384, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, layers = simulated(tmp_path, 8)
    groups = weight_groups(model, layers, 0.1) + range_groups(layers, 1e-3)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim > 1 and "lr" not in group else 0.0)


def test_scale_offset_is_trained_normalised_and_warned_of_above_four_bits(tiny_llama, simulated, train_tokens, run):
    model, layers = simulated(tiny_llama, 8, "scale-offset")
    one = replace(QUICK, steps=1, warmup=0)
    train(model, range_groups(layers, 1e-3), train_tokens, one, run)
    assert "warning: scale-offset" in (run.folder / "log.txt").read_text()
    for _, activation in activations_of(layers):
        activation.fix(torch.tensor(-1.0), torch.tensor(1.0), "scale-offset", normalised=False)
    with pytest.raises(UserError, match="raw scale and offset do not train"):
        train(model, range_groups(layers, 1e-3), train_tokens, one, run)


def test_no_warning_at_four_bits(tiny_llama, simulated, train_tokens, run):
    model, layers = simulated(tiny_llama, 4, "scale-offset")
    train(model, range_groups(layers, 1e-3), train_tokens, replace(QUICK, steps=1, warmup=0), run)
    assert "warning" not in (run.folder / "log.txt").read_text()


def test_clipping_is_counted(tiny_llama, simulated, train_tokens):
    model, layers = simulated(tiny_llama, 8)
    reach = clipping(model, layers, train_tokens[:16])
    assert all(r.clipped < 2e-3 for r in reach.values()), "calibrated on these very windows, only rounding of the zero can clip"
    name, activation = next(iter(activations_of(layers)))
    values = []
    hook = layers[name].register_forward_pre_hook(lambda m, inputs: values.append(inputs[0].detach()))
    activation.fix(torch.tensor(-0.5), torch.tensor(0.5))
    found = clipping(model, layers, train_tokens[:16])[name]
    hook.remove()
    x = torch.cat(values).double()
    assert (found.low, found.high) == (-0.5, 0.5)
    half_step = 1 / 255 / 2
    beyond = ((x < -0.5 - half_step) | (x > 0.5 + half_step)).double().mean().item()
    assert beyond > 0.1 and found.clipped == pytest.approx(beyond, abs=2e-3)


def test_split_keeps_every_window_once():
    tokens = torch.arange(40).view(20, 2)
    learnt, held_out = split(tokens, 0.1)
    assert torch.equal(torch.cat([learnt, held_out]), tokens) and len(held_out) == 2
    assert len(split(tokens[:2], 0.1)[1]) == 1


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_run_holds_curves_clipping_and_a_model_that_loads_bit_for_bit(tiny_llama, qat, test_text, train_text, test_tokens, tmp_path):
    metrics = qat(tiny_llama, "--teacher", "self", "--evaluate", str(test_text), str(train_text))
    assert metrics["steps"] == 12 and metrics["stopped"] == "steps"
    assert metrics["perplexity"].keys() == {str(test_text), str(train_text)}
    for text in metrics["perplexity"]:
        assert metrics["perplexity_float"][text] < metrics["perplexity"][text] < metrics["perplexity_before"][text]
    assert metrics["tokens"] == 58 * 64 and metrics["held_out_tokens"] == 6 * 64

    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    curve = [row for row in rows if "perplexity" in row]
    assert [row["step"] for row in curve] == [0, 4, 8, 12]
    kept = curve[metrics["kept_step"] // 4]
    assert kept["perplexity"] == metrics["perplexity"] and kept["held_out"] == metrics["held_out"] == min(r["held_out"] for r in curve)
    reaches = [row for row in rows if "activation" in row]
    assert len(reaches) == 8 and all(row["before"]["low"] <= 0 < row["before"]["high"] for row in reaches)
    assert not (tmp_path / "run" / CHECKPOINT).exists()

    model, layers = load(tmp_path / "run" / TRAINED, CPU)
    with torch.no_grad():
        found = model(test_tokens[:4]).logits
    again, _ = load(tmp_path / "run" / TRAINED, CPU)
    assert torch.equal(found, again(test_tokens[:4]).logits)
    last = {row["activation"]: row["after"] for row in reaches}
    for name, activation in activations_of(layers):
        assert [end.item() for end in activation.range.ends()] == [last[name]["low"], last[name]["high"]]
    assert all(static_layer(quant).codes.abs().max() <= 7 for quant in layers.values())


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tiny_llama, qat, refused, tmp_path, monkeypatch):
    whole = qat(tiny_llama, "--output", str(tmp_path / "whole"))
    import smidgen.quant.training as job

    shuffled = job.shuffled

    def interrupting(*arguments):
        batches = shuffled(*arguments)

        def batch(i):
            if i == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return batches(i)

        return batch

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(job, "shuffled", interrupting)
    try:
        line = refused(tiny_llama)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "interrupted after 6 of 12 steps" in line and f"--resume {tmp_path / 'refused'}" in line
    monkeypatch.setattr(job, "shuffled", shuffled)
    resumed = qat(tiny_llama, "--resume", str(tmp_path / "refused"))
    assert {k: v for k, v in whole.items() if k != "train_seconds"} == {k: v for k, v in resumed.items() if k != "train_seconds"}
    for name in ("model.safetensors", "ranges.safetensors"):
        assert (tmp_path / "whole" / TRAINED / name).read_bytes() == (tmp_path / "run" / TRAINED / name).read_bytes()
    assert (tmp_path / "whole" / "steps.jsonl").read_text() == (tmp_path / "run" / "steps.jsonl").read_text()


def test_stops_early_and_keeps_the_start_where_training_only_harms(tiny_llama, qat):
    options = "--learning-rate", "0.3", "--range-learning-rate", "1e-5", "--patience", "2", "--weights", "8", "--activations", "8"
    metrics = qat(tiny_llama, *options, "--evaluate-every", "2")
    assert metrics["stopped"] == "patience" and metrics["steps"] == 4 and metrics["kept_step"] == 0
    assert metrics["perplexity"] == metrics["perplexity_before"]


def test_what_was_trained_runs_on_integers(tiny_llama, qat, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    metrics = qat(tiny_llama, "--export", "onnx", "--weights", "8", "--activations", "8", "--steps", "4", "--evaluate-every", "2")
    (simulated,), (measured,) = metrics["perplexity"].values(), metrics["perplexity_runtime"].values()
    assert measured == pytest.approx(simulated, rel=0.01)
    assert (tmp_path / "run" / metrics["written"]["onnx"]["folder"] / "model.onnx").is_file()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--train", "nowhere.txt"], "no such text: nowhere.txt"),
        (["--evaluate", "nowhere.txt"], "no such text: nowhere.txt"),
        (["--train", "self"], "'self' is text written by the model"),
        (["--weights", "1"], "--weights must be between 2 and 8 bits"),
        (["--activations", "17"], "--activations must be between 2 and 16 bits"),
        (["--export", "onnx", "--group", "16"], "integer kernels have a scale per row"),
        (["--sites", "heads"], "--sites are of --start"),
        (["--factors", "somewhere"], "--factors are of methods"),
        (["--group", "48"], "group 48 does not divide"),
        (["--held-out", "1"], "--held-out must be between 0 and 1"),
        (["--share", "0.7"], "--share is the teacher's"),
        (["--link", "sigmoid", "--weight-ranges", "min-max"], "--link is of"),
        (["--quadapter.steps", "5"], "--quadapter.* options are of --start quadapter, not of min-max"),
        (["--steps", "0"], "--steps must be positive"),
        (["--batch", "99"], "a batch of 99 cannot be drawn from 58"),
        (["--sequences", "1"], "none is left"),
        (["--resume", "nowhere"], "no checkpoint nowhere"),
        (["--range-learning-rate", "1e30"], "training diverged: the loss is nan at step 2, learning rate"),
    ],
)
def test_bad_options(tiny_llama, refused, options, line):
    assert line in refused(tiny_llama, *options)


def test_damaged_weights(tiny_llama, refused, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "nan")
    assert "not finite" in refused(tmp_path / "nan")


def test_a_folder_that_was_not_trained(tiny_llama):
    with pytest.raises(UserError, match="holds no trained model"):
        load(tiny_llama, CPU)
