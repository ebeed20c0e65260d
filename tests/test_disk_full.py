"""What cannot be written: one line and exit code 2, and nothing that looks finished."""

import re
import resource
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from smidgen.cli import main
from smidgen.quant.export import EXPORTERS

NEEDS = {"gguf": ("gguf",), "onnx": ("onnx_ir",), "executorch": ("executorch", "torchao")}
SMALL, LARGE = 8_000, 60_000  # bytes a file may have: less than a tokenizer, more than the metadata, less than the weights


def installed(name: str):
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed"))


QUICK = [installed(name) for name in EXPORTERS if name != "executorch"]  # which traces for half a minute first


@pytest.fixture(scope="module")
def options(test_text) -> list[str]:
    """Of `smidgen quantize`: a grid that every format holds but executorch, which has bfloat16 scales."""
    grid = ["--method", "rtn", "--bits", "4", "--group", "32", "--symmetric", "--scale-dtype", "float16"]
    return [*grid, "--evaluate", str(test_text), "--length", "64", "--eval-windows", "2"]


@pytest.fixture(scope="module")
def artifact(tiny_llama, options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    assert main(["quantize", str(tiny_llama), *options, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def stopped(capsys):
    """(bytes a file may have, *arguments) -> the one line with which a command ends."""

    def command(size: int, *arguments: str) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        assert (
            signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
        )  # Python's default: a write beyond the limit is an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code = main(list(arguments))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        captured = capsys.readouterr()
        assert code == 2 and captured.out == ""
        lines = [line for line in captured.err.splitlines() if line.startswith("smidgen: ")]
        assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]), captured.err
        return lines[0]

    return command


def nothing_looks_finished(run: Path) -> bool:
    return not run.exists() or (not [p for p in run.iterdir() if p.is_dir()] and not (run / "metrics.json").exists())


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("name", QUICK)
def test_quantize(name, size, tiny_llama, options, tmp_path, stopped):
    line = stopped(size, "quantize", str(tiny_llama), *options, "--export", name, "--output", str(tmp_path / "run"))
    assert re.search("cannot be written: .*(File too large|the disk is full)", line)
    assert nothing_looks_finished(tmp_path / "run")


@pytest.mark.parametrize("name", QUICK)
def test_convert(name, artifact, tmp_path, stopped):
    line = stopped(LARGE, "convert", str(artifact), "--to", name, "--output", str(tmp_path / "run"))
    assert re.search("cannot be written: .*(File too large|the disk is full)", line)
    assert nothing_looks_finished(tmp_path / "run")


@pytest.mark.parametrize("name", ["compressed-tensors", "onnx"])
def test_a_disk_that_is_full(name, tiny_llama, options, tmp_path, stopped):
    """A real one, of 100 kB: even the run's own files find no room."""
    if name == "onnx" and find_spec("onnx_ir") is None:
        pytest.skip("onnx_ir not installed")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        line = stopped(resource.RLIM_INFINITY, "quantize", str(tiny_llama), *options, "--export", name, "--output", str(disk / "run"))
        assert re.search("cannot be written: .*No space left on device", line)
        assert nothing_looks_finished(disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", QUICK)
def test_an_artifact_without_tokenizer_is_refused_before_work(name, artifact, tmp_path, capsys):
    bare = Path(shutil.copytree(artifact / "artifact", tmp_path / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert main(["convert", str(bare), "--to", name, "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "no usable tokenizer" in captured.err.splitlines()[-1]
    assert "blocks" not in captured.err and nothing_looks_finished(tmp_path / "run")


def test_executorch_programs(tiny_llama, options, tmp_path, monkeypatch, stopped, capsys):
    """Tracing takes long and is tested elsewhere: here a program is a megabyte of zeros, and there is no room for it."""
    monkeypatch.setattr("smidgen.quant.export.executorch.imported", lambda: None)
    monkeypatch.setattr("smidgen.quant.export.executorch.lowered", lambda *_: bytes(2**20))
    bfloat16 = ["bfloat16" if option == "float16" else option for option in options]
    assert main(["quantize", str(tiny_llama), *bfloat16, "--output", str(tmp_path / "solved")]) == 0
    capsys.readouterr()
    line = stopped(LARGE, "convert", str(tmp_path / "solved"), "--to", "executorch", "--output", str(tmp_path / "run"))
    assert "executorch.partial cannot be written: File too large" in line
    assert nothing_looks_finished(tmp_path / "run")
