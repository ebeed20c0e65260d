"""What is expected of features without examples: the regression by hand, its limits, and what it is worth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_search_bert import tiny

from smidgen.search.add import guessed, unit
from smidgen.search.expected import FEWEST, RIDGE, expected
from smidgen.search.features import Feature, Query
from smidgen.search.index import Index
from smidgen.search.relevance import relevance, sides


def corpus(n: int = 120, width: int = 16, noise: float = 0.3):
    """Features, people's words for them (turned and shifted, the same way for all), and one question each."""
    random = np.random.default_rng(0)
    v = unit(random.normal(size=(n, width)))
    turn = np.eye(width) + random.normal(size=(width, width)) / np.sqrt(width)
    e = unit(v @ turn + random.normal(size=width))
    return v, e, unit(e + noise * unit(random.normal(size=(n, width))))


def test_the_regression_is_the_least_of_its_objective():
    """As least squares with a row sqrt(a) for every number of W, by numpy's own solver."""
    v, e, _ = corpus(30, 5)
    known = np.arange(30) % 3 > 0
    x, moves = v[known] - v[known].mean(0), e[known] - v[known]
    rows = np.concatenate([x, np.sqrt(RIDGE) * np.eye(5)])
    w = np.linalg.lstsq(rows, np.concatenate([moves - moves.mean(0), np.zeros((5, 5))]), rcond=None)[0]
    found = expected(v, e[known], known)
    np.testing.assert_allclose(found, unit(v + moves.mean(0) + (v - v[known].mean(0)) @ w), atol=1e-12)


def test_a_move_that_is_the_same_for_all_is_the_move():
    v, _, _ = corpus(20, 6)
    known, move = np.arange(20) < 12, np.linspace(-1, 1, 6)
    np.testing.assert_allclose(expected(v, v[known] + move, known), unit(v + move), atol=1e-12)


def test_few_features_say_nothing():
    v, e, _ = corpus(20, 6)
    assert expected(v, e[: FEWEST - 1], np.arange(20) < FEWEST - 1) is None
    assert expected(v, e[:FEWEST], np.arange(20) < FEWEST) is not None


def test_whom_nobody_asked_for_is_found_by_what_others_were_asked_for():
    """Share of questions about features without examples whose feature is first: by texts, by expectation, by one of shuffled pairs."""
    v, e, asked = corpus()
    known = np.arange(len(v)) % 2 == 0
    shuffled = np.random.default_rng(1).permutation(e[known])

    def first(bank: np.ndarray) -> float:
        scores = relevance(torch.from_numpy(asked[~known]), torch.from_numpy(np.stack([v, bank], 1))).numpy()
        return float((scores.argmax(1) == np.flatnonzero(~known)).mean())

    by_texts = first(np.where(known[:, None], e, v))
    by_guess, by_chance = (first(np.where(known[:, None], e, expected(v, said, known))) for said in (e[known], shuffled))
    assert by_guess > by_texts + 0.3 and by_chance < by_guess - 0.3, (by_texts, by_guess, by_chance)


def test_the_bank_has_what_is_expected_with_its_lift():
    encoder = tiny()
    words = "screen sound night light volume battery phone dark loud music noon empty".split()
    features = tuple(Feature(word, word, f"the {word} of it") for word in words)
    examples = tuple(Query(f"my {word} hurts", (word,)) for word in words[:10])
    bank = sides(encoder, features, examples, lift=1.25)
    texts = sides(encoder, features, ())[:, 0].numpy()
    known = np.arange(12) < 10
    found = expected(texts, bank[:10, 1].numpy(), known)
    np.testing.assert_allclose(bank[10:, 1], 1.25 * found[10:], atol=1e-6)
    np.testing.assert_allclose(bank[10:, 0], 1.25 * texts[10:], atol=1e-6)
    torch.testing.assert_close(bank[:10], sides(encoder, features, (*examples, replace(examples[0], relevant=("noon",))), 1.25)[:10])


def test_an_index_expects_what_its_vectors_do():
    """Rounded to bytes, lengthened or not; features with one vector have no part in it."""
    v, e, _ = corpus(40, 16)
    pairs = [lift * np.stack([a, b]) for a, b, lift in zip(v[:30], e[:30], [1.0, 1.2] * 15, strict=True)]
    index = Index.of([*pairs, v[30:31]], ["text"] * 31)
    np.testing.assert_allclose(
        guessed(index, v[31:]), expected(v[[*range(30), *range(31, 40)]], e[:30], np.arange(39) < 30)[30:], atol=0.03
    )
    assert guessed(Index.of(pairs[:5], ["text"] * 5), v[31:]) is None


@pytest.mark.parametrize("lift", [1.0, 1.1])
def test_everybody_asked_for_changes_nothing(lift):
    encoder = tiny()
    features = tuple(Feature(word, word, "") for word in "screen sound night light volume battery phone dark loud music".split())
    examples = tuple(Query(f"my {f.title}", (f.id,)) for f in features)
    torch.testing.assert_close(sides(encoder, features, examples, lift), sides(encoder, features, examples))
