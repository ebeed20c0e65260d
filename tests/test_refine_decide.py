"""Who is asked before an image is dropped: the hidden-label model lets pictures between two classes stay."""

import pytest
import torch

from smidgen.refine.decide import DROP
from smidgen.refine.detectors import Ensemble
from smidgen.refine.detectors.noise import undone
from smidgen.refine.evidence import Evidence


def blurred(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels of five classes, two of which overlap, and which labels are wrong: a tenth, moved to any other class."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(1000) % 5
    centres = 6 * torch.eye(5, 8)
    centres[1] = centres[0] + torch.tensor([0, 0, 0, 0, 0, 2.0, 0, 0])
    x = centres[true] + torch.randn(1000, 8, generator=generator)
    wrong = torch.rand(1000, generator=generator) < 0.1
    return x, torch.where(wrong, (true + torch.randint(1, 5, (1000,), generator=generator)) % 5, true), wrong


def test_noise_is_undone():
    t = torch.tensor([[0.9, 0.2, 0.0], [0.1, 0.7, 0.3], [0.0, 0.1, 0.7]], dtype=torch.float64)
    true = torch.tensor([[0.5, 0.3, 0.2], [0.01, 0.98, 0.01]], dtype=torch.float64)
    assert torch.allclose(undone(true @ t.mT, t), true)
    impossible = undone(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), t)
    assert impossible.min() > 0 and abs(float(impossible.sum()) - 1) < 1e-12, "more of class 0 than the noise leaves"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_second_opinion_spares_hard_pictures(seed):
    x, y, wrong = blurred(seed)
    found = Ensemble()(Evidence(x, y, 5))
    suspicious = found.wrong >= DROP
    dropped = suspicious & (found.hidden >= DROP)
    assert 0.5 * int((suspicious & wrong).sum()) < int((dropped & wrong).sum())
    assert float(wrong[dropped].float().mean()) > float(wrong[suspicious].float().mean())
