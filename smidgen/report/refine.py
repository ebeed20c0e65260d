"""The page of `smidgen refine`: what the stages were worth, every decision with its picture, new images, which transforms keep which label.

Read besides what every run has: decisions.json (classes; decisions, each with its path, verdict, label, proposed, reason and, unless it
could not be read, a picture as data URI; new images by class).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from smidgen import plots
from smidgen.errors import UserError
from smidgen.report.finished import Finished, read_json
from smidgen.report.page import Cell, Figure, Section, Table
from smidgen.report.run import facts
from smidgen.report.words import finite, number

PROOF = (
    "One small network, trained on the set before and after each stage with several seeds, on held-out images that no stage saw; labels "
    "are those given. The interval is of the paired difference, over images and seeds. A stage whose gain is not above its standard "
    "error is undone."
)
VERDICTS = {
    "relabel": "Relabelled",
    "drop": "Dropped",
    "duplicate": "Duplicates left out",
    "outlier": "Outsiders left out",
}
ALLOWED = "Largest strength allowed, relative to the largest tried; blank: the transform moves images of the class to other classes."
MAPS = "A mirror makes other classes of some: "
SHOWN = {"accuracy_before", "accuracy", "accuracy_gain", "accuracy_gain_interval", "stages", "stages_kept", "better"}
SHEET = 240  # pictures in one figure
KEPT = "Everything kept as it was, class by class."


def refinement(run: Finished) -> list[Section]:
    """Headline, decisions, new images, transforms."""
    path = run.folder / "decisions.json"
    shown = read_json(path)
    try:
        decided = list(decisions(shown["decisions"], shown["classes"]))
        new = additions(shown["new"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, it lacks classes, decisions or new images") from error
    return [headline(run), *decided, *new, *transforms(run, shown["classes"])]


def headline(run: Finished) -> Section:
    """Is it better?"""
    rows = []
    for row in (row for row in run.steps if "stage" in row):
        kept = "stays" if row["stays"] else "undone" if row["changed"] else "changed nothing"
        figures = [points(row.get(name)) for name in ("before", "after")]
        cells = [number(row["images"]), *figures, difference(row.get("gain"), row.get("interval")), kept]
        rows.append([Cell(row["stage"]), *(Cell(text, numeric=True, best=row["stays"] and i == 3) for i, text in enumerate(cells))])
    whole = difference(run.metrics.get("accuracy_gain"), run.metrics.get("accuracy_gain_interval"))
    total = ["", *(points(run.metrics.get(name)) for name in ("accuracy_before", "accuracy")), whole, ""]
    rows.append([Cell("together"), *(Cell(text, numeric=True) for text in total)])
    table = Table(["stage", "images", "accuracy before", "after", "gain in points", ""], rows)
    return Section("Did it help?", note=PROOF, table=table, facts=facts(run, SHOWN))


def points(fraction: Any) -> str:
    """Percent."""
    return f"{100 * finite(fraction):.1f}%" if fraction is not None else "–"


def difference(gain: Any, interval: Any) -> str:
    """A gain and its interval, in points."""
    return "–" if gain is None else f"{100 * finite(gain):+.1f} ({100 * finite(interval[0]):+.1f} to {100 * finite(interval[1]):+.1f})"


def decisions(found: Sequence[dict[str, Any]], classes: Sequence[str]) -> Iterator[Section]:
    """A section per verdict, in the order of findings.csv."""
    for verdict, title in VERDICTS.items():
        rows = [row for row in found if row["verdict"] == verdict]
        if rows:
            pictures = [(row.get("picture"), heading(row), row["reason"] or row["path"], True) for row in rows]
            yield Section(f"{title}: {number(len(rows))}", figures=sheets(pictures, title))
    kept = [row for row in found if row["verdict"] == "keep"]
    drawn = [row for row in kept if "picture" in row]
    figures = []
    for name in classes:
        pictures = [(row["picture"], "", row["path"], False) for row in drawn if row["label"] == name]
        figures += sheets(pictures, f"{name}: {number(len(pictures))}") if pictures else []
    note = KEPT if len(drawn) == len(kept) else f"{KEPT} The {number(len(drawn))} most suspicious are drawn."
    yield Section(f"Kept: {number(len(kept))}", note=note, figures=figures)


def heading(row: dict[str, Any]) -> str:
    """Its class, and the one it gets."""
    return f"{row['label']} → {row['proposed']}" if row["verdict"] == "relabel" else row["label"]


def sheets(pictures: Sequence[tuple[str | None, str, str, bool]], title: str) -> list[Figure]:
    """Pictures in figures that a page can hold."""
    return [
        Figure(plots.gallery(pictures[start : start + SHEET], title), title if len(pictures) <= SHEET else f"{title}, from {start + 1} on")
        for start in range(0, len(pictures), SHEET)
    ]


def additions(new: Sequence[dict[str, Any]]) -> list[Section]:
    """Some new images of every class."""
    figures = []
    for group in new:
        pictures = [(image["picture"], "", image["transform"], False) for image in group["images"]]
        figures.append(Figure(plots.gallery(pictures, f"new {group['label']}"), f"{group['label']}: some of the new images"))
    return [Section("New images", figures=figures)] if figures else []


def transforms(run: Finished, classes: Sequence[str]) -> list[Section]:
    """Which transforms keep which label."""
    rows = {row["transform"]: row for row in run.steps if "transform" in row}  # learnt again for all images: the last counts
    if not rows:
        return []
    values = [[limit / row["largest"] for limit in row["limit"]] for row in rows.values()]
    named = [
        f"{name} takes {classes[c]} to {classes[d]}" for name, row in rows.items() for c, d in enumerate(row["becomes"] or ()) if d >= 0
    ]
    picture = plots.heat_map(values, list(rows), list(classes), "Transforms that keep labels", x_label="class")
    return [Section("Transforms", note=MAPS + "; ".join(named) + "." if named else "", figures=[Figure(picture, ALLOWED)])]
