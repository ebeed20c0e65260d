"""Characters rendered from matplotlib's fonts: what they are, that none is a box, and that parts share no shape."""

import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font

from smidgen.errors import UserError
from smidgen.fewshot import glyphs
from smidgen.fewshot.episodes import Sampler


@pytest.fixture(scope="module", params=["val", "test"])
def images(request):
    return glyphs.glyphs(request.param)


def test_what_a_set_is(images):
    n = len(images.classes)
    assert n >= 45 and len(set(images.classes)) == n
    assert images.pixels.shape == (20 * n, 28, 28, 1) and images.pixels.dtype == torch.uint8
    assert torch.bincount(images.labels).tolist() == [20] * n
    ink = images.pixels.float().mean((1, 2, 3)) / 255
    assert ink.min() > 0.01 and ink.max() < 0.6, "ink on an empty ground"
    assert images.pixels.flatten(1).unique(dim=0).shape[0] > 0.99 * len(images.pixels), "no image twice"
    assert Sampler(images, 5, 5, 15)(0).support_x.shape == (1, 25, 1, 28, 28)


def test_parts_hold_different_alphabets_and_shapes():
    parts = {split: [(a.name, c) for a, c in glyphs.characters() if a.split == split] for split in ("train", "val", "test")}
    assert all(len(parts[split]) > least for split, least in (("train", 700), ("val", 40), ("test", 250)))
    alphabets = [{name for name, _ in part} for part in parts.values()]
    assert not alphabets[0] & alphabets[1] and not alphabets[0] & alphabets[2] and not alphabets[1] & alphabets[2]
    assert {"A", "B"} <= {c for _, c in parts["train"]}
    everything = {c for part in parts.values() for _, c in part}
    assert not everything & {"\u0391", "\u0410"}, "alpha and Cyrillic a look like A"
    looks = np.stack([glyphs._look(c) for _, c in glyphs.characters()])
    alike = looks @ looks.T - 2 * np.eye(len(looks))
    assert alike.max() < glyphs.SAME


def test_no_character_is_the_box_of_a_missing_one():
    """FreeType's own answer; and the trap is real: the font of last resort claims scripts that no other font has."""
    fonts = {name: FT2Font(str(glyphs._file(name))) for name in glyphs.FONTS}
    for _, character in glyphs.characters():
        for name, font in fonts.items():
            assert (ord(character) in glyphs._map(name)) == (font.get_char_index(ord(character)) != 0)
    box = np.asarray(glyphs._drawn("\u13a0", "DejaVuSans"))  # Cherokee, which it lacks
    assert ord("\u13a0") not in glyphs._map("DejaVuSans") and box.any()
    assert not any(np.array_equal(box, np.asarray(glyphs._drawn(c, "DejaVuSans"))) for _, c in glyphs.characters())
    assert ord("\u13a0") in glyphs._map("LastResortHE-Regular") and "LastResortHE-Regular" not in glyphs.FONTS


def test_drawn_again_it_is_the_same():
    images = glyphs.glyphs("val")
    assert glyphs.glyphs("val") is images, "kept in memory"
    assert torch.equal(glyphs.glyphs.__wrapped__("val").pixels, images.pixels)
    assert torch.equal(glyphs.glyphs("val", 3).pixels.reshape(-1, 3, 28, 28), images.pixels.reshape(-1, 20, 28, 28)[:, :3])
    assert not torch.equal(glyphs.glyphs("val", seed=1).pixels, images.pixels)


def test_classes_can_be_learnt_but_not_for_nothing():
    """Nearest mean of raw pixels, 5-way 5-shot: far above chance, far below perfect, so there is something to learn."""
    sampler = Sampler(glyphs.glyphs("test"), 5, 5, 15)
    right = []
    for i in range(60):
        e = sampler(i)
        support, query = e.support_x[0].flatten(1), e.query_x[0].flatten(1)
        means = torch.stack([support[e.support_y[0] == c].mean(0) for c in range(5)])
        right.append((torch.cdist(query, means).argmin(1) == e.query_y[0]).float().mean().item())
    assert 0.6 < np.mean(right) < 0.95


def test_refusals():
    with pytest.raises(UserError, match="no split"):
        glyphs.glyphs("valid")
    with pytest.raises(UserError, match="at least one"):
        glyphs.glyphs("val", 0)
