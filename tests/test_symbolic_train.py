"""Symbolic training: what it learns, from which questions, that it goes on where it stopped, what it keeps, and refusals."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smidgen.cli import main as smidgen
from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT
from smidgen.run import Run
from smidgen.symbolic.decoders import to_slots
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.models import MODELS, Sizes, make, sizes_of
from smidgen.symbolic.pool import Pool, Training
from smidgen.symbolic.predict import Answers, predict, right
from smidgen.symbolic.stored import TRAINED, Description, describe, load, save
from smidgen.symbolic.tasks import Batch, open_task
from smidgen.symbolic.train import Config, certainty, drawn, figures, main, validation

CPU = torch.device("cpu")
QUICK = Config(
    task="addition",
    option={"dim": 8, "layers": 1, "blocks": 1},
    questions=300,
    steps=6,
    batch=8,
    learning_rate=1e-2,
    validate_every=3,
    validation_questions=50,
    device="cpu",
)


@pytest.fixture
def trained(tmp_path):
    """(config, name) -> metrics and folder of a run."""

    def command(config: Config, name: str = "run") -> tuple[dict, Path]:
        with Run("symbolic train", config, tmp_path / name) as run:
            return main(config, run), run.folder

    return command


def test_an_alignment_that_is_given_is_enough_to_learn_addition(trained):
    """Units under units: two numbers are added by a network that sees two slots to each side."""
    config = replace(
        QUICK, option={"dim": 16, "layers": 1, "blocks": 2, "guided": True}, questions=5000, steps=250, batch=64, validate_every=50
    )
    metrics, folder = trained(config)
    assert metrics["validation_accuracy"] > 0.35 and metrics["validation_accuracy_before"] == 0, "0.55 when written"
    assert "validation_certainty" not in metrics and not (folder / CHECKPOINT).exists()
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    validations = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    assert list(validations) == [0, 50, 100, 150, 200, 250] and metrics["validation_accuracy"] == max(validations.values())
    task = open_task("addition")
    model, held_out = load(folder), validation(task, config)
    assert right(predict(model, held_out), held_out).mean() == pytest.approx(metrics["validation_accuracy"])
    described = describe(folder)
    assert (described.name, described.task, described.tokens, described.slots) == ("s2g-cnn", "addition", task.tokens, task.slots)


def test_an_interrupted_run_goes_on_to_the_same_end(trained, tmp_path, monkeypatch):
    _, whole = trained(QUICK, "whole")
    draw = Pool.__call__

    def broken(pool, i):
        if i == 5:
            raise RuntimeError("power cut")
        return draw(pool, i)

    monkeypatch.setattr(Pool, "__call__", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(replace(QUICK, checkpoint_every=4), "broken")
    monkeypatch.undo()
    _, resumed = trained(replace(QUICK, resume=tmp_path / "broken"), "resumed")
    a, b = (load(folder).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "steps.jsonl").read_text() == (resumed / "steps.jsonl").read_text()


def test_sharpening_makes_actions_certain(questions):
    def certain_after(sharpen: float) -> float:
        torch.manual_seed(0)
        model = make("s2g-cnn", sizes_of(open_task("addition")), {"dim": 8, "layers": 1, "blocks": 1})
        training, pool = Training(model.train(), sharpen), Pool(questions, 25, 16, 40, CPU)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for i in range(40):
            optimizer.zero_grad()
            training(pool(i)).backward()
            optimizer.step()
        return figures(model.eval(), questions)["certainty"]

    assert certain_after(3.0) > max(0.8, certain_after(0.0) + 0.2)


def test_what_is_kept(questions):
    """The fewest errors; with a crisp layout asked for, the fewest with one."""
    torch.manual_seed(0)
    model = make("s2g-cnn", sizes_of(open_task("addition")), {"dim": 8, "layers": 1}).eval()
    soft, crisp = figures(model, questions), figures(model, questions, crisp=True)
    assert {name: soft[name] for name in ("accuracy", "hard", "certainty")} == {n: crisp[n] for n in ("accuracy", "hard", "certainty")}
    assert 0 < soft["held_out"] - (1 - soft["accuracy"]) < 1.1e-5 and 0 < crisp["held_out"] - (1 - crisp["hard"]) < 1.1e-5


@pytest.fixture
def questions() -> Batch:
    return open_task("addition").sample("train", 200, seed=3)


def test_a_pool_draws_the_questions_it_was_given(questions):
    pool = Pool(questions, 9, 64, 100, CPU)
    assert questions.actions is not None
    given = zip(questions.tokens, questions.mask, to_slots(questions.target, 9), questions.actions, strict=True)
    texts = {(tuple(t[m]), tuple(y), tuple(a[m])) for t, m, y, a in given}
    seen = set()
    for i in range(40):
        tokens, mask, target, actions, progress = pool(i)
        assert progress == i / 100 and tokens.shape == mask.shape and mask[:, -1].any() and not tokens[~mask].any()
        assert actions is not None and bool((actions[~mask] == 2).all())
        rows = zip(tokens.numpy(), mask.numpy(), target.numpy(), actions.numpy(), strict=True)
        seen |= {(tuple(t[m]), tuple(y), tuple(a[m])) for t, m, y, a in rows}
    assert seen == texts, "all of them, and nothing else"


def test_a_pool_is_a_function_of_its_seed_and_the_number(questions):
    pools = [Pool(questions, None, 8, 10, CPU, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(pools[0](7).tokens, pools[1](7).tokens)
    assert not torch.equal(pools[0](7).target, pools[2](7).target) and not torch.equal(pools[0](7).target, pools[0](6).target)


def test_buckets_are_of_like_length(questions):
    def spread(buckets: int) -> float:
        pool = Pool(questions, None, 32, 50, CPU, buckets=buckets)
        return float(np.mean([np.ptp(pool(i).mask.sum(1).numpy()) for i in range(50)]))

    assert spread(10) < 0.3 * spread(1)
    lengths = torch.cat([Pool(questions, None, 32, 50, CPU, buckets=10)(i).mask.sum(1) for i in range(50)])
    assert lengths.min() == questions.lengths.min() and lengths.max() == questions.lengths.max()


def test_a_curriculum_starts_with_short_questions_and_ends_with_all(questions):
    pool = Pool(questions, None, 64, 100, CPU, curriculum=0.5)
    longest = [int(pool(i).mask.sum(1).max()) for i in (0, 20, 50, 99)]
    assert longest == sorted(longest) and longest[0] < longest[-1]
    assert [pool.among(p) for p in (0.0, 0.25, 0.5, 1.0)] == [20, 110, 200, 200]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_trained_a_step_and_made_again(name, tmp_path):
    """Also in any order and number at once: what a question is answered does not depend on the others."""
    torch.manual_seed(0)
    task = open_task("addition")
    small = {"dim": 8} if name.startswith("s2g") or "cnn" in name else {"width": 8}
    classifies = "text" in name
    sizes = Sizes(len(task.tokens), 4, None) if classifies else sizes_of(task)
    model = make(name, sizes, small)
    batch = task.sample("train", 23)
    if classifies:
        batch = replace(batch, target=batch.tokens[:, 0] % 4)
    pool = Pool(batch, model.columns, 16, 1, CPU)  # pyright: ignore
    loss = Training(model.train())(pool(0))
    loss.backward()
    assert loss.ndim == 0 and bool(loss.isfinite())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = predict(model.eval(), batch)
    save(tmp_path, model, Description(name, "addition", task.tokens, task.answers, sizes.slots, 12, small))
    if not classifies:
        again = predict(load(tmp_path), batch, size=5)
        shared = min(again.symbols.shape[1], before.symbols.shape[1])
        assert np.array_equal(again.symbols[:, :shared], before.symbols[:, :shared])
        np.testing.assert_allclose(again.log_probability, before.log_probability, rtol=1e-4, atol=1e-4)
    assert before.log_probability.max() <= 0 and len(before.symbols) == 23


def test_answers_are_right_in_every_symbol_or_wrong(questions):
    few = questions.take(np.arange(4))
    said = np.pad(few.target, ((0, 0), (0, 3)))
    said[1, 0] += 1
    said[2, -1] = 5
    assert right(Answers(said, np.zeros(4)), few).tolist() == [True, False, False, True]


def test_certainty_is_of_the_most_probable_action():
    torch.manual_seed(0)
    task = open_task("addition")
    model = make("s2g-cnn", sizes_of(task), {"dim": 8, "layers": 1})
    assert isinstance(model, GridModel)
    with torch.no_grad():
        model.module.action.weight.zero_()
        model.module.action.bias.copy_(torch.tensor([0.5, 0.2, 0.3]).log())
    assert certainty(model, task.sample("dev", 30), size=7) == pytest.approx(0.5)


@pytest.fixture
def orders(tmp_path) -> Path:
    """Words, labelled by whether a comes before b."""
    rows = [w for w in itertools.permutations("abcdef", 5) if "a" in w and "b" in w]
    path = tmp_path / "order.jsonl"
    path.write_text(
        "".join(json.dumps({"input": " ".join(w), "label": "yes" if w.index("a") < w.index("b") else "no"}) + "\n" for w in rows)
    )
    return path


def test_labels_from_a_file(trained, orders):
    """Words in, a label out, by the model of labels; the order of words decides, so it is not a bag of them."""
    config = replace(QUICK, task=str(orders), option={"dim": 16, "layers": 1, "dropout": 0.0}, steps=120, batch=32, validate_every=40)
    metrics, _ = trained(config)
    assert metrics["model"] == "s2g-textcnn" and metrics["validation_accuracy"] > 0.85


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_a_gpu(name, trained, orders):
    config = replace(QUICK, model=name, option={}, device="cuda", precision="auto")
    metrics, folder = trained(replace(config, task=str(orders)) if name.endswith("textcnn") else config)
    assert metrics["device"] == "cuda" and (folder / TRAINED / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "--steps must be positive"),
        ({"batch": 0}, "--batch must be positive"),
        ({"buckets": 0}, "--buckets must be positive"),
        ({"curriculum": 2.0}, "--curriculum is a share"),
        ({"sharpen": -1.0}, "--sharpen must not be negative"),
        ({"model": "s3g"}, "no model 's3g'"),
        ({"model": "textcnn", "option": {}}, "the task wants sequences"),
        ({"model": "lstm", "option": {}, "sharpen": 0.1}, "--sharpen is for models that learn actions, not for lstm"),
        ({"option": {"guided": True}, "sharpen": 0.1}, "not for s2g-cnn with guidance"),
        ({"model": "lstm", "option": {}, "compile": True}, "--compile is for s2g models, not for lstm"),
        ({"graph": True}, "--graph needs one CUDA device"),
        ({"graph": True, "compile": True}, "--graph and --compile exclude each other"),
        ({"graph": True, "accumulation": 2}, "--graph keeps one gradient"),
        ({"model": "lstm", "option": {}, "graph": True}, "gru-attention and transformers, not for lstm"),
        ({"model": "cnn", "option": {}, "graph": True}, "gru-attention and transformers, not for cnn"),
        ({"task": "sums"}, "no task 'sums'"),
        ({"task": "word-problem", "option": {"guided": True}}, "this data has none"),
    ],
)
def test_refusals(change, message, trained):
    with pytest.raises(UserError) as refused:
        trained(replace(QUICK, **change))
    assert message in str(refused.value)


def test_a_diverging_run_leaves_nothing_that_looks_finished(trained, tmp_path):
    with pytest.raises(UserError, match="diverged"):
        trained(replace(QUICK, learning_rate=1e30, clip=None))
    assert not (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / TRAINED).exists()


def test_the_command(tmp_path, capfd):
    output = tmp_path / "run"
    options = "--questions 100 --steps 2 --batch 4 --validation-questions 20 --option.dim 8 --option.blocks 1 --device cpu".split()
    assert smidgen(["symbolic", "train", "--task", "addition", *options, "--output", str(output)]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out.splitlines()[-1])["questions"] == 100 and "100 training questions of addition" in said.err
    assert smidgen(["symbolic", "train", "--task", "addition", *options, "--output", str(output)]) == 2
    assert "already holds a finished run" in capfd.readouterr().err
    assert smidgen(["symbolic", "train", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, again = (json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path / "again"))
    assert {k: v for k, v in first.items() if "seconds" not in k} == {k: v for k, v in again.items() if "seconds" not in k}


def test_drawing_all_there_is(tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [{"input": f"{i}+1", "target": str(i + 1), "split": "dev" if i == 3 else "train"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task(str(path))
    assert len(drawn(task, "train", 1000, 0)) == 7 and len(drawn(task, "train", 3, 0)) == 3
    assert len(validation(task, QUICK)) == 1
