"""Who is asked before an image is dropped, and how many go."""

import numpy as np
import torch

from smidgen.refine.decide import Judged, droppable
from smidgen.refine.detectors import Ensemble
from smidgen.refine.detectors.noise import undone
from smidgen.refine.evidence import Evidence


def judged(labels: list[int], wrong: list[float], hidden: list[float]) -> Judged:
    """Of these opinions; nothing else matters here."""
    y, none = np.array(labels), np.zeros(len(labels))
    return Judged(
        np.arange(len(y)), y, np.array(wrong), np.array(hidden), y, none, y, none > 0, none > 0, none > 0, {}, share=float(np.mean(wrong))
    )  # fmt: skip


def test_both_opinions_are_needed():
    found = droppable(judged([0] * 4, [0.9, 0.7, 0.4, 0.6], [0.6, 0.2, 0.9, 0.5]))
    assert found == [0, 3], "1: a hard picture, says the second; 2: not suspicious enough"


def test_no_more_of_a_class_than_are_wrong_in_it():
    found = droppable(judged([0] * 4 + [1] * 4, [0.6] * 4 + [0.9, 0.8, 0.0, 0.0], [1.0] * 8))
    assert [sum(i < 4 for i in found), sum(i >= 4 for i in found)] == [2, 2] and found[:2] == [4, 5], "2.4 and 1.7 are wrong"


def test_noise_is_undone():
    t = torch.tensor([[0.9, 0.2, 0.0], [0.1, 0.7, 0.3], [0.0, 0.1, 0.7]], dtype=torch.float64)
    true = torch.tensor([[0.5, 0.3, 0.2], [0.01, 0.98, 0.01]], dtype=torch.float64)
    assert torch.allclose(undone(true @ t.mT, t), true)
    impossible = undone(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), t)
    assert impossible.min() > 0 and abs(float(impossible.sum()) - 1) < 1e-12, "more of class 0 than the noise leaves"


def test_planted_errors_among_classes_apart_go_by_both_opinions():
    generator = torch.Generator().manual_seed(1)
    true = torch.arange(1000) % 5
    x = 10 * torch.eye(5, 8)[true] + torch.randn(1000, 8, generator=generator)  # so few dimensions that landmarks nearly repeat each other
    wrong = torch.rand(1000, generator=generator) < 0.2
    y = torch.where(wrong, (true + torch.randint(1, 5, (1000,), generator=generator)) % 5, true)
    found = Ensemble()(Evidence(x, y, 5))
    dropped = (found.wrong >= 0.5) & (found.hidden >= 0.5)
    assert float(dropped[wrong].float().mean()) > 0.95 and float(wrong[dropped].float().mean()) > 0.95
