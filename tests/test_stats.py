import pytest
import torch

from smidgen.errors import UserError
from smidgen.quant.attention import causal, probabilities, rotary_mean
from smidgen.quant.stats import TILE, Moments, Stats, add_gram, exact_products, symmetrize

CPU = torch.device("cpu")

# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_loss_is_the_kronecker_form_summed_over_heads(shared, normal, moments):
    e, h_in, h_out = normal(3 * 4, 7), moments(1 if shared else 3, 7), moments(3, 4)
    parts = e.view(3, 28)  # row-major: a weight's row is the slow index
    expected = sum(parts[i] @ torch.kron(h_out[i], h_in[0 if shared else i]) @ parts[i] for i in range(3))
    assert Stats(h_in, h_out).loss(e) == pytest.approx(expected.item())


def test_loss_without_row_factor_is_the_squared_change_of_the_outputs(normal):
    x, e = normal(50, 7), normal(12, 7)
    assert Stats((x.T @ x)[None]).loss(e) == pytest.approx((e @ x.T).square().sum().item())


def test_loss_with_an_h_in_per_head_gives_each_its_rows(normal):
    x, e = normal(3, 50, 7), normal(12, 7)
    stats = Stats(x.mT @ x)
    assert stats.heads() == 3
    assert stats.loss(e) == pytest.approx(sum((e[4 * i : 4 * i + 4] @ x[i].T).square().sum().item() for i in range(3)))


# --- second moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, TILE, TILE + 1, 2 * TILE + 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gram_is_x_transposed_x(dtype, width, normal):
    total = torch.zeros(width, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    parts = [normal(30, width).to(dtype) for _ in range(2)]
    for x in parts:
        add_gram(total, x)
    x = torch.cat(parts).double()
    found = symmetrize(total)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), x.T @ x, rtol=0, atol=1e-10 if dtype == torch.float64 else 2e-4)


def test_gram_is_not_rounded_by_autocast(normal):
    x, total = normal(30, 5).float(), torch.zeros(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        add_gram(total, x)
    torch.testing.assert_close(symmetrize(total).double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-5)


def test_exact_products_leave_the_precision_as_they_found_it():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), exact_products(True):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
        with exact_products(False):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- rotary angles ---------------------------------------------------------------------------------------------------


def tables(length, rotated, factor=1.0, first=0):
    """Cosines and sines as `transformers` passes them; with a `factor` as scaled variants (YaRN) do."""
    angles = torch.arange(first, first + length)[:, None] * 10.0 ** -torch.arange(rotated // 2, dtype=torch.float64)
    angles = torch.cat([angles, angles], -1)[None]
    return factor * angles.cos(), factor * angles.sin()


def rotated(x, cos, sin):
    """Llama's rotation of rows x at every position, x: (..., length, dim), the dims beyond the tables left as they are."""
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    half = torch.cat([-turned[..., n // 2 :], turned[..., : n // 2]], -1)
    return torch.cat([turned * cos[0] + half * sin[0], rest], -1)


def rotations(dim, cos, sin):
    """R_t of every position: what happens to each unit vector. (length, dim, dim)"""
    eye = torch.eye(dim, dtype=torch.float64)[:, None].expand(dim, cos.shape[1], dim)
    return rotated(eye, cos, sin).permute(1, 2, 0)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("factor", [1.0, 1.7])
@pytest.mark.parametrize("turning", [2, 4, 8], ids=["quarter", "half", "full"])
def test_rotary_mean_is_the_mean_over_positions(turning, factor, first, normal):
    m = normal(3, 8, 8)  # not even symmetric
    cos, sin = tables(11, turning, factor, first)
    r = rotations(8, cos, sin)
    brute = torch.stack([r[t].T @ m @ r[t] for t in range(11)]).mean(0)
    torch.testing.assert_close(rotary_mean(m, cos, sin), brute)


def test_rotations_are_those_of_transformers(normal):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = tables(11, 8)
    x = normal(1, 2, 11, 8)
    torch.testing.assert_close(rotated(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])
    torch.testing.assert_close(torch.einsum("tij,nhtj->nhti", rotations(8, cos, sin), x), rotated(x, cos, sin))


def test_one_sequence_makes_the_query_loss_the_change_of_the_scores(normal):
    x, k, dw = normal(20, 6), normal(20, 4), normal(4, 6)
    scores = (x @ dw.T) @ k.T  # before the softmax and without a mask
    stats = Stats((x.T @ x)[None], (k.T @ k)[None])
    assert stats.loss(dw) == pytest.approx(scores.square().sum().item())


def test_with_rotary_angles_the_query_loss_is_exact_over_all_shifts_of_the_tokens(normal):
    """The two factors are averaged apart, which is exact where every token meets every position."""
    length = 9
    x, k, dw = normal(length, 6), normal(length, 4), normal(4, 6)
    cos, sin = tables(length, 4)
    keys = rotated(k, cos, sin)
    change = sum((rotated(x.roll(shift, 0) @ dw.T, cos, sin) @ keys.T).square().sum() for shift in range(length))
    stats = Stats((x.T @ x / length)[None], rotary_mean((keys.T @ keys / length)[None], cos, sin))
    assert stats.loss(dw) * length**3 == pytest.approx(change.item())


# --- the attention matrix --------------------------------------------------------------------------------------------


def test_causal_mask_is_the_lower_triangle():
    triangle = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert torch.equal(causal(None, 5, CPU), triangle)
    window = triangle & ~triangle.tril(-3)
    assert torch.equal(causal(window, 5, CPU), window)


def test_a_mask_that_looks_ahead_is_refused():
    ahead = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    ahead[1, 0, 2, 3] = True
    with pytest.raises(UserError, match="not causal"):
        causal(ahead, 5, CPU)
    with pytest.raises(UserError, match="unknown kind"):
        causal(torch.zeros(1, 1, 5, 5), 5, CPU)


def test_probabilities_are_a_masked_softmax_for_each_query_head(normal):
    q, k = normal(2, 3, 2, 5, 4).float(), normal(2, 3, 5, 4).float()
    a = probabilities(q, k, causal(None, 5, CPU), 0.7)
    for t in range(5):
        scores = torch.einsum("bhgd,bhud->bhgu", q[..., t, :], k[:, :, : t + 1]) * 0.7
        torch.testing.assert_close(a[..., t, : t + 1], scores.softmax(-1))
        assert not a[..., t, t + 1 :].any()


def test_holding_rows_out_leaves_the_sums_of_all_rows_as_they_are():
    """To the last bit: statistics collected once must give the same integers as a direct run that holds nothing out."""
    torch.manual_seed(0)
    batches = [torch.randn(1, 500, 48) for _ in range(8)]
    plain, split = Moments(), Moments()
    for i, rows in enumerate(batches):
        split.held = i >= 6
        plain.add("x", rows, 500)
        split.add("x", rows, 500)
    whole, parts = plain.stats("x"), split.stats("x")
    assert whole.held is None and torch.equal(whole.h_in, parts.h_in)
    last = torch.cat(batches[6:], 1)[0].double()
    assert torch.allclose(parts.held.h_in[0].double(), last.T @ last / 1000, rtol=0, atol=1e-5)
    assert parts.held.tokens == 1000 and parts.tokens == 4000
