"""Transforms of images, by Pillow: what `smidgen refine` may make new images by, if the data says that labels survive it.

An operator is applied at a strength; strength 0 is the image itself, to the bit. Lengths are shares of the image's sides, so that a photo
and its small copy are changed alike. Where a transform uncovers the ground below, that has the colour of the image's border.

    rotate          degrees, either way             brightness, contrast   factor 1 + strength, either way
    shear_x, _y     shift per length, either way    sharpen, blur          unsharp mask; radius as a share of the longer side
    scale           share larger or smaller         noise                  standard deviation, of 1
    stretch         sides against each other        thick, thin            dark strokes grow or shrink; share of the longer side
    shift           share of the sides              flip_x, flip_y         left-right, up-down; no strength but 1
    perspective     how far corners move            tighten                margins without ink are cut off, down to 1 - strength of them
    elastic         how far a 4 x 4 grid's knots move
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

Colour = int | tuple[int, ...]
INK = 48  # grey levels from the border's colour that make a pixel ink


@dataclass(frozen=True)
class Operator:
    """A transform and the strengths that are tried."""

    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    strengths: tuple[float, ...]
    "Growing."
    signed: bool = True
    "Whether a strength may be negative, too."


@dataclass(frozen=True)
class Transform:
    """Operators one after the other; the same image, transform and seed give the same bytes."""

    steps: tuple[tuple[str, float], ...]
    "Operator and strength, signed."
    seed: int = 0
    "Of what operators draw."

    def __call__(self, image: Image.Image) -> Image.Image:
        """A new image of the same size and mode."""
        generator = np.random.default_rng(self.seed)
        for name, strength in self.steps:
            image = OPERATORS[name].apply(image, strength, generator) if strength else image
        return image

    def __str__(self) -> str:
        return "; ".join(f"{name} {strength:.4g}" for name, strength in self.steps)


def border(image: Image.Image) -> Colour:
    """The median colour of the pixels at the edge."""
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    median = np.median(edge, axis=0)
    return int(median) if median.ndim == 0 else tuple(int(v) for v in median)


# --- where pixels are ------------------------------------------------------------------------------------------------


def affine(image: Image.Image, matrix: tuple[tuple[float, float], tuple[float, float]], dx: float = 0.0, dy: float = 0.0) -> Image.Image:
    """Maps centred places p to matrix p + (dx, dy), in pixels."""
    (a, b), (c, d) = matrix
    determinant = a * d - b * c
    a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant  # Pillow asks where a pixel comes from
    x, y = image.width / 2, image.height / 2
    back = (a, b, x - a * (x + dx) - b * (y + dy), c, d, y - c * (x + dx) - d * (y + dy))
    return image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC, fillcolor=border(image))


def rotate(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """About the centre, counter-clockwise."""
    cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
    return affine(image, ((cos, sin), (-sin, cos)))


def shear_x(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Rows against each other."""
    return affine(image, ((1.0, strength), (0.0, 1.0)))


def shear_y(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Columns against each other."""
    return affine(image, ((1.0, 0.0), (strength, 1.0)))


def scale(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Larger, or smaller on more ground."""
    return affine(image, ((1 + strength, 0.0), (0.0, 1 + strength)))


def stretch(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Wider and lower, or the other way round; the area stays."""
    wider = math.sqrt(1 + strength) if strength > 0 else 1 / math.sqrt(1 - strength)
    return affine(image, ((wider, 0.0), (0.0, 1 / wider)))


def shift(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """In a drawn direction."""
    angle = generator.uniform(0, 2 * math.pi)
    return affine(image, ((1.0, 0.0), (0.0, 1.0)), strength * image.width * math.cos(angle), strength * image.height * math.sin(angle))


def perspective(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Corners move, each by its own draw."""
    w, h = image.size
    corners = np.array([(0, 0), (0, h), (w, h), (w, 0)], float)
    moved = corners + generator.uniform(-strength, strength, (4, 2)) * (w, h)
    quad = tuple(moved.ravel().tolist())
    return image.transform(image.size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC, fillcolor=border(image))


def elastic(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """The knots of a 4 x 4 grid move, those at the edge along with it; between them it is bilinear."""
    w, h = image.size
    xs, ys = np.meshgrid(np.linspace(0, w, 5), np.linspace(0, h, 5))
    mx = xs + generator.uniform(-strength, strength, xs.shape) * w
    my = ys + generator.uniform(-strength, strength, ys.shape) * h
    mesh = []
    for i in range(4):
        for j in range(4):
            box = (round(xs[i, j]), round(ys[i, j]), round(xs[i + 1, j + 1]), round(ys[i + 1, j + 1]))
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
            mesh.append((box, tuple(float(v) for corner in corners for v in (mx[corner], my[corner]))))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC, fillcolor=border(image))


def flip_x(image: Image.Image, _: float, __: np.random.Generator) -> Image.Image:
    """Left becomes right."""
    return ImageOps.mirror(image)


def flip_y(image: Image.Image, _: float, __: np.random.Generator) -> Image.Image:
    """Up becomes down."""
    return ImageOps.flip(image)


def tighten(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Cuts margins and enlarges what is inside."""
    box = ink(image)
    if box is None:
        return image
    w, h = image.size
    cut = (strength * box[0], strength * box[1], w - strength * (w - box[2]), h - strength * (h - box[3]))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=cut)


def ink(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of what differs from the border; none of an empty image."""
    ground = Image.new(image.mode, image.size, border(image))
    difference = np.asarray(ImageChops.difference(image, ground).convert("L"))
    return Image.fromarray(difference > INK).getbbox()


# --- what pixels are -------------------------------------------------------------------------------------------------


def brightness(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """All values times 1 + strength."""
    return ImageEnhance.Brightness(image).enhance(1 + strength)


def contrast(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Differences from the mean times 1 + strength."""
    return ImageEnhance.Contrast(image).enhance(1 + strength)


def sharpen(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Pillow's sharpness, 1 + strength."""
    return ImageEnhance.Sharpness(image).enhance(1 + strength)


def blur(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """Gaussian."""
    return image.filter(ImageFilter.GaussianBlur(strength * max(image.size)))


def noise(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Gaussian, of every value."""
    pixels = np.asarray(image).astype(np.float32)
    pixels = pixels + 255 * strength * generator.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def thick(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """The darkest of the neighbourhood."""
    return stroke(image, strength, ImageFilter.MinFilter)


def thin(image: Image.Image, strength: float, _: np.random.Generator) -> Image.Image:
    """The lightest of the neighbourhood."""
    return stroke(image, strength, ImageFilter.MaxFilter)


def stroke(image: Image.Image, strength: float, form: Callable[[int], ImageFilter.Filter]) -> Image.Image:
    """A filter whose radius is a share of the longer side, blended between whole pixels: small copies have radii below one."""
    radius = strength * max(image.size)
    lower = math.floor(radius)
    low = image.filter(form(2 * lower + 1)) if lower else image
    return Image.blend(low, image.filter(form(2 * lower + 3)), radius - lower)


OPERATORS = {
    "rotate": Operator(rotate, (5.0, 10.0, 15.0, 20.0, 30.0)),
    "shear_x": Operator(shear_x, (0.1, 0.2, 0.3)),
    "shear_y": Operator(shear_y, (0.1, 0.2, 0.3)),
    "scale": Operator(scale, (0.1, 0.2, 0.3)),
    "stretch": Operator(stretch, (0.2, 0.4, 0.7)),
    "shift": Operator(shift, (0.05, 0.1, 0.15)),
    "perspective": Operator(perspective, (0.05, 0.1, 0.15), signed=False),
    "elastic": Operator(elastic, (0.02, 0.04, 0.06), signed=False),
    "tighten": Operator(tighten, (0.3, 0.6, 0.9), signed=False),
    "flip_x": Operator(flip_x, (1.0,), signed=False),
    "flip_y": Operator(flip_y, (1.0,), signed=False),
    "brightness": Operator(brightness, (0.1, 0.2, 0.35)),
    "contrast": Operator(contrast, (0.15, 0.3, 0.5)),
    "sharpen": Operator(sharpen, (0.5, 1.0, 2.0), signed=False),
    "blur": Operator(blur, (0.004, 0.008, 0.015), signed=False),
    "noise": Operator(noise, (0.02, 0.05, 0.1), signed=False),
    "thick": Operator(thick, (0.004, 0.008, 0.015), signed=False),
    "thin": Operator(thin, (0.004, 0.008, 0.015), signed=False),
}
FLIPS = ("flip_x", "flip_y")
