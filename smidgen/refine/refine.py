"""`smidgen refine DIR`: a folder of scarce, noisy images -> a cleaner, balanced, augmented one, and whether that helps.

    value      what is every image worth? Those that harm go
    clean      duplicates and outsiders go, wrong labels are put right
    augment    new images up to the budget: only transforms that keep the label, most for the classes that are hardest to tell

A stage is a rule, proved where it has not looked: a part of the images is held out (or --validation is given), rules are applied to the
rest, and networks trained before and after each stage are compared on the part held out (gate.py). A stage that does not help is
undone. What is left of the rules is then applied to all images: that is what the output holds.

The source is not touched. The output is complete or it has no metrics.json; the same command into the same --output goes on with what an
interrupted one has computed.
"""

import base64
import io
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from cyclopts import App, Parameter

from smidgen.backbones import LITE, Backbone, Scaling, open_backbone
from smidgen.errors import UserError, check_seed
from smidgen.precision import pick_device
from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Judge, Recipe
from smidgen.refine.decide import STAGES, Decision, Judged, Stage, findings
from smidgen.refine.folder import (
    FINDINGS,
    PICTURES,
    Copy,
    Finding,
    Source,
    Verdict,
    View,
    check_output,
    read,
    untouched,
    write_findings,
    write_images,
)
from smidgen.refine.material import Material, gather
from smidgen.refine.review import REVIEW, Decisions, Item, check_installed, serve
from smidgen.refine.stages import Proof, Result, Stages
from smidgen.report import write_report
from smidgen.run import Run

CACHE = ".cache"
SIZE = 64  # side of the squares, for a backbone that reads any
THUMB, NEW_SHOWN = 48, 12  # side of a picture in the report; new images of a class in it
DRAWN = 4000  # of the images kept, the most suspicious, in the report


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen refine`."""

    source: str
    "Images to refine: class folders, a .csv with the columns path,label, or a .npz."
    _: KW_ONLY
    budget: int = 10_000
    "Images the output is to have, new ones included."
    validation: str | None = None
    "Images that stages are proved on, labelled with care; none: a part of the source, held out for it."
    stages: str = ",".join(STAGES)
    "Some of value,clean,augment."
    rounds: int = 1
    "Times value and clean judge what the last time left, at most; they stop when little changes."
    embed: str = LITE
    "What images are compared by: efficientnet-lite0, pixels, a .onnx file, a trained Conv-4, or a folder with a transformers image model."
    scaling: Scaling | None = None
    "What a .onnx file wants of pixels in 0 .. 1; none if not given."
    size: int | None = None
    "Side of the images for --embed, where it reads any; 64 if not given."
    split: str | None = None
    "Part of the source to refine, where it is divided into parts."
    validation_split: str | None = None
    "Part of --validation."
    held_out: float = 0.2
    "Share of the source held out for the proof, where there is no --validation."
    seeds: int = 5
    "Networks trained per stage for the proof."
    steps: int = 1000
    "Updates of each, and of the judging networks."
    review: bool = False
    "Serve a page on which a person looks at suspicious images, before the output is written."
    review_port: int = 0
    "Of that page; 0: any free one."
    batch: int = 32
    "Images embedded at once."
    output: Path | None = None
    "New folder for the refined images; by default one under runs/refine."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to compute."
    seed: int = 0
    "Chooses the held-out part, the folds, the first parameters and the new images."

    def check(self) -> tuple[Stage, ...]:
        """Refuses what cannot work; the stages in their order."""
        asked = [stage.strip() for stage in self.stages.split(",")]
        unknown = [stage for stage in asked if stage not in STAGES]
        if unknown:
            raise UserError(f"--stages: there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
        for name, value in (
            ("budget", self.budget),
            ("seeds", self.seeds),
            ("steps", self.steps),
            ("batch", self.batch),
            ("rounds", self.rounds),
        ):
            if value < 1:
                raise UserError(f"--{name} must be positive, got {value}")
        if not 0.05 <= self.held_out <= 0.5:
            raise UserError(f"--held-out must be between 0.05 and 0.5, got {self.held_out}")
        check_seed(self.seed)
        if self.validation is not None and self.held_out != type(self).held_out:
            raise UserError("--held-out divides the source where there is no --validation; leave one of the two out")
        if self.review_port and not self.review:
            raise UserError("--review-port is of the page that --review serves; give that, too")
        if self.validation_split is not None and self.validation is None:
            raise UserError("--validation-split is a part of --validation; give that, too")
        return tuple(stage for stage in STAGES if stage in asked)


def command(config: Config) -> dict[str, Any]:
    """Clean, balance and augment a set of labelled images, and prove that it helps."""
    if config.output is not None:
        for source in filter(None, (config.source, config.validation)):
            check_output(Path(source), config.output)
    with Run("refine", config, config.output, Path(config.source).stem) as run:
        try:
            metrics = main(config, run)
        except KeyboardInterrupt as stop:
            raise UserError(f"interrupted; repeat the command with --output {run.folder} to go on from here") from stop
        run.say(f"report: {write_report([run.folder])}")
    return metrics


def main(config: Config, run: Run) -> dict[str, Any]:
    """Read, judge, prove each stage, apply those that help to everything, ask a person, write."""
    started = time.monotonic()
    stages = config.check()
    if config.review:
        check_installed()
    device, cache, recipe = pick_device(config.device), Cache(run.folder / CACHE), Recipe(steps=config.steps)
    backbone = open_backbone(config.embed, device, config.scaling)
    source, validation = read_both(config, backbone, run)
    material = gather(source, validation, backbone, recipe.side, config.held_out, cache, config.batch, config.seed)
    work = Stages(material, recipe, config.budget, config.seeds, device, cache, run, config.seed, config.rounds)

    judges = work.judges()
    part = work.known(material.part, judges)
    proof = work.prove(stages, part, judges)
    every = part if len(part.rows) == len(source) else work.known(np.arange(len(source)), judges)
    result = work.apply(proof.stages, every, judges)
    if config.review:
        result = reviewed(result, every, work, proof.stages, judges, config.review_port)

    found = [*source.unreadable, *findings(every, result.decisions, material.twins, source)]
    write_images(source, result.kept(), result.copies, run)
    write_findings(found, run.folder / FINDINGS)
    run.save(PICTURES, pictures(found, result, source, material.view))
    shutil.rmtree(run.folder / CACHE, ignore_errors=True)
    run.say(statement(proof))
    return run.finish(**figures(result, found, proof, every, material, config), refine_seconds=time.monotonic() - started)


def read_both(config: Config, backbone: Backbone, run: Run) -> tuple[Source, Source | None]:
    """Source and validation."""
    if config.size is not None and backbone.size not in (None, config.size):
        raise UserError(f"--size {config.size}: {backbone.name} reads images of side {backbone.size}; leave --size out")
    size = backbone.size or config.size or SIZE
    source = read(config.source, config.split, size, run)
    for finding in source.unreadable:
        run.say(f"left out, cannot be read: {finding.path}")
    return source, None if config.validation is None else read(config.validation, config.validation_split, size, run)


def reviewed(result: Result, every: Judged, work: Stages, stages: Sequence[Stage], judges: Judge, port: int) -> Result:
    """The result with a person's decisions in it."""
    source, twins = work.material.source, work.material.twins
    rows = {name: row for row, name in enumerate(source.names)}
    asked = [f for f in findings(every, result.decisions, twins, source) if f.verdict != "keep" or f.proposed or f.reason]
    decisions = Decisions(work.run.folder / REVIEW, [Item.of(f) for f in asked], source.classes)
    made = serve(decisions, lambda path: source.original(rows[path]), work.run.say, port)
    changed = dict(result.decisions)
    for path, answer in made.items():
        label = source.classes.index(answer.label) if answer.label else int(source.labels[rows[path]])
        changed[rows[path]] = Decision(answer.decision, label, "by hand")
    return work.extended(changed, stages, every, judges)


# --- told ------------------------------------------------------------------------------------------------------------


def statement(proof: Proof) -> str:
    """In words: is the refined set better?"""
    low, high = proof.total.interval
    change = f"{100 * proof.total.gain:+.1f} points of accuracy ({100 * low:+.1f} to {100 * high:+.1f}) on images no stage saw"
    if not proof.stages:
        return "no stage helped: the output is the source as it was, without what could not be read"
    sure = "the refined set is better" if low > 0 else "the refined set is probably better"
    undone = [stage for stage, gain in proof.gains.items() if gain is not None and not gain.helps]
    return f"{sure}: {change}" + (f"; undone, since it did not help: {', '.join(undone)}" if undone else "")


def figures(result: Result, found: Sequence[Finding], proof: Proof, every: Judged, material: Material, config: Config) -> dict[str, Any]:
    """What metrics.json says."""
    verdicts = Counter(finding.verdict for finding in found)
    total = proof.total
    return {
        "images": len(found),
        **{verdict: verdicts[verdict] for verdict in get_args(Verdict)},
        "unreadable": len(material.source.unreadable),
        "added": len(result.copies),
        "output_images": len(result.images()),
        "leaks": len(material.twins.leaks),
        "duplicate_groups": len(material.twins.groups),
        "wrong_share": every.share,
        "stages": list(proof.gains),
        "stages_kept": list(proof.stages),
        "accuracy_before": total.before,
        "accuracy": total.after,
        "accuracy_gain": total.gain,
        "accuracy_gain_interval": list(total.interval),
        "better": bool(proof.stages) and total.interval[0] > 0,
        "held_out_images": len(material.held_y),
        "seeds": config.seeds,
        "classes": material.classes,
        "data": material.source.images.name,
        "embed": config.embed,
        "seed": config.seed,
    }


def pictures(found: Sequence[Finding], result: Result, source: Source, view: View) -> dict[str, Any]:
    """What the report draws: every decision with its image, those kept only as far as a page can hold them; and some of the new ones."""
    rows = {name: row for row, name in enumerate(source.names)}
    decisions = [
        {"path": f.path, "verdict": f.verdict, "label": f.label, "proposed": f.proposed, "reason": f.reason}
        | ({"picture": data_uri(view, untouched([rows[f.path]], [0])[0])} if f.path in rows and (f.verdict != "keep" or i < DRAWN) else {})
        for i, f in enumerate(found)
    ]
    shown: dict[int, list[Copy]] = {}
    for copy in result.copies:
        if len(shown.setdefault(copy.label, [])) < NEW_SHOWN:
            shown[copy.label].append(copy)
    new = [
        {"label": source.classes[label], "images": [{"transform": str(c.transform), "picture": data_uri(view, c)} for c in copies]}
        for label, copies in sorted(shown.items())
    ]
    return {"classes": source.classes, "decisions": decisions, "new": new}


def data_uri(view: View, copy: Copy) -> str:
    """A small picture that a page can hold."""
    image = copy.transform(view.small[copy.row])
    image.thumbnail((THUMB, THUMB))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


app = App(name="refine", help="Clean, balance and augment labelled images, and prove that it helps.", result_action="return_value")
app.default(command)
app.command("smidgen.refine.value:command", name="value", help="What every image is worth, by a method of choice; prints CSV.")
