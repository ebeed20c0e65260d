"""The command: what it finds, leaves, says and refuses, and that it goes on where it stopped."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from drawings import CLASSES, folders

from smidgen import cli
from smidgen.images import load
from smidgen.refine import refine
from smidgen.refine.classifier import Recipe
from smidgen.refine.decide import Decision
from smidgen.refine.stages import repeated
from smidgen.report import write_report


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network for tests: a sixteenth of the work."""
    monkeypatch.setattr(refine, "Recipe", partial(Recipe, side=16, width=8, batch=32))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """22 images a class, 2 of them of another class, and one of them twice."""
    root = tmp_path_factory.mktemp("data")
    return root / "in", folders(root / "in", each=22, wrong=2, twins=1)


QUICK = {"--embed": "pixels", "--size": "32", "--steps": "60", "--seeds": "1", "--budget": "240", "--device": "cpu"}


def refined(source: Path, output: Path, *options: str) -> int:
    quick = [word for name, value in QUICK.items() if name not in options for word in (name, value)]
    return cli.main(["refine", str(source), "--output", str(output), *quick, *options])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "Recipe", partial(Recipe, side=16, width=8, batch=32))
        output = tmp_path_factory.mktemp("run") / "out"
        assert refined(given[0], output) == 0
    return output


def test_what_a_run_leaves(given, done):
    source, truth = given
    metrics = json.loads((done / "metrics.json").read_text())
    found = rows(done / "findings.csv")
    assert {row["path"] for row in found} == set(truth) and len(found) == metrics["images"] == 92
    assert list(found[0])[:5] == ["path", "verdict", "label", "proposed", "reason"]
    scores = [name for name in found[0] if name not in ("path", "verdict", "label", "proposed", "reason")]
    assert {"data-oob", "knn-shapley", "wrong-label", "outlier", "probabilities"} <= set(scores)
    assert all(0 <= float(row[name]) <= 1 for row in found for name in scores)
    output = load(done, size=32)
    assert output.classes == CLASSES and len(output.labels) == metrics["output_images"]
    assert metrics["output_images"] == sum(metrics[v] for v in ("keep", "relabel")) + metrics["added"]
    assert sorted(f.name for f in done.iterdir() if f.name.startswith(".") or "partial" in f.name) == []
    assert set(metrics["stages_kept"]) <= set(metrics["stages"]) == {"value", "clean", "augment"}


def test_planted_errors_are_the_most_suspicious(given, done):
    _, truth = given
    order = sorted(rows(done / "findings.csv"), key=lambda row: float(row["wrong-label"]))
    first = [row["path"] for row in order[:8]]
    assert sum(truth[path] != path.split("/")[0] for path in first) >= 6, "8 are planted"
    twins = {row["path"] for row in order if "the same picture" in row["reason"] or row["verdict"] == "duplicate"}
    assert "duplicate" not in json.loads((done / "metrics.json").read_text())["stages_kept"] and len(twins) in (0, 4)


def test_the_report_shows_every_decision(given, done):
    page = (done / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 92 and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    for words in ("Did it help?", "Kept: ", "Transforms that keep labels", "augment"):
        assert words in page, words
    assert write_report([done], done.parent / "again.html").read_text() == page


def test_a_run_that_stopped_goes_on(given, done, tmp_path, monkeypatch, capsys):
    """Stopped while a network was trained; the second time the others are not trained again, and the result is the same."""
    from smidgen.refine import classifier

    train, made = classifier.train, []

    def counted(*arguments, **options):
        made.append(arguments)
        if len(made) == 7:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(classifier, "train", counted)
    assert refined(given[0], tmp_path / "out") == 2
    assert f"interrupted; repeat the command with --output {tmp_path / 'out'} to go on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "findings.csv").exists()
    assert not [f for f in (tmp_path / "out").iterdir() if f.name in CLASSES], "nothing looks finished"
    assert refined(given[0], tmp_path / "out") == 0
    whole = 5 + (1 + len([r for r in (done / "steps.jsonl").read_text().splitlines() if '"changed": true' in r]))
    assert len(made) == whole + 1, "only the one that was stopped is begun again"
    for name in ("findings.csv", "augmented.csv"):
        assert (tmp_path / "out" / name).read_text() == (done / name).read_text()
    seconds = "refine_seconds"
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (done, tmp_path / "out"))
    assert {k: v for k, v in a.items() if k != seconds} == {k: v for k, v in b.items() if k != seconds}


def test_a_stage_that_does_not_help_is_undone(given, tmp_path, monkeypatch, capsys):
    """The proof says no to everything: the output is the source, and it is said so."""
    from smidgen.refine.gate import Gain

    monkeypatch.setattr(Gain, "helps", False)
    assert refined(given[0], tmp_path / "out", "--stages", "clean", "--steps", "5") == 0
    said = capsys.readouterr()
    assert "no stage helped: the output is the source as it was" in said.err
    metrics = json.loads(said.out.splitlines()[-1])
    assert metrics["stages_kept"] == [] and metrics["keep"] == 92 and metrics["better"] is False
    for path in given[1]:
        assert (tmp_path / "out" / path).read_bytes() == (given[0] / path).read_bytes()


def test_stages_that_help_are_applied_to_all_images(given, tmp_path, monkeypatch):
    """The proof says yes: wrong labels go, also those that were held out, and the budget is filled to the image."""
    from smidgen.refine.gate import Gain

    monkeypatch.setattr(Gain, "helps", True)
    assert refined(given[0], tmp_path / "out", "--steps", "80") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["stages_kept"] == ["value", "clean", "augment"] and metrics["output_images"] == 240
    gone = {row["path"]: row["verdict"] for row in rows(tmp_path / "out" / "findings.csv") if row["verdict"] != "keep"}
    wrong = {path for path, of in given[1].items() if of != path.split("/")[0]}
    assert len(wrong & set(gone)) >= 5, f"8 are wrong, these go: {gone}"
    assert {path for path, verdict in gone.items() if verdict == "duplicate"} & {f"{c}/{n}.png" for c in CLASSES for n in ("021", "twin0")}
    assert len(set(gone) - wrong) - 4 <= 4
    counts = np.bincount(load(tmp_path / "out", size=16).labels)
    assert counts.max() < 2 * counts.min()


def test_rounds_go_on_while_something_changes():
    """Each round drops the last of what is left, down to seven; a round that changes nothing is the last."""
    seen = []

    def once_more(kept):
        seen.append(dict(kept))
        worst = max(kept) if len(kept) > 7 else None
        return {row: Decision("drop" if row == worst else "keep", label, "") for row, label in kept.items()}

    first = once_more({row: 0 for row in range(10)}) | {0: Decision("relabel", 1, "")}
    decisions = repeated(first, once_more, rounds=9)
    assert [len(kept) for kept in seen] == [10, 9, 8, 7] and all(kept[0] == 1 for kept in seen[1:])
    assert [row for row, d in decisions.items() if d.verdict == "drop"] == [7, 8, 9] and decisions[0].verdict == "relabel"
    assert repeated(first, once_more, rounds=1) == first


def test_validation_and_leaks(given, tmp_path):
    held = tmp_path / "held"
    folders(held, each=8, seed=9)
    for name in CLASSES:
        (held / name / "leak.png").write_bytes((given[0] / name / "005.png").read_bytes())
    assert refined(given[0], tmp_path / "out", "--validation", str(held), "--stages", "clean", "--steps", "5") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["leaks"] == 4 and metrics["held_out_images"] == 32, "what is known by heart proves nothing"


def test_review(given, tmp_path, monkeypatch):
    """What a person says goes, whatever was proved."""
    from smidgen.refine import refine
    from smidgen.refine.review import Decisions

    asked = []

    def person(decisions: Decisions, picture, say, port) -> dict:
        asked.extend(decisions.items)
        assert picture(decisions.items[0].path).size == (44, 36)
        for item, answer in zip(decisions.items, ("drop", "relabel", "keep"), strict=False):
            decisions.add({"path": item.path, "decision": answer, "label": "dash" if answer == "relabel" else ""})
        return decisions.made

    monkeypatch.setattr(refine, "serve", person)
    assert refined(given[0], tmp_path / "out", "--review", "--stages", "clean", "--steps", "5") == 0
    by_path = {row["path"]: row for row in rows(tmp_path / "out" / "findings.csv")}
    first = [by_path[item.path] for item in asked[:3]]
    assert [row["verdict"] for row in first] == ["drop", "relabel", "keep"] and all(row["reason"] == "by hand" for row in first)
    assert first[1]["proposed"] == "dash" and not (tmp_path / "out" / asked[0].path).exists()
    assert (tmp_path / "out" / "review.jsonl").read_text().count("\n") == 3
    assert len({path for path, of in given[1].items() if of != path.split("/")[0]} - {item.path for item in asked}) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "value,clen"], "--stages: there is no stage 'clen'; there are value, clean, augment"),
        (["--budget", "0"], "--budget must be positive"),
        (["--held-out", "0.9"], "--held-out must be between"),
        (["--validation-split", "val"], "--validation-split is a part of --validation"),
        (["--validation", "val", "--held-out", "0.3"], "--held-out divides the source where there is no --validation"),
        (["--review-port", "8000"], "--review-port is of the page that --review serves"),
        (["--validation", "nowhere"], "no such image folder or file: nowhere"),
        (["--embed", "nothing"], "no backbone nothing"),
    ],
)
def test_refusals(given, tmp_path, capsys, options, message):
    assert refined(given[0], tmp_path / "out", *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not (tmp_path / "out" / "metrics.json").exists()


def test_the_source_is_not_written_into(given, capsys):
    before = sorted(f.as_posix() for f in given[0].rglob("*"))
    assert refined(given[0], given[0] / "new") == 2
    assert "which must stay as it is" in capsys.readouterr().err
    assert sorted(f.as_posix() for f in given[0].rglob("*")) == before


def test_an_output_that_cannot_be_written(given, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert refined(given[0], tmp_path / "file" / "out") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_values_of_a_method(given, tmp_path, capsys):
    quick = ["--embed", "pixels", "--size", "32", "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(["refine", "value", str(given[0]), "--method", "data-oob", *quick]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["path"] for line in lines] == [row["path"] for row in rows(tmp_path / "run" / "values.csv")] and len(lines) == 92
    values = [float(line["value"]) for line in lines]
    assert values == sorted(values) and all(line["label"] == line["path"].split("/")[0] for line in lines)
    worst = [given[1][line["path"]] != line["label"] for line in lines[:8]]
    assert sum(worst) >= 6, "8 of 92 are wrong"
    assert cli.main(["refine", "value", str(given[0]), "--method", "loo", "--embed", "pixels"]) == 2
    assert "--method loo compares models on a validation set" in capsys.readouterr().err
    assert cli.main(["refine", "value", str(given[0]), "--method", "shapely"]) == 2
    assert "there is no method 'shapely'; there are knn-shapley" in capsys.readouterr().err
