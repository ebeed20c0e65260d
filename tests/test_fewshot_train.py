"""Few-shot training: what it wins, that it goes on where it stopped, what it keeps, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_fewshot_evaluate import SIDE, coloured, stored

from smidgen import cli
from smidgen.errors import UserError
from smidgen.fewshot import train as training
from smidgen.fewshot.augment import augmented
from smidgen.fewshot.episodes import Sampler
from smidgen.fewshot.measure import evaluated
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
        (str(data),),
        option={"width": 8},
        queries=5,
        steps=60,
        learning_rate=1e-2,
        schedule="cosine",
        evaluate_every=20,
        validation_episodes=30,
        device="cpu",
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
    metrics, folder = trained(replace(quick, schedule="constant", learning_rate=0.3, steps=40, evaluate_every=10))
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
    """Higher shot: the figures are of the tasks of use."""
    metrics, _ = trained(replace(quick, steps=2, evaluate_every=2, shots=5, validation_shots=1, validation_ways=2, examples=0))
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
    quick = replace(quick, steps=4, evaluate_every=4, validation_episodes=4, examples=0)
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
    with pytest.raises(UserError, match="--members: only for --method mxml, not for protonet"):
        trained(replace(quick, members=tuple(members)), "not")


def test_simpleshot_takes_the_mean_of_the_base_classes(quick, trained):
    _, folder = trained(replace(quick, method="simpleshot", steps=4, evaluate_every=4, validation_episodes=4, examples=0))
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
    with pytest.raises(UserError, match="has no split 'validate'.*; classes without splits are divided by --hold-out"):
        trained(replace(quick, validation_split="validate"))
    colour = coloured(12)
    np.savez(
        tmp_path / "colour.npz",
        images=colour.pixels.expand(-1, -1, -1, 3).numpy(),
        labels=colour.labels.numpy(),
        class_names=np.array(colour.classes),
    )
    with pytest.raises(UserError, match="colour.npz:? ?.*of 16 x 16 with 3 channels; resize"):
        trained(replace(quick, validation_data=(str(tmp_path / "colour.npz"),), validation_split="all"))
    with pytest.raises(UserError, match="--validation-episodes must be positive"):
        trained(replace(quick, validation_episodes=0))
    with pytest.raises(UserError, match="--weight-steps: only for --method mxml"):
        trained(replace(quick, weight_steps=3))
    with pytest.raises(UserError, match="--decay and --decay-every are of --schedule steps, not of method"):
        trained(replace(quick, schedule="method", decay=0.3))
    with pytest.raises(UserError, match="--hold-out divides the classes itself"):
        trained(replace(quick, hold_out=0.2, train_split="all"))
    with pytest.raises(UserError, match="--graph needs one CUDA device"):
        trained(replace(quick, graph=True, device="cpu"))
    with pytest.raises(UserError, match="--graph: not for mxml"):
        trained(replace(quick, graph=True, method="mxml"))


# --- several data sets, and mixtures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[str, str]:
    """Two sets of 45 classes, with the same three splits."""
    folder = tmp_path_factory.mktemp("two")
    return tuple(str(stored(folder / f"{name}.npz", coloured(45, each=20, seed=i, noise=60.0))) for i, name in enumerate("ab"))


def test_a_mixture_is_trained_in_two_stages_on_several_sets(quick, trained, two, monkeypatch):
    """Members see four fifths of their set's training classes, the weights the rest of both; members stay as stage one left them."""
    stages = []

    def told(stage, tasks):
        def called(*arguments, **options):
            stages.append({c.rpartition("/")[2] for sampler in tasks(arguments) for c in sampler.classes})
            return stage(*arguments, **options)

        return called

    monkeypatch.setattr(training, "train_members", told(training.train_members, lambda given: given[1]))
    monkeypatch.setattr(training, "train", told(training.train, lambda given: [given[1]]))
    config = replace(quick, data=two, method="mxml", ways=3, steps=20, weight_steps=6, evaluate_every=10, validation_episodes=8)
    metrics, folder = trained(config)
    assert [len(classes) for classes in stages] == [12, 3] and not stages[0] & stages[1]
    members = [folder / "members" / str(i) for i in range(2)]
    assert [describe(m).data.split(":")[0] for m in members] == list(two)
    mixture = load(folder / TRAINED)
    assert describe(folder / TRAINED).options["members"] == [{"name": "normalised-protonet", "options": {"width": 8}}] * 2
    for i, member in enumerate(members):
        for name, value in load(member).state_dict().items():
            assert torch.equal(mixture.state_dict()[f"members.{i}.{name}"], value)
    assert metrics["steps"] == 6 and metrics["train_classes"] == 30 and metrics["validation_classes"] == 30
    assert metrics["validation_accuracy"] > 0.6, "members alone are at 0.8 or more; chance 0.33"
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [len(row["member_accuracies"]) for row in rows if "member_accuracies" in row] == [2, 2, 2]
    again, second = trained(replace(config, members=tuple(members), steps=6, weight_steps=None, option={}), "again")
    assert again["steps"] == 6 and not (second / "members").exists()


def test_one_learner_on_several_sets(quick, trained, two):
    metrics, folder = trained(replace(quick, data=two, steps=4, evaluate_every=4, validation_episodes=6))
    assert metrics["train_classes"] == 30 and metrics["data"].split(" ")[1].startswith(two[1])
    shown = json.loads((folder / "examples.json").read_text())["examples"][0]["rows"][0]["class"]
    assert shown.startswith(two)


def test_classes_can_be_held_out_of_data_without_splits(quick, trained, tmp_path):
    images = coloured(20, each=20, noise=60.0)
    path = tmp_path / "plain.npz"
    np.savez(path, images=images.pixels[..., 0].numpy(), labels=images.labels.numpy(), class_names=np.array(images.classes))
    metrics, _ = trained(replace(quick, data=(str(path),), hold_out=0.4, steps=2, evaluate_every=2, validation_episodes=4))
    assert (metrics["train_classes"], metrics["validation_classes"]) == (12, 8)


# --- augmentation, groups, schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flip", "crop", "colour", "affine"])
def test_augmentation_is_repeatable_each_image_its_own_and_leaves_padding_alone(kind):
    x = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[1, 4:] = 0
    a, b = (augmented(x, (kind,), np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and 0 <= a.min() <= a.max() <= 1
    assert not torch.equal(a, augmented(x, (kind,), np.random.default_rng(8))) and a[1, 4:].abs().max() == 0
    same = augmented(x[:1, :1].expand(1, 400, -1, -1, -1), (kind,), np.random.default_rng(1))[0]
    assert len({image.numpy().tobytes() for image in same}) == (2 if kind == "flip" else 25 if kind == "crop" else 400)


def test_a_crop_is_a_window_of_the_mirrored_image():
    """Against numpy's own mirroring: every result is one of the 25 windows."""
    x = torch.arange(256.0).view(1, 1, 16, 16) / 256
    wide = np.pad(x[0, 0].numpy(), 2, mode="reflect")
    windows = {wide[i : i + 16, j : j + 16].tobytes() for i in range(5) for j in range(5)}
    found = {augmented(x, ("crop",), np.random.default_rng(s))[0, 0].numpy().tobytes() for s in range(200)}
    assert found == windows


def test_augmented_tasks_are_the_same_tasks():
    plain, varied = (Sampler(coloured(), 3, 2, 4, seed=3, augment=kinds)(5) for kinds in ((), ("affine", "crop")))
    assert torch.equal(plain.classes, varied.classes) and torch.equal(plain.query_y, varied.query_y)
    assert not torch.equal(plain.query_x, varied.query_x)
    nearest = torch.cdist(varied.query_x.flatten(2), plain.query_x.flatten(2)).argmin(-1)
    assert (torch.arange(12) // 4 == nearest[0] // 4).float().mean() > 0.9, "an image varied a little is most like one of its class"


def test_frames_of_one_film_are_on_one_side_of_a_task():
    """And without groups they are not: the check can fail."""
    images = coloured(6, each=24)
    images = replace(images, pixels=torch.arange(144).view(-1, 1, 1, 1))  # an image is its number
    film = torch.arange(144) // 4  # 6 films of 4 frames a class
    for groups, clean in ((film, True), (None, False)):
        both = []
        for shots in (3, "any"):
            sampler = Sampler(replace(images, groups=groups), 4, shots, 5, tasks=2)
            for i in range(20):
                episode = sampler(i)
                support, query = ((x * 255).round().long().flatten(1) for x in (episode.support_x, episode.query_x))
                for t in range(2):
                    sides = [
                        set(film[numbers[t][y[t] >= 0]].tolist()) for numbers, y in ((support, episode.support_y), (query, episode.query_y))
                    ]
                    both.append(bool(sides[0] & sides[1]))
                assert (episode.query_y >= 0).all()
        assert any(both) is not clean
    halves = Sampler(replace(images, groups=film), 4, 12, 12)(0)
    assert (halves.query_y >= 0).sum() == (halves.support_y >= 0).sum() == 4 * 12, "three films of four frames on either side"
    with pytest.raises(UserError, match="0 classes with enough images"):
        Sampler(replace(images, groups=torch.arange(144) // 24), 2, 1, 1)
    assert torch.equal(replace(images, groups=film).of([2, 0]).groups, torch.cat([film[48:72], film[:24]]))


def test_a_method_has_the_schedule_of_its_paper():
    rates = {
        name: [Config(("glyphs",), method=name, steps=50_000).training().factor(step) for step in (0, 9_999, 10_000, 34_999, 35_000)]
        for name in ("tpn", "btaml", "normalised-protonet")
    }
    assert rates == {"tpn": [1, 1, 0.5, 0.125, 0.125], "btaml": [1] * 5, "normalised-protonet": [1, 1, 1, 1, pytest.approx(0.1)]}
    assert Config(("glyphs",), method="mxml", steps=100, weight_steps=10).weighing().learning_rate == 1e-4


def test_the_command_line(data, tmp_path, capsys, monkeypatch):
    """Options of the loop, of the command and of the method beside data sets that come first; and its recipe repeats a run."""
    monkeypatch.chdir(tmp_path)
    options = ["--option.width", "4", "--steps", "2", "--validation-episodes", "2", "--queries", "3", "--examples", "0", "--device", "cpu"]
    augment = ["--augment", "crop", "--augment", "flip"]
    assert cli.main(["fewshot", "train", str(data), str(data), "--method", "tpn", *options, *augment, "--output", "a"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["method"] == "tpn" and metrics["steps"] == 2 and metrics["train_classes"] == 40
    assert cli.main(["fewshot", "train", "--config", "a/config.yaml", "--output", "b"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["validation_accuracy"] == metrics["validation_accuracy"] and again["train_classes"] == 40
    assert cli.main(["fewshot", "train", str(data), "--method", "protnet", "--output", "c"]) == 2
    assert "there is no method 'protnet'" in capsys.readouterr().err and not (tmp_path / "c" / "metrics.json").exists()


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """photos/{train,val,test}: four classes each of eight noisy squares, of several sizes and modes; commands run beside it."""
    random = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for c in range(4):
            folder = tmp_path / "photos" / part / f"{part}{c}"
            folder.mkdir(parents=True)
            colour = random.integers(40, 216, 3)
            for i in range(8):
                pixels = (colour + random.normal(0, 20, (18 + i, 20, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).convert(("RGB", "RGBA", "P", "L")[i % 4]).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


TINY = ["--option.width", "4", "--steps", "2", "--validation-episodes", "2", "--queries", "3", "--device", "cpu"]


def test_photos_of_all_sizes_and_modes(photos, capsys):
    """And what is wrong with a folder is said in a line, with the file's name; a damaged file is left out only when asked."""

    def train(*options: str, ways: int = 3) -> tuple[int, str]:
        code = cli.main(["fewshot", "train", "photos", *TINY, "--ways", str(ways), *options])
        captured = capsys.readouterr()
        return code, captured.out if code == 0 else captured.err

    code, out = train("--size", "16", "--channels", "3", "--output", "run")
    assert code == 0 and json.loads(out)["train_classes"] == 4
    code, err = train("--output", "sizes")
    assert code == 2 and "images of different sizes, 20 x 18 and 20 x 19 among them; give a size" in err
    code, err = train("--size", "16", "--output", "ways", ways=5)
    assert code == 2 and "photos has 4 classes with enough images, which is not enough for 5 ways" in err
    bad = photos / "train" / "train1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    code, err = train("--size", "16", "--output", "bad")
    assert code == 2 and "train1/3.png: cannot be read as an image" in err and "--skip-bad" in err and err.count("\n") == 1
    code, _ = train("--size", "16", "--skip-bad", "--output", "skipped")
    assert code == 0 and "train1/3.png" in Path("skipped/log.txt").read_text()
    for i in range(7):
        (photos / "test" / "test2" / f"{i}.png").unlink()
    code = cli.main(["fewshot", "evaluate", "run", "photos", "--resize", "--episodes", "2", "--queries-per-class", "3", "--output", "one"])
    err = capsys.readouterr().err
    assert code == 2 and "class 'test2' has only 1 image that can be read, 2 or more are needed" in err
    assert not any((Path(name) / "metrics.json").exists() for name in ("sizes", "ways", "bad", "one"))


def test_uneven_queries_leave_the_shots_alone():
    """Of 12 images a class, 5 to learn from: however many queries are drawn, at most 7 are asked."""
    for shots in (5, "any"):
        episodes = [Sampler(coloured(each=12), 3, shots, 7, "dirichlet", tasks=4)(i) for i in range(20)]
        asked = torch.cat([torch.stack([(e.query_y == c).sum(1) for c in range(3)], 1) for e in episodes])
        assert asked.max() == (7 if shots == 5 else 11) and len(asked.unique()) > 5
        if shots == 5:
            assert all((e.shots() == 5).all() for e in episodes)
        else:
            assert min(int(e.shots().min()) for e in episodes) >= 1
