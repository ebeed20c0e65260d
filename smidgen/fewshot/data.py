"""Images of training and evaluation, by name and split."""

from smidgen.arrays import NoSplit
from smidgen.errors import UserError
from smidgen.fewshot.glyphs import SIZE, glyphs
from smidgen.images import Images, load

GLYPHS = "glyphs"  # the set that comes with the package
Shape = tuple[int, int, int]


def load_images(source: str, split: str, size: int | None = None, channels: int | None = None, skip_bad: bool = False) -> Images:
    """Classes of one split of a data set, or of all; `source` is glyphs, or what `smidgen.images.load` reads.

    `size` is the side of the square images, where photos have to be brought to one; `skip_bad` leaves files out that cannot be read.
    """
    if source == GLYPHS:
        if size not in (None, SIZE) or channels not in (None, 1):
            raise UserError("glyphs are 28x28 and grey; leave the size out, or use images of your own")
        if split not in ("train", "val", "test"):
            raise UserError(f"glyphs has no split {split!r}; it has train, val, test, and no need of --hold-out")
        return glyphs(split)
    try:
        return load(source, None if split == "all" else split, size, channels, skip_bad, least=2)
    except NoSplit as error:
        raise UserError(
            f"{error}; classes without splits are divided by --hold-out 0.2 in training, and evaluated by --split all"
        ) from error


def shape_of(images: Images) -> Shape:
    """(channels, height, width)"""
    height, width, channels = images.pixels.shape[1:]
    return channels, height, width
