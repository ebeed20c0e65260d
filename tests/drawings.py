"""Small drawings whose classes are known: what tests of `smidgen refine` are made of."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("cross", "dash", "left", "right")  # a mirror makes left of right, and nothing of the others
SIZE = (44, 36)


def drawing(name: str, generator: np.random.Generator, size: tuple[int, int] = SIZE) -> Image.Image:
    """Dark strokes on light ground, each a little different."""
    w, h = size
    image = Image.new("L", size, int(generator.integers(215, 250)))
    draw = ImageDraw.Draw(image)
    cx, cy = w / 2 + generator.uniform(-0.06, 0.06) * w, h / 2 + generator.uniform(-0.06, 0.06) * h
    r, ink, width = generator.uniform(0.24, 0.34) * min(size), int(generator.integers(10, 70)), int(generator.integers(2, 5))

    def line(*points: tuple[float, float]) -> None:
        shaken = [(cx + r * (x + generator.normal(0, 0.06)), cy + r * (y + generator.normal(0, 0.06))) for x, y in points]
        draw.line(shaken, fill=ink, width=width)

    if name == "cross":
        line((-1, -1), (1, 1))
        line((-1, 1), (1, -1))
    else:
        line((-1, 0), (1, 0))
    if name == "left":
        line((-0.3, -0.7), (-1, 0), (-0.3, 0.7))
    elif name == "right":
        line((0.3, -0.7), (1, 0), (0.3, 0.7))
    pixels = np.asarray(image) + generator.normal(0, 4, (h, w))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folders(root: Path, each: int | dict[str, int] = 24, wrong: int = 0, twins: int = 0, seed: int = 0) -> dict[str, str]:
    """Class folders; in each of them `wrong` drawings of the next class, and `twins` copies. Path -> the class it is of."""
    generator = np.random.default_rng(seed)
    truth = {}
    for i, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        count = each if isinstance(each, int) else each[name]
        for k in range(count):
            of = CLASSES[(i + 1) % len(CLASSES)] if k < wrong else name
            drawing(of, generator).save(root / name / f"{k:03d}.png")
            truth[f"{name}/{k:03d}.png"] = of
        for k in range(twins):
            (root / name / f"twin{k}.png").write_bytes((root / name / f"{count - 1 - k:03d}.png").read_bytes())
            truth[f"{name}/twin{k}.png"] = name
    return truth
