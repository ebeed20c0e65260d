"""What the command line refuses before a job starts, and what a refused job leaves behind."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from smidgen.cli import EXTRAS, check_recipe, lacking, main
from smidgen.errors import UserError, check_seed
from smidgen.run import Run

ROOT = Path(__file__).parent.parent


def refused(capsys, *words: str) -> str:
    """The one line that a command is refused with."""
    assert main(list(words)) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("smidgen: ")
    return told.err


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("just words", "has nothing nested under 'fewshot', the name of the command; it holds no options"),
        ("", "it holds no options"),
        ("steps: 3", "has nothing nested under 'fewshot', the name of the command; it begins with steps"),
        ("quantize:\n  bits: 3", "it begins with quantize"),
        ("fewshot:\n  evaluate:\n    episodes: 3", "has nothing nested under 'train', the name of the command; it begins with evaluate"),
    ],
)
def test_a_recipe_of_something_else_is_not_ignored(text, line, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert line in refused(capsys, "fewshot", "train", "glyphs", "--config", str(tmp_path / "recipe.yaml"))


def test_a_recipe_of_the_command_is_taken(tmp_path):
    (tmp_path / "recipe.yaml").write_text("fewshot:\n  train:\n    steps: 3\nquantize:\n  bits: 3\n")
    check_recipe(tmp_path / "recipe.yaml", ["fewshot", "train", "glyphs"])
    check_recipe(tmp_path / "recipe.yaml", ["quantize", "fewshot"])
    with pytest.raises(UserError, match="nothing nested under 'evaluate'"):
        check_recipe(tmp_path / "recipe.yaml", ["fewshot", "evaluate"])


def test_a_recipe_has_to_be_named(tmp_path, capsys):
    assert "--config needs a file of options" in refused(capsys, "quantize", "model", "--config")
    assert "no such file" in refused(capsys, "quantize", "model", f"--config={tmp_path / 'none.yaml'}")


# --- packages that are not installed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("quantize model", "quant"),
        ("qat --help", "quant"),
        ("lab ranges", "quant"),
        ("fewshot train glyphs", "vision"),
        ("symbolic train --task addition", "symbolic"),
        ("refine photos", "refine,vision"),
        ("search train", "search-training"),
    ],
)
def test_a_command_without_torch_says_what_to_install(words, extra):
    code = f"import sys; sys.modules['torch'] = None; from smidgen.cli import main; sys.exit(main({words.split()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"smidgen: this command needs the package torch: pip install 'smidgen[{extra}]'\n")


def test_extras_that_messages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {e for f in (ROOT / "smidgen").rglob("*.py") for e in re.findall(r"smidgen\[([a-z-]+)\]", f.read_text())} | {
        *",".join(EXTRAS.values()).split(",")
    }
    assert len(named) > 5 and named <= extras.keys()


def test_other_import_errors_are_bugs():
    for error in (ImportError("cannot import name 'x'"), ModuleNotFoundError("no", name="smidgen.nothing")):
        with pytest.raises(ImportError):
            lacking(error)


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Of a job."""

    output: Path | None = None
    size: int = 3


def stopped(folder: Path, error: BaseException, *, work=lambda run: None) -> None:
    with pytest.raises(type(error)), Run("job", Options(), folder) as run:
        run.say("about to start")
        work(run)
        raise error


def test_a_job_refused_before_it_made_anything_leaves_no_folder(tmp_path):
    stopped(tmp_path / "a", UserError("no such model"))
    stopped(tmp_path / "b", UserError("no room"), work=lambda run: run.partial("artifact"))
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_stays(tmp_path):
    stopped(tmp_path / "rows", UserError("diverged"), work=lambda run: run.log(loss=1.0))
    stopped(tmp_path / "file", UserError("interrupted"), work=lambda run: run.save("bits.json", {}))
    stopped(tmp_path / "bug", ZeroDivisionError())
    assert "stopped: diverged" in (tmp_path / "rows" / "log.txt").read_text()
    assert json.loads((tmp_path / "file" / "bits.json").read_text()) == {}
    assert (tmp_path / "bug" / "log.txt").is_file()


def test_a_folder_that_was_there_before_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    stopped(tmp_path / "mine", UserError("no such model"))
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_that_a_generator_would_not_take(seed):
    check_seed(0)
    check_seed(2**31 - 1)
    with pytest.raises(UserError, match=f"--seed must be between 0 and 2147483647, got {seed}"):
        check_seed(seed)
