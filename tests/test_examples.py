"""Every example runs and shows what it says."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quantize_matrix_ranks_the_solvers():
    done = subprocess.run([sys.executable, EXAMPLES / "quantize_matrix.py"], capture_output=True, text=True, check=True)
    losses = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert losses["BOA"] < losses["GPTQ"] < losses["RTN"]


def test_every_example_is_run():
    assert [f.name for f in EXAMPLES.glob("*.py")] == ["quantize_matrix.py"]
