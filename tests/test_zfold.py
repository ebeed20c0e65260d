"""Folded factors: the float model stays what it was, its statistics follow, and its columns become easier to round."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_blocks import CONFIGS, KNOWN, saved

import smidgen.quant.transforms.zfold as zfold
from smidgen.cli import main
from smidgen.grid import Grid, expand
from smidgen.quant.blocks import family_of
from smidgen.quant.checkpoint import load_model
from smidgen.quant.collect import collect
from smidgen.quant.linear import weight_of
from smidgen.quant.stats import Stats
from smidgen.quant.transforms.zfold import factors, fold

GRID = Grid(3, scale_dtype="float64")
PLAIN = frozenset({"h_in"})
POST_NORM = transformers.OPTConfig.from_dict(CONFIGS["opt"].to_dict() | {"do_layer_norm_before": False})
TABLE = {name: CONFIGS[name] for name in KNOWN} | {"opt-post-norm": POST_NORM}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(name) -> folder of an untrained model whose columns differ in size, as those of large trained models do."""
    made = {}

    def make(name):
        if name not in made:
            folder = saved(TABLE[name], tmp_path_factory.mktemp("zfold") / name)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for layer in model.modules():
                    if isinstance(layer, zfold.LINEAR) and layer is not model.lm_head:
                        weight_of(layer).mul_(torch.exp(0.5 * torch.randn(weight_of(layer).shape[1])))
            model.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def tokens(generator):
    return torch.randint(1, 64, (6, 20), generator=generator)


@pytest.fixture
def taken(monkeypatch):
    """(site, factors it really took) of every fold, in order."""
    seen = []
    original = zfold.absorb

    def recording(block, site, *args):
        zeta = original(block, site, *args)
        seen.append((site, zeta.clone()))
        return zeta

    monkeypatch.setattr(zfold, "absorb", recording)
    return seen


@torch.no_grad()
def exact(block):
    """The block's outputs, of float64 weights and with an attention that keeps them so."""
    attention = block.module.get_submodule(block.family.attention.module)
    ours, attention.config._attn_implementation = attention.config._attn_implementation, "sdpa"
    try:
        out = block.module(block.hidden[0].double(), **block.arguments)
    finally:
        attention.config._attn_implementation = ours
    return out[0] if isinstance(out, tuple) else out


def state(block):
    return {n: p.clone() for n, p in block.module.state_dict().items()}


# --- the float model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [*((n, torch.bfloat16) for n in TABLE), ("llama", torch.float32), ("opt", torch.float16)])
def test_folding_leaves_the_outputs_as_they_were(name, dtype, family, tokens, blocks_of, taken):
    for block in blocks_of(family(name), tokens):
        taken.clear()
        stats = collect(block, PLAIN)
        block.module.double()
        before = exact(block)
        fold(block, stats, GRID, 0.01, dtype)
        tolerance = 1e-6 if "gemma" in name else 1e-9  # whose norms compute in float32 whatever their input is
        torch.testing.assert_close(exact(block), before, rtol=1e-9, atol=tolerance)
        post_norm = name == "opt-post-norm"
        assert [site for site, _ in taken] == [s for s in block.family.folds if not (post_norm and s.before.endswith("norm"))]
        for _, zeta in taken:  # all of them moved
            assert (zeta != 1).double().mean() > 0.9 and zeta.abs().log().std() > 0.1
        block.module.float()


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2"])
def test_factors_taken_are_what_columns_gave_and_rows_got(name, family, tokens, blocks_of, taken):
    block = next(iter(blocks_of(family(name), tokens)))
    stats = collect(block, PLAIN)
    block.module.double()
    before = state(block)
    zeta = {}
    fold(block, stats, GRID, 0.01, torch.float64)
    for site, factor in taken:
        zeta |= {("columns", layer): factor for layer in site.after}
        zeta["rows", site.before] = factor
    for layer, module in {m.layer: m.module for m in block.matrices()}.items():
        w = before[f"{layer}.weight"].T if "gpt2" in name else before[f"{layer}.weight"]
        rows, columns = torch.ones(len(w)).double(), torch.ones(w.shape[1]).double()
        if ("columns", layer) in zeta:
            factor = zeta["columns", layer]
            columns = factor if len(factor) == len(columns) else factor.view(2, 8).repeat_interleave(2, 0).flatten()
        if ("rows", layer) in zeta:
            rows[len(rows) - len(zeta["rows", layer]) :] = zeta["rows", layer]  # of a fused layer the values'
        torch.testing.assert_close(weight_of(module), rows[:, None] * w / columns)
        if module.bias is not None:
            torch.testing.assert_close(module.bias, rows * before[f"{layer}.bias"])
    for layer, module in block.module.named_modules():
        if "norm" in layer or layer.startswith("ln_"):
            for parameter, values in module.named_parameters():
                torch.testing.assert_close(values, zeta["rows", layer] * before[f"{layer}.{parameter}"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_query_heads_that_share_a_value_head_get_the_same_factors(name, family, tokens, blocks_of):
    block = next(iter(blocks_of(family(name), tokens)))
    before = state(block)
    fold(block, collect(block, PLAIN), GRID, 0.01, torch.float32)
    own = block.module.self_attn
    columns = (before["self_attn.o_proj.weight"] / own.o_proj.weight).median(0).values.view(2, 2, 8)  # value heads, sharing, dim
    torch.testing.assert_close(columns[:, 0], columns[:, 1])
    assert (columns[0, 0] - columns[1, 0]).abs().max() > 0.05  # not so those of another


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_gains_are_numbers_the_model_can_store(name, dtype, family, tokens, blocks_of):
    """Up to the last bit of float32, which storing takes off."""
    for block in blocks_of(family(name), tokens):
        before = state(block)
        fold(block, collect(block, PLAIN), GRID, 0.01, dtype)
        for layer, module in block.module.named_modules():
            if "norm" in layer or layer.startswith("ln_"):
                stored = module.weight.to(dtype).float()
                assert (module.weight - stored).abs().max() <= 2e-7 * stored.abs().max()
                assert ((module.weight - before[f"{layer}.weight"]).abs() > 0.01).float().mean() > 0.5


def test_gains_that_are_zero_stay_and_take_no_factor(family, tokens, blocks_of, taken):
    block = next(iter(blocks_of(family("llama"), tokens)))
    with torch.no_grad():
        block.module.input_layernorm.weight[:3] = 0
    stats = collect(block, PLAIN)
    block.module.double()
    before = exact(block)
    fold(block, stats, GRID, 0.01, torch.bfloat16)
    assert torch.equal(taken[0][1][:3], torch.ones(3).double()) and not block.module.input_layernorm.weight[:3].any()
    torch.testing.assert_close(exact(block), before, rtol=1e-9, atol=1e-9)


def test_norms_after_the_residual_are_left_alone(family, tokens, blocks_of):
    for block in blocks_of(family("opt-post-norm"), tokens):
        before = state(block)
        fold(block, collect(block, PLAIN), GRID, 0.01, torch.float32)
        changed = {n.rsplit(".", 1)[0] for n, p in block.module.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {"self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_statistics_become_those_of_the_folded_block(name, family, tokens, blocks_of, monkeypatch):
    monkeypatch.setattr("smidgen.quant.blocks.BATCH_TOKENS", 40)
    needs = frozenset({"h_in", "h_out", "held", "value_rows", "mlp_rows"})
    for block in blocks_of(family(name), tokens):
        stats = collect(block, needs)
        before = {n: s.h_in.clone() for n, s in stats.items()}
        fold(block, stats, GRID, 0.01, torch.float32)
        fresh = collect(block, needs)
        moved = 0
        for layer, s in stats.items():
            for one, other in ((s, fresh[layer]), (s.held, fresh[layer].held)):
                for part in ("h_in", "h_out"):
                    a, b = getattr(one, part), getattr(other, part)
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=f"{layer} {part}")
            moved += not torch.allclose(before[layer], s.h_in, rtol=0.1)
        sites = {layer for site in block.family.folds for layer in site.after}
        assert moved == sum(m.layer in sites for m in block.matrices())


def test_cross_moments_are_scaled_with_the_others(normal, moments):
    h, cross, zeta = moments(1, 6), normal(1, 6, 6), normal(6)
    shared = Stats(h.clone(), None, 10, cross.clone())
    zfold.rescale([shared, Stats(shared.h_in, None, 10, shared.cross, held=Stats(h.clone()))], zeta)
    for found, before in ((shared.h_in, h), (shared.cross, cross)):
        torch.testing.assert_close(found, zeta.diag() @ before @ zeta.diag())  # once, though two layers share it


# --- the factors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unequal(normal):
    """(rows, columns) -> weights whose columns differ in size by an order of magnitude."""
    return lambda rows, columns: normal(rows, columns) * torch.exp(normal(columns))


def own(columns):
    """Every column reads its own channel."""
    return torch.arange(columns)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 8])
def test_no_round_raises_the_loss(group, bits, unequal, moments, monkeypatch):
    rounds = []
    original = zfold._Rows.round

    def recording(self, zeta):
        loss = original(self, zeta)
        values = self.grid.decode(self.codes, *(expand(t, 24) for t in (self.scale, self.zero))) * zeta
        assert loss.item() == pytest.approx(((self.w - values).square() * self.cost[:, None]).sum().item())
        rounds.append(loss.item())
        return loss

    monkeypatch.setattr(zfold._Rows, "round", recording)
    grid = Grid(bits, group, scale_dtype="float64")
    layers = [(unequal(12, 24), Stats(moments(1, 24))), (unequal(6, 24), Stats(moments(3, 24)))]
    zeta = factors(layers, own(24), grid, 0.01, positive=False)
    totals = [one + other for one, other in zip(rounds[::2], rounds[1::2], strict=True)]
    assert len(totals) > 3 and all(b <= a * (1 + 1e-12) for a, b in zip(totals, totals[1:], strict=False))
    assert totals[-1] < 0.95 * totals[0]
    assert zeta.shape == (24,)


def test_columns_are_weighed_by_what_their_errors_cost_after_compensation(unequal, moments):
    h = moments(1, 10)
    problem = zfold._Rows(unequal(6, 10), Stats(h), GRID, 0.01)
    damped = h[0] + 0.01 * h[0].diagonal().mean() * torch.eye(10)
    order = damped.diagonal().argsort(descending=True)
    u = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    torch.testing.assert_close(problem.cost[0, order], u.diagonal() ** -2)


def test_factors_are_those_of_least_squares(unequal, moments):
    """After the last round, given the codes and scales it was made from."""
    w, stats = unequal(12, 10), Stats(moments(1, 10))
    problem = zfold._Rows(w, stats, GRID, 0.01)
    problem.round(torch.ones(10).double())
    top, bottom = problem.columns()
    values = GRID.decode(problem.codes, problem.scale, problem.zero)[0]
    assert (values != 0).any(0).sum() > 5
    for j in range(10):
        if values[:, j].any():
            torch.testing.assert_close(top[j] / bottom[j], torch.linalg.lstsq(values[:, j : j + 1], w[:, j : j + 1]).solution[0, 0])


def test_weights_that_lie_on_a_grid_need_no_factors(moments, generator):
    codes = torch.randint(8, (12, 10), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 7  # so the range is that of the grid
    w = 0.25 * (codes.double() - 3)
    assert torch.equal(factors([(w, Stats(moments(1, 10)))], own(10), GRID, 0.01, positive=False), torch.ones(10).double())


def test_equal_sizes_are_found_again_from_a_common_factor(unequal, moments, normal):
    """Columns that share a channel are one column, twice as long."""
    w, h = unequal(8, 10), normal(10).square().add(0.1)
    twice = torch.cat([w, w], 1)
    both = factors([(twice, Stats(torch.cat([h, h]).diag()[None]))], own(10).repeat(2), GRID, 0.0, positive=False)
    once = factors([(w, Stats(h.diag()[None]))], own(10), GRID, 0.0, positive=False)
    torch.testing.assert_close(both, once)


@pytest.mark.parametrize("positive", [False, True])
def test_only_positive_factors_pass_a_relu(positive, normal, moments, monkeypatch):
    """No rounding to nearest gives a negative factor, so one round of it is feigned."""
    columns, losses = zfold._Rows.columns, iter([2.0, 1.0, 1.0])
    monkeypatch.setattr(zfold._Rows, "columns", lambda self: (-columns(self)[0], columns(self)[1]))
    monkeypatch.setattr(zfold._Rows, "round", lambda self, zeta: torch.tensor(next(losses)))
    layer = normal(12, 10), Stats(moments(1, 10))
    problem = zfold._Rows(*layer, GRID, 0.01)
    monkeypatch.setattr(zfold, "_Rows", lambda *args: problem)
    problem.codes = GRID.encode(problem.w, problem.scale, problem.zero)
    assert (problem.codes != problem.zero).any(-2).all()
    zeta = factors([layer], own(10), GRID, 0.01, positive)
    assert (zeta == zfold.SMALLEST).all() if positive else (zeta < 0).all()


def test_only_factors_through_a_relu_are_kept_positive(family, tokens, blocks_of, monkeypatch):
    asked = []
    original = zfold.factors

    def recording(*args, positive):
        asked.append(positive)
        return original(*args, positive=positive)

    monkeypatch.setattr(zfold, "factors", recording)
    for name in ("opt", "llama"):
        block = next(iter(blocks_of(family(name), tokens)))
        fold(block, collect(block, PLAIN), GRID, 0.01, torch.float32)
    assert asked == [False, False, False, True] + [False] * 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_columns_of_unequal_size_are_rounded_much_better(bits, normal):
    w = normal(64, 32) * torch.exp(normal(32))
    stats, grid = Stats(torch.eye(32).double()[None]), Grid(bits, scale_dtype="float64")
    zeta = factors([(w, stats)], own(32), grid, 0.01, positive=True)
    plain, folded = (w - z * grid.nearest(w / z, *grid.fit(w / z, z * z)) for z in (torch.ones(32).double(), zeta))
    assert stats.loss(folded) < 0.75 * stats.loss(plain)


# --- through the command ---------------------------------------------------------------------------------------------


def test_a_folded_artifact_has_the_reported_perplexity(tiny_llama, train_text, test_text, test_tokens, perplexity, tmp_path, capsys):
    texts = ["--calibration", str(train_text), "--evaluate", str(test_text), "--output", str(tmp_path / "run")]
    options = ["--method", "gptq", "--gptq.zfold", "--bits", "3", "--sequences", "16", "--length", "64", "--eval-windows", "8"]
    assert main(["quantize", str(tiny_llama), *options, *texts]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    artifact = tmp_path / "run" / "artifact"
    model = load_model(artifact, torch.float32, torch.device("cpu"))
    assert perplexity(model, test_tokens[:8]) == pytest.approx(metrics["perplexity"][str(test_text)], rel=1e-3)
    assert metrics["perplexity"][str(test_text)] < 1.2 * metrics["perplexity_float"][str(test_text)]
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(artifact / "model.safetensors")
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = f"model.layers.{i}.{norm}.weight"
            assert not torch.allclose(before[gain].float(), after[gain].float(), rtol=0.01)
    assert torch.equal(before["model.norm.weight"].float(), after["model.norm.weight"].float())  # no layer after it was folded


def test_folding_an_unknown_family_is_refused(tokenizer, train_text, test_text, tmp_path, capsys):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"])
    assert family_of(model) is None
    config = CONFIGS["gpt_neox"].to_dict() | {"vocab_size": 384, "max_position_embeddings": 128}
    transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig.from_dict(config)).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    texts = ["--calibration", str(train_text), "--evaluate", str(test_text), "--output", str(tmp_path / "run")]
    options = ["--method", "gptq", "--gptq.zfold", "--sequences", "4", "--length", "64", "--eval-windows", "1"]
    assert main(["quantize", str(tmp_path / "neox"), *options, *texts]) == 2
    assert "gpt_neox" in capsys.readouterr().err
