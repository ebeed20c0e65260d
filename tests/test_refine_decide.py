"""Who is asked before an image is dropped, and how many go."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from smidgen.images import Images
from smidgen.refine.decide import Judged, Twins, decide, droppable
from smidgen.refine.detectors import Ensemble
from smidgen.refine.detectors.noise import undone
from smidgen.refine.evidence import Evidence
from smidgen.refine.folder import LEAST, Source


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


def source(labels: list[int]) -> Source:
    """As many images, of classes a and b."""
    y = torch.tensor(labels)
    return Source(Images("set", torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8), y, ("a", "b")), (), tuple(map(str, range(len(y)))))


@pytest.mark.parametrize(("confidence", "agree", "verdict"), [(0.8, True, "relabel"), (0.79, True, "keep"), (0.99, False, "keep")])
def test_a_label_is_changed_if_ensemble_and_judges_want_it(confidence, agree, verdict):
    labels = [0] * 8 + [1] * 8
    j = judged(labels, [0.0] * 16, [0.0] * 16)
    first = np.arange(16) == 3
    j = replace(j, proposed=np.where(first, 1, j.labels), confidence=np.where(first, confidence, 0.0), agree=first & agree)
    decision = decide(j, Twins(), ("clean",), source(labels))[3]
    assert (decision.verdict, decision.label) == (verdict, 1 if verdict == "relabel" else 0)
    assert decide(j, Twins(), ("value",), source(labels))[3].verdict == "keep", "another stage's business"


def test_of_twins_the_surest_stays_and_none_that_validation_has():
    labels = [0] * 16
    j = judged(labels, [0.1, 0.4, 0.2, *[0.0] * 13], [0.0] * 16)
    decisions = decide(j, Twins(((0, 1, 2),), {7: "val.png"}), ("clean",), source(labels))
    assert [row for row, d in decisions.items() if d.verdict == "duplicate"] == [1, 2, 7]
    assert decisions[1].reason == "the same picture as 0" and "val.png" in decisions[7].reason


def test_no_class_is_emptied():
    labels = [0] * (LEAST + 2) + [1] * 20
    j = judged(labels, [1.0] * len(labels), [1.0] * len(labels))
    kept = [j.labels[row] for row, d in decide(j, Twins(), ("value",), source(labels)).items() if d.verdict == "keep"]
    assert kept.count(0) == LEAST and kept.count(1) == LEAST


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
