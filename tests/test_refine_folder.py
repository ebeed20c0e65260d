"""What refine reads and writes, and what it refuses."""

import csv

import numpy as np
import pytest
import torch
from drawings import CLASSES, folders
from PIL import Image

from smidgen.errors import UserError
from smidgen.refine.classifier import Recipe
from smidgen.refine.folder import Copy, Finding, View, check_output, read, untouched, unused, write_findings, write_images
from smidgen.refine.operators import Transform
from smidgen.run import Run


@pytest.fixture
def run(tmp_path):
    with Run("refine", Recipe(), tmp_path / "out") as opened:
        opened.console.quiet = True
        yield opened


@pytest.fixture
def given(tmp_path):
    folders(tmp_path / "in", each=8)
    return tmp_path / "in"


def test_folders_lists_and_arrays_are_the_same_set(given, run, tmp_path):
    source = read(given, None, 32, run)
    assert source.classes == CLASSES and source.names[0] == "cross/000.png" and len(source) == 32
    assert source.images.pixels.shape == (32, 32, 32, 1) and source.small[0].size == (44, 36)
    lines = ["path,label"] + [f"in/{name},{name.split('/')[0]}" for name in source.names]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    listed = read(tmp_path / "list.csv", None, 32, run)
    assert listed.names == tuple(f"in/{name}" for name in source.names)
    pixels = np.stack([np.asarray(image) for image in source.small])
    np.savez(tmp_path / "set.npz", images=pixels, labels=source.labels, class_names=np.array(CLASSES))
    stored = read(tmp_path / "set.npz", None, 32, run)
    assert stored.names[3] == "set.npz[3]"
    for other in (listed, stored):
        assert torch.equal(other.images.pixels, source.images.pixels) and other.labels.tolist() == source.labels.tolist()
        assert other.original(5).tobytes() == source.original(5).tobytes()


def test_images_of_any_size_are_seen_whole(run, tmp_path):
    """A mark at the left end of a long image is not cropped away."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            image = Image.new("L", (400, 50 + i), 255)
            image.paste(0, (0, 0, 40, 50) if name == "a" else (360, 0, 400, 50))
            image.save(tmp_path / "in" / name / f"{i}.png")
    source = read(tmp_path / "in", None, 20, run)
    assert source.small[0].size == (128, 16)
    assert source.images.pixels[0, 10, 0] < 50 and source.images.pixels[5, 10, 19] < 50
    seen = View(source.small, 1, 20)(untouched([0, 5], [0, 1]))
    assert seen.shape == (2, 1, 20, 20) and seen[0, 0, 10, 0] < 50 and seen[1, 0, 10, 19] < 50


def test_a_damaged_image_is_a_finding(given, run):
    (given / "dash" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (given / "dash" / "004.png").write_bytes((given / "dash" / "004.png").read_bytes()[:200])
    source = read(given, None, 32, run)
    assert len(source) == 30
    assert [(f.path, f.verdict, f.label) for f in source.unreadable] == [("dash/003.png", "drop", "dash"), ("dash/004.png", "drop", "dash")]
    assert all("cannot be read" in f.reason for f in source.unreadable)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: [f.unlink() for f in (root / "left").iterdir()], "left: a class folder without images"),
        (lambda root: [f.write_bytes(b"") for f in (root / "left").iterdir()], "class 'left' has 0 images that can be read, 5 or more"),
        (lambda root: [(root / c).rename(root.parent / c) for c in CLASSES[1:]], "holds one class, 'cross'"),
        (lambda root: (root / "left").rename(root / "metrics.json"), "class 'metrics.json' cannot be the name of a folder"),
    ],
    ids=["empty class", "nothing readable", "one class", "a name that is taken"],
)
def test_sets_that_cannot_be_judged(given, run, spoil, message):
    spoil(given)
    with pytest.raises(UserError, match=message):
        read(given, None, 32, run)


def test_labels_of_a_list_cannot_lead_out_of_the_folder(given, run):
    rows = [f"{c}/{i:03d}.png,{label}" for c, label in (("left", "../out"), ("right", "b")) for i in range(8)]
    (given / "list.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UserError, match="class '../out' cannot be the name of a folder"):
        read(given / "list.csv", None, 32, run)


def test_the_output_is_beside_the_source(tmp_path):
    (tmp_path / "in").mkdir()
    check_output(tmp_path / "in", tmp_path / "in2")
    check_output(tmp_path / "in.csv", tmp_path / "out")
    for output in (tmp_path / "in", tmp_path / "in" / "new", tmp_path):
        with pytest.raises(UserError, match="which must stay as it is"):
            check_output(tmp_path / "in", output)


def test_what_is_written(given, run):
    source = read(given, None, 32, run)
    before = {name: (given / name).read_bytes() for name in source.names}
    kept = {row: int(label) for row, label in enumerate(source.labels) if row != 9}
    kept[0] = 1  # cross/000.png becomes a dash, where there is a 000.png already
    turned = Transform((("rotate", 10.0), ("noise", 0.05)), seed=4)
    write_images(source, kept, [Copy(2, 0, turned), Copy(2, 0, Transform((("flip_x", 1.0),))), Copy(16, 3, turned)], run)
    assert {name: (given / name).read_bytes() for name in source.names} == before
    found = sorted(f.relative_to(run.folder).as_posix() for f in run.folder.rglob("*.png"))
    assert "cross/000.png" not in found and {"dash/000.png", "dash/000~2.png"} <= set(found), "both are there"
    assert "dash/001.png" not in found, "row 9 was left out"
    written = {(run.folder / "dash" / name).read_bytes() for name in ("000.png", "000~2.png")}
    assert written == {before["cross/000.png"], before["dash/000.png"]}, "originals are the files they were"
    with (run.folder / "augmented.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["cross/002~1.png", "cross/002~2.png", "right/000~1.png"]
    assert rows[0]["transform"] == "rotate 10; noise 0.05" and rows[0]["seed"] == "4" and rows[2]["source"] == "left/000.png"
    made = np.asarray(Image.open(run.folder / "cross" / "002~1.png"))
    assert np.array_equal(made, np.asarray(turned(source.original(2)))), "the line says how to make it again"
    assert not list(run.folder.glob("*.partial"))


def test_names_differ_on_any_file_system():
    taken: set[str] = set()
    names = [unused(stem, ".png", taken) for stem in ("a", "A", "a", "a~2", "b~1", "b~1", "000", "000")]
    assert names == ["a.png", "A~2.png", "a~3.png", "a~4.png", "b~1.png", "b~2.png", "000.png", "000~2.png"]


def test_findings_have_the_columns_of_the_contract(tmp_path):
    found = [Finding("a/1.png", "relabel", "a", "b", "b, surely", {"data-oob": 0.25}), Finding("a/2.png", "drop", "a", "", "damaged")]
    write_findings(found, tmp_path / "findings.csv")
    assert (tmp_path / "findings.csv").read_text() == (
        'path,verdict,label,proposed,reason,data-oob\na/1.png,relabel,a,b,"b, surely",0.250000\na/2.png,drop,a,,damaged,\n'
    )
