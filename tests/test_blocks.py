"""Walking a model and collecting statistics, on an untrained model of every family whose attention is known."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.errors import UserError
from smidgen.quant import attention, blocks
from smidgen.quant.blocks import decoder_list
from smidgen.quant.checkpoint import Checkpoint
from smidgen.quant.collect import collect
from smidgen.quant.families import FAMILIES

ALL = frozenset({"h_in", "h_out"})
WIDTH, HEADS, DIM, LENGTH = 32, 4, 8, 20
COMMON = dict(
    vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
GQA = COMMON | dict(num_key_value_heads=2)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
SLIDING = ["full_attention", "sliding_attention"]
CONFIGS = {
    "llama": transformers.LlamaConfig(**GQA),
    "llama-mha": transformers.LlamaConfig(**COMMON, num_key_value_heads=HEADS, attention_bias=True),
    "llama-yarn": transformers.LlamaConfig(**GQA, rope_parameters=YARN),
    "mistral": transformers.MistralConfig(**GQA, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=6, layer_types=SLIDING),
    "qwen3": transformers.Qwen3Config(**GQA, head_dim=DIM),
    "smollm3": transformers.SmolLM3Config(**GQA, no_rope_layers=[1, 0]),
    "gemma3_text": transformers.Gemma3TextConfig(
        **GQA, head_dim=DIM, query_pre_attn_scalar=DIM, sliding_window=6, layer_types=SLIDING,
    ),
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=48, num_hidden_layers=2, num_attention_heads=HEADS,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0, init_std=0.3,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=WIDTH, n_inner=48, n_layer=2, n_head=HEADS, n_positions=32,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON),  # not in the table: no attention-aware statistics
}  # fmt: skip
KNOWN = [name for name in CONFIGS if name != "gpt_neox"]
GAINS = {"qwen3": 0, "gemma3_text": 1}  # families with QK-norm: what is added to its weights
OUTPUT = {"opt": "out_proj", "gpt2": "c_proj"}  # the layer after attention, o_proj elsewhere


def saved(config, folder):
    """A model of this configuration with random weights, biases and gains."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    """As many sequences in a batch as fit, also where there are few."""
    monkeypatch.setattr(blocks, "BATCHES", 1)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(name) -> folder of the model."""
    made = {}

    def make(name):
        made[name] = made.get(name) or saved(CONFIGS[name], tmp_path_factory.mktemp("families") / name)
        return made[name]

    return make


@pytest.fixture
def tokens(generator):
    return torch.randint(1, 64, (6, LENGTH), generator=generator)


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def layers(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def watch(module):
    """What the module will have returned, call by call."""
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    return seen


def watch_input(module):
    """What the module will have been given, call by call."""
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    return seen


def is_real(module):
    return {not p.is_meta for p in module.parameters()} == {True}


def is_empty(module):
    return {p.is_meta for p in module.parameters()} == {True}


# --- the walk --------------------------------------------------------------------------------------------------------


def test_every_family_in_the_table_is_tested():
    assert {CONFIGS[name].model_type for name in KNOWN} == set(FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_one_after_another_are_the_model(name, family, tokens, blocks_of):
    model = reference(family(name))
    path, modules = decoder_list(model)
    inputs, outputs = [watch_input(module) for module in modules], watch(modules[-1])
    model(tokens, use_cache=False)
    for i, block in enumerate(blocks_of(family(name), tokens)):
        assert (block.name, block.index) == (f"{path}.{i}", i)
        torch.testing.assert_close(block.hidden.flatten(0, 1), inputs[i][0], rtol=1e-4, atol=1e-4)
        out = torch.cat([block.run(batch) for batch in block.hidden])
    torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [40, 45, 10_000])
def test_batching_changes_nothing(size, family, tokens, blocks_of, monkeypatch):
    whole = [b.hidden.flatten(0, 1).clone() for b in blocks_of(family("llama"), tokens)]
    monkeypatch.setattr(blocks, "BATCH_TOKENS", size)
    for block, expected in zip(blocks_of(family("llama"), tokens), whole, strict=True):
        assert block.hidden.shape == ((3, 2) if size < 100 else (1, 6)) + (LENGTH, WIDTH)
        torch.testing.assert_close(block.hidden.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("has_tokens", [False, True])
def test_only_one_block_has_weights_at_a_time(has_tokens, name, family, tokens):
    checkpoint = Checkpoint(family(name), name)
    cpu = torch.device("cpu")
    model = checkpoint.skeleton(cpu)
    _, modules = decoder_list(model)
    assert is_empty(model)
    for block in blocks.walk(checkpoint, model, tokens if has_tokens else None, cpu, torch.float32):
        assert is_real(modules[block.index])
        assert sum(p.numel() for p in model.parameters() if not p.is_meta) == sum(p.numel() for p in block.module.parameters())
    assert is_empty(model)


def test_walking_a_skeleton_leaves_the_checkpoints_others_alone(family, tokens):
    """An exporter traces its own while another is walked with attention that gathers statistics."""
    checkpoint = Checkpoint(family("llama"), "llama")
    cpu = torch.device("cpu")
    other = checkpoint.skeleton(cpu)
    before = other.config._attn_implementation
    next(blocks.walk(checkpoint, checkpoint.skeleton(cpu), tokens, cpu, torch.float32))
    assert other.config._attn_implementation == before != attention.NAME
    assert checkpoint.skeleton(cpu).config._attn_implementation == before


def test_every_weight_is_read_once(family, tokens, blocks_of, monkeypatch):
    read = []
    original = Checkpoint.read

    def recording(*args):
        found = original(*args)
        read.extend(found)
        return found

    monkeypatch.setattr(Checkpoint, "read", recording)
    list(blocks_of(family("llama"), tokens))
    assert sorted(read) == sorted(n for n, _ in reference(family("llama")).named_parameters() if n != "lm_head.weight")


@torch.no_grad()
def test_what_is_done_to_a_block_flows_into_the_next(family, tokens, blocks_of):
    model = reference(family("llama"))
    seen = watch_input(model.model.layers[1])
    for matrix in layers(model.model.layers[0]).values():
        matrix.weight.mul_(0.5)
    model(tokens)
    for block in blocks_of(family("llama"), tokens):
        if block.index == 1:
            torch.testing.assert_close(block.hidden.flatten(0, 1), seen[0], rtol=1e-4, atol=1e-4)
        for matrix in block.matrices():
            matrix.weight().mul_(0.5)


def test_a_model_without_blocks_is_refused():
    class Single(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.Linear(3, 3)

    with pytest.raises(UserError, match="Single: no list of decoder blocks"):
        decoder_list(Single(transformers.LlamaConfig()))


# --- matrices --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_views_that_cover_every_linear_layer_once(name, family, blocks_of):
    for block in blocks_of(family(name), None):
        before = {n: m.weight.clone() for n, m in layers(block.module).items()}
        for matrix in block.matrices():
            matrix.weight().add_(1)
        for n, layer in layers(block.module).items():
            torch.testing.assert_close(layer.weight, before[n] + 1)
        roles = [m.role for m in block.matrices() if m.role]
        assert sorted(roles) == ([] if name == "gpt_neox" else ["key", "query", "value"])


@torch.no_grad()
def test_fused_rows_are_query_key_and_value(family, blocks_of):
    block = next(iter(blocks_of(family("gpt2"), None)))
    parts = {m.role: m for m in block.matrices() if m.role}
    assert [m.name for m in parts.values()] == ["attn.c_attn[query]", "attn.c_attn[key]", "attn.c_attn[value]"]
    x = torch.randn(3, WIDTH)
    layer = block.module.attn.c_attn
    for part, out in zip(parts.values(), layer(x).split(WIDTH, -1), strict=True):
        torch.testing.assert_close(x @ part.weight().T + layer.bias[part.rows], out)


# --- statistics of inputs --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("needs", [frozenset({"h_in"}), ALL], ids=["h_in", "all"])
@pytest.mark.parametrize("name", KNOWN)
def test_h_in_is_the_second_moment_of_every_layers_input(name, needs, family, tokens, blocks_of):
    model = reference(family(name))
    path, modules = decoder_list(model)
    inputs = {n: watch_input(layer) for n, layer in layers(modules).items()}
    model(tokens)
    for block in blocks_of(family(name), tokens):
        stats = collect(block, needs)
        assert set(stats) == {m.name for m in block.matrices()}
        for matrix in block.matrices():
            x = inputs[f"{block.index}.{matrix.layer}"][0].double().flatten(0, -2)
            if "h_out" not in needs or matrix.role != "value":  # values have attention-weighted inputs
                torch.testing.assert_close(stats[matrix.name].h_in[0].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
            if "h_out" not in needs or matrix.role not in ("query", "key"):
                assert stats[matrix.name].h_out is None
            assert stats[matrix.name].tokens == tokens.numel()


def test_an_unknown_family_has_inputs_but_no_heads(family, tokens, blocks_of):
    block = next(iter(blocks_of(family("gpt_neox"), tokens)))
    assert set(collect(block, frozenset({"h_in"}))) == set(layers(block.module))
    with pytest.raises(UserError, match="not known for this family"):
        collect(block, ALL)


def test_no_needs_cost_nothing(family, blocks_of):
    block = next(iter(blocks_of(family("llama"), None)))
    assert collect(block, frozenset()) == {}


def test_a_layer_that_never_ran_is_named(family, tokens, blocks_of):
    block = next(iter(blocks_of(family("llama"), tokens)))
    block.module.mlp.expert = nn.Linear(3, 3)
    with pytest.raises(UserError, match="mlp.expert was never called"):
        collect(block, frozenset({"h_in"}))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_data_twice_gives_the_same_statistics(name, family, tokens, blocks_of):
    once, twice = (collect(next(iter(blocks_of(family(name), t))), ALL) for t in (tokens, tokens.repeat(2, 1)))
    for layer in once:
        torch.testing.assert_close(once[layer].h_in, twice[layer].h_in)
        if once[layer].h_out is not None:
            torch.testing.assert_close(once[layer].h_out, twice[layer].h_out)


def test_bfloat16_passes_give_nearly_the_same_statistics(family, tokens, blocks_of):
    exact, rough = (collect(next(iter(blocks_of(family("llama"), tokens, p))), ALL) for p in (torch.float32, torch.bfloat16))
    for layer in exact:
        for a, b in ((exact[layer].h_in, rough[layer].h_in), (exact[layer].h_out, rough[layer].h_out)):
            if a is not None:
                assert b.dtype == torch.float32
                assert 0 < (a - b).norm() < 0.02 * a.norm()


def test_collecting_leaves_no_trace(family, tokens, blocks_of, monkeypatch):
    block = next(iter(blocks_of(family("llama"), tokens)))
    before = {n: p.clone() for n, p in block.module.named_parameters()}
    hidden = block.hidden.clone()
    collect(block, ALL)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(block.module.mlp, "forward", lambda x: x[:, :, :3])
        collect(block, ALL)
    assert all(torch.equal(p, before[n]) for n, p in block.module.named_parameters()) and torch.equal(block.hidden, hidden)
    assert not any(m._forward_pre_hooks for m in block.module.modules()) and not attention._observers


# --- statistics of heads ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_being_observed_changes_no_output(name, family, tokens, blocks_of, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 7)
    for block in blocks_of(family(name), tokens):
        outputs = watch(block.module)
        collect(block, ALL)
        block.run(block.hidden[0])
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
def test_attention_as_used_never_looks_ahead(name, family, tokens, blocks_of, monkeypatch):
    seen = []
    original = attention.probabilities

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(attention, "probabilities", recording)
    monkeypatch.setattr(attention, "QUERIES", 7)
    for block in blocks_of(family(name), tokens):
        seen.clear()
        collect(block, ALL)
        assert [a.shape[3] for a in seen] == [7, 7, 6]
        for a, start in zip(seen, (0, 7, 14), strict=True):
            window = 6 if name == "mistral" or (name in ("qwen2", "gemma3_text") and block.index == 1) else LENGTH
            query, key = torch.arange(start, start + a.shape[3])[:, None], torch.arange(a.shape[4])
            allowed = (key <= query) & (key > query - window)
            assert not a[..., ~allowed].any() and bool((a[..., allowed] > 0).all())
            torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:4]))


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_later_tokens_change_nothing_earlier(name, family, tokens, blocks_of):
    block = next(iter(blocks_of(family(name), tokens)))
    before = block.run(block.hidden[0])
    changed = block.hidden[0].clone()
    changed[:, 12:] = changed[:, 12:].flip(1)
    after = block.run(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert (after[:, 12:] - before[:, 12:]).abs().max() > 0.1


def record(monkeypatch):
    """Queries and keys as attention reads them, of every batch."""
    seen = []
    original = attention.HeadMoments.observe

    def observe(self, q, k, *args):
        seen.append((q.double(), k.double()))
        return original(self, q, k, *args)

    monkeypatch.setattr(attention.HeadMoments, "observe", observe)
    return seen


def matrix_of(block, role):
    return next(m for m in block.matrices() if m.role == role)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in KNOWN if n not in GAINS])
@pytest.mark.parametrize("role", ["query", "key"])
def test_query_and_key_losses_are_the_change_of_the_scores(role, name, family, tokens, blocks_of, monkeypatch):
    """Exact for a sequence of one token repeated: then averaging both factors apart loses nothing, at any rotary angle."""
    seen = record(monkeypatch)
    for block in blocks_of(family(name), tokens):
        inputs = block.hidden
        block.hidden = inputs[:1, :1, 3:4].expand(inputs.shape).contiguous()
        stats = collect(block, ALL)
        matrix = matrix_of(block, role)
        w = matrix.weight()
        dw = 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        w.add_(dw)
        collect(block, ALL)
        w.sub_(dw)
        block.hidden = inputs
        (q0, k0), (q1, k1) = seen[-2:]
        sharing = q0.shape[1] // k0.shape[1]
        before, after = (q @ k.repeat_interleave(sharing, 1).mT for q, k in ((q0, k0), (q1, k1)))
        change = (after - before).square().sum().item() / len(before) / LENGTH**2
        change *= DIM if name == "opt" and role == "query" else 1  # OPT scales its queries by dim^-1/2 beforehand
        change /= sharing if role == "key" else 1  # the mean of the queries that share a key
        assert stats[matrix.name].loss(dw) == pytest.approx(change, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", GAINS)
def test_row_factors_are_second_moments_seen_through_rotation_and_gain(name, family, tokens, blocks_of, monkeypatch):
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    seen = record(monkeypatch)
    for block in blocks_of(family(name), tokens):
        stats = collect(block, ALL)
        q, k = seen[-1]
        cos, sin = (t.double() for t in block.arguments["position_embeddings"])
        unit = torch.eye(DIM, dtype=torch.float64)[:, None, None].expand(DIM, 1, LENGTH, DIM)
        r = apply_rotary_pos_emb(unit, unit, cos, sin)[0][:, 0].permute(1, 2, 0)  # (length, dim, dim)
        own = block.module.self_attn
        gains = {"query": own.q_norm.weight.double() + GAINS[name], "key": own.k_norm.weight.double() + GAINS[name]}
        for role, other, heads in (("query", k.repeat_interleave(2, 1), HEADS), ("key", q.unflatten(1, (2, 2)), 2)):
            for h in range(heads):
                rows = other[:, h].reshape(-1, DIM)
                m = rows.T @ rows / len(rows)
                expected = sum(r[t].T @ m @ r[t] for t in range(LENGTH)) / LENGTH * gains[role][:, None] * gains[role]
                found = stats[matrix_of(block, role).name].h_out[h].double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_value_loss_is_the_change_of_the_attention_output(name, family, tokens, blocks_of):
    for block in blocks_of(family(name), tokens):
        stats = collect(block, ALL)
        matrix = matrix_of(block, "value")
        outputs = watch_input(block.module.get_submodule(block.family.attention.module).get_submodule(OUTPUT.get(name, "o_proj")))
        w = matrix.weight()
        dw = 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
        block.run(block.hidden[0])
        w.add_(dw)
        block.run(block.hidden[0])
        w.sub_(dw)
        change = (outputs[1].double() - outputs[0].double()).square().sum().item() / tokens.numel()
        sharing = HEADS * DIM // len(w)  # the mean of the query heads that share a value head
        assert stats[matrix.name].loss(dw) * sharing == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_forming_attention_in_pieces_changes_nothing(chunk, family, tokens, blocks_of, monkeypatch):
    block = next(iter(blocks_of(family("llama"), tokens)))
    monkeypatch.setattr(attention, "QUERIES", 1000)
    whole = collect(block, ALL)["self_attn.v_proj"].h_in
    monkeypatch.setattr(attention, "QUERIES", chunk)
    torch.testing.assert_close(collect(block, ALL)["self_attn.v_proj"].h_in, whole)


@torch.no_grad()
def test_copied_key_value_heads_give_the_statistics_of_shared_ones(family, tokens, blocks_of, tmp_path):
    shared = reference(family("llama"))
    copied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, num_key_value_heads=HEADS))
    state = shared.state_dict()
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].unflatten(0, (2, DIM)).repeat_interleave(2, 0).flatten(0, 1)
    copied.load_state_dict(state)
    copied.save_pretrained(tmp_path / "copied")
    for few, many in zip(blocks_of(family("llama"), tokens), blocks_of(tmp_path / "copied", tokens), strict=True):
        few, many = collect(few, ALL), collect(many, ALL)
        query, key, value = (f"self_attn.{n}_proj" for n in "qkv")
        torch.testing.assert_close(few[query].h_out, many[query].h_out)
        torch.testing.assert_close(few[key].h_out, many[key].h_out.unflatten(0, (2, 2)).mean(1))
        torch.testing.assert_close(few[value].h_in, many[value].h_in.unflatten(0, (2, 2)).mean(1))
