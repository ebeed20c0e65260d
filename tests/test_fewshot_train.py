"""Few-shot training: what it wins, that it goes on where it stopped, what it keeps, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fewshot_evaluate import SIDE, coloured, stored

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Sampler
from smidgen.fewshot.evaluate import evaluated
from smidgen.fewshot.models import METHODS, TRAINED, Description, describe, load, make, save, trained_folder
from smidgen.fewshot.train import Config, main
from smidgen.fit import CHECKPOINT
from smidgen.report import write_report
from smidgen.run import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 classes, 20 of each split, in much noise."""
    return stored(tmp_path_factory.mktemp("data") / "set.npz", coloured(60, each=20, noise=60.0))


@pytest.fixture
def quick(data) -> Config:
    return Config(
        str(data), option={"width": 8}, queries=5, steps=60, learning_rate=1e-2, validate_every=20, validation_episodes=30, device="cpu"
    )


@pytest.fixture
def trained(tmp_path):
    """(config, name) -> metrics and folder of a run."""

    def command(config: Config, name: str = "run") -> tuple[dict, Path]:
        with Run("fewshot train", config, tmp_path / name) as run:
            return main(config, run), run.folder

    return command


def test_training_beats_chance_and_no_training(quick, trained):
    metrics, folder = trained(quick)
    assert metrics["chance"] == 0.2 and metrics["validation_accuracy"] > 0.75, "0.87 when written, chance 0.2"
    assert metrics["validation_accuracy"] > metrics["validation_accuracy_before"] + 2 * metrics["validation_accuracy_interval"]
    assert not (folder / CHECKPOINT).exists()
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    validations = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    assert list(validations) == [0, 20, 40, 60] and metrics["validation_accuracy"] == max(validations.values())
    page = write_report([folder]).read_text()
    for words in ("Learning curves", "Episodes", "data:image/png;base64", "% ±"):
        assert words in page, words


def test_the_folder_holds_the_best_state(quick, trained):
    """A learning rate that destroys what was learnt: not the last state is saved, and loading gives the accuracy that was reported."""
    metrics, folder = trained(replace(quick, schedule="constant", learning_rate=0.3, steps=40, validate_every=10))
    validation = Sampler(coloured(60, each=20, noise=60.0).of(list(range(1, 60, 3))), 5, 1, 5, seed=1)
    method = load(folder / TRAINED)
    assert evaluated(method, validation, 30).accuracy == pytest.approx(metrics["validation_accuracy"])
    described = describe(folder / TRAINED)
    assert described.shape == (1, SIDE, SIDE) and described.options == {"width": 8} and described.ways == 5


def test_an_interrupted_run_goes_on_to_the_same_end(quick, trained, tmp_path, monkeypatch):
    _, whole = trained(quick, "whole")
    calls = iter(range(10_000))
    draw = Sampler.__call__

    def broken(sampler, i):
        if len(sampler.images.classes) == 20 and sampler.seed == 0 and next(calls) == 45:
            raise RuntimeError("power cut")
        return draw(sampler, i)

    monkeypatch.setattr(Sampler, "__call__", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(replace(quick, checkpoint_every=20), "broken")
    monkeypatch.undo()
    _, resumed = trained(replace(quick, resume=tmp_path / "broken"), "resumed")
    a, b = (load(folder / TRAINED).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "steps.jsonl").read_text() == (resumed / "steps.jsonl").read_text()


def test_training_for_other_tasks_than_validation(quick, trained):
    """Higher shot (notes 2.4): the figures are of the tasks of use."""
    metrics, _ = trained(replace(quick, steps=2, validate_every=2, shots=5, validation_shots=1, validation_ways=2, examples=0))
    assert metrics["shots"] == 5 and metrics["validation_shots"] == 1 and metrics["chance"] == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_made_trained_a_step_and_made_again(name, tmp_path):
    torch.manual_seed(0)
    members = [{"name": "normalised-protonet", "options": {"width": 4}} for _ in range(2)]
    options = {"members": members} if name == "mxml" else {"width": 4}
    method = make(name, (1, SIDE, SIDE), 3, options)
    episode = Sampler(coloured(), ways=3, shots=2, queries=2, tasks=2)(0)
    method.train()
    loss = method.loss(episode)
    assert loss.ndim == 0 and bool(loss.isfinite())
    loss.backward()
    method.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        before = method.predict(episode)
    torch.testing.assert_close(before.sum(-1), torch.ones(2, 6))
    save(tmp_path, method, Description(name, (1, SIDE, SIDE), 3, 2, options))
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).predict(episode), before)


def test_a_mixture_is_trained_on_trained_members(quick, trained, tmp_path):
    """Stage two leaves the members as their runs left them."""
    quick = replace(quick, steps=4, validate_every=4, validation_episodes=4, examples=0)
    members = []
    for seed in (0, 1):
        _, folder = trained(replace(quick, method="normalised-protonet", seed=seed), f"member-{seed}")
        members.append(folder)
    metrics, folder = trained(replace(quick, method="mxml", option={}, members=tuple(members), examples=1), "mixture")
    mixture = load(folder / TRAINED).state_dict()
    for i, member in enumerate(members):
        for name, value in load(trained_folder(member)).state_dict().items():
            assert torch.equal(mixture[f"members.{i}.{name}"], value)
    assert metrics["parameters"] > 0
    with pytest.raises(UserError, match="mxml mixes trained methods: give their runs with --members"):
        trained(replace(quick, method="mxml", option={}), "none")
    with pytest.raises(UserError, match="--members are of --method mxml, not of protonet"):
        trained(replace(quick, members=tuple(members)), "not")


def test_simpleshot_takes_the_mean_of_the_base_classes(quick, trained):
    _, folder = trained(replace(quick, method="simpleshot", steps=4, validate_every=4, validation_episodes=4, examples=0))
    method = load(folder / TRAINED)
    base = coloured(60, each=20, noise=60.0).of(list(range(0, 60, 3)))
    with torch.no_grad():
        mean = method.backbone(base.floats(torch.arange(400))).flatten(1).mean(0)
    torch.testing.assert_close(method.mean, mean, rtol=1e-4, atol=1e-6)


def test_refusals(quick, trained, tmp_path):
    with pytest.raises(UserError, match="there is no method 'protnet'; there are .*protonet"):
        trained(replace(quick, method="protnet"))
    with pytest.raises(UserError, match=r"--option\.widht: protonet has no such option; it has width, norm"):
        trained(replace(quick, option={"widht": 8}))
    with pytest.raises(UserError, match=r"--option\.width wide: not a value like the default, 64"):
        trained(replace(quick, option={"width": "wide"}))
    with pytest.raises(UserError, match="20 classes with enough images, which is not enough for 21 ways"):
        trained(replace(quick, ways=21))
    with pytest.raises(UserError, match="has no split 'validate'"):
        trained(replace(quick, validation_split="validate"))
    colour = coloured(12)
    np.savez(
        tmp_path / "colour.npz",
        images=colour.pixels.expand(-1, -1, -1, 3).numpy(),
        labels=colour.labels.numpy(),
        class_names=np.array(colour.classes),
    )
    with pytest.raises(UserError, match="colour.npz has images of 3x16x16"):
        trained(replace(quick, validation_data=str(tmp_path / "colour.npz"), validation_split="all"))
    with pytest.raises(UserError, match="--validation-episodes must be positive"):
        trained(replace(quick, validation_episodes=0))
