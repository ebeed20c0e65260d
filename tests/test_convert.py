"""`smidgen convert`: the integers of an artifact, in other formats, untouched."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.cli import main
from smidgen.quant.export import gptq
from smidgen.quant.export.compressed_tensors import Packed


@pytest.fixture(scope="module")
def artifact(tiny_llama, test_text, tmp_path_factory):
    """A run with an artifact at 4 bits, group 32."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    options = ["--method", "rtn", "--bits", "4", "--group", "32", "--evaluate", str(test_text), "--length", "64", "--eval-windows", "2"]
    assert main(["quantize", str(tiny_llama), *options, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """(arguments) -> the one line with which `smidgen convert` refuses."""

    def command(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return command


@pytest.mark.parametrize("options", [["--bits", "4", "--group", "32"], ["--bits", "3", "--symmetric"], ["--target-bpw", "3.5"]], ids=str)
def test_an_artifact_converted_to_its_own_format_is_itself(tiny_llama, train_text, test_text, tmp_path, options):
    text = ["--calibration", str(train_text), "--evaluate", str(test_text), "--length", "64", "--sequences", "8", "--eval-windows", "2"]
    assert main(["quantize", str(tiny_llama), "--method", "gptq", *text, *options, "--output", str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), "--to", "compressed-tensors", "--output", str(tmp_path / "again")]) == 0
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("run/artifact", "again/compressed-tensors"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("run/artifact", "again/compressed-tensors")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_grid_is_read_with_the_codes(artifact):
    packed = Packed(artifact / "artifact")
    q = packed.read("model.layers.1.mlp.down_proj")
    assert (q.grid.bits, q.grid.group, q.grid.symmetric, q.grid.scale_dtype) == (4, 32, False, "float16")
    assert q.codes.shape == (64, 128) and q.scale.shape == q.zero.shape == (64, 4)


def test_what_cannot_be_converted_is_refused(artifact, tiny_llama, tmp_path, refused):
    assert "no such format: parquet" in refused(str(artifact), "--to", "parquet", "--output", str(tmp_path / "a"))
    assert "(none given)" in refused(str(artifact), "--to", ",", "--output", str(tmp_path / "b"))
    assert "no artifact of smidgen" in refused(str(tiny_llama), "--to", "compressed-tensors", "--output", str(tmp_path / "c"))
    assert "no config.json" in refused(str(tmp_path), "--to", "compressed-tensors", "--output", str(tmp_path / "d"))


def test_a_damaged_artifact_is_refused_and_leaves_nothing(artifact, tmp_path, refused):
    broken = tmp_path / "broken"
    shutil.copytree(artifact / "artifact", broken)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, file)
    assert "model.layers.1.mlp.down_proj.weight_scale" in refused(
        str(broken), "--to", "compressed-tensors", "--output", str(tmp_path / "e")
    )
    file.write_bytes(file.read_bytes()[:1000])
    assert "not a readable safetensors file" in refused(str(broken), "--to", "compressed-tensors", "--output", str(tmp_path / "f"))
    assert not list(tmp_path.glob("[ef]/compressed-tensors*")) and not list(tmp_path.glob("[ef]/metrics.json"))


def test_one_run_writes_several_formats_with_the_same_integers(tiny_llama, train_text, test_text, tmp_path):
    text = ["--calibration", str(train_text), "--evaluate", str(test_text), "--length", "64", "--sequences", "8", "--eval-windows", "2"]
    options = ["--method", "gptq", "--bits", "3", "--group", "32", "--export", "compressed-tensors,gptq"]
    assert main(["quantize", str(tiny_llama), *text, *options, "--output", str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), "--to", "gptq", "--output", str(tmp_path / "later")]) == 0
    packed = Packed(tmp_path / "run" / "artifact")
    for folder in ("run/gptq", "later/gptq"):
        found = gptq.read(tmp_path / folder)
        assert sorted(found) == sorted(packed.layers)
        assert all(torch.equal(found[n].codes, packed.read(n).codes) for n in found)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["written"]["gptq"]["folder"] == "gptq" and metrics["written"]["gptq"]["size_bytes"] > 0


def test_a_format_that_cannot_hold_the_grid_refuses_before_work(artifact, tiny_llama, test_text, tmp_path, refused, capsys):
    options = ["--method", "rtn", "--bits", "5", "--export", "compressed-tensors,gptq", "--evaluate", str(test_text)]
    assert main(["quantize", str(tiny_llama), *options, "--output", str(tmp_path / "run")]) == 2
    assert "use --bits 4" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("run/artifact*"))


def test_a_format_of_one_grid_refuses_bits_per_layer_before_work(tiny_llama, test_text, tmp_path, capsys):
    options = ["--method", "gptq", "--target-bpw", "3.5", "--export", "gptq", "--evaluate", str(test_text)]
    assert main(["quantize", str(tiny_llama), *options, "--output", str(tmp_path / "run")]) == 2
    assert "one grid for all layers" in capsys.readouterr().err.splitlines()[-1]
