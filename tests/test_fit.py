"""The training loop: against plain torch, interrupted and resumed, stopped early, on two processes."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fit import CHECKPOINT, FitConfig, fit, shuffled
from smidgen.run import Run

QUICK = FitConfig(steps=12, learning_rate=1e-2, precision="float32", evaluate_every=4)


@pytest.fixture
def run(tmp_path):
    with Run("fit", QUICK, tmp_path / "run") as run:
        yield run


@pytest.fixture
def new_run(tmp_path):
    """(name) -> a run in a folder of that name."""
    return lambda name: Run("fit", QUICK, tmp_path / name)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16, track_running_stats=True), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)
    return nn.Sequential(*layers).double()


def data(n: int = 96) -> torch.Tensor:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([x, x[:, :1] * x[:, 1:2] + x[:, 2:3]], 1)


def squared(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch[:, :6]) - batch[:, 6:]).square().mean()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), [n for n in a if not torch.equal(a[n], b[n])]


# --- what it computes ------------------------------------------------------------------------------------------------


def test_is_adamw_with_a_warm_up_and_a_cosine(run):
    model, twin = network(), network()
    config = replace(QUICK, warmup=3, weight_decay=0.1, clip=0.5, steps=10)
    batches = shuffled(data(), 16)
    result = fit(model, squared, batches, config, run)

    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    expected = [1e-2 / 3, 2e-2 / 3, 1e-2] + [5e-3 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
    losses = []
    for step, rate in enumerate(expected):
        optimizer.param_groups[0]["lr"] = rate
        loss = squared(twin, batches(step))
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, value in state(twin).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)
    assert [row["loss"] for row in result.rows] == pytest.approx(losses, rel=1e-6)
    assert [row["learning_rate"] for row in result.rows] == pytest.approx(expected)
    assert [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()] == result.rows


def test_accumulated_batches_are_one_batch(run, new_run):
    two, one = nn.Linear(6, 1).double(), nn.Linear(6, 1).double()
    one.load_state_dict(two.state_dict())
    half = shuffled(data(), 8)
    fit(two, squared, half, replace(QUICK, accumulation=2), run)
    fit(one, squared, lambda i: torch.cat([half(2 * i), half(2 * i + 1)]), QUICK, new_run("one"))
    torch.testing.assert_close(two.weight, one.weight, rtol=0, atol=1e-12)


def test_groups_have_their_own_rates_and_the_rest_is_frozen(run):
    model = network()
    before = state(model)
    groups = [{"params": [model[0].weight], "lr": 1e-3}, {"params": [model[4].bias]}]
    fit(model, squared, shuffled(data(), 16), replace(QUICK, steps=1), run, groups=groups)
    moved = {n: (t - before[n]).abs().max().item() for n, t in model.named_parameters()}
    assert moved["0.weight"] == pytest.approx(1e-3, rel=0.01) and moved["4.bias"] == pytest.approx(1e-2, rel=0.01)  # Adam's first step
    assert moved["0.bias"] == moved["1.weight"] == moved["4.weight"] == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_batches_read_every_example_once_an_epoch():
    batches = shuffled(torch.arange(10), 4, seed=3)
    read = torch.cat([batches(i) for i in range(10)]).view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in read)
    assert not torch.equal(read[0], read[1])
    assert torch.equal(batches(7), shuffled(torch.arange(10), 4, seed=3)(7))
    assert not torch.equal(batches(0), shuffled(torch.arange(10), 4, seed=4)(0))


def test_bfloat16_multiplies_in_bfloat16_and_keeps_parameters_in_float32(run):
    seen = []

    def loss(model, batch):
        out = model(batch[:, :6].float())
        seen.append(out.dtype)
        return (out.float() - batch[:, 6:].float()).square().mean()

    model = nn.Linear(6, 1)
    fit(model, loss, shuffled(data(), 8), replace(QUICK, steps=1, precision="bfloat16"), run)
    assert seen == [torch.bfloat16] and model.weight.dtype == torch.float32


# --- early stop ------------------------------------------------------------------------------------------------------


def test_early_stop_restores_the_best_state(run):
    model = network()
    curve = iter([5.0, 4.0, 3.0, 3.5, 3.2, 1.0])
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(state(model))
        return {"held_out": next(curve)}

    config = replace(QUICK, steps=100, patience=2)
    result = fit(model, squared, shuffled(data(), 16), config, run, evaluate=evaluate)
    assert (result.step, result.kept, result.stopped) == (16, 8, "patience")
    assert_equal(state(model) | {"1.num_batches_tracked": seen[2]["1.num_batches_tracked"]}, seen[2])
    assert model.training
    assert result.evaluation(8)["held_out"] == 3.0


def test_the_best_state_can_be_kept_without_stopping(run):
    curve = iter([5.0, 4.0, 1.0, 3.0])
    config = replace(QUICK, keep_best=True)
    result = fit(network(), squared, shuffled(data(), 16), config, run, evaluate=lambda model: {"held_out": next(curve)})
    assert (result.step, result.kept, result.stopped) == (12, 8, "steps")


def test_rates_fall_in_steps():
    """Halved every 3 updates after the warm-up; and the single drop after 70 %."""
    config = FitConfig(steps=10, warmup=2, schedule="steps", decay=0.5, decay_every=3)
    assert [config.factor(i) for i in range(10)] == [0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    drop = FitConfig(steps=10, schedule="steps", decay=0.1, decay_every=7)
    assert [drop.factor(i) for i in (0, 6, 7, 9)] == [1, 1, 0.1, 0.1]


def test_without_patience_the_last_state_stays(run):
    curve = iter([1.0, 2.0, 3.0, 4.0])
    result = fit(network(), squared, shuffled(data(), 16), QUICK, run, evaluate=lambda model: {"held_out": next(curve)})
    assert (result.step, result.kept, result.stopped) == (12, 12, "steps")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [None, 9])
def test_resumed_is_bit_identical_to_uninterrupted(new_run, tmp_path, patience):
    """With dropout, batch statistics and a warm-up; with patience, the best state lies before the checkpoint."""
    config = replace(QUICK, warmup=2, accumulation=2, patience=patience)
    batches = shuffled(data(), 8, seed=5)
    held_out = {0: 3.0, 4: 1.0, 8: 2.0, 12: 1.5}

    def train(model, name, fail_at=None, **changes):
        def failing(i):
            if i == fail_at:
                raise KeyboardInterrupt
            return batches(i)

        run = new_run(name)

        def evaluate(model):
            torch.rand(3)  # drawing random numbers must not matter
            rows = (run.folder / "steps.jsonl").read_text().splitlines()
            return {"held_out": held_out[json.loads(rows[-1])["step"] if rows else 0]}

        return fit(model, squared, failing, replace(config, **changes), run, evaluate=evaluate)

    whole, resumed = network(0.5), network(0.5)
    expected = train(whole, "whole")
    with pytest.raises(KeyboardInterrupt):
        train(network(0.5), "broken", fail_at=17, checkpoint_every=5)
    assert [f.name for f in (tmp_path / "broken").glob("checkpoint*")] == [CHECKPOINT]
    torch.manual_seed(99)
    result = train(resumed, "resumed", resume=tmp_path / "broken")
    assert_equal(state(whole), state(resumed))
    assert result == expected and result.kept == (12 if patience is None else 4)
    assert len((tmp_path / "resumed" / "steps.jsonl").read_text().splitlines()) == len(expected.rows) == 12 + 4


def test_another_course_or_model_is_not_resumed(new_run, tmp_path):
    fit(network(), squared, shuffled(data(), 8), replace(QUICK, checkpoint_every=3), new_run("a"))
    with pytest.raises(UserError, match="learning_rate 0.01, not 0.02"):
        fit(network(), squared, shuffled(data(), 8), replace(QUICK, learning_rate=0.02, resume=tmp_path / "a"), new_run("b"))
    with pytest.raises(UserError, match="another model"):
        fit(nn.Linear(6, 1).double(), squared, shuffled(data(), 8), replace(QUICK, resume=tmp_path / "a"), new_run("c"))
    with pytest.raises(UserError, match="no checkpoint"):
        fit(network(), squared, shuffled(data(), 8), replace(QUICK, resume=tmp_path / "nowhere"), new_run("d"))
    (tmp_path / "a" / CHECKPOINT).write_bytes((tmp_path / "a" / CHECKPOINT).read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        fit(network(), squared, shuffled(data(), 8), replace(QUICK, resume=tmp_path / "a"), new_run("e"))


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(new_run, tmp_path):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
    batches = shuffled(data(), 8)

    def interrupted(i):
        if i == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(i)

    whole, model = network(0.5), network(0.5)
    fit(whole, squared, batches, QUICK, new_run("whole"))
    try:
        with pytest.raises(UserError, match=r"interrupted after 7 of 12 steps.*--resume"):
            fit(model, squared, interrupted, QUICK, new_run("broken"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    resumed = network(0.5)
    fit(resumed, squared, batches, replace(QUICK, resume=tmp_path / "broken" / CHECKPOINT), new_run("resumed"))
    assert_equal(state(whole), state(resumed))


# --- many processes --------------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_doubled_batch(tmp_path, run):
    (tmp_path / "two.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pathlib import Path
from torch import nn
from test_fit import QUICK, data, squared
from smidgen.distributed import is_first_process, process_run
from smidgen.fit import fit, shuffled
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
with process_run("fit", QUICK, Path({str(tmp_path / "ranks")!r})) as run:
    result = fit(model, squared, shuffled(data(), 8), QUICK, run, evaluate=lambda m: {{"held_out": squared(m, data()).item()}})
    torch.save((model.state_dict(), result.rows), Path({str(tmp_path)!r}) / f"{{'first' if is_first_process() else 'second'}}.pt")
torch.distributed.destroy_process_group()
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    (first, rows), (second, _) = (torch.load(tmp_path / f"{name}.pt") for name in ("first", "second"))
    assert_equal(first, second)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    half = shuffled(data(), 8)
    result = fit(model, squared, lambda i: torch.cat([half(2 * i), half(2 * i + 1)]), QUICK, run)
    for name, value in state(model).items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in result.rows], rel=1e-5)
    assert len((tmp_path / "ranks" / "steps.jsonl").read_text().splitlines()) == len(rows) == 12 + 4


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_named(run):
    def loss(model, batch):
        return squared(model, batch) * (float("nan") if torch.equal(batch, batches(4)) else 1.0)

    batches = shuffled(data(), 8)
    model = network()
    with pytest.raises(UserError, match=r"the loss is nan at step 5, learning rate 0.0\d+; lower the learning rate"):
        fit(model, loss, batches, QUICK, run)
    assert all(t.isfinite().all() for t in model.parameters())
    with pytest.raises(UserError, match="gradient's norm is nan at step 1,"):
        fit(model, lambda m, b: (m(b[:, :6]) * 0).abs().sqrt().sum(), batches, QUICK, run)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "--steps must be positive"),
        ({"warmup": 13}, "--warmup must be between 0 and the 12 steps"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"patience": 1}, "--patience needs held-out data"),
        ({"keep_best": True}, "--keep-best needs held-out data"),
        ({"decay": 0.3}, "--decay and --decay-every are of --schedule steps, not of cosine"),
        ({"schedule": "steps", "decay_every": 0}, "--decay-every must be positive"),
        ({"clip": -1.0}, "--clip"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative, got -0.1"),
    ],
)
def test_settings(run, change, line):
    with pytest.raises(UserError, match=line):
        fit(network(), squared, shuffled(data(), 8), replace(QUICK, **change), run)


def test_nothing_to_train(run):
    with pytest.raises(UserError, match="nothing to train"):
        fit(network(), squared, shuffled(data(), 8), QUICK, run, groups=[])
    with pytest.raises(UserError, match="a batch of 97 cannot be drawn from 96"):
        shuffled(data(), 97)
