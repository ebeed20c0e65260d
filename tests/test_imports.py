"""What imports what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen

ROOT = Path(smidgen.__file__).parent
SOLVERS = sorted(f.stem for f in (ROOT / "quant" / "solvers").glob("*.py") if f.stem != "__init__")
EXPORTERS = sorted(f.stem for f in (ROOT / "quant" / "export").glob("*.py"))
SHARED = ["errors.py", "run.py", "plots.py", "texts.py", *(f"report/{f.name}" for f in sorted((ROOT / "report").glob("*.py")))]
HEAVY = {"torch", "transformers", "safetensors", "compressed_tensors", "accelerate"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def imported(file, everywhere=True):
    """Modules a file imports, or only those imported when it is."""
    tree = ast.parse(file.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_import(node):
    """Nodes that run when a module is imported: no function bodies, no `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def under(modules, *packages):
    return {m for m in modules if any(m == p or m.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize(
    "code",
    [
        "import smidgen",
        "import smidgen.cli, smidgen.run, smidgen.report, smidgen.texts, smidgen.errors",
        "import smidgen.cli\ntry:\n    assert smidgen.cli.main(['--help']) == 0\nexcept SystemExit as e:\n    assert not e.code",
    ],
    ids=["import", "light modules", "help"],
)
def test_torch_is_loaded_only_by_what_needs_it(code):
    found = run(code + f"\nimport sys\nprint('loaded:', sorted(set(sys.modules) & {HEAVY}))")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(("words", "line"), [(["quantise"], "did you mean 'quantize'"), (["search", "trian"], "did you mean 'train'")])
def test_a_mistyped_command_is_answered_without_torch(words, line):
    done = run(f"import sys; from smidgen.cli import main; code = main({words}); assert 'torch' not in sys.modules; sys.exit(code)")
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1


def test_help_names_the_commands():
    found = subprocess.run([sys.executable, "-m", "smidgen", "--help"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0
    assert all(name in found.stdout for name in ("quantize", "evaluate", "report"))


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py", "cli.py", *SHARED])
def test_light_modules_import_nothing_heavy(name):
    found = imported(ROOT / name, everywhere=False)
    assert not under(found, *HEAVY)
    assert not under(found, "smidgen.quant", "smidgen.grid")


@pytest.mark.parametrize("name", ["grid.py", *SHARED])
def test_what_jobs_share_knows_no_job(name):
    assert not under(imported(ROOT / name), "smidgen.quant", "smidgen.cli")


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_see_the_grid_the_statistics_and_each_other(name):
    ours = under(imported(ROOT / "quant" / "solvers" / f"{name}.py"), "smidgen")
    assert ours == under(ours, "smidgen.grid", "smidgen.quant.stats", "smidgen.quant.replay", "smidgen.errors", "smidgen.quant.solvers")


def test_an_older_solver_does_not_know_a_newer_one():
    solvers = ROOT / "quant" / "solvers"
    assert not under(imported(solvers / "rtn.py"), "smidgen.quant.solvers")
    assert not under(imported(solvers / "gptq.py"), "smidgen.quant.solvers.boa")


@pytest.mark.parametrize("name", EXPORTERS)
def test_exporters_know_no_solver_and_no_job(name):
    found = imported(ROOT / "quant" / "export" / f"{name}.py")
    assert not under(found, "smidgen.quant.solvers", "smidgen.quant.quantize", "smidgen.quant.evaluate", "smidgen.quant.collect")


def test_only_exporters_pack():
    users = {f.relative_to(ROOT).as_posix() for f in ROOT.rglob("*.py") if under(imported(f), "smidgen.quant.pack")}
    assert users and all(u.startswith("quant/export/") for u in users)


def test_statistics_and_walk_know_no_solver():
    for name in ("stats.py", "blocks.py", "checkpoint.py", "families.py", "pack.py"):
        assert not under(imported(ROOT / "quant" / name), "smidgen.quant.solvers", "smidgen.quant.quantize", "smidgen.quant.export"), name
