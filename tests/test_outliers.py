"""Ranges that clip by what layers return, and factors of outlier channels alone."""

import math

import pytest
import torch

from smidgen.errors import UserError
from smidgen.quant.transforms.clip import searched
from smidgen.quant.transforms.outliers import Outliers, closed_form


def outlying() -> torch.Tensor:
    """64 tokens of 8 channels, one entry a hundred times the others."""
    u = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    u[5, 3] = 100.0
    return u


def reach(u: torch.Tensor, w: torch.Tensor, stands: torch.Tensor | None = None) -> tuple[float, float]:
    return searched(u, w, torch.ones(len(u)) if stands is None else stands, u.min(), u.max(), 8)


def test_what_the_layers_read_is_not_clipped():
    """Losing 96 of one entry costs more than steps of 0.4 for all of them."""
    assert reach(outlying(), torch.eye(8))[1] > 0.95


def test_what_no_layer_reads_is_clipped():
    w = torch.eye(8)
    w[:, 3] = 0
    low, high = reach(outlying(), w)
    assert high * 100 < 5 and low > 0.8


def test_tokens_count_as_often_as_they_stand_for_others():
    """The token of the outlier is one of its kind, every other stands for ten thousand: rounding those finely is worth more."""
    stands = torch.full((64,), 1e4)
    stands[5] = 1e-3
    assert reach(outlying(), torch.eye(8), stands)[1] * 100 < 10


def test_error_is_that_of_brute_force():
    """The ends found are at least as good as every pair of a fine grid, measured with plain rounding in float64."""
    u, w = outlying().clamp(max=6.0), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))

    def error(p: float, q: float) -> float:
        low, high = p * float(u.min()), q * float(u.max())
        scale = (high - low) / 15
        zero = round(-low / scale)
        codes = (u.double() / scale).round().add(zero).clamp(0, 15)
        return float((((codes - zero) * scale - u.double()) @ w.double().T).square().sum())

    found = searched(u, w, torch.ones(64), u.min(), u.max(), 4)
    best = min(error(p / 20, q / 20) for p in range(4, 21) for q in range(4, 21))
    assert error(*found) < 1.03 * best < 0.9 * error(1.0, 1.0)


def test_channels_within_the_threshold_keep_their_scale():
    a = closed_form(torch.tensor([1.0, 2.0, 16.0, 64.0]), 0.25)
    assert a.tolist() == pytest.approx([0, 0, 0, -math.log(4)])
    assert closed_form(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_thresholds_have_to_be_tried():
    with pytest.raises(UserError, match="at least one threshold"):
        Outliers(octaves=0)
