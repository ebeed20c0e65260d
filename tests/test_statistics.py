"""`smidgen collect`, `--stats`, and bits per layer."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.cli import main
from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant.allocate import knapsack, measured, widths
from smidgen.quant.blocks import walk
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.collect import collect
from smidgen.quant.solvers import BOA, GPTQ
from smidgen.quant.statistics import StatsFolder

CPU = torch.device("cpu")


@pytest.fixture
def smidgen(train_text, test_text, tmp_path, capsys):
    """(command, model, *options) -> metrics; data as every test here uses it."""

    def run(command, model, *options: str) -> dict:
        data = ["--sequences", "16", "--length", "64"]
        given = data + (["--evaluate", str(test_text), "--eval-windows", "4"] if command == "quantize" else [])
        calibration = [] if "--stats" in options else ["--calibration", str(train_text)]
        assert main([command, str(model), *given, *calibration, *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def collected(smidgen, tiny_llama, tmp_path):
    smidgen("collect", tiny_llama, "--output", str(tmp_path / "c"))
    return tmp_path / "c"


def tensors(folder):
    return load_file(folder / "artifact" / "model.safetensors")


# --- statistics once, any bits later ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--method", "boa"], ["--method", "gptq", "--gptq.zfold"], ["--method", "boa", "--boa.choose"]])
def test_one_collection_gives_the_integers_of_direct_runs(options, collected, smidgen, tiny_llama, tmp_path):
    for bits in ("2", "3", "4"):
        smidgen("quantize", tiny_llama, "--bits", bits, *options, "--stats", str(collected), "--output", str(tmp_path / f"s{bits}"))
        smidgen("quantize", tiny_llama, "--bits", bits, *options, "--inputs", "float", "--output", str(tmp_path / f"d{bits}"))
        stored, direct = tensors(tmp_path / f"s{bits}"), tensors(tmp_path / f"d{bits}")
        assert stored.keys() == direct.keys()
        assert all(torch.equal(stored[name], direct[name]) for name in stored)


@torch.no_grad()
def test_float_inputs_are_those_of_the_unquantized_model(tiny_llama, train_tokens):
    checkpoint, tokens = Checkpoint(tiny_llama, "tiny"), train_tokens[:8]
    model = load_model(tiny_llama, torch.float32, CPU)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(tokens, use_cache=False)
    for block in walk(checkpoint, checkpoint.skeleton(CPU), tokens, CPU, torch.float32, "float"):
        if block.index == 1:
            torch.testing.assert_close(block.hidden.flatten(0, 1), seen[0], rtol=1e-4, atol=1e-4)
        collect(block, frozenset({"h_in"}))
        for matrix in block.matrices():
            matrix.weight().zero_()  # what is done to a block does not reach the next


def test_what_layers_share_is_stored_once_and_shared_again(collected, tiny_llama, blocks_of):
    block = next(iter(blocks_of(tiny_llama, None)))
    stats = StatsFolder.open(collected).read(block, frozenset({"h_in", "h_out", "held"}), CPU)
    q, k, v = (stats[f"self_attn.{n}_proj"] for n in "qkv")
    gate, up = (stats[f"mlp.{n}_proj"] for n in ("gate", "up"))
    assert q.h_in is k.h_in and q.h_in is not v.h_in and gate.h_in is up.h_in
    assert q.held.h_in is k.held.h_in and 0 < q.held.tokens < q.tokens
    plain = StatsFolder.open(collected).read(block, frozenset({"h_in"}), CPU)
    assert plain["self_attn.v_proj"].h_in is plain["self_attn.q_proj"].h_in
    assert plain["self_attn.q_proj"].h_out is None and plain["mlp.up_proj"].held is None


def test_statistics_that_do_not_fit_are_refused(collected, tiny_llama, tiny_opt, smidgen, tmp_path, capsys):
    def refused(model, *options):
        command = ["quantize", str(model), "--stats", str(collected), "--output", str(tmp_path / "r"), "--length", "64", *options]
        assert main(command) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "reads no statistics" in refused(tiny_llama, "--method", "rtn")
    assert "leave out one of --stats and --calibration" in refused(tiny_llama, "--method", "boa", "--calibration", "docstrings:json")
    assert "--rotate changes it" in refused(tiny_llama, "--method", "boa", "--rotate")
    assert "collected on tiny-llama" in refused(tiny_opt, "--method", "boa")
    assert "mismatch" in refused(tiny_llama, "--method", "boa", "--boa.mismatch", "residual")
    assert "without value_rows" in refused(tiny_llama, "--method", "boa", "--boa.value-rows")
    (collected / "stats" / "block-001.safetensors").write_bytes(b"broken")
    assert "collect the statistics again" in refused(tiny_llama, "--method", "boa")
    (collected / "stats" / "stats.json").write_text("{}")
    assert "stats.json is damaged; collect the statistics again" in refused(tiny_llama, "--method", "boa")
    (collected / "stats" / "stats.json").unlink()
    assert "no finished statistics" in refused(tiny_llama, "--method", "boa")


def test_statistics_of_a_damaged_model_are_not_kept(tiny_llama, train_text, tmp_path, capsys):
    damaged = shutil.copytree(tiny_llama, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    data = ["--calibration", str(train_text), "--sequences", "16", "--length", "64"]
    assert main(["collect", str(damaged), *data, "--output", str(tmp_path / "c")]) == 2
    assert "model.layers.1.mlp.down_proj: second moments of the inputs contain NaN" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# --- bits per layer --------------------------------------------------------------------------------------------------


def test_knapsack_is_the_best_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    choices, layers = (2, 3, 4), [f"l{i}" for i in range(6)]
    loss = {n: {b: float(torch.rand(1, generator=generator)) * 4.0**-b for b in choices} for n in layers}
    size = {n: {b: b * int(torch.randint(50, 500, (1,), generator=generator)) for b in choices} for n in layers}
    size = {n: {b: s[2] // 2 * b for b in choices} for n, s in size.items()}
    for share in (2.0, 2.4, 3.1, 3.9, 4.0):
        budget = int(share * sum(s[2] // 2 for s in size.values()))
        fitting = [c for c in itertools.product(choices, repeat=6) if sum(size[n][b] for n, b in zip(layers, c, strict=True)) <= budget]
        best = min(sum(loss[n][b] for n, b in zip(layers, c, strict=True)) for c in fitting)
        found = knapsack(loss, size, budget)
        assert sum(size[n][b] for n, b in found.items()) <= budget
        assert sum(loss[n][b] for n, b in found.items()) == pytest.approx(best, rel=1e-3)


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(UserError, match="raise --target-bpw"):
        knapsack({"a": {2: 1.0, 3: 0.5}}, {"a": {2: 200, 3: 300}}, 199)


def test_widths_surround_the_target():
    assert widths(2.5) == [2, 3, 4, 5] and widths(2.0) == [2, 3, 4, 5] and widths(4.2) == [3, 4, 5, 6, 7] and widths(8.0) == [7, 8]


def test_measured_sizes_and_losses_are_the_solvers_and_change_nothing(tiny_llama, train_tokens):
    checkpoint, grid, solver = Checkpoint(tiny_llama, "tiny"), Grid(2, scale_dtype="float16"), GPTQ()
    walked = walk(checkpoint, checkpoint.skeleton(CPU), train_tokens[:8], CPU, torch.float32, "float")
    loss, size = measured(walked, solver, grid, [2, 3], None, CPU)
    assert len(loss) == 14
    block = next(iter(walk(checkpoint, checkpoint.skeleton(CPU), train_tokens[:8], CPU, torch.float32, "float")))
    stats = collect(block, solver.needs)["mlp.up_proj"]
    w = block.module.mlp.up_proj.weight
    q = solver(w, stats, replace(grid, bits=3))
    name = "model.layers.0.mlp.up_proj"
    assert loss[name][3] == pytest.approx(stats.loss(q.dequantize() - w) / stats.loss(w), rel=1e-5)
    assert size[name] == {2: w.numel() * 2 + 128 * 18, 3: w.numel() * 3 + 128 * 19}
    assert all(row[3] < row[2] for row in loss.values())


def test_target_bpw_keeps_its_budget_and_beats_two_bits(smidgen, tiny_llama, tmp_path):
    mixed = smidgen("quantize", tiny_llama, "--method", "gptq", "--target-bpw", "3", "--output", str(tmp_path / "m"))
    two = smidgen("quantize", tiny_llama, "--method", "gptq", "--bits", "2", "--output", str(tmp_path / "two"))
    bits = json.loads((tmp_path / "m" / "bits.json").read_text())
    assert len(set(bits.values())) > 1 and len(bits) == 14
    assert two["bits_per_weight"] < mixed["bits_per_weight"] <= 3
    assert next(iter(mixed["perplexity"].values())) < next(iter(two["perplexity"].values()))
    groups = json.loads((tmp_path / "m" / "artifact" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {g["weights"]["num_bits"] for g in groups.values()} == set(bits.values())
    assert {t: g["weights"]["num_bits"] for g in groups.values() for t in g["targets"]} == bits


def test_target_bpw_works_from_stored_statistics(collected, smidgen, tiny_llama, tmp_path):
    m = smidgen("quantize", tiny_llama, "--method", "boa", "--target-bpw", "3", "--stats", str(collected), "--output", str(tmp_path / "m"))
    assert m["bits_per_weight"] <= 3 and m["tokens"] == 0


# --- choices on held-out sequences, seeds ----------------------------------------------------------------------------


def test_choose_takes_the_option_of_least_held_out_loss(tiny_llama, train_tokens):
    checkpoint, grid = Checkpoint(tiny_llama, "tiny"), Grid(2, scale_dtype="float32")
    solver = BOA(choose=True)
    block = next(iter(walk(checkpoint, checkpoint.skeleton(CPU), train_tokens[:64], CPU, torch.float32)))
    for name, stats in collect(block, solver.needs).items():
        w = block.module.get_submodule(name).weight
        chosen = solver.chosen(w, stats, grid)
        held = replace(stats.held, h_out=stats.h_out)
        losses = {
            (d, o): held.loss(BOA(damp=d, act_order=o)(w, stats.fitted(), grid).dequantize() - w)
            for d in (0.003, 0.01, 0.03, 0.1)
            for o in (True, False)
        }
        assert (chosen.damp, chosen.act_order) == min(losses, key=losses.get) and not chosen.choose
        assert torch.equal(solver(w, stats, grid).codes, chosen(w, stats, grid).codes)


def test_seeds_give_mean_and_spread(smidgen, tiny_llama, tmp_path):
    together = smidgen("quantize", tiny_llama, "--method", "gptq", "--bits", "3", "--seeds", "2", "--output", str(tmp_path / "s"))
    ((text, mean),) = together["perplexity"].items()
    single = [json.loads((tmp_path / "s" / f"seed-{i}" / "metrics.json").read_text())["perplexity"][text] for i in (0, 1)]
    assert single[0] != single[1]
    assert mean == pytest.approx(sum(single) / 2) and together["perplexity_spread"][text] == pytest.approx(
        abs(single[0] - single[1]) / 2**0.5
    )


def test_rotated_models_are_written_and_measured_like_others(smidgen, tiny_llama, tmp_path):
    m = smidgen("quantize", tiny_llama, "--bits", "8", "--rotate", "--method", "gptq", "--output", str(tmp_path / "r"))
    (before,), (after,) = m["perplexity_float"].values(), m["perplexity"].values()
    assert after == pytest.approx(before, rel=0.01)
    assert not json.loads((tmp_path / "r" / "artifact" / "config.json").read_text())["tie_word_embeddings"]
    assert not list((tmp_path / "r").glob("rotated*"))
