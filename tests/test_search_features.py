"""What is read and refused, figures in closed form, baselines by their definitions, misspelling, the data of the package."""

import json
import math

import numpy as np
import pytest
import torch
from test_search_bert import tiny

from smidgen.errors import UserError
from smidgen.search.baselines import aosp, bm25, dense, fts5, fused, words
from smidgen.search.features import (
    CATALOGUE,
    NONE,
    QUERIES,
    Feature,
    Query,
    read_features,
    read_queries,
    write_features,
    write_queries,
)
from smidgen.search.metrics import auroc, by_kind, figures, ranking
from smidgen.search.relevance import relevance, sides
from smidgen.search.typos import NEIGHBOURS, corrupted, misspelt

HOTSPOT = Feature("hotspot", "Wi-Fi hotspot", "Shares the connection with others", ("tethering",), "Settings > Network")
LIGHT = Feature("light", "Night Light", "Tints the screen amber", ("blue light",), "Settings > Display", options=("Sunset to sunrise",))
LONG = Feature("long", "Automatic brightness of the display", path="Settings > Display")
FEATURES = (HOTSPOT, LIGHT, LONG)


# --- files -----------------------------------------------------------------------------------------------------------


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_what_is_written_is_read_again(tmp_path):
    write_features(tmp_path / "f.jsonl", FEATURES)
    assert read_features(tmp_path / "f.jsonl") == FEATURES
    queries = (Query("glare", ("light", "long")), Query("opera", (), "none"))
    write_queries(tmp_path / "q.jsonl", queries)
    assert read_queries(tmp_path / "q.jsonl", FEATURES) == queries


def test_spaces_and_absent_fields(tmp_path):
    path = written(
        tmp_path / "f.jsonl", "\ufeff" + json.dumps({"id": "a", "title": " Two \n words ", "summary": None, "colour": 3}), "", "  "
    )
    assert read_features(path) == (Feature("a", "Two words"),)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "a", "title": "A"}, {"id": "a", "title": "B"}], r"id 'a' of feature 2 is that of feature 1 already"),
        ([{"id": "a"}], "line 1: a feature without title"),
        ([{"id": "a", "title": "A"}, {"title": "B"}], "line 2: a feature without id"),
        ([{"id": "a", "title": "  "}], "a feature without title"),
        ([{"id": "a", "title": 7}], "title is 7, not text"),
        ([{"id": "a", "title": "A", "keywords": "b c"}], "keywords is \"b c\", not a list of texts"),
        ([{"id": "a", "title": "A", "keywords": ["b", 1]}], "keywords is 1, not text"),
        ([{"id": "a", "title": "x" * 2001}], "title has 2001 characters; 2000 at most"),
        ([{"id": "a", "title": "\ud83d"}], "half a character"),
        (['{"id": "a", "title": "A"'], "line 1: not JSON"),
        (["[1]"], "line 1: list instead of a JSON object"),
        ([""], "holds no features"),
    ],
)  # fmt: skip
def test_features_that_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_features(written(tmp_path / "f.jsonl", *rows))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "glare", "relevant": ["glare"]}, "query 1: relevant names 'glare', which is no id"),
        ({"query": "glare", "relevant": []}, "must list the ids that answer the query, or be"),
        ({"query": "glare"}, "must list the ids"),
        ({"query": "glare", "relevant": ["light"], "kind": "none"}, "must list the ids"),
        ({"query": "glare", "relevant": ["light"], "kind": "poem"}, "kind 'poem'; there are contextual, keyword, typo, none"),
        ({"query": " ", "relevant": ["light"]}, "an empty query"),
        ({"query": "glare", "relevant": ["light", "light"]}, "names a feature twice"),
    ],
)
def test_queries_that_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_queries(written(tmp_path / "q.jsonl", row), FEATURES)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_features(tmp_path / "f.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_features(tmp_path / "none.jsonl")


def test_views_say_where():
    assert LIGHT.views()[0] == "Night Light (Display)" and "Sunset to sunrise" in LIGHT.views()[2]
    assert all("Display" in view for view in LIGHT.views())
    assert len(set(LONG.views())) == len(LONG.views()) == 2
    assert Feature("a", "A").views() == ("A",)


def test_the_package_has_five_queries_a_feature():
    features = read_features(CATALOGUE)
    queries = read_queries(QUERIES, features)
    counts = dict.fromkeys((f.id for f in features), 0)
    for query in queries:
        for name in query.relevant:
            counts[name] += 1
    assert len(features) >= 300 and min(counts.values()) >= 5
    assert len({q.query.casefold() for q in queries}) == len(queries)
    assert all(q.kind == "none" for q in read_queries(NONE))


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, gain", [(1, 1.0), (2, 0.63093), (3, 0.5), (10, 1 / math.log2(11)), (11, 0.0)])
def test_one_relevant_feature(rank, gain):
    found = figures([[*range(1, rank), 0, *range(rank, 20)]], [{0}])
    assert found["ndcg@10"] == pytest.approx(gain, abs=1e-5) and found["mrr@10"] == (1 / rank if rank <= 10 else 0)
    assert [found[f"hit@{k}"] for k in (1, 3, 5, 10)] == [rank <= 1, rank <= 3, rank <= 5, rank <= 10]


def test_two_relevant_features():
    assert figures([[4, 0, 5]], [{4, 5}])["ndcg@10"] == pytest.approx(0.91972, abs=1e-5)


def test_random_order():
    """What chance gives of 636."""
    random = np.random.default_rng(0)
    found = figures([random.permutation(636) for _ in range(20000)], [{0}] * 20000)
    assert found["hit@10"] == pytest.approx(10 / 636, abs=0.003)
    assert found["mrr@10"] == pytest.approx(sum(1 / i for i in range(1, 11)) / 636, abs=0.0015)


def test_equal_scores_keep_the_order_of_features():
    assert ranking(np.array([0.5, 0.7, 0.5, 0.7])).tolist() == [1, 3, 0, 2]
    assert ranking(np.full(4, -np.inf)).tolist() == []


def test_area_under_the_curve():
    assert auroc(np.ones(3), np.ones(4)) == 0.5 and auroc(np.array([2.0, 3.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([-np.inf, 1.0]), np.array([-np.inf])) == 0.75


def test_kinds_are_kept_apart():
    queries = [Query("a", ("light",)), Query("b", ("hotspot",), "keyword"), Query("c", (), "none")]
    scores = np.array([[0.1, 0.9, 0.0], [0.2, 0.8, 0.0], [0.1, 0.1, 0.1]])
    found = by_kind(scores, queries, FEATURES)
    assert found["contextual"]["hit@1"] == 1 and found["keyword"]["hit@1"] == 0 and found["all"]["hit@1"] == 0.5
    assert found["none"] == {"auroc": 1.0} and "typo" not in found


# --- baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, ranks",
    [
        ("hotsp", [3, None, None]),  # a later word of the title
        ("wi-fi", [1, None, None]),
        ("wifi", [1, None, None]),  # normalised
        ("night", [None, 1, None]),
        ("auto", [None, None, 2]),  # a title of more than 20 characters
        ("the", [7, 7, 4]),  # a word of the summaries, a later one of the title
        ("tether", [9, None, None]),
        ("blue", [None, 9, None]),
        ("sunset", [None, 9, None]),
        ("light", [None, 3, None]),  # the best round decides: the keyword has it too
        ("wifi hotspot password change", [None, None, None]),
        ("hotspto", [None, None, None]),
    ],
)
def test_what_ships(query, ranks):
    expected = [-np.inf if rank is None else -rank for rank in ranks]
    assert aosp(FEATURES)([query])[0].tolist() == expected


def test_full_text_wants_every_word():
    found = fts5(FEATURES)(["screen ambe", "screen password", "", "wi-fi"])
    assert np.isfinite(found).tolist() == [[False, True, False], [False] * 3, [False] * 3, [True, False, False]]


def test_bm25_is_its_formula():
    """With the constant factor k1 + 1 that does not change an order."""
    k1, b = 1.2, 0.75
    texts = [words(f"{f.title} {f.everything()}") for f in FEATURES]
    mean = np.mean([len(t) for t in texts])

    def score(query, text):
        total = 0.0
        for word in words(query):
            n, tf = sum(word in t for t in texts), text.count(word)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            total += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        return total

    query = "the light of the display"
    ours = [score(query, text) for text in texts]
    np.testing.assert_allclose(bm25(FEATURES)([query])[0], ours, rtol=1e-5)
    assert bm25(FEATURES)(["zebra"])[0].tolist() == [-np.inf] * 3


def test_reciprocal_ranks():
    first = np.array([[3.0, 2.0, 1.0]])
    assert fused(first, first)[0, 0] == pytest.approx(2 / 61)
    assert fused(first, np.full((1, 3), -np.inf)).round(6).tolist() == [[round(1 / r, 6) for r in (61, 62, 63)]]


def test_dense_is_the_mean_cosine():
    encoder = tiny()
    queries = ["my eyes hurt", "loud"]
    a, b = ["screen", "sound", "phone"], ["night light", "volume", "battery"]
    u = encoder.encode(queries).double()
    expected = (u @ encoder.encode(a).double().T + u @ encoder.encode(b).double().T) / 2
    np.testing.assert_allclose(dense(encoder, a, b)(queries), expected.numpy(), atol=1e-6)


# --- examples --------------------------------------------------------------------------------------------------------


def test_examples_stand_beside_texts():
    """By hand, one query and feature at a time."""
    encoder = tiny()
    examples = (Query("my eyes hurt", ("light",)), Query("read at night", ("light", "long")))
    bank = sides(encoder, FEATURES, examples, lift=1.25)
    mean = [encoder.encode(f.views()).double().mean(0) for f in FEATURES]
    texts = [m / m.norm() for m in mean]
    said = encoder.encode([q.query for q in examples]).double()
    light = said.sum(0) / said.sum(0).norm()
    expected = [[1.25 * texts[0]] * 2, [texts[1], light], [texts[2], said[1]]]
    torch.testing.assert_close(bank.double(), torch.stack([torch.stack(pair) for pair in expected]), atol=1e-6, rtol=0)
    u = encoder.encode(["eyes hurt at night"])
    by_hand = [max(float(u[0].double() @ v) for v in pair) for pair in expected]
    np.testing.assert_allclose(relevance(u, bank)[0].numpy(), by_hand, atol=1e-6)


def test_without_examples_there_are_texts_alone():
    bank = sides(tiny(), FEATURES, (), lift=2.0)
    torch.testing.assert_close(bank.norm(dim=-1), torch.ones(3, 2))
    assert torch.equal(bank[:, 0], bank[:, 1])


# --- misspelling -----------------------------------------------------------------------------------------------------


def test_a_slip_is_small_and_in_a_long_word():
    random = np.random.default_rng(0)
    for _ in range(300):
        wrong = misspelt("my screen is too dim", random)
        assert wrong.split(" ")[:1] + wrong.split(" ")[2:] == ["my", "is", "too", "dim"]
        assert abs(len(wrong) - len("my screen is too dim")) <= 1
    assert misspelt("too dim", random) == "too dim" and misspelt("화면이너무", random) == "화면이너무"


def test_the_same_seed_slips_the_same():
    texts = ["brightness of the screen"] * 50
    assert corrupted(texts, 3) == corrupted(texts, 3) != corrupted(texts, 4)
    assert corrupted(texts, 3, rate=0.0) == texts


def test_neighbours_are_mutual():
    assert all(a in NEIGHBOURS[b] for a, near in NEIGHBOURS.items() for b in near)
