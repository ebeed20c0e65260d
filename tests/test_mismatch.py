"""Inputs that are no longer the model's own: the shifted weights, how far to shift, and the stages in which layers meet their inputs."""

import pytest
import torch
import transformers
from test_blocks import CONFIGS, layers, reference, saved, watch, watch_input

from smidgen.errors import UserError
from smidgen.grid import Grid
from smidgen.quant import attention, blocks
from smidgen.quant.blocks import walk
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.collect import stages
from smidgen.quant.solvers import GPTQ, RTN
from smidgen.quant.solvers.mismatch import aim, shift, strength
from smidgen.quant.stats import Moments, Stats

CPU = torch.device("cpu")
CROSS = frozenset({"h_in", "cross", "residual", "held"})

# --- the shifted weights ---------------------------------------------------------------------------------------------


def moments_of(x, x_float, lacks=None, h_out=None):
    """Stats of rows x and x_float (heads, n, in) and, instead of x_float, of what the output lacks (n, out)."""
    cross = (x_float - x).mT @ x / x.shape[1] if lacks is None else None
    lacking = None if lacks is None else lacks.T @ x[0] / x.shape[1]
    return Stats(x.mT @ x / x.shape[1], h_out, x.shape[0] * x.shape[1], cross, lacking)


@pytest.mark.parametrize(("heads", "residual"), [(1, False), (3, False), (1, True)])
def test_the_error_against_the_float_outputs_is_that_against_the_shifted_weights_and_a_constant(heads, residual, normal):
    """||W_hat X_q - W X_f - (R_f - R_q)||^2 = ||(W_hat - W*) X_q||^2 + const, whatever W_hat."""
    x, w = normal(heads, 60, 10), normal(heads, 4, 10)
    x_float = x + 0.3 * normal(heads, 60, 10)
    stream, stream_float = (normal(60, 4) if residual else torch.zeros(60, 4) for _ in range(2))
    lacks = stream_float + (x_float - x)[0] @ w[0].T - stream if residual else None
    best = aim(w.flatten(0, 1), moments_of(x, x_float, lacks), damp=0.0).unflatten(0, (heads, -1))

    def gap(rounded):
        error = x @ rounded.mT - x_float @ w.mT - (stream_float - stream)
        return error.square().sum() - (x @ (rounded - best).mT).square().sum()

    gaps = torch.stack([gap(v) for v in (w, best, w + normal(heads, 4, 10), 100 * normal(heads, 4, 10))])
    assert (gaps - gaps[0]).abs().max() <= 1e-9 * gaps[0]
    assert gaps[0] > 0 and (best - w).abs().max() > 0.01


def test_the_constant_is_the_same_with_a_factor_of_the_rows(normal, moments):
    x, w, g = normal(1, 60, 10), normal(12, 10), moments(3, 4)
    x_float = x + 0.3 * normal(1, 60, 10)
    best = aim(w, moments_of(x, x_float, h_out=g), damp=0.0)

    def size(outputs):
        return sum((outputs[:, 4 * i : 4 * i + 4] @ torch.linalg.cholesky(g[i])).square().sum() for i in range(3))

    gaps = [size(x[0] @ v.T - x_float[0] @ w.T) - size(x[0] @ (v - best).T) for v in (w, best, normal(12, 10))]
    assert max(gaps) - min(gaps) <= 1e-9 * gaps[0]


def test_the_shift_is_a_damped_regression(normal):
    x, w = normal(1, 60, 10), normal(1, 4, 10)
    x_float, damp = x + 0.3 * normal(1, 60, 10), 0.05
    stats = moments_of(x, x_float)
    ridge = damp * stats.h_in[0].diagonal().mean() * 60
    rows = torch.cat([x[0], ridge.sqrt() * torch.eye(10, dtype=torch.float64)])
    lacks = torch.cat([(x_float - x)[0] @ w[0].T, torch.zeros(10, 4, dtype=torch.float64)])
    torch.testing.assert_close(shift(w, stats, damp)[0], torch.linalg.lstsq(rows, lacks, driver="gelsd").solution.T)


def test_inputs_that_are_the_models_own_shift_nothing(normal):
    x, w = normal(1, 60, 10), normal(4, 10)
    assert torch.equal(aim(w, moments_of(x, x), damp=0.01), w)


def test_a_solver_rounds_the_shifted_weights(normal):
    x, w, grid = normal(1, 60, 10), normal(4, 10), Grid(3, scale_dtype="float64")
    stats = moments_of(x, x + 0.3 * normal(1, 60, 10))
    expected, plain = GPTQ()(aim(w, stats, 0.01), stats, grid), GPTQ()(w, stats, grid)
    for mismatch in ("inputs", "residual"):
        q = GPTQ(mismatch=mismatch)(w, stats, grid)
        assert torch.equal(q.codes, expected.codes) and torch.equal(q.scale, expected.scale)
    assert not torch.equal(expected.codes, plain.codes)


# --- how far ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(normal):
    """(the mismatch of held-out rows given that of the others, ...) -> held-out rows x and what is lacking there, and Stats of all."""

    def draw(mismatch, tokens=400, h_out=None):
        x, held = normal(1, tokens, 10), normal(1, 100, 10)
        m = 0.2 * normal(10, 10)
        x_float, held_float = x + x @ m + 0.1 * normal(1, tokens, 10), held + mismatch(m, held)
        both = torch.cat([x, held], 1), torch.cat([x_float, held_float], 1)
        stats, part = moments_of(*both, h_out=h_out), moments_of(held, held_float)
        stats.held = part
        return held[0], held_float[0], stats, moments_of(x, x_float, h_out=h_out)

    return draw


def test_fitted_moments_are_those_of_the_rest(split, moments):
    h_out = moments(2, 4)
    _, _, stats, rest = split(lambda m, x: x @ m, h_out=h_out)
    fitted = stats.fitted()
    assert (fitted.tokens, fitted.held) == (400, None) and fitted.h_out is h_out
    torch.testing.assert_close(fitted.h_in, rest.h_in)
    torch.testing.assert_close(fitted.cross, rest.cross)


def test_fitted_moments_of_what_the_output_lacks_are_those_of_the_rest(normal):
    x, lacks = normal(1, 50, 6), normal(50, 4)
    stats = moments_of(x, x, lacks)
    stats.held = moments_of(x[:, 40:], x[:, 40:], lacks[40:])
    torch.testing.assert_close(stats.fitted().lacking, moments_of(x[:, :40], x[:, :40], lacks[:40]).lacking)


@pytest.mark.parametrize("coupled", [False, True], ids=["rows alone", "rows of heads"])
@pytest.mark.parametrize("part", [-0.3, 0.2, 0.6, 1.7])
def test_strength_is_the_best_on_held_out_rows_by_line_search(part, coupled, split, normal, moments):
    """The held-out mismatch is about `part` of the one the shift was made from, less of some inputs than of others, and noise."""
    g, w = moments(2, 4), normal(2, 4, 10)
    parts = part + torch.linspace(-0.3, 0.3, 10).double()[:, None]
    x, x_float, stats, rest = split(lambda m, x: x @ (parts * m) + 0.1 * normal(1, 100, 10), h_out=g if coupled else None)
    w = w if coupled else w.flatten(0, 1)[None]
    d = shift(w, rest, 0.01)
    roots = torch.linalg.cholesky(g) if coupled else torch.eye(8, dtype=torch.float64)[None]
    lines = torch.linspace(0, 1, 1001, dtype=torch.float64)
    error = [((x @ (w + a * d).mT - x_float @ w.mT) @ roots).square().sum() for a in lines]
    found = strength(w, stats, 0.01)
    assert 0 <= found <= 1
    assert found == pytest.approx(lines[torch.stack(error).argmin()].item(), abs=1e-3)
    expected = aim(w.flatten(0, 1), stats, 0.01)
    torch.testing.assert_close(expected.view_as(w), w + found * shift(w, stats, 0.01))


def test_a_mismatch_that_is_the_same_everywhere_is_corrected_wholly(split, normal):
    _, _, stats, _ = split(lambda m, x: x @ m)
    assert strength(normal(1, 4, 10), stats, 0.01) > 0.9


def test_a_mismatch_that_turns_round_is_not_corrected(split, normal):
    _, _, stats, _ = split(lambda m, x: -(x @ m))
    w = normal(1, 4, 10)
    assert strength(w, stats, 0.01) == 0
    assert torch.equal(aim(w[0], stats, 0.01), w[0])


def test_a_mismatch_of_noise_is_hardly_corrected(normal):
    """Few rows, many inputs: the regression finds a shift, the held-out rows know nothing of it."""
    x, held, w = normal(1, 40, 30), normal(1, 2000, 30), normal(1, 8, 30)
    x_float, held_float = (t + 0.3 * normal(*t.shape) for t in (x, held))
    stats = moments_of(torch.cat([x, held], 1), torch.cat([x_float, held_float], 1))
    stats.held = moments_of(held, held_float)
    assert shift(w, stats.fitted(), 0.01).norm() > 0.1 * w.norm()
    assert strength(w, stats, 0.01) < 0.05


def test_no_mismatch_is_no_shift_however_it_is_measured(split, normal):
    x = normal(1, 60, 10)
    stats = moments_of(x, x)
    stats.held = moments_of(x[:, :20], x[:, :20])
    assert strength(normal(1, 4, 10), stats, 0.01) == 0.0


# --- collecting ------------------------------------------------------------------------------------------------------


def test_rows_are_paired_with_those_of_the_reference(normal):
    x, x_float, lacks = normal(2, 12, 5).float(), normal(2, 12, 5).float(), normal(12, 3).float()
    moments = Moments()
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        moments.held = start == 8
        moments.reference = True
        moments.add("paired", x_float[:, part], 4)
        moments.add("lacking", x_float[:1, part], 4, paired=False)
        moments.reference = False
        moments.add("paired", x[:, part], 4)
        moments.add("lacking", x[:1, part], 4, paired=False, lacking=lacks[part])
    for name, expected in (("paired", moments_of(x, x_float)), ("lacking", moments_of(x[:1], x[:1], lacks))):
        stats = moments.stats(name)
        assert (stats.tokens, stats.held.tokens) == (12, 4)
        for found, wanted in ((stats.h_in, expected.h_in), (stats.cross, expected.cross), (stats.lacking, expected.lacking)):
            assert found is wanted is None or torch.allclose(found, wanted, atol=1e-6)
    held = moments_of(x[:, 8:], x_float[:, 8:])
    assert moments.sums == {}
    assert held.cross.norm() > 0


OUTPUTS = {  # the layers whose output is added to the residual stream, and the norm that reads it in between
    "llama": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
    "opt": ("self_attn.out_proj", "fc2", "final_layer_norm"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "ln_2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """(name) -> a model: tiny Llama, trained, or an untrained one of another family."""
    made = {"llama": tiny_llama}

    def make(name):
        made[name] = made.get(name) or saved(CONFIGS[name], tmp_path_factory.mktemp("mismatch") / name)
        return made[name]

    return make


@pytest.fixture
def tokens(generator, monkeypatch):
    """16 sequences of 20 tokens, run two at a time."""
    monkeypatch.setattr(blocks, "BATCH_TOKENS", 40)
    return torch.randint(1, 64, (16, 20), generator=generator)


def followed(folder, tokens, inputs="both", precision=torch.float32):
    checkpoint = Checkpoint(folder, folder.name)
    return walk(checkpoint, checkpoint.skeleton(CPU), tokens, CPU, precision, inputs)


class Watched:
    """A whole model, and what flowed through a block's layers when it last ran."""

    def __init__(self, folder, name):
        self.model = reference(folder).eval()
        self.model.set_attn_implementation("eager")
        self.path, modules = blocks.decoder_list(self.model)
        self.first, self.second, norm = OUTPUTS[name]
        self.inputs = {f"{self.path}.{n}": watch_input(m) for n, m in layers(modules).items()}
        self.between = {f"{self.path}.{i}": watch_input(b.get_submodule(norm)) for i, b in enumerate(modules)}
        self.outputs = {f"{self.path}.{i}": watch(b) for i, b in enumerate(modules)}

    def run(self, tokens):
        for seen in (*self.inputs.values(), *self.between.values(), *self.outputs.values()):
            seen.clear()
        self.attention = self.model(tokens, output_attentions=True, use_cache=False).attentions
        return self

    def input(self, block, layer):
        """Rows of every sequence, (sequences, length, in)."""
        return self.inputs[f"{block.name}.{layer}"][0].double().flatten(0, -2).unflatten(0, (16, 20))

    def stream(self, block, layer):
        """The residual stream after the layer's output was added, (sequences, length, width); None where it is not."""
        seen = {self.first: self.between[block.name], self.second: self.outputs[block.name]}.get(layer)
        return None if seen is None else seen[0].double().flatten(0, -2).unflatten(0, (16, 20))

    def mixed(self, block, heads):
        """A X^T of every query head, those that share a value head one after the other, (heads, sequences, sharing * length, in)."""
        x = self.input(block, next(m.layer for m in block.matrices() if m.role == "value"))
        return (self.attention[block.index].double() @ x[:, None]).unflatten(1, (heads, -1)).transpose(0, 1).flatten(2, 3)


def check(stats, x, x_float, lacks):
    """Moments of the rows of all sequences, and of the last two of sixteen as held out."""
    for found, part in ((stats, slice(None)), (stats.held, slice(-2, None))):
        rows, rows_float = (t[..., part, :, :].flatten(-3, -2) for t in (x, x_float))
        rows, rows_float = (t if t.ndim == 3 else t[None] for t in (rows, rows_float))
        expected = moments_of(rows, rows_float, None if lacks is None else lacks[part].flatten(0, 1))
        for name in ("h_in", "cross", "lacking"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * expected.h_in.abs().max().item(), msg=name)


@torch.no_grad()
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_stage_meets_what_the_quantized_layers_before_it_send(name, folder, tokens):
    before, now = Watched(folder(name), name).run(tokens), Watched(folder(name), name)
    for block in followed(folder(name), tokens):
        solved, mismatched = [], 0.0
        for matrices, stats in stages(block, CROSS):
            assert set(stats) == {m.name for m in matrices}
            now.run(tokens)
            for matrix in matrices:
                x, x_float = (w.input(block, matrix.layer) for w in (now, before))
                t, t_float = (w.stream(block, matrix.layer) for w in (now, before))
                check(stats[matrix.name], x, x_float, None if t is None else t_float - t)
                mismatched += (x_float - x).norm().item()
            for matrix in matrices:
                matrix.weight().copy_(RTN()(matrix.weight(), None, Grid(2)).dequantize())
                solved.append(matrix.name)
            now.model.get_submodule(block.name).load_state_dict(block.module.state_dict())
        assert solved == [m.name for m in block.matrices()] and mismatched > 1
        now.run(tokens)
        for found, whole in ((block.hidden, now), (block.reference, before)):
            torch.testing.assert_close(found.flatten(0, 1), whole.outputs[block.name][0], rtol=1e-3, atol=1e-3)
        assert (block.hidden - block.reference).norm() > 0.05 * block.reference.norm()
        assert not attention._observers and not hooks(block)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_are_compared_with_the_attention_of_the_unquantized_model(name, folder, tokens, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 7)
    before, now = Watched(folder(name), name).run(tokens), Watched(folder(name), name)
    for block in followed(folder(name), tokens):
        for matrices, stats in stages(block, CROSS | {"h_out"}):
            now.run(tokens)
            for matrix in matrices:
                if matrix.role == "value":
                    heads = stats[matrix.name].heads()
                    check(stats[matrix.name], now.mixed(block, heads), before.mixed(block, heads), None)
                    assert stats[matrix.name].tokens == tokens.numel()
                elif matrix.role:
                    assert stats[matrix.name].h_out is not None
                    check(stats[matrix.name], *(w.input(block, matrix.layer) for w in (now, before)), None)
                matrix.weight().copy_(RTN()(matrix.weight(), None, Grid(2)).dequantize())
            now.model.get_submodule(block.name).load_state_dict(block.module.state_dict())


def test_without_held_out_sequences_all_count_alike(folder, tokens):
    for needs in (CROSS, CROSS - {"held"}):
        block = next(followed(folder("llama"), tokens))
        found = next(stages(block, needs))[1]
        assert all((s.held is None) == ("held" not in needs) for s in found.values())


@torch.no_grad()
def test_norms_after_the_residual_read_no_stale_stream(folder, tokens, tmp_path):
    """OPT-350M normalises after adding, so the stream a layer is added to is read by no norm before it."""
    config = transformers.OPTConfig.from_dict(CONFIGS["opt"].to_dict() | {"do_layer_norm_before": False})
    made = saved(config, tmp_path / "post-norm")
    before, now = Watched(made, "opt").run(tokens), Watched(made, "opt")
    for block in followed(made, tokens):
        norms = [watch_input(now.model.get_submodule(f"{block.name}.{n}")) for n in ("self_attn_layer_norm", "final_layer_norm")]
        norms_before = [watch_input(before.model.get_submodule(f"{block.name}.{n}")) for n in ("self_attn_layer_norm", "final_layer_norm")]
        before.run(tokens)
        for matrices, stats in stages(block, CROSS):
            for seen in norms:
                seen.clear()
            now.run(tokens)
            for matrix in matrices:
                x, x_float = (w.input(block, matrix.layer) for w in (now, before))
                lacks = None
                if stats[matrix.name].lacking is not None:
                    which = ("self_attn.out_proj", "fc2").index(matrix.layer)
                    lacks = (norms_before[which][0] - norms[which][0]).double().flatten(0, -2).unflatten(0, (16, 20))
                check(stats[matrix.name], x, x_float, lacks)
                matrix.weight().copy_(RTN()(matrix.weight(), None, Grid(2)).dequantize())
            now.model.get_submodule(block.name).load_state_dict(block.module.state_dict())


def hooks(block):
    return [m for m in block.module.modules() if m._forward_pre_hooks or m._forward_hooks]


@torch.no_grad()
@pytest.mark.parametrize("needs", [CROSS, CROSS | {"h_out", "mlp_rows"}], ids=["inputs", "heads"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_stages_left_early_leave_no_trace(name, needs, folder, tokens):
    for taken in range(1, 6):
        block = next(followed(folder(name), tokens))
        running = stages(block, needs)
        reached = len([None for _ in zip(range(taken), running, strict=False)])
        running.close()
        assert reached == min(taken, 4)
        assert not attention._observers and not hooks(block)


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_trace(folder, tokens, monkeypatch):
    block = next(followed(folder("llama"), tokens))
    running = stages(block, CROSS | {"h_out", "mlp_rows"})
    next(running)
    monkeypatch.setattr(block.module.mlp, "forward", lambda x: x[:, :, :3])
    with pytest.raises(RuntimeError):
        list(running)
    assert not attention._observers and not hooks(block)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_unquantized_stream_must_be_followed(inputs, folder, tokens):
    block = next(followed(folder("llama"), tokens, inputs))
    with pytest.raises(UserError, match="not followed"):
        next(stages(block, CROSS))


def test_held_out_sequences_need_others(folder, tokens):
    block = next(followed(folder("llama"), tokens[:1]))
    with pytest.raises(UserError, match="more calibration sequences"):
        next(stages(block, CROSS))


# --- who must win ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized_in_stages(folder, tokens, solver, grid):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in followed(folder, tokens):
        for matrices, stats in stages(block, solver.needs):
            for matrix in matrices:
                matrix.weight().copy_(solver(matrix.weight(), stats[matrix.name], grid).dequantize())
        model.get_submodule(block.name).load_state_dict(block.module.state_dict())
    return model


def test_correcting_for_the_mismatch_lowers_the_perplexity(tiny_llama, train_tokens, test_tokens, quantized, perplexity):
    grid, calibration = Grid(2), train_tokens[:128]
    plain = perplexity(quantized(tiny_llama, calibration, GPTQ(), grid), test_tokens)
    inputs, residual = (
        perplexity(quantized_in_stages(tiny_llama, calibration, GPTQ(mismatch=m), grid), test_tokens) for m in ("inputs", "residual")
    )
    assert max(inputs, residual) < 0.985 * plain
