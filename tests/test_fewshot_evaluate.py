"""Evaluation: the interval, what is counted, the same figures from one process and two, and refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Sampler
from smidgen.fewshot.evaluate import Config, confused, main, png
from smidgen.fewshot.measure import Result, evaluated, norm_mode, transductive
from smidgen.fewshot.models import Description, make, save
from smidgen.images import Images
from smidgen.report import write_report
from smidgen.run import Run

SIDE = 16


def coloured(classes: int = 12, each: int = 24, seed: int = 0, noise: float = 40.0) -> Images:
    """Every class a pattern of its own of 4 x 4 patches, its images that pattern in noise."""
    random = np.random.default_rng(seed)
    pattern = random.integers(60, 196, (classes, 1, 4, 4, 1)).repeat(SIDE // 4, 2).repeat(SIDE // 4, 3)
    pixels = np.clip(pattern + random.normal(0, noise, (classes, each, SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
    labels = torch.arange(classes).repeat_interleave(each)
    return Images("coloured", torch.from_numpy(pixels.reshape(-1, SIDE, SIDE, 1)), labels, tuple(f"c{i}" for i in range(classes)))


class Means(nn.Module):
    """Nearest class mean of pixels; with `joint` the queries' mean is subtracted from all, so that they inform each other."""

    def __init__(self, joint: bool = False) -> None:
        super().__init__()
        self.joint = joint

    def predict(self, episode):
        support, query = episode.support_x.flatten(2), episode.query_x.flatten(2)
        member = nn.functional.one_hot(episode.support_y + 1, episode.ways + 1)[..., 1:].float()
        means = member.mT @ support / member.sum(1)[..., None]
        query = query - query.mean(1, keepdim=True) if self.joint else query
        return (-torch.cdist(query, means)).softmax(-1)


class Chance(nn.Module):
    """Guesses by torch's generator."""

    def predict(self, episode):
        return torch.rand(*episode.query_y.shape, episode.ways).softmax(-1)


def saved(folder: Path, channels: int = 1, ways: int = 3) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    method = make("protonet", (channels, SIDE, SIDE), ways, {"width": 4})
    save(folder, method, Description("protonet", (channels, SIDE, SIDE), ways, 1, {"width": 4}, "noise"))
    return folder


def stored(path: Path, images: Images) -> Path:
    split = np.arange(len(images.classes)) % 3
    np.savez(
        path, images=images.pixels[..., 0].numpy(), labels=images.labels.numpy(), class_names=np.array(images.classes), class_split=split
    )
    return path


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
    """Against the formula by hand, and against how often it holds the truth."""
    result = Result(np.array([0.2, 0.4, 0.9]), np.zeros((1, 1), int), {}, [])
    assert result.accuracy == pytest.approx(0.5) and result.interval == pytest.approx(1.96 * (0.26 / 3) ** 0.5 / 3**0.5, rel=1e-12)
    random = np.random.default_rng(0)
    draws = random.beta(8, 4, (2000, 200))
    results = [Result(a, np.zeros((1, 1), int), {}, []) for a in draws]
    held = np.mean([abs(r.accuracy - 8 / 12) <= r.interval for r in results])
    assert 0.935 < held < 0.965


def test_figures_are_what_counting_by_hand_gives():
    """Also of the last batch, of which only some tasks are asked for."""
    sampler = Sampler(coloured(), ways=4, shots="any", queries=3, tasks=3)
    result = evaluated(Means(), sampler, 8)
    accuracies, confusion, by_shots = [], np.zeros((12, 12), int), {}
    for i in range(3):
        episode = sampler(i)
        guess = Means().predict(episode).argmax(-1)
        for t in range(3):
            if len(accuracies) == 8:
                break
            real = [q for q in range(episode.query_y.shape[1]) if episode.query_y[t, q] >= 0]
            accuracies.append(sum(int(guess[t, q] == episode.query_y[t, q]) for q in real) / len(real))
            for q in real:
                truth = int(episode.query_y[t, q])
                confusion[episode.classes[t, truth], episode.classes[t, guess[t, q]]] += 1
                shots = int((episode.support_y[t] == truth).sum())
                right, queries = by_shots.get(shots, (0, 0))
                by_shots[shots] = right + int(guess[t, q] == truth), queries + 1
    np.testing.assert_allclose(result.accuracies, accuracies, atol=1e-7)
    np.testing.assert_array_equal(result.confusion, confusion)
    assert result.by_shots == by_shots
    binned = result.binned()
    assert sum(row["queries"] for row in binned.values()) == 8 * 4 * 3
    assert sum(row["accuracy"] * row["queries"] for row in binned.values()) == pytest.approx(confusion.trace())


def test_chance_is_chance_and_easy_tasks_are_not():
    sampler = Sampler(coloured(), ways=5, queries=5)
    chance = evaluated(Chance(), sampler, 100)
    assert abs(chance.accuracy - 0.2) < 2 * chance.interval
    assert evaluated(Means(), sampler, 100).accuracy > 0.95
    hard = Sampler(coloured(noise=250.0), ways=5, queries=5)
    one, ten = (evaluated(Means(), replace(hard, shots=shots), 100) for shots in (1, 10))
    assert ten.accuracy > one.accuracy + 2 * (one.interval + ten.interval)


def test_what_was_drawn_before_does_not_matter_and_the_mode_is_put_back():
    sampler, method = Sampler(coloured(), ways=3, queries=4), Chance().train()
    first = evaluated(method, sampler, 10)
    state = torch.random.get_rng_state()
    again = evaluated(method, sampler, 10)
    np.testing.assert_array_equal(first.accuracies, again.accuracies)
    np.testing.assert_array_equal(first.accuracies[:4], evaluated(method, sampler, 4).accuracies)
    assert torch.equal(state, torch.random.get_rng_state()) and method.training


def test_what_lets_queries_inform_each_other_is_found_out():
    episode = Sampler(coloured(), ways=3, queries=4)(0)
    assert not transductive(Means(), episode) and transductive(Means(joint=True), episode)
    inductive, batch = (make("protonet", (1, SIDE, SIDE), 3, {"width": 4, "norm": n}).eval() for n in ("inductive", "transductive"))
    assert norm_mode(inductive) == "running statistics" and not transductive(inductive, episode)
    assert norm_mode(batch) == "batch statistics" and transductive(batch, episode)
    assert norm_mode(Means()) == "none"


def test_probabilities_that_are_not_finite_are_refused():
    class Broken(Means):
        def predict(self, episode):
            return super().predict(episode) * float("nan")

    with pytest.raises(UserError, match="episode 0 are not finite"):
        evaluated(Broken(), Sampler(coloured(), ways=3, queries=4), 5)


def test_of_many_classes_the_worst_are_shown():
    counts = np.diag(np.full(100, 10))
    counts[70, 70], counts[70, 71] = 2, 8
    shown = confused(counts, tuple(map(str, range(100))))
    assert len(shown["classes"]) == 64 and "70" in shown["classes"] and shown["of"] == 100


def test_a_thumbnail_is_the_image():
    import base64
    import io

    from PIL import Image

    pixels = coloured().floats(torch.tensor([0]))[0]
    uri = png(pixels)
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))
    np.testing.assert_array_equal(read, coloured().pixels[0, :, :, 0].numpy())


# --- many processes --------------------------------------------------------------------------------------------------


def test_two_processes_give_the_figures_of_one(tmp_path):
    (tmp_path / "two.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_fewshot_evaluate import Chance, Means, Sampler, coloured, evaluated
import os
sampler = Sampler(coloured(), ways=4, shots="any", queries=3, tasks=2)
results = [evaluated(method, sampler, 13) for method in (Means(), Chance())]
torch.save([(r.accuracies, r.confusion, r.by_shots) for r in results], Path({str(tmp_path)!r}) / (os.environ["RANK"] + ".pt"))
torch.distributed.destroy_process_group()
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    sampler = Sampler(coloured(), ways=4, shots="any", queries=3, tasks=2)
    for rank in (0, 1):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for method, (accuracies, confusion, by_shots) in zip((Means(), Chance()), both, strict=True):
            alone = evaluated(method, sampler, 13)
            np.testing.assert_array_equal(accuracies, alone.accuracies)
            np.testing.assert_array_equal(confusion, alone.confusion)
            assert by_shots == alone.by_shots


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(tmp_path):
    """(config) -> metrics and folder of a run, a new one each time."""
    numbers = iter(range(100))

    def command(config: Config) -> tuple[dict, Path]:
        with Run("fewshot evaluate", config, tmp_path / f"run-{next(numbers)}") as run:
            return main(config, run), run.folder

    return command


def test_the_command_writes_figures_and_a_page(tmp_path, evaluate):
    data = stored(tmp_path / "set.npz", coloured(18))
    config = Config(saved(tmp_path / "model"), str(data), episodes=12, shots="any", queries="dirichlet", queries_per_class=4, device="cpu")
    metrics, folder = evaluate(config)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["queries"] == "dirichlet" and metrics["batch_norm"] == "running statistics" and metrics["chance"] == pytest.approx(1 / 3)
    assert metrics["classes"] == 6 and not metrics["queries_inform_each_other"]
    assert 0 < metrics["accuracy_interval"] < 0.2
    confusion = json.loads((folder / "confusion.json").read_text())
    assert confusion["classes"] == [f"c{i}" for i in range(2, 18, 3)] and sum(confusion["queries"]) == 12 * 3 * 4
    page = write_report([folder]).read_text()
    for words in ("Accuracy against shots", "Confusion", "data:image/png;base64", "c17", "% ±"):
        assert words in page, words


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tpn", {"width": 4}, ["Propagation graph"]),
        ("btaml", {"width": 4, "test_steps": 1, "samples": 1}, ["Learning rates by task size", "Class weights by class size"]),
        ("mxml", {"members": [{"name": "normalised-protonet", "options": {"width": 4}}] * 2}, ["Weights of the mixture"]),
    ],
)
def test_a_page_shows_what_a_method_has_inside(tmp_path, evaluate, name, options, words):
    data = stored(tmp_path / "set.npz", coloured(18))
    (tmp_path / "model").mkdir()
    save(tmp_path / "model", make(name, (1, SIDE, SIDE), 3, options), Description(name, (1, SIDE, SIDE), 3, 2, options, "noise"))
    config = Config(tmp_path / "model", str(data), episodes=4, queries_per_class=4, examples=1, device="cpu")
    metrics, folder = evaluate(config)
    assert metrics["batch_norm"] == ("batch statistics" if name == "btaml" else "running statistics")
    page = write_report([folder]).read_text()
    assert all(w in page for w in words), words


def test_refusals(tmp_path, evaluate):
    data = str(stored(tmp_path / "set.npz", coloured(18)))
    config = Config(saved(tmp_path / "model"), data, episodes=2, queries_per_class=4, device="cpu")
    with pytest.raises(UserError, match="6 classes with enough images, which is not enough for 7 ways"):
        evaluate(replace(config, ways=7))
    with pytest.raises(UserError, match="1x16x16.*the model reads 3x16x16; add --resize"):
        evaluate(replace(config, model=saved(tmp_path / "colour", channels=3)))
    assert evaluate(replace(config, model=tmp_path / "colour", resize=True, examples=0))[0]["episodes"] == 2
    with pytest.raises(UserError, match=r"holds no trained method: it has no method\.json"):
        evaluate(replace(config, model=tmp_path))
    with pytest.raises(UserError, match="--episodes must be positive, got 0"):
        replace(config, episodes=0).check()
    (tmp_path / "model" / "method.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        evaluate(config)
