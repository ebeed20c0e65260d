"""Labelled images from folders, lists and arrays, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from smidgen.errors import UserError
from smidgen.images import Images, load, read, unlabelled

RED, GREY = (200, 30, 40), 77


@pytest.fixture
def photos(tmp_path):
    """photos/cat: a red 8 x 6 png and jpg; photos/dog: a grey 6 x 8 bmp and webp; and a file that is no image."""
    for name, mode, colour, size in (
        ("cat/a.png", "RGB", RED, (8, 6)),
        ("cat/b.JPG", "RGB", RED, (8, 6)),
        ("dog/c.bmp", "L", GREY, (6, 8)),
        ("dog/d.webp", "RGB", (GREY,) * 3, (6, 8)),
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path)
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def arrays(tmp_path):
    """(**changes) -> a file of 6 grey images of 3 classes, pixels all i."""

    def make(**changes):
        given = {
            "images": np.repeat(np.arange(6, dtype=np.uint8), 20).reshape(6, 4, 5),
            "labels": np.array([0, 1, 2, 0, 1, 2]),
            "class_names": np.array(["a", "b", "c"]),
            "class_split": np.array([0, 2, 0], np.uint8),
        } | changes
        path = tmp_path / "set.npz"
        np.savez(path, **{name: array for name, array in given.items() if array is not None})
        return path

    return make


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_class_folders(photos):
    images = load(photos, size=5)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    assert images.pixels.shape == (4, 5, 5, 3) and images.pixels.dtype == torch.uint8
    assert images.pixels[0, 2, 2].tolist() == list(RED) and images.pixels[2, 2, 2].tolist() == [GREY] * 3
    assert [p.rsplit("/")[-1] for p in images.paths] == ["a.png", "b.JPG", "c.bmp", "d.webp"]
    assert load(photos, size=5, channels=1).pixels.shape == (4, 5, 5, 1)
    assert load(photos / "..", split="photos", size=5).classes == ("cat", "dog")


def test_all_grey_images_stay_grey_and_sizes_must_agree(photos):
    assert load(photos.parent, split="photos", size=4).pixels.shape[-1] == 3
    Image.new("L", (6, 8), GREY).save(photos / "dog" / "d.webp", lossless=True)
    (photos / "cat" / "a.png").unlink()
    (photos / "cat" / "b.JPG").unlink()
    Image.new("L", (6, 8), 5).save(photos / "cat" / "b.png")
    (photos / "dog" / "d.webp").unlink()
    assert load(photos).pixels.shape == (2, 8, 6, 1)
    Image.new("L", (7, 8), 5).save(photos / "cat" / "e.png")
    assert "6 x 8" in (message := refused(photos)) and "7 x 8" in message and "size" in message


def test_the_centred_square_is_what_stays(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = RED
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read(tmp_path / "wide.png", 10) == RED).all()


def test_a_camera_held_sideways(tmp_path):
    """EXIF orientation 6: to be turned a quarter clockwise, so the left column becomes the upper row."""
    array = np.zeros((4, 6, 3), np.uint8)
    array[:, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "side.png", exif=exif)
    seen = read(tmp_path / "side.png")
    assert seen.shape == (6, 4, 3) and (seen[0] == 255).all() and (seen[1:] == 0).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Image.fromarray(np.full((4, 4), 0x4DFF, np.uint16)), (0x4D,)),
        (lambda: Image.new("RGBA", (4, 4), (*RED, 0)), (255,)),
        (lambda: Image.new("LA", (4, 4), (GREY, 255)), (GREY,)),
        (lambda: Image.new("RGB", (4, 4), RED).quantize(4), RED),
        (lambda: Image.new("1", (4, 4), 1), (255,)),
    ],
    ids=["16 bits", "transparent is white", "grey and alpha", "palette", "black and white"],
)
def test_any_mode(tmp_path, make, expected):
    make().save(tmp_path / "x.png")
    assert tuple(read(tmp_path / "x.png")[1, 1].tolist()) == expected


def test_damaged_files_are_named_and_skipped_only_when_asked(photos):
    whole = (photos / "cat" / "b.JPG").read_bytes()
    (photos / "cat" / "b.JPG").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "c.bmp").write_bytes(b"")
    assert "b.JPG" in (message := refused(photos, size=5)) and "--skip-bad" in message
    images = load(photos, size=5, skip_bad=True)
    assert len(images.labels) == 2 and [p.rsplit("/")[-1] for p in images.skipped] == ["b.JPG", "c.bmp"]
    (photos / "dog" / "d.webp").write_bytes(b"nothing")
    assert "'dog' has no image" in refused(photos, size=5, skip_bad=True)


def test_folders_that_cannot_be_classes(photos, tmp_path):
    assert "only 2 images" in refused(photos, size=5, least=3) and "3 or more" in refused(photos, size=5, least=3)
    (photos / "bird").mkdir()
    assert "bird" in refused(photos, size=5) and "without images" in refused(photos, size=5)
    assert "no split 'test'" in refused(photos.parent, split="test")
    (photos / "bird").rmdir()
    assert "choose a split, one of photos" in refused(photos.parent)
    assert "no class folders" in refused(photos / "cat")
    assert "no such" in refused(tmp_path / "nowhere")
    assert "path,label" in refused(photos / "cat" / "notes.txt")
    assert "positive" in refused(photos, size=0) and "channel" in refused(photos, channels=2)
    for name in ("cafe\u0301", "caf\u00e9"):  # one name, written in two ways
        (photos / name).mkdir()
        Image.new("RGB", (5, 5)).save(photos / name / "x.png")
    assert "caf" in (message := refused(photos, size=5)) and "own" in message


def test_unlabelled_images(photos):
    assert [p.rsplit("/")[-1] for p in unlabelled(photos, 5).paths] == ["a.png", "b.JPG", "c.bmp", "d.webp"]
    assert unlabelled(photos / "cat" / "a.png").pixels.shape == (1, 6, 8, 3)
    (photos / "dog" / "c.bmp").write_bytes(b"x")
    assert len(unlabelled(photos, 5, skip_bad=True).labels) == 3
    with pytest.raises(UserError, match="none of its 1 images"):
        unlabelled(photos / "dog" / "c.bmp", skip_bad=True)
    (photos / "empty").mkdir()
    with pytest.raises(UserError, match="no image in it"):
        unlabelled(photos / "empty")


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_list_of_paths(photos, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,label,split\nphotos/dog/c.bmp,pet,train\nphotos/cat/a.png,beast,val\nphotos/cat/b.JPG,pet,val\n")
    images = load(table, size=5)
    assert images.classes == ("beast", "pet") and images.labels.tolist() == [0, 1, 1]
    assert len(load(table, split="validation", size=5).labels) == 2
    assert "no split 'test'; it has train, val" in refused(table, split="test")
    table.write_text("path,label\nphotos/dog/gone.bmp,pet\n")
    assert "gone.bmp: no such image file" in refused(table) and "no column split" in refused(table, split="val")
    table.write_text("file,label\nx,y\n")
    assert "path,label" in refused(table)
    table.write_text("path,label\nphotos/cat/a.png,\n")
    assert "image 1: no path or no label" in refused(table)
    table.write_text("path,label\nphotos/cat/a.png,cat\nphotos/cat/b.JPG,cat \n")
    assert "'cat '" in refused(table)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_and_their_splits(arrays):
    images = load(arrays())
    assert images.pixels.shape == (6, 4, 5, 1) and images.pixels[3].unique().tolist() == [3] and images.classes == ("a", "b", "c")
    train = load(arrays(), split="train")
    assert train.classes == ("a", "c") and train.labels.tolist() == [0, 1, 0, 1] and train.pixels[:, 0, 0, 0].tolist() == [0, 2, 3, 5]
    assert load(arrays(), size=3, channels=3).pixels.shape == (6, 3, 3, 3)
    assert "no split 'val'; it has test, train" in refused(arrays(), split="val")
    assert "no split at all" in refused(arrays(class_split=None), split="train")


def test_several_split_arrays_have_names(arrays):
    both = {"class_split": None, "class_split_lake": np.array([0, 1, 1]), "class_split_vinyals": np.array([0, 0, 2])}
    assert load(arrays(**both), split="background").classes == ("a",)
    assert load(arrays(**both), split="train").classes == load(arrays(**both), split="vinyals:train").classes == ("a", "b")
    clash = both | {"class_split_lake": np.array(["train", "test", "test"])}
    assert "say which" in refused(arrays(**clash), split="train")
    assert load(arrays(**clash), split="lake:train").classes == ("a",)
    named = {"class_split": None, "split": np.array([0, 0, 1, 1, 1, 1]), "split_names": np.array(["old", "new"])}
    assert load(arrays(**named), split="new").labels.tolist() == [2, 0, 1, 2]
    assert load(arrays(**named), split="old").classes == ("a", "b")
    assert "holds 7" in refused(arrays(class_split=np.array([0, 7, 0])), split="train")
    assert "2 entries" in refused(arrays(class_split=np.array([0, 1])), split="train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.full((6, 4, 4), np.nan)}, "NaN"),
        ({"images": np.zeros((6, 4, 4), np.float32)}, "must be uint8"),
        ({"images": np.zeros((6, 4), np.uint8)}, "shape"),
        ({"images": np.zeros((6, 4, 4, 2), np.uint8)}, "shape"),
        ({"labels": np.zeros(5, int)}, "6 integers"),
        ({"labels": np.zeros(6)}, "6 integers"),
        ({"labels": np.array([0, 1, 2, 3, 1, 1])}, "0 to 2"),
        ({"labels": np.array([0, 1, 0, 1, 1, 1])}, "'c' has no image"),
        ({"class_names": np.array(["a", "b", "a"])}, "twice"),
        ({"class_names": None}, "no array class_names"),
        ({"images": np.array([None] * 6)}, "readable"),
    ],
)
def test_arrays_that_cannot_be(arrays, changes, message):
    assert message in refused(arrays(**changes))


def test_a_damaged_file_of_arrays(tmp_path):
    (tmp_path / "set.npz").write_bytes(b"PK\x03\x04 and then nothing")
    assert "not a readable .npz" in refused(tmp_path / "set.npz")


# --- a set -----------------------------------------------------------------------------------------------------------


def test_some_classes_of_a_set_keep_their_images(photos):
    images = load(photos, size=5).of([1])
    assert images.classes == ("dog",) and images.labels.tolist() == [0, 0] and [p[-5:] for p in images.paths] == ["c.bmp", ".webp"]
    assert isinstance(images.to(torch.device("cpu")), Images) and images.to(torch.device("cpu")).paths == images.paths
    assert torch.equal(images.floats(torch.tensor([0, -1]))[1], torch.zeros(3, 5, 5))
