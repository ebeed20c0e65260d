"""Factors per channel: exact where nothing is quantized, learned through ranges, and gone after folding."""

import hashlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from test_blocks import CONFIGS, KNOWN, saved
from torch import nn

import smidgen.quant.transforms.alpha as alpha
from smidgen.errors import UserError
from smidgen.quant.activations import fix_ranges, search
from smidgen.quant.blocks import Block, decoder_list
from smidgen.quant.checkpoint import Checkpoint, load_model
from smidgen.quant.codes import static_layer
from smidgen.quant.families import Attention, Family, Fold
from smidgen.quant.linear import weight_of
from smidgen.quant.ranges import fake_quantize
from smidgen.quant.simulate import Activation, QuantLinear, Scheme, activations_of, set_mode, simulate
from smidgen.quant.transforms import equalize, smoothquant
from smidgen.quant.transforms.alpha import KINDS, adapted, check, legal, released
from smidgen.quant.transforms.equalize import Equalization
from smidgen.quant.transforms.factors import Factors, attach, calibrate, fold
from smidgen.quant.transforms.quadapter import Quadapter, centre, finetune
from smidgen.quant.transforms.smoothquant import SmoothQuant, smooth
from smidgen.run import Run

CPU = torch.device("cpu")
W8A8 = Scheme()
ALL = {
    "llama": ("norm", "heads", "product"),
    "qwen3": ("norm", "heads", "product"),
    "gpt2": ("norm", "heads"),
    "opt": ("norm", "heads", "relu"),
}
SHORT = Quadapter(steps=100, learning_rate=0.05, clip=False)


class Affine(nn.Module):
    """The second half of a LayerNorm."""

    def __init__(self, gain, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(gain), nn.Parameter(bias)

    def forward(self, h):
        return h * self.weight + self.bias


class Toy(nn.Module):
    """One norm and one layer; two channels of outliers."""

    def __init__(self, width=256, out=512):
        super().__init__()
        rng = np.random.default_rng(3)
        h = torch.tensor(rng.normal(size=(256, width))).float()
        self.h = nn.functional.pad(h, (0, out - width))  # a block's inputs are as wide as its outputs
        gain, bias = 1 + 0.1 * rng.normal(size=width), 0.1 * rng.normal(size=width)
        few = [5 % width, 77 % width]
        gain[few] *= 25
        bias[few[1]] += 8
        self.norm = Affine(torch.tensor(gain).float(), torch.tensor(bias).float())
        self.linear = nn.Linear(width, out, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor(0.02 * rng.normal(size=(width, out))).float().T.contiguous())

    def forward(self, h):
        return self.linear(self.normed(h))

    def normed(self, h):
        return self.norm(h[..., : len(self.norm.weight)])


TOY = Family(Attention("none", "q", "k", "v", "o"), (Fold("norm", ("linear",)),))


def toy(width=256, out=512, scheme=W8A8, double=False):
    module = Toy(width, out)
    if double:
        module.double()
    hidden = (module.h.double() if double else module.h)[None, None]
    return adapted(Block("toy", 0, module, hidden, {}, TOY, torch.float32), scheme, ("norm",))


def relative(block):
    return math.sqrt(block.error() / block.energy)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(name) -> folder of an untrained model with two channels of outliers after every norm."""
    made = {}

    def make(name):
        if name not in made:
            config = OTHERS[name] if name in OTHERS else CONFIGS[name]
            folder = saved(config, tmp_path_factory.mktemp("quadapter") / name)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for block in decoder_list(model)[1]:
                    for path, module in block.named_modules():
                        if ("norm" in path or path.startswith("ln_")) and len(module.weight) == model.config.hidden_size:
                            module.weight[[1, 6]] *= 20
            model.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


OTHERS = {
    "opt-gelu": transformers.OPTConfig.from_dict(CONFIGS["opt"].to_dict() | {"activation_function": "gelu"}),
    "opt-post-norm": transformers.OPTConfig.from_dict(CONFIGS["opt"].to_dict() | {"do_layer_norm_before": False}),
}


@pytest.fixture
def tokens(generator):
    return torch.randint(1, 64, (16, 20), generator=generator)


@pytest.fixture
def with_factors(family, generator):
    """(name, kinds) -> a simulated model with random factors at its sites, in double precision."""

    def make(name, kinds, scheme=W8A8, spread=0.7):
        model = load_model(family(name), torch.float32, CPU).double()
        check(model, kinds)
        layers = simulate(model, scheme)
        with alpha.bare(model, layers) as blocks:
            sites = {f"{b.name}.{f.before}": int(alpha.source_of(b, f).max()) + 1 for b in blocks for f in legal(b, kinds)}
        draw = {n: spread * torch.randn(k, generator=generator, dtype=torch.float64) for n, k in sites.items()}
        attach(model, layers, Factors({n: a - a.mean() for n, a in draw.items()}))
        return model, layers

    return make


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def observed(model, layers, tokens, how="min-max"):
    set_mode(layers, "observe")
    logits(model, tokens)
    fix_ranges(layers, how)


def hashed(model):
    """Of all parameters but factors and ranges."""
    names = [(n, p) for n, p in model.named_parameters() if not n.endswith(".alpha") and ".range." not in n]
    assert names
    return hashlib.sha256(b"".join(n.encode() + p.detach().contiguous().numpy().tobytes() for n, p in names)).hexdigest()


# --- sites -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_without_quantizers_factors_change_nothing(name, with_factors, family, tokens):
    model, layers = with_factors(name, ALL[name])
    before = logits(load_model(family(name), torch.float32, CPU).double(), tokens)
    for quant in layers.values():
        quant.quantized = False
    assert sum(q.alpha is not None for q in layers.values()) >= 3
    for quant in layers.values():
        factors = quant.factors()
        if factors is not None:
            torch.testing.assert_close(quant.scaled_weight() * factors, quant.weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-9, atol=1e-9)
    fold(model, layers, torch.float64)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "mode"), [(W8A8, "batch"), (Scheme(4, 6), "learned"), (Scheme(4, 8, group=8), "batch"), (W8A8, "token")]
)
@pytest.mark.parametrize("name", ALL)
def test_folded_is_unfolded_with_quantizers(name, scheme, mode, with_factors, tokens):
    model, layers = with_factors(name, ALL[name], scheme)
    observed(model, layers, tokens) if mode == "learned" else set_mode(layers, mode)
    unfolded = logits(model, tokens)
    fold(model, layers, torch.float64)
    assert all(q.alpha is None and q.source is None for q in layers.values())
    folded, largest = logits(model, tokens), float(unfolded.abs().max())
    apart = (folded - unfolded).abs()  # scales are float32, so a value on the border of two codes may change sides
    assert (apart > 1e-5 * largest).double().mean() < 0.01 and apart.max() < 0.05 * largest
    without, again = with_factors(name, ALL[name], scheme)  # negative control: factors do change what is rounded
    for quant in again.values():
        quant.alpha = None
    observed(without, again, tokens) if mode == "learned" else set_mode(again, mode)
    assert ((logits(without, tokens) - unfolded).abs() > 1e-3 * largest).double().mean() > 0.5


@torch.no_grad()
def test_weights_quantized_before_they_are_divided_do_not_fold(monkeypatch, with_factors, tokens):
    model, layers = with_factors("llama", ("norm",))
    set_mode(layers, "batch")

    def wrong(self):
        w = self.weight
        rounded = self._nearest(w[:, None]).flatten(1)
        return rounded if self.alpha is None else rounded / self.factors()

    with monkeypatch.context() as patch:
        patch.setattr(QuantLinear, "fake_weight", wrong)
        unfolded = logits(model, tokens)
    fold(model, layers, torch.float64)
    assert ((logits(model, tokens) - unfolded).abs() > 1e-3 * unfolded.abs().max()).double().mean() > 0.5


@torch.no_grad()
def test_folded_layers_can_be_exported_and_unfolded_ones_cannot(with_factors, tokens):
    model, layers = with_factors("gpt2", ("norm",))
    observed(model, layers, tokens)
    quant = layers["transformer.h.0.attn.c_attn"]
    with pytest.raises(UserError, match="folded"):
        static_layer(quant)
    fold(model, layers, torch.float64)
    static = static_layer(quant)
    torch.testing.assert_close(static.codes * static.scale[:, None], quant.fake_weight().float(), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_gains_are_folded_as_they_can_be_stored(with_factors, tokens):
    model, layers = with_factors("llama", ("norm",))
    for quant in layers.values():
        quant.quantized = False
    before = logits(model, tokens)
    fold(model, layers, torch.bfloat16)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-9, atol=1e-9)
    gain = model.model.layers[0].input_layernorm.weight
    torch.testing.assert_close(gain, gain.bfloat16().double(), rtol=1e-14, atol=0)


def test_grouped_heads_share_the_factors_of_their_values(with_factors):
    model, layers = with_factors("llama", ("heads",))
    out, attention = layers["model.layers.0.self_attn.o_proj"], model.model.layers[0].self_attn
    kv, dim = model.config.num_key_value_heads, attention.head_dim
    assert len(out.alpha) == kv * dim < out.weight.shape[1]
    torch.testing.assert_close(
        out.factors(), out.alpha.exp().view(kv, -1, dim).repeat_interleave(out.weight.shape[1] // (kv * dim), 0).flatten()
    )


def test_which_sites_a_family_has(family, blocks_of):
    for name in KNOWN:
        block = next(iter(blocks_of(family(name), None)))
        kinds = ALL["gpt2"] if name == "gpt2" else ALL["opt"] if name == "opt" else ALL["llama"]
        assert [alpha._kind(block, f) for f in legal(block, kinds)].count("norm") == 2
        assert len(legal(block, kinds)) == len(block.family.folds)
        assert not any("rope" in f.before or "q_proj" in f.before or "k_proj" in f.before for f in legal(block, kinds))


@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("gpt2", ("norm", "relu"), "GELU"),
        ("opt-gelu", ("relu",), "GELU"),
        ("opt-post-norm", ("norm",), "residual stream"),
        ("opt", ("product",), "not gated"),
        ("gpt2", ("norm", "head"), "tied to the embedding"),
        ("llama", ("head",), "not quantized"),
        ("llama", ("scores",), "choose among norm, heads, product, relu"),
        ("gpt_neox", ("norm",), "not known"),
    ],
)
def test_sites_that_cannot_be_folded_are_refused(name, kinds, words, family, tokens, tmp_path):
    checkpoint = Checkpoint(family(name), name)
    with Run("factors", W8A8, tmp_path / "run") as run, pytest.raises(UserError, match=words) as error:
        calibrate(checkpoint, checkpoint.skeleton(CPU), tokens, SHORT, W8A8, run, CPU, kinds)
    assert "\n" not in str(error.value)


def test_factors_of_another_model_are_refused(with_factors):
    model, layers = with_factors("llama", ("norm",))
    with pytest.raises(UserError, match="no such site"):
        attach(model, layers, Factors({"model.layers.9.input_layernorm": torch.zeros(4)}))
    with pytest.raises(UserError, match="4 factors"):
        attach(model, layers, Factors({"model.layers.0.input_layernorm": torch.zeros(4)}))


# --- a toy ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ones_are_plain_fake_quantization_to_the_bit():
    block = toy()
    x, w = block.block.module.normed(block.block.hidden[0]), block.layers["linear"].weight
    low, high = x.min(), x.max()
    scale = (high - low) / 255
    by_hand = fake_quantize(x, scale, (-low / scale).round(), 255)
    step = w.abs().amax(1, keepdim=True) / 127
    assert torch.equal(block.forward(block.block.hidden[0]), by_hand @ (step * (w / step).round().clamp(-127, 127)).T)


@torch.no_grad()
def test_doubling_all_factors_changes_no_bit():
    block = toy()
    (site,) = block.sites
    site.a.copy_(0.3 * torch.randn(256, generator=torch.Generator().manual_seed(0)))
    quant = block.layers["linear"]
    factors = site.a.exp()
    outputs = []
    for k in (1.0, 2.0):
        quant.factors = lambda k=k: k * factors
        outputs.append(block.forward(block.block.hidden[0]))
    assert torch.equal(*outputs)


def test_learned_factors_need_their_gradient_through_the_ranges(monkeypatch):
    block = toy()
    start = relative(block)
    assert start == pytest.approx(0.0720, abs=5e-5)
    errors = {}
    for t in SmoothQuant().migration:
        smooth(block, block.largest_inputs(), t)
        errors[t] = relative(block)
    assert min(errors, key=errors.__getitem__) == 0.6 and errors[0.5] == pytest.approx(0.0176, abs=1e-4)
    row = SmoothQuant()(block)
    assert row["migration"] == 0.6 and math.sqrt(row["error_before"] / block.energy) != start  # it had factors already
    assert relative(block) == errors[0.6]

    block = toy()
    SHORT(block)
    learned = relative(block)
    assert learned < 0.25 * start and learned <= 1.02 * min(errors.values())
    assert abs(float(block.sites[0].a.detach().mean())) < 1e-6

    block = toy()
    Quadapter(steps=40, learning_rate=0.02, init="smoothquant", clip=False)(block)
    assert relative(block) <= min(errors.values())

    within = Activation.within
    monkeypatch.setattr(Activation, "within", lambda self, x, low, high: within(self, x, low.detach(), high.detach()))
    block = toy()
    SHORT(block)
    assert relative(block) > 0.8 * start


def test_factors_gradient_is_the_closed_form():
    block = toy(24, 32, double=True)
    (site,) = block.sites
    quant = block.layers["linear"]
    generator = torch.Generator().manual_seed(0)
    a = 0.2 * torch.randn(24, generator=generator)
    site.a.data = a
    out = block.forward(block.block.hidden[0])[0]
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * g).sum().backward()

    x = block.block.module.normed(block.block.hidden[0][0]).detach()
    factors = a.exp().double()
    u, w = x * factors, (quant.weight.detach() / factors).double()
    low, high = u.min(), u.max()
    s = (high - low) / 255
    z = (-low / s).round()
    code = (u / s).round() + z
    inside, below = (code >= 0) & (code <= 255), code < 0
    q_u = s * (code.clamp(0, 255) - z)
    sw = w.abs().amax(1, keepdim=True) / 127
    q_w = sw * (w / sw).round()
    g_u, g_w = g @ q_w, g.T @ q_u
    e, d = (u / s).round() - u / s, z + low / s
    to_high = torch.where(inside, e / 255, torch.where(below, -d / 255, 1 - d / 255))
    to_low = torch.where(inside, -e / 255, torch.where(below, 1 + d / 255, d / 255))
    expected = (g_u * inside * u).sum(0) - (g_w * w).sum(0)
    expected[int(u.argmax()) % 24] += high * (g_u * to_high).sum()
    expected[int(u.argmin()) % 24] += low * (g_u * to_low).sum()
    e_w = (w / sw).round() - w / sw
    for o, j in enumerate(w.abs().argmax(1)):
        expected[j] -= w[o, j].abs() / 127 * (g_w[o] * e_w[o]).sum()
    torch.testing.assert_close(site.a.grad.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))  # scales are float32
    assert (torch.corrcoef(torch.stack([site.a.grad.double(), expected]))[0, 1]) > 0.999999


@torch.no_grad()
def test_closed_forms_by_hand():
    block = toy(4, 6)
    (site,) = block.sites
    w, x = block.layers["linear"].weight, block.block.module.normed(block.block.hidden[0])
    largest = block.largest_inputs()[0]
    assert largest.tolist() == x.abs().flatten(0, -2).amax(0).tolist()
    a = smoothquant.closed_form(site, largest, 0.7).exp()
    torch.testing.assert_close(a, w.abs().amax(0) ** 0.3 / largest**0.7)
    site.set(a.log())
    torch.testing.assert_close(site.a.exp(), a / a.log().mean().exp())
    with pytest.raises(UserError, match="norm is a norm"):
        Equalization()(block)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kinds"), [("llama", ("heads", "product")), ("gpt2", ("heads",)), ("opt", ("heads", "relu"))])
def test_equalization_makes_both_ranges_their_geometric_mean(name, kinds, family, tokens, blocks_of):
    block = next(iter(blocks_of(family(name), tokens)))
    one = adapted(block, W8A8, kinds)
    for site in one.sites:
        a = equalize.closed_form(site)
        rows = weight_of(site.producer)[-len(a) :].abs().amax(1) * a.exp()
        for j, largest in enumerate(rows):
            columns = site.consumers[0].weight[:, site.source == j] / a[j].exp()
            assert float(largest) == pytest.approx(float(columns.abs().max()), rel=1e-5)
    Equalization()(one)
    released(one)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_calibrated_lose_less_and_keep_their_weights(name, family, tokens, tmp_path):
    checkpoint = Checkpoint(family(name), name)
    whole = load_model(family(name), torch.float32, CPU)
    before, reference = hashed(whole), logits(whole, tokens)
    errors, smooth, learned = {}, SmoothQuant(), Quadapter(steps=25, learning_rate=0.05, init="smoothquant")
    for method in (Quadapter(steps=60, learning_rate=0.05), smooth, learned):
        with Run("factors", W8A8, tmp_path / str(len(errors))) as run:
            factors = calibrate(checkpoint, checkpoint.skeleton(CPU), tokens, method, W8A8, run, CPU)
        rows = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
        assert [r["block"] for r in rows] == [0, 1]
        assert all(r["error"] < 0.8 * r["error_before"] for r in rows)
        errors[method] = [r["error"] for r in rows]
    assert all(later <= first for first, later in zip(errors[smooth], errors[learned], strict=True))
    assert len(factors.a) == 4 and sum(a.numel() for a in factors.a.values()) == 4 * whole.config.hidden_size

    layers = simulate(whole, W8A8)
    attach(whole, layers, factors)
    assert hashed_bare(whole, layers) == before
    groups = finetune(whole, layers, 1e-3)
    assert {g["name"]: sum(p.numel() for p in g["params"]) for g in groups} == {
        "factors": 4 * whole.config.hidden_size, "ranges": 2 * len(list(activations_of(layers))) 
        + sum(len(q.weight) for q in layers.values()),
    }  # fmt: skip
    assert sum(p.requires_grad for p in whole.parameters()) == sum(len(g["params"]) for g in groups)
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (whole(tokens, use_cache=False).logits - reference).square().mean()
        loss.backward()
        assert all(p.grad is not None for g in groups for p in g["params"])
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    assert hashed_bare(whole, layers) == before  # after both phases
    end = logits(whole, tokens)
    factors = list({id(q.alpha): q.alpha for q in layers.values() if q.alpha is not None}.values())
    assert max(abs(float(a.detach().mean())) for a in factors) > 1e-4  # training moved the constant
    centre(layers)
    assert max(abs(float(a.detach().mean())) for a in factors) < 1e-6
    torch.testing.assert_close(logits(whole, tokens), end, rtol=0, atol=0.02 * float(end.abs().max()))
    fold(whole, layers, torch.float32)
    torch.testing.assert_close(logits(whole, tokens), end, rtol=0, atol=0.02 * float(end.abs().max()))
    assert hashed_bare(whole, layers) != before


def hashed_bare(model, layers):
    with alpha.bare(model, layers):
        return hashed(model)


def test_an_interrupted_calibration_goes_on_where_it_was(family, tokens, tmp_path):
    checkpoint = Checkpoint(family("llama"), "llama")
    method = Quadapter(steps=4)

    def factors(folder, method=method, text=tokens):
        with Run("factors", W8A8, tmp_path / folder) as run:
            return calibrate(checkpoint, checkpoint.skeleton(CPU), text, method, W8A8, run, CPU)

    class Interrupted(Quadapter):
        def __call__(self, block):
            if block.block.index == 1:
                raise KeyboardInterrupt
            return super().__call__(block)

        def __repr__(self):
            return repr(method)

    whole = factors("whole")
    with pytest.raises(KeyboardInterrupt):
        factors("parts", Interrupted(steps=4))
    first = tmp_path / "parts" / "factors" / "0.safetensors"
    written = first.stat().st_mtime_ns
    parts = factors("parts")
    assert first.stat().st_mtime_ns == written
    for kind in ("a", "low", "high"):
        one, other = vars(whole)[kind], vars(parts)[kind]
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    with pytest.raises(UserError, match="other options"):
        factors("parts", Quadapter(steps=5))
    with pytest.raises(UserError, match="other options"):
        factors("parts", text=tokens.flip(0))


def test_a_gain_of_zero_takes_no_factor_and_gains_are_rounded_before_ranges_are_read(family, tokens, blocks_of):
    block = next(iter(blocks_of(family("gpt2"), tokens)))
    block.module.ln_1.weight.data[3] = 0
    one = adapted(block, W8A8, ("norm",))
    Quadapter(steps=60, learning_rate=0.05)(one)
    site = one.sites[0]
    assert site.a[3] == 0 and (site.a[:3] != 0).all()
    site.store(torch.bfloat16)
    gain = (block.module.ln_1.weight * site.a.exp()).detach()
    torch.testing.assert_close(gain, gain.bfloat16().float(), rtol=1e-6, atol=0)
    released(one)
    assert not any(isinstance(m, QuantLinear) for m in block.module.modules())


def test_a_start_that_is_not_bettered_is_kept():
    block = toy(24, 32)
    start = relative(block)
    Quadapter(steps=20, learning_rate=50.0)(block)
    assert relative(block) <= start and not block.sites[0].a.any()


def test_ranges_per_token_calibrate_but_cannot_be_learned(family, tokens, tmp_path):
    checkpoint, scheme = Checkpoint(family("opt"), "opt"), Scheme(per_token=True)
    with Run("factors", scheme, tmp_path / "run") as run:
        factors = calibrate(checkpoint, checkpoint.skeleton(CPU), tokens, SmoothQuant((0.5,)), scheme, run, CPU, ALL["opt"])
    model = load_model(family("opt"), torch.float32, CPU)
    layers = simulate(model, scheme)
    attach(model, layers, factors)
    with pytest.raises(UserError, match="static ranges"):
        finetune(model, layers)


@pytest.mark.parametrize(
    "make", [lambda: Quadapter(steps=-1), lambda: Quadapter(learning_rate=0.0), lambda: SmoothQuant(()), lambda: SmoothQuant((2.0,))]
)
def test_options_out_of_range(make):
    with pytest.raises(UserError, match="--"):
        make()


# --- ranges ----------------------------------------------------------------------------------------------------------


def seen(x, bits=4):
    activation = Activation(bits)
    activation.mode = "observe"
    activation(x)
    return activation


def squares(x, low, high, bits=4):
    scale = (high - low) / (2**bits - 1)
    return float((fake_quantize(x, scale, (-low / scale).round(), 2**bits - 1) - x).square().mean())


@pytest.mark.parametrize("data", ["normal", "relu", "outliers", "lopsided"])
def test_search_finds_what_brute_force_finds(data, normal):
    x = normal(4000)
    x = {"normal": x, "relu": x.relu(), "outliers": torch.cat([x, torch.tensor([40.0, -25.0])]), "lopsided": x.exp()}[data]
    activation = seen(x.float())
    low, high = (end.double() for end in search(activation))
    ends = [(lo * x.min().clamp(max=0), hi * x.max()) for lo, hi in itertools.product(torch.linspace(0.02, 1, 50).double(), repeat=2)]
    least = min(squares(x, *pair) for pair in ends)
    plain = squares(x, x.min().clamp(max=0), x.max())
    assert squares(x, low, high) <= 1.02 * least
    assert squares(x, low, high) < {"normal": 1.0, "relu": 1.0, "outliers": 0.5, "lopsided": 0.7}[data] * plain


def test_an_extreme_the_sample_missed_still_weighs(monkeypatch, normal):
    x = normal(400_000).float()
    x[123_457] = 3000.0
    assert 3000.0 not in seen(x).sample[0]
    assert search(seen(x, 8))[1] > 1000  # clipping it would cost 3000^2 / 400000 = 22 a value
    missed = seen(x, 8)
    missed.high.fill_(float(missed.sample[0].max()))
    assert search(missed)[1] < 5


@torch.no_grad()
def test_fixed_ranges_are_those_observed_or_searched(with_factors, tokens):
    model, layers = with_factors("llama", ("norm",))
    with pytest.raises(UserError, match="not observed"):
        fix_ranges(layers, "min-max")
    for how in ("min-max", "mse"):
        set_mode(layers, "observe")
        logits(model, tokens)
        found = fix_ranges(layers, how)
        assert list(found) == [n for n, _ in activations_of(layers)]
        for name, activation in activations_of(layers):
            low, high = activation.range.ends()
            assert (float(low), float(high)) == pytest.approx(found[name], rel=1e-5) and activation.mode == "learned"
            assert (found[name] == (float(activation.low), float(activation.high))) or how == "mse"


def test_a_constant_has_a_range():
    for value in (0.0, 3.0):
        activation = seen(torch.full((64,), value))
        activation.fix(*search(activation))
        torch.testing.assert_close(activation(torch.full((2,), value)), torch.full((2,), value))


def test_every_kind_of_site_is_tried():
    assert set(itertools.chain(*ALL.values())) == set(KINDS)
