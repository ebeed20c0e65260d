"""The proof: its arithmetic, and that it tells what helps from what does not."""

import math

import numpy as np
import pytest
import torch
from drawings import CLASSES, drawing

from smidgen.refine.cache import Cache
from smidgen.refine.classifier import Recipe, trained
from smidgen.refine.folder import View, untouched
from smidgen.refine.gate import Gain, compare, right

TINY = Recipe(side=16, width=8, steps=60, batch=32)


def test_gain_and_error_by_hand():
    generator = np.random.default_rng(0)
    before, after = (generator.integers(0, 2, (3, 7)).astype(np.float32) for _ in range(2))
    d = after.astype(float) - before
    by_image = sum((m - d.mean()) ** 2 for m in d.mean(0)) / 6 / 7
    by_seed = sum((m - d.mean()) ** 2 for m in d.mean(1)) / 2 / 3
    gain = compare(torch.from_numpy(before), torch.from_numpy(after))
    assert gain.gain == pytest.approx(d.mean()) and gain.error == pytest.approx(math.sqrt(by_image + by_seed))
    low, high = gain.interval
    assert (low + high) / 2 == pytest.approx(gain.gain) and high - low == pytest.approx(2 * 1.96 * gain.error)


def test_nothing_is_no_help():
    same = torch.ones(2, 5)
    assert not compare(same, same).helps and compare(same, same).error == 0
    worse = same.clone()
    worse[:, 0] = 0
    assert not compare(same, worse).helps and compare(worse.mT, same.mT).gain > 0


@pytest.mark.parametrize(("after", "helps"), [(0.48, False), (0.58, False), (0.6, False), (0.62, True)])
def test_a_gain_helps_if_it_is_above_its_standard_error(after, helps):
    assert Gain(0.5, after, 0.1).helps == helps


def drawn(each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    labels = [c for c in range(4) for _ in range(each)]
    view = View(tuple(drawing(CLASSES[c], generator) for c in labels), 1, TINY.side)
    return view(untouched(range(len(labels)), labels)), torch.tensor(labels)


def test_right_labels_help_and_wrong_ones_do_not(tmp_path):
    (x, y), (held_x, held_y) = drawn(20, 0), drawn(15, 1)
    wrong = y.clone()
    wrong[torch.arange(80) % 5 < 2] += 1  # 40%
    clean, noisy = (right(x, labels % 4, held_x, held_y, 4, TINY, range(2), Cache(tmp_path)) for labels in (y, wrong))
    assert compare(noisy, clean).helps and compare(noisy, clean).interval[0] > 0
    assert not compare(clean, noisy).helps


def test_what_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    x, y = drawn(4, 0)
    first = trained(x, y, 4, TINY, Cache(tmp_path), seed=0)
    monkeypatch.setattr("smidgen.refine.classifier.train", None)
    again = trained(x, y, 4, TINY, Cache(tmp_path), seed=0)
    assert torch.equal(first.probabilities(x), again.probabilities(x))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(TypeError):
        trained(x, y, 4, TINY, Cache(tmp_path), seed=0)  # a damaged file is made again
    with pytest.raises(TypeError):
        trained(x, y.flip(0), 4, TINY, Cache(tmp_path), seed=0)  # as is anything else


def test_seeds_fix_the_network(tmp_path):
    x, y = drawn(4, 0)
    short = Recipe(side=16, width=8, steps=10, batch=8)
    a, b, c = (trained(x, y, 4, short, Cache(tmp_path / str(i)), seed, moving=True).probabilities(x) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)
