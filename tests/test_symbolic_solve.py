"""Solve, evaluate and export: a model whose layout is learned, the same without torch, what is refused and what is not answered."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from smidgen import cli  # noqa: E402 (after the skips)
from smidgen.errors import UserError  # noqa: E402
from smidgen.report import write_report  # noqa: E402
from smidgen.run import Run  # noqa: E402
from smidgen.symbolic import evaluate, export  # noqa: E402
from smidgen.symbolic.answering import cut_in_two, solve  # noqa: E402
from smidgen.symbolic.card import Card  # noqa: E402
from smidgen.symbolic.confidence import NEVER  # noqa: E402
from smidgen.symbolic.graph import build  # noqa: E402
from smidgen.symbolic.grid_model import GridModel  # noqa: E402
from smidgen.symbolic.models import Sizes, make, sizes_of  # noqa: E402
from smidgen.symbolic.runtime import ARTIFACT, FILE, open_exported  # noqa: E402
from smidgen.symbolic.settle import CARD, open_trained, settle  # noqa: E402
from smidgen.symbolic.solve import explained, open_network  # noqa: E402
from smidgen.symbolic.stored import TRAINED, Description, save  # noqa: E402
from smidgen.symbolic.tasks import open_task  # noqa: E402
from smidgen.symbolic.tasks.babi import phrased  # noqa: E402

OPTIONS = {"dim": 16, "rows": 2, "columns": 12, "layers": 1, "blocks": 1}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A model of the toy addition whose layout was learned from the given actions; its network was not trained at all."""
    task = open_task("addition")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make("s2g-cnn", sizes_of(task), OPTIONS)
        assert isinstance(model, GridModel)
        batch = task.sample("train", 2000)
        assert batch.actions is not None
        optimizer = torch.optim.Adam([*model.module.parameters(), model.embedding.table], 1e-2)
        for step in range(150):
            part = batch.take(np.arange(40 * step, 40 * step + 40) % 2000)
            tokens, mask, actions = (torch.from_numpy(a) for a in (part.tokens, part.mask, part.actions))
            p = model.module.probabilities(model.embedding(tokens, mask), mask)
            nn.functional.nll_loss(p.clamp_min(1e-9).log().flatten(0, 1), actions.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return stored(tmp_path_factory.mktemp("toy"), "s2g-cnn", model.eval(), "addition", OPTIONS)


def stored(folder: Path, name: str, model: nn.Module, task_name: str, options: dict) -> Path:
    """A folder as training leaves it."""
    task = open_task(task_name)
    description = Description(name, task_name, task.tokens, task.answers, None if task.classifies else task.slots, task.length, options)
    (folder / TRAINED).mkdir()
    save(folder / TRAINED, model, description)
    (folder / TRAINED / CARD).write_text(settle(model, name, task).text())
    return folder


@pytest.fixture(scope="module")
def exported(toy, tmp_path_factory) -> tuple[dict, Path]:
    """Metrics and folder of the export in eight bits."""
    with Run("symbolic export", config := export.Config(toy, bits=8, questions=200), tmp_path_factory.mktemp("export") / "run") as run:
        return export.main(config, run), run.folder


def normalised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model with batch norms as after a training, and actions that are neither certain nor alike."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0), ("weight", 0.5, 1.5), ("bias", -0.3, 0.3)):
                part.state_dict()[name].uniform_(low, high, generator=generator)
    assert isinstance(model, GridModel)
    model.module.action.weight.data.mul_(4)
    return model.eval()


KINDS = {
    "cnn": ("s2g-cnn", {"columns": 9, "dim": 16}),
    "one row": ("s2g-cnn", {"columns": 9, "dim": 16, "rows": 1, "blocks": 2}),
    "many rows, carry, no leak": ("s2g-cnn", {"columns": 9, "dim": 16, "rows": 5, "carry": True, "no_leak": True}),
    "local attention": ("s2g-acnn", {"columns": 9, "dim": 16}),
    "local attention, many rows": ("s2g-acnn", {"columns": 9, "dim": 16, "rows": 6, "blocks": 2}),
    "textcnn": ("s2g-textcnn", {"dim": 16, "filters": 8}),
}


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_the_model(kind, mode):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    model = normalised(make(name, Sizes(20, 7, None if name == "s2g-textcnn" else 5), options))
    assert isinstance(model, GridModel)
    model.module.mode = mode
    session = ort.InferenceSession(build(model, mode, False).SerializeToString(), providers=["CPUExecutionProvider"])
    for length in (1, 2, 7, 40):
        tokens = torch.randint(2, 20, (1, length))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            ours = model(tokens, mask)[0].numpy()
            p = model.module.probabilities(model.embedding(tokens, mask), mask)[0].numpy()
        logits, actions = session.run(["logits", "actions"], {"tokens": tokens[0].numpy()})
        np.testing.assert_allclose(actions, p, atol=1e-5)
        np.testing.assert_allclose(logits, ours, atol=2e-5 * np.abs(ours).max())


def test_a_hard_layout_differs_from_a_soft_one_where_actions_are_not_certain():
    """Lest the test above compare one thing with itself."""
    torch.manual_seed(0)
    model = normalised(make("s2g-cnn", Sizes(20, 7, 5), {"columns": 9, "dim": 16}))
    sessions = [ort.InferenceSession(build(model, mode, False).SerializeToString()) for mode in ("hard", "soft")]
    a, b = (s.run(["logits"], {"tokens": np.arange(2, 12)})[0] for s in sessions)
    assert np.abs(a - b).max() > 0.05 * np.abs(a).max()


def test_eight_bits_are_a_quarter_and_close():
    torch.manual_seed(0)
    model = normalised(make("s2g-cnn", Sizes(20, 7, 5), {"columns": 9, "dim": 64}))
    files = [build(model, "soft", eight).SerializeToString() for eight in (False, True)]
    assert len(files[1]) < 0.36 * len(files[0]), "int8 behind the grid, float16 before it"
    a, b = (ort.InferenceSession(f).run(["logits"], {"tokens": np.arange(2, 20)})[0] for f in files)
    assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()


def test_the_exact_back_end_answers_what_the_network_cannot(toy):
    network = open_trained(toy)
    assert network.card.rules["# #"].coefficients == (1, 1, 0) and network.card.network.threshold == NEVER
    solved = solve(network, "582 13")
    assert (solved.answer, solved.by) == ("595", "exact") and solved.confidence > 0.9
    alone = solve(network, "582 13", "network")
    assert alone.answer is None and alone.guess is not None and alone.reason.startswith("never sure enough")


def test_it_is_evaluated_on_longer_questions(toy, tmp_path):
    config = evaluate.Config(toy, split="ood", questions=300, device="cpu")
    with Run("symbolic evaluate", config, tmp_path / "run") as run:
        metrics = evaluate.main(config, run)
    assert metrics["exact_accuracy"] > 0.97 and metrics["accuracy"] < 0.2, "the layout generalises, an untrained network does not"
    assert metrics["answered_network"] == 0 and metrics["answered_accuracy_network"] is None
    assert metrics["answered_exact"] == metrics["answered_auto"] > 0.9 and metrics["answered_accuracy_exact"] > 0.97
    assert set(metrics["accuracy_by_group"]) == {"6 digits", "7 digits", "8 digits"} and sum(metrics["questions_by_group"].values()) == 300
    assert metrics["groups_failed"] == 3 and metrics["accuracy_hard"] < 0.2 and metrics["longest_question"] <= 18
    page = write_report([tmp_path / "run"]).read_text()
    for words in ("exact back end", "Question 1, grid", "Question 1, actions", "8 digits", "row 1", "Answered, or not"):
        assert words in page, words


def test_the_export_answers_like_torch(toy, exported):
    metrics, folder = exported
    assert metrics["agreement_decided"] == 1.0 and metrics["agreement"] > 0.9 and metrics["bits"] == 8 and metrics["rules"] == 1
    assert metrics["size_bytes"] == (folder / ARTIFACT / FILE).stat().st_size < 60_000
    assert metrics["layout"] == "hard" and metrics["latency_ms_p50"] < 50
    ours, theirs = open_trained(toy), open_network(folder)
    for question in open_task("addition").examples("ood", 50, seed=9).inputs:
        assert solve(ours, question).answer == solve(theirs, question).answer is not None
    assert "Exported" in write_report([folder]).read_text()


def test_an_exported_model_needs_no_torch(exported):
    _, folder = exported
    code = (
        "import sys\nfrom smidgen import cli\n"
        f"assert cli.main(['symbolic', 'solve', {str(folder)!r}, '582 13', '--explain']) == 0\n"
        "assert not {'torch', 'onnx', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    printed = json.loads(found.stdout)
    assert printed["answer"] == "595" and printed["by"] == "exact" and "row 1" in found.stderr


def test_what_cannot_be_read_is_refused_and_what_does_not_fit_is_not_answered(exported, capsys):
    _, folder = exported
    for question, words in (("", "the question is empty"), ("  ", "empty"), ("58x2 13?", "'x', '?': not among the 11 characters")):
        assert cli.main(["symbolic", "solve", str(folder), question]) == 2
        assert words in capsys.readouterr().err
    network = open_network(folder)
    long = solve(network, "123456789 123456789")
    assert long.answer is None and "20 tokens with the end, more than the 18" in long.reason
    wide = solve(network, "1234567890123 1")
    assert wide.answer is None and "slots of a row" in wide.reason and solve(network, "1234567890123 1", "exact").answer is None


def test_a_number_cut_at_the_last_slot(toy):
    network = open_trained(toy)
    for question, cut in (("12345678901 1", False), ("123456789012 1", True), ("1 123456789012", True), ("1 2", False)):
        said = network(network.card.tokens.encode([question])[0][0])
        assert cut_in_two(question, said, network.card) == cut, question


def test_the_grid_is_drawn(toy):
    network = open_trained(toy)
    drawn = explained(solve(network, "582 13"), network.card).splitlines()
    assert drawn[0] == "token    5 8 2 _ 1 3 $" and drawn[1] == "action   u u u u P u u"
    assert [line.split() for line in drawn[4:6]] == [["row", "0", "$", "3", "1"], ["row", "1", "_", "2", "8", "5"]]


def test_cards_round_trip(toy):
    card = open_trained(toy).card
    assert Card.of(card.text()) == card and card.exact is not None


def test_labels(tmp_path):
    rows = [{"input": f"{what} the light {'now' * (i % 2)}", "label": what} for i, what in enumerate(["raise", "dim"] * 40)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row | {"split": ("train", "dev", "id")[i % 3]}) for i, row in enumerate(rows)))
    options = {"dim": 8, "filters": 4}
    torch.manual_seed(0)
    model = make("s2g-textcnn", sizes_of(open_task(str(path))), options).eval()
    folder = stored(tmp_path, "s2g-textcnn", model, str(path), options)
    solved = solve(open_trained(folder), "dim the light")
    assert (solved.answer or solved.guess) in ("dim", "raise")
    with pytest.raises(UserError, match="no rules for an exact answer"):
        solve(open_trained(folder), "dim the light", "exact")
    with Run("symbolic export", config := export.Config(folder, questions=10), tmp_path / "export") as run:
        assert export.main(config, run)["agreement"] == 1.0


def test_a_guided_model_is_measured_but_cannot_be_asked(tmp_path):
    options = OPTIONS | {"guided": True}
    torch.manual_seed(0)
    model = make("s2g-cnn", sizes_of(open_task("addition")), options).eval()
    folder = stored(tmp_path, "s2g-cnn", model, "addition", options)
    with Run("symbolic evaluate", config := evaluate.Config(folder, questions=20, device="cpu"), tmp_path / "run") as run:
        assert evaluate.main(config, run)["questions"] == 20
    with pytest.raises(UserError, match="lays out by actions that come with the data"):
        solve(open_trained(folder), "1 2")
    with (
        Run("symbolic export", config := export.Config(folder), tmp_path / "export") as run,
        pytest.raises(UserError, match="not a guided"),
    ):
        export.main(config, run)


def test_stories_may_be_told_as_people_tell_them():
    told = "Mary went to the garden. Where is Mary? John is here."
    assert phrased(told) == "« Where is Mary? » Mary went to the garden. John is here."
    assert phrased("« Where is Mary ? » Mary left .") == "« Where is Mary ? » Mary left ." and phrased("No question.") == "No question."


def test_models_without_a_grid_are_measured_but_not_exported(tmp_path):
    torch.manual_seed(0)
    task = open_task("addition")
    model = make("cnn", sizes_of(task), {"dim": 8, "columns": 12}).eval()
    folder = stored(tmp_path, "cnn", model, "addition", {"dim": 8, "columns": 12})
    config = evaluate.Config(folder, questions=20, device="cpu")
    with Run("symbolic evaluate", config, tmp_path / "run") as run:
        metrics = evaluate.main(config, run)
    assert metrics["accuracy"] == 0 and "answered_exact" not in metrics and "accuracy_hard" not in metrics
    with Run("symbolic export", config := export.Config(folder), tmp_path / "export") as run, pytest.raises(UserError, match="not cnn"):
        export.main(config, run)
    assert not (tmp_path / "export" / ARTIFACT).exists()


def test_bad_models_are_refused(toy, exported, tmp_path):
    for path, words in (
        (tmp_path / "none", "no such model"),
        (tmp_path, "holds no trained model"),
        (tmp_path / "none.onnx", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            open_network(path)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="not an ONNX model"):
        open_exported(tmp_path / "bad.onnx")
    import onnx

    model = onnx.load(exported[1] / ARTIFACT / FILE)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not written by smidgen symbolic export"):
        open_exported(tmp_path / "other.onnx")
    with Run("symbolic evaluate", config := evaluate.Config(exported[1], device="cuda"), tmp_path / "run") as run:
        with pytest.raises(UserError, match="runs on the processor"):
            evaluate.main(config, run)
    for refused in ({"questions": 0}, {"risk": 1.0}, {"seed": -1}):
        with pytest.raises(UserError, match="must be positive|is a share|--seed must be"):
            export.Config(toy, **refused).check()
    for refused in ({"questions": 0}, {"examples": -1}, {"seed": -1}):
        with pytest.raises(UserError, match="must"):
            evaluate.Config(toy, **refused).check()
