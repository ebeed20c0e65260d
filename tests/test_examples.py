"""Every example runs and shows what it says."""

import subprocess
import sys
from pathlib import Path

from test_search_device import make_folder

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quantize_matrix_ranks_the_solvers():
    done = subprocess.run([sys.executable, EXAMPLES / "quantize_matrix.py"], capture_output=True, text=True, check=True)
    losses = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert losses["BOA"] < losses["GPTQ"] < losses["RTN"]


def test_search_features_answers_and_adds(tmp_path):
    folder = make_folder(tmp_path / "phone")
    for asked, first in (("read in the dark", "Settings > Display > Night Light"), ("tetherng", "Settings > Network > Mobile hotspot")):
        done = subprocess.run([sys.executable, EXAMPLES / "search_features.py", folder, asked], capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        assert lines[1].endswith(first) and lines[-1] == "bulb: Settings > Connected devices > Lamp on the desk"


def test_every_example_is_run():
    assert sorted(f.name for f in EXAMPLES.glob("*.py")) == ["quantize_matrix.py", "search_features.py"]
