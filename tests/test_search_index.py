"""The index file, its trigrams, the fusion and the threshold: against brute force, closed forms and damaged files."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from smidgen.errors import UserError
from smidgen.search import index as index_module
from smidgen.search.calibration import Calibration, calibrate, evidence
from smidgen.search.features import Feature
from smidgen.search.fusion import Lexicon, fuse, idf, spelt, trigrams, words
from smidgen.search.index import BLOCK, HEADER, Index, best, quantized
from smidgen.search.spelling import Speller, distance, outlines

TEXTS = ["Night light amber eyes", "Mobile hotspot share", "Bluetooth headphones", "Dark theme", "Wi-Fi wifi"]


def unit(random, *shape):
    v = random.normal(size=shape)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def views(random):
    """Of five features, one to three each."""
    return [unit(random, n, 48) for n in (1, 3, 2, 1, 2)]


@pytest.fixture
def made(views):
    return Index.of(views, TEXTS)


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_rounding_is_at_most_half_a_step(random):
    """In every number, in products, and whatever the scale; rows of zeros stay zeros."""
    v = np.concatenate([unit(random, 20, 48), np.zeros((1, 48))])
    q = unit(random, 48)
    codes, scales = quantized(v)
    assert (np.abs(v - codes * scales[:, None]) <= scales[:, None] / 2 * 1.0001).all()
    assert (np.abs((v - codes * scales[:, None]) @ q) <= np.abs(q).sum() * scales / 2 * 1.0001).all()
    assert (quantized(2 * v)[0] == codes).all() and not codes[-1].any() and scales[-1] == 0


def test_scores_are_those_of_the_stored_numbers(made, views, random):
    """Float64, feature by feature and view by view."""
    u = unit(random, 48).astype(np.float32)
    slow, at = [], 0
    for rows in views:
        slow.append(max(float(a) * float(np.dot(c.astype(float), u)) for c, a in zip(*quantized(rows), strict=True)))
        at += len(rows)
    assert made.scores(u) == pytest.approx(slow, abs=1e-6) and len(made.codes) == at
    assert made.scores(u) == pytest.approx([float((rows @ u).max()) for rows in views], abs=0.01)
    others = [unit(random, 48).astype(np.float32) for _ in range(2)]
    assert made.scores(u, *others) == pytest.approx(np.max([made.scores(v) for v in (u, *others)], 0), abs=1e-6)


def test_blocks_change_nothing(random, monkeypatch):
    v = unit(random, BLOCK + 7, 16)
    index, u = Index.of(list(v[:, None]), ["x"] * len(v)), unit(random, 16).astype(np.float32)
    whole = index.scores(u)
    monkeypatch.setattr(index_module, "BLOCK", 5)
    index = replace(index)  # whose floats are not yet made
    assert np.allclose(index.scores(u), whole, atol=1e-6) and best(whole, 1)[0] == (v @ u).argmax()
    assert np.allclose(index.scores(u, -u), np.abs(whole), atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 10, 50, 80])
def test_the_best_as_a_stable_sort_has_them(random, count):
    for _ in range(20):
        scores = random.integers(0, 6, 50).astype(np.float32)  # many are equal
        assert best(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


# --- the file --------------------------------------------------------------------------------------------------------


def test_written_and_read_back(made, tmp_path, random):
    path = tmp_path / "index.smi"
    made.write(path)
    read = Index.read(path)
    u = unit(random, 48).astype(np.float32)
    assert isinstance(read.codes.base.base, np.memmap) and (read.codes == made.codes).all() and len(read) == 5
    assert (read.scores(u) == made.scores(u)).all()
    assert (read.lexicon.coverage("night lihgt") == made.lexicon.coverage("night lihgt")).all()
    assert [f.name for f in tmp_path.iterdir()] == ["index.smi"]


def test_header_as_it_is_drawn(made, tmp_path):
    made.write(tmp_path / "index.smi")
    data = (tmp_path / "index.smi").read_bytes()
    assert data[:8] == b"\x89SMI\r\n\x1a\n"
    assert struct.unpack_from("<6I", data, 8) == (1, 48, 5, 9, len(made.lexicon.keys), len(made.lexicon.members))
    assert struct.unpack_from("<2I", data, 32) == (zlib.crc32(data[64:]), zlib.crc32(data[:36]))
    assert np.frombuffer(data, np.int8, 9 * 48, 64).tolist() == made.codes.ravel().tolist()
    scales = 64 + -(-9 * 48 // 64) * 64
    assert np.frombuffer(data, np.float32, 9, scales).tolist() == made.scales.tolist() and len(data) % 64 == 0


def test_every_truncation_is_refused_by_name(made, tmp_path):
    path = tmp_path / "index.smi"
    made.write(path)
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 35, 40, 63, 64, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"index\.smi: (damaged|not an index)"):
            Index.read(path)


def test_every_changed_byte_is_noticed(made, tmp_path, random):
    path = tmp_path / "index.smi"
    made.write(path)
    data = path.read_bytes()
    for place in [*range(40), *random.integers(64, len(data), 40).tolist()]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"index\.smi"):
            Index.read(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 some other file, long enough to have a header of sixty-four bytes", b"\x89PNG\r\n\x1a\n" * 20]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "index.smi").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.smi: not an index of smidgen search"):
        Index.read(tmp_path / "index.smi")


def test_later_versions_are_refused(made, tmp_path):
    made.write(tmp_path / "index.smi")
    data = bytearray((tmp_path / "index.smi").read_bytes())
    struct.pack_into("<I", data, 8, 2)
    (tmp_path / "index.smi").write_bytes(data)
    with pytest.raises(UserError, match="version 2, this smidgen reads 1"):
        Index.read(tmp_path / "index.smi")


def test_right_checksums_over_wrong_numbers(made, tmp_path):
    """Somebody's own writer: a member beyond the features would be read from nowhere."""
    path = tmp_path / "index.smi"
    made.write(path)
    data = bytearray(path.read_bytes())
    at = len(data) - -(-4 * len(made.lexicon.members) // 64) * 64
    struct.pack_into("<I", data, at, 77)
    struct.pack_into("<I", data, HEADER.size - 4, zlib.crc32(data[64:]))
    struct.pack_into("<I", data, HEADER.size, zlib.crc32(data[: HEADER.size]))
    path.write_bytes(data)
    with pytest.raises(UserError, match="point outside"):
        Index.read(path)


def test_adding_is_making_it_at_once(made, views, tmp_path):
    """The very same file, whatever the split."""
    for k in (1, 3, 4):
        grown = Index.of(views[:k], TEXTS[:k]).extended(views[k:], TEXTS[k:])
        for index, name in ((made, "a"), (grown, "b")):
            index.write(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_write_cut_short_leaves_the_old_file(made, tmp_path, monkeypatch):
    path = tmp_path / "index.smi"
    made.write(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        made.extended([np.ones((1, 48))], ["new"]).write(path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["index.smi"]


def test_a_reader_keeps_the_old_index_while_it_is_replaced(made, tmp_path, random):
    path = tmp_path / "index.smi"
    made.write(path)
    old, u = Index.read(path), unit(random, 48).astype(np.float32)
    before = old.scores(u)
    made.extended([np.ones((1, 48))], ["new"]).write(path)
    assert (old.scores(u) == before).all() and len(Index.read(path)) == 6


# --- letters ---------------------------------------------------------------------------------------------------------


def covered(query: str, text: str, texts: list[str]) -> float:
    """c by sets of strings."""
    found = {spelt(int(t)) for t in trigrams(query, open_end=True)}
    has = [{spelt(int(t)) for t in trigrams(other)} for other in texts]
    n = len(texts)
    weight = {t: np.log(1 + (n - sum(t in h for h in has) + 0.5) / (sum(t in h for h in has) + 0.5)) for t in found}
    return sum(weight[t] for t in found & has[texts.index(text)]) / max(sum(weight.values()), 1e-300)


@pytest.mark.parametrize(
    "query", ["night", "bluetoth hedphones", "my eyes hurt at night", "zzz", "dark theme ", "  ", "", "é", "hotsp", "a"]
)
def test_coverage_against_sets_of_strings(query):
    expected = [covered(query, text, TEXTS) for text in TEXTS]
    assert Lexicon.of(TEXTS).coverage(query) == pytest.approx(expected, abs=1e-6)


def test_coverage_in_closed_form():
    """The feature's own text is covered whole; nothing covers nothing; idf as BM25 has it."""
    lexicon = Lexicon.of(TEXTS)
    for i, text in enumerate(TEXTS):
        assert lexicon.coverage(text)[i] == pytest.approx(1)
    assert not lexicon.coverage("").any() and not lexicon.coverage("設定").any()
    assert idf(np.array([1]), 5)[0] == pytest.approx(np.log(1 + 4.5 / 1.5))
    assert not Lexicon.of([""]).coverage("anything").any()


def test_half_typed_words_and_other_spellings():
    assert [spelt(int(t)) for t in trigrams("Wi-Fi", open_end=True)] == [" fi", " wi", "wi "]
    lexicon = Lexicon.of(
        [words(Feature("1", "Mobile Hotspot")), words(Feature("2", "Wi\u2011Fi calling")), words(Feature("3", "Réglages"))]
    )
    assert lexicon.coverage("hotsp")[0] == pytest.approx(1) and lexicon.coverage("hotsp ")[0] < 1
    assert lexicon.coverage("wifi")[1] == pytest.approx(1) and lexicon.coverage("wi-fi")[1] == pytest.approx(1)
    assert lexicon.coverage("REGLAGES")[2] == pytest.approx(1)


def test_the_gate_lets_words_through_and_sentences_not():
    """A word misspelt gets more than half of the weight, a sentence that shares some letters next to nothing."""
    lexicon = Lexicon.of([*TEXTS, "Alarm volume", "Screen timeout", "Battery saver"])
    zero = np.zeros(8, np.float32)
    assert fuse(zero, lexicon.coverage("bluetooh"), 0.4)[2] > 0.2
    assert fuse(zero, lexicon.coverage("my mother cannot hear who is ringing her in the garden"), 0.4).max() < 0.02
    assert (fuse(zero + 0.3, lexicon.coverage("bluetooth"), 0.0) == np.float32(0.3)).all()


# --- spelling --------------------------------------------------------------------------------------------------------


def slips(a: str, b: str) -> int:
    """Optimal string alignment by its definition, recursively."""
    if not a or not b:
        return len(a) + len(b)
    cost = min(slips(a[1:], b) + 1, slips(a, b[1:]) + 1, slips(a[1:], b[1:]) + (a[0] != b[0]))
    return min(cost, slips(a[2:], b[2:]) + 1) if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0] else cost


def test_distance_against_its_definition(random):
    for _ in range(300):
        a, b = ("".join(random.choice(list("abc"), random.integers(0, 6))) for _ in range(2))
        for most in (1, 2):
            assert distance(a, b, most) == min(slips(a, b), most + 1), (a, b)


@pytest.fixture(scope="module")
def speller():
    return Speller.of(
        [words(Feature(str(i), text)) for i, text in enumerate(TEXTS)], ["dimmer", "grandmother", "read", "when", "sound", "yellow"]
    )


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("blutooth hedphones", "bluetooth headphones"),
        ("wfii", "wifi"),
        ("nihgt lihgt", "night light"),
        ("grandmothr when", "grandmother when"),
        ("grndmothr when", "grndmothr when"),  # two slips are forgiven to words of the features alone
        ("BLUETOTH!", "bluetooth!"),
        ("hotsp", "hotsp"),  # half typed
        ("hotspo ", "hotspot "),
        ("night", "night"),
        ("yellowish dimmers", "yellowish dimmers"),
        ("don't", "don't"),
        ("eys", "eys"),
        ("xqzzt 12345 \u8a2d\u5b9a", "xqzzt 12345 \u8a2d\u5b9a"),
        ("", ""),
    ],
)
def test_spelling(speller, typed, read):
    assert speller.corrected(typed) == read


def test_of_words_equally_near_the_one_that_begins_alike_is_meant():
    speller = Speller.of(["fund fund sound"], [])
    assert speller.word("sund") == "sound" and speller.word("gund") == "fund"


def test_a_slip_is_two_bits_of_an_outline_at_most(random):
    for _ in range(2000):
        a, b = ("".join(random.choice(list("abcde\u00e9"), random.integers(1, 14))) for _ in range(2))
        first, second = outlines((a, b))
        assert int(first ^ second).bit_count() <= 2 * distance(a, b, 14), (a, b)


def test_outlines_lose_no_neighbour(speller, random):
    """Every word within reach by brute force is found with the bound on letters, too."""
    for word in ("bluetooth", "headphones", "hotspot", "theme", "share"):
        for _ in range(30):
            letters = list(word)
            i = int(random.integers(len(letters) - 1))
            letters[i : i + 2] = [letters[i : i + 2][::-1], letters[i : i + 1], [*letters[i : i + 2], "q"]][int(random.integers(3))]
            typed = "".join(letters)
            near = min((slips(typed[:9], w[:9]) if len(typed) < 10 else distance(typed, w, 2), w) for w in speller.words)
            if len(typed) >= 4 and typed not in speller.rank and near[0] == 1:
                assert distance(typed, speller.word(typed), 2) == 1


# --- the threshold ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(random):
    return random.normal((0.7, 0.3), 0.08, (400, 2)), random.normal((0.45, 0.2), 0.08, (300, 2))


def test_the_threshold_answers_as_many_as_wanted(fitted):
    """Of the queries it was fitted on exactly, and a higher one never answers more, nor shows more falsely."""
    shown = [calibrate(*fitted, answer_rate=rate) for rate in (0.5, 0.8, 0.95, 0.99, 1.0)]
    assert [c.answer_rate for c in shown] == pytest.approx([0.5, 0.8, 0.95, 0.99, 1.0], abs=0.003)
    assert [c.threshold for c in shown] == sorted((c.threshold for c in shown), reverse=True)
    assert [c.false_show for c in shown] == sorted(c.false_show for c in shown)
    assert {c.auroc for c in shown} == {shown[0].auroc} and 0.95 < shown[0].auroc < 1


def test_rates_hold_on_queries_it_has_not_seen(fitted):
    random = np.random.default_rng(9)
    made = calibrate(*fitted)
    p = [1 / (1 + np.exp(-(np.dot(made.weights, x) + made.bias))) for x in random.normal((0.7, 0.3), 0.08, (2000, 2))]
    q = [1 / (1 + np.exp(-(np.dot(made.weights, x) + made.bias))) for x in random.normal((0.45, 0.2), 0.08, (2000, 2))]
    assert np.mean(np.array(p) >= made.threshold) == pytest.approx(0.95, abs=0.03)
    assert np.mean(np.array(q) >= made.threshold) == pytest.approx(made.false_show, abs=0.05)


def test_it_finds_the_logistic_regression(fitted):
    """scikit-learn's, with the same weights of the two sorts and the same ridge."""
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate(fitted)
    z = (x - x.mean(0)) / x.std(0)
    y = np.arange(len(x)) < 400
    share = np.where(y, 0.5 / 400, 0.5 / 300)
    other = LogisticRegression(C=1 / 1e-3, tol=1e-10, max_iter=1000).fit(z, y, sample_weight=share)
    made = calibrate(*fitted)
    assert np.array(made.weights) * x.std(0) == pytest.approx(other.coef_[0], rel=1e-4)


def test_separable_and_constant_scores_do_not_break_it():
    apart = calibrate(np.full((5, 2), 0.9), np.full((4, 2), 0.1))
    assert apart.auroc == 1 and apart.false_show == 0 and apart.answer_rate == 1
    same = calibrate(np.full((5, 2), 0.5), np.full((4, 2), 0.5))
    assert same.auroc == 0.5 and same.false_show == 1 and np.isfinite(same.weights).all()


def test_confidence_of_scores(fitted):
    made = calibrate(*fitted)
    sure, unsure = np.array([0.8, 0.3, 0.3], np.float32), np.array([0.31, 0.3, 0.3], np.float32)
    assert evidence(sure) == pytest.approx([0.8, 0.5]) and evidence(np.array([0.4])).tolist() == [0.4, 0.0]
    assert made.confidence(sure) > 0.9 > 0.1 > made.confidence(unsure)
    assert Calibration.read(made.row()) == made


@pytest.mark.parametrize(("answerable", "none", "rate"), [(0, 3, 0.95), (3, 0, 0.95), (3, 3, 0.0), (3, 3, 1.5)])
def test_what_no_threshold_comes_from(answerable, none, rate):
    with pytest.raises(UserError):
        calibrate(np.ones((answerable, 2)), np.ones((none, 2)), rate)
