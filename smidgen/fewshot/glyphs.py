"""Characters of many scripts, rendered from the fonts that come with matplotlib: images to meta-learn from without any download.

A class is a character, its images are that character in several fonts (upright, slanted, bold; with serifs, without, of one width), each
shifted, turned, sheared, scaled and thickened a little: 28 x 28, grey, ink 255 on 0, like Omniglot. Alphabets are shared out, so that no
character of the test has been seen:

    train   Latin, Cyrillic, mathematical operators, arrows, Canadian syllabics
    val     Greek, digits
    test    Armenian, Georgian, Hebrew, Arabic, Lao

Two traps of such data. A font answers for a character it lacks with a box: the characters of a font are read from its character map, and
matplotlib's LastResort font, whose map holds every script as boxes, is not among the fonts. And scripts share shapes (A, Greek alpha and
Cyrillic a): of characters that look the same in DejaVu Sans (their images, brought to one size, correlate above SAME) only the first
stays, in the order above, so that a shape of the training part is in no later one; upper and lower case of one shape are one class too.
"""

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from smidgen.errors import UserError
from smidgen.images import Images

Split = Literal["train", "val", "test"]
SIZE = 28
COPIES = 20  # images of a character, as in Omniglot
LARGE = 64  # a character is drawn this high, then brought to SIZE
SAME = 0.92
FONTS = tuple(f"DejaVu{f}" for f in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")) + tuple(
    f"DejaVu{f}" for f in ("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic", "SansMono", "SansMono-Bold", "SansMono-Oblique")
)  # fmt: skip
FONTS += ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")


@dataclass(frozen=True)
class Alphabet:
    """A script, and where Unicode has its characters."""

    name: str
    split: Split
    ranges: tuple[tuple[int, int], ...]
    categories: tuple[str, ...] = ("Lu", "Ll", "Lo")
    "Unicode's, of the characters that count."


ALPHABETS = (
    Alphabet(
        "Latin", "train", ((0x41, 0x5A), (0x61, 0x7A), (0xC6, 0xC6), (0xD0, 0xD0), (0xD8, 0xD8), (0xDE, 0xDF), (0xE6, 0xE6), (0xF0, 0xF0))
    ),
    Alphabet("Cyrillic", "train", ((0x402, 0x40B), (0x40F, 0x418), (0x41A, 0x438), (0x43A, 0x44F), (0x462, 0x475))),
    Alphabet("Mathematics", "train", ((0x2200, 0x22FF),), ("Sm",)),
    Alphabet("Arrows", "train", ((0x2190, 0x21FF),), ("Sm", "So")),
    Alphabet("Syllabics", "train", ((0x1401, 0x1676),)),
    Alphabet("Greek", "val", ((0x391, 0x3A9), (0x3B1, 0x3C9), (0x3D0, 0x3E1))),
    Alphabet("Digits", "val", ((0x30, 0x39),), ("Nd",)),
    Alphabet("Armenian", "test", ((0x531, 0x556), (0x561, 0x587))),
    Alphabet("Georgian", "test", ((0x10A0, 0x10C5), (0x10D0, 0x10F6))),
    Alphabet("Hebrew", "test", ((0x5D0, 0x5EA),)),
    Alphabet("Arabic", "test", ((0x621, 0x64A), (0x671, 0x6D3))),
    Alphabet("Lao", "test", ((0xE81, 0xEDF),)),
)


@lru_cache
def glyphs(split: str = "train", copies: int = COPIES, seed: int = 0) -> Images:
    """The characters of a split; the same ones whatever was asked before."""
    if split not in ("train", "val", "test"):
        raise UserError(f"glyphs has no split {split!r}; it has train, val, test")
    if copies < 1:
        raise UserError(f"a character needs at least one image, got {copies}")
    chosen = [(alphabet, c) for alphabet, c in characters() if alphabet.split == split]
    pixels = np.empty((len(chosen), copies, SIZE, SIZE), np.uint8)
    for row, (_, character) in zip(pixels, chosen, strict=True):
        random = np.random.default_rng([seed, ord(character)])
        fonts = [font for font in FONTS if ord(character) in _map(font)]
        order = random.permutation(len(fonts))
        for i in range(copies):
            row[i] = distorted(_drawn(character, fonts[order[i % len(fonts)]]), random)
    labels = torch.arange(len(chosen)).repeat_interleave(copies)
    names = tuple(f"{alphabet.name}/{unicodedata.name(c).lower()}" for alphabet, c in chosen)
    return Images(f"glyphs:{split}", torch.from_numpy(pixels.reshape(-1, SIZE, SIZE, 1)), labels, names)


@lru_cache
def characters() -> tuple[tuple[Alphabet, str], ...]:
    """All that the first font has and that look different from those before them."""
    kept: list[tuple[Alphabet, str]] = []
    looks: list[np.ndarray] = []
    for alphabet in ALPHABETS:
        for code in (code for first, last in alphabet.ranges for code in range(first, last + 1)):
            if code not in _map(FONTS[0]) or unicodedata.category(chr(code)) not in alphabet.categories:
                continue
            look = _look(chr(code))
            if not looks or float((np.stack(looks) @ look).max()) < SAME:
                kept.append((alphabet, chr(code)))
                looks.append(look)
    return tuple(kept)


def _look(character: str) -> Float32[np.ndarray, "pixels"]:
    """The shape alone: stretched to one size, blurred, mean 0, norm 1, so that a product of two is their correlation."""
    image = _drawn(character, FONTS[0])
    small = np.asarray(image.crop(image.getbbox()).resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)


def distorted(image: Image.Image, random: np.random.Generator) -> UInt8[np.ndarray, "height width"]:
    """Centred and brought to SIZE, with about 15 % of variation in size and shift, 10 degrees in turn and slant."""
    left, top, right, bottom = image.getbbox() or (0, 0, LARGE, LARGE)
    turn, shear = random.normal(0, 0.1, 2).clip(-0.25, 0.25)
    width, height = (max(right - left, bottom - top, LARGE / 3) * 1.3 * random.uniform(0.9, 1.15, 2)).tolist()
    shift = random.uniform(-0.07, 0.07, 2) * (width, height)
    middle = np.array([(left + right) / 2, (top + bottom) / 2]) + shift
    inverse = np.array([[np.cos(turn), np.sin(turn) + shear], [-np.sin(turn), np.cos(turn)]]) @ np.diag([width / SIZE, height / SIZE])
    offset = middle - inverse @ (SIZE / 2, SIZE / 2)
    data = (*inverse[0].tolist(), float(offset[0]), *inverse[1].tolist(), float(offset[1]))
    ink = image.reduce(2) if width > 2 * SIZE else image  # what lies between the sampled points must not be lost
    factor = 2 if ink is not image else 1
    data = tuple(value / factor for value in data)
    small = np.asarray(ink.transform((SIZE, SIZE), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR), np.float32) / 255
    return (255 * (1.1 * small).clip(0, 1) ** random.uniform(0.7, 1.4)).astype(np.uint8)


@lru_cache(4096)
def _drawn(character: str, font: str) -> Image.Image:
    """Large, in the middle of an empty square."""
    image = Image.new("L", (2 * LARGE, 2 * LARGE))
    ImageDraw.Draw(image).text((LARGE, LARGE), character, fill=255, font=_font(font), anchor="mm")
    return image


@lru_cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_file(name)), LARGE, layout_engine=ImageFont.Layout.BASIC)


@lru_cache
def _map(name: str) -> frozenset[int]:
    """Characters a font has a shape for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(code for code, glyph in FT2Font(str(_file(name))).get_charmap().items() if glyph)


def _file(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
