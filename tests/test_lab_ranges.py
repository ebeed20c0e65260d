"""`smidgen lab ranges`: what its controlled experiments must show, and the command itself."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from cyclopts import App
from cyclopts.config import Yaml

from smidgen.errors import UserError
from smidgen.lab.ranges import CASES, FORMS, Adam, Config, Form, Result, Setting, command, learned, reference, samples
from smidgen.quant.ranges import Range, fake_quantize, moved
from smidgen.report import write_report
from smidgen.report.finished import Finished

CPU = torch.device("cpu")


@cache
def result(case: str, form: Form, steps: int) -> Result:
    """How a case went, with the samples of seed 0."""
    setting = CASES[case]
    losses, ((low, high),) = learned([setting], form, steps, 0, CPU)
    return Result(losses[0] / reference(samples(setting.data, 0), setting.bits), low, high)


def last(of: Result, steps: int = 300) -> float:
    return float(of.ratio[-steps:].mean())


# --- the experiments: loose bounds on figures that no change to ranges.py should move far ----------------------------


def test_c2_scale_and_offset_do_not_share_a_learning_rate_at_ten_bits():
    assert result("C2", "scale-offset", 501).ratio[500] > 10 * result("C2", "min-max", 501).ratio[500]


@pytest.mark.parametrize("form", FORMS)
def test_c1_every_form_learns_three_bits(form):
    assert result("C1", form, 600).ratio[-50:].mean() <= 1.05


def test_c3_scale_offset_fails_on_relu_at_eight_bits():
    assert last(result("C3", "scale-offset", 1000)) > 3 * last(result("C3", "min-max", 1000))


def test_c4_multipliers_come_back_from_a_wide_range_before_ends_do():
    assert result("C4", "beta-gamma", 101).ratio[100] < 1.2
    assert result("C4", "min-max", 101).ratio[100] > 5


def test_c5_a_sigmoid_cannot_widen_the_end_it_starts_from():
    stuck, free = result("C5, 8 bits", "sigmoid", 800), result("C5, 8 bits", "exp", 1800)
    assert last(stuck) > 1000 and -0.5 <= stuck.low < 0
    assert last(free) < 1.1


@pytest.mark.parametrize("case", ["C5, 4 bits", "C5, 8 bits"])
def test_c5_min_max_finds_the_symmetry_of_the_data(case):
    found = result(case, "min-max", 2000)
    assert abs(found.high + found.low) < 0.1 * found.high


def test_c5_scale_offset_drags_the_good_end_away():
    found = result("C5, 8 bits", "scale-offset", 2000)
    assert found.high > 2 * -found.low


def test_c6_normalising_repairs_scale_offset():
    raw, normalised = result("C5, 8 bits", "scale-offset", 2000), result("C5, 8 bits", "normalised", 2000)
    assert last(normalised) < 0.2 * last(raw)
    assert result("C2", "normalised", 501).ratio[500] < 1.3


def test_c6_a_logarithmic_scale_beside_a_raw_offset_does_not():
    """Steps of the scale become relative, but the offset still has codes to travel; no form of the command, hence written out."""
    x, least = samples("normal", 0), reference(samples("normal", 0), 8)
    low, high = -0.5, 8.0
    scale = torch.tensor([[(high - low) / 255]])
    log, zeta = torch.nn.Parameter(scale.log()), torch.nn.Parameter(-low / scale)
    adam = Adam([log, zeta], torch.tensor([[1e-2]]))
    losses = []
    for _ in range(2000):
        zero = moved(zeta, zeta.round().clamp(0, 255))
        loss = (fake_quantize(x, log.exp(), zero, 255) - x).square().mean()
        losses.append(loss.item() / least)
        adam.step(torch.autograd.grad(loss, [log, zeta]))
    assert np.mean(losses[-300:]) > 10
    assert float((log.exp() * (255 - zeta)).detach()) > 2 * float((log.exp() * zeta).detach()), "the good end went along"


# --- their parts -----------------------------------------------------------------------------------------------------


def test_a_batch_of_settings_is_each_of_them_alone():
    settings = [Setting("normal", 4, 1e-2, "x3"), Setting("relu", 4, 1e-3, "one-sided")]
    together, ends = learned(settings, "min-max", 50, 0, CPU)
    for setting, losses, end in zip(settings, together, ends, strict=True):
        alone, (own,) = learned([setting], "min-max", 50, 0, CPU)
        np.testing.assert_allclose(losses, alone[0], rtol=1e-4)
        assert end == pytest.approx(own, rel=1e-4)


def test_adam_is_that_of_torch():
    ours, theirs = (torch.nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64)) for _ in range(2))
    adam, expected = Adam([ours], torch.full((2, 1), 0.1, dtype=torch.float64)), torch.optim.Adam([theirs], 0.1)
    for step in range(30):
        adam.step(((ours.detach() - step).sin(),))
        theirs.grad = (theirs.detach() - step).sin()
        expected.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_reference_is_the_best_of_brute_force():
    x = samples("normal", 0)
    low, high = x.min(), x.max()
    errors = [
        (Range(u * low, v * high, 3)(x) - x).square().mean().item() for u in torch.linspace(0.2, 1, 5) for v in torch.linspace(0.2, 1, 5)
    ]
    assert reference(x, 3, points=5) == pytest.approx(min(errors), rel=1e-6)
    assert reference(x, 3) < min(errors)


def curve(*parts: tuple[float, int]) -> Result:
    return Result(np.concatenate([np.full(n, value) for value, n in parts]), -1.0, 1.0)


@pytest.mark.parametrize(
    ("of", "verdict", "last_above"),
    [
        (curve((5.0, 10), (1.0, 990)), "converges", 9),
        (curve((1.0, 1000)), "converges", None),
        (curve((1.0, 890), (9.0, 1), (1.0, 109)), "converges", 890),  # touches early, leaves, and comes back in time
        (curve((5.0, 10), (1.0, 940), (1.5, 1), (1.0, 49)), "oscillates", 950),
        (curve((5.0, 910), (2.0, 30), (4.5, 60)), "oscillates", 999),
        (curve((2.0, 100), (3.0, 900)), "diverges", 999),
        (curve((2.0, 990), (np.nan, 10)), "diverges", 999),
        (curve((9.0, 800), (5.0, 100), (4.0, 100)), "slow", 999),
        (curve((9.0, 960), (1.0, 40)), "slow", 959),  # below too late to be trusted
        (curve((9.0, 500), (4.0, 500)), "sticks", 999),
    ],
)
def test_verdicts(of, verdict, last_above):
    assert (of.verdict, of.last_above) == (verdict, last_above)


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_learns_a_grid_and_draws_it(tmp_path, capsys):
    folder = tmp_path / "run"
    config = Config(data=("normal",), bits=(3,), rate=(1e-2,), start=("x1", "x3"), form=("min-max", "exp"), steps=200, output=folder)
    metrics = command(config)
    assert metrics["cases"] == 4 and set(metrics["verdicts"]) == {"min-max", "exp"}
    assert sum(n for by in metrics["verdicts"].values() for n in by.values()) == 4
    assert metrics == json.loads((folder / "metrics.json").read_text())

    rows = Finished.read(folder).cases()
    assert [(row["case"], row["start"], row["form"]) for row in rows] == [
        ("C1", "x1", "min-max"), ("C4", "x3", "min-max"), ("C1", "x1", "exp"), ("C4", "x3", "exp"),
    ]  # fmt: skip
    assert all(row["curve"][0] == [1, pytest.approx(row["ratio_0"], rel=1e-4)] and row["curve"][-1][0] == 200 for row in rows)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "smidgen lab ranges --config" in page and "C4: normal, 3 bits, rate 0.01, start x3" in page
    assert "normal    3    0.01  x3" in capsys.readouterr().err


def test_a_recipe_repeats_the_figures_of_a_command_of_a_command(tmp_path):
    app, lab = (App(name=name, result_action="return_value") for name in ("smidgen", "lab"))
    app.command(lab)
    lab.command(command, name="ranges")
    a, b = tmp_path / "a", tmp_path / "b"
    options = "--data relu --bits 3 4 --rate 0.01 --start x1 x3 --form exp --steps 100 --seed 2"
    app(["lab", "ranges", *options.split(), "--output", str(a)], exit_on_error=False, print_error=False)
    app.config = [Yaml(a / "config.yaml", must_exist=True)]
    app(["lab", "ranges", "--output", str(b)], exit_on_error=False, print_error=False)
    rows = (a / "steps.jsonl").read_text()
    assert rows == (b / "steps.jsonl").read_text() and rows.count("\n") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=(1,)), "--bits must lie between 2 and 12, got 1"),
        (dict(bits=()), "--bits must name one value or more, each once"),
        (dict(form=("exp", "exp")), "--form must name one value or more, each once"),
        (dict(rate=(0.0,)), "--rate must be positive, got 0.0"),
        (dict(steps=10), "--steps must be at least 100, got 10"),
        (dict(seed=-1), "--seed must be between 0 and 2147483647, got -1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_folder_is_made(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        command(Config(output=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_damaged_row_is_named(tmp_path):
    folder = tmp_path / "run"
    command(Config(data=("normal",), bits=(3,), rate=(1e-2,), start=("x1",), form=("exp",), steps=100, output=folder))
    (folder / "steps.jsonl").write_text('{"data": "normal"}\n')
    with pytest.raises(UserError, match="steps.jsonl, line 1: damaged, it lacks bits, curve"):
        write_report([folder])
