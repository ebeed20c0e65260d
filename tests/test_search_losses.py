"""Losses in closed form, and what a batch of contrastive training does."""

import math
from dataclasses import replace

import pytest
import torch
from test_search_bert import tiny

from smidgen.search.contrastive import (
    Contrastive,
    Views,
    batches,
    computed_anew,
    cosines,
    groups,
    interpolated,
    labels,
    objective,
    own_queries,
)
from smidgen.search.features import Feature, Query
from smidgen.search.losses import alignment, info_nce, list_kl

FEATURES = (
    Feature("eyes", "Night Light", "Screen amber at night", ("eyes",), "Settings > Screen"),
    Feature("volume", "Volume", "", ("loud", "quiet"), "Settings > Sound"),
    Feature("ring", "Volume", "", (), "Settings > Ring"),
    Feature("saver", "Battery", "Slow charge", (), "Settings > Battery"),
)
QUERIES = (Query("my eyes hurt", ("eyes",)), Query("the phone loud", ("volume",)), Query("my ring quiet", ("ring", "volume")))


def test_info_nce_in_closed_form():
    eye = torch.eye(64, dtype=torch.bool)
    assert float(info_nce(torch.zeros(64, 64).double(), eye, 0.05)) == pytest.approx(math.log(64), rel=1e-12)
    apart = info_nce(torch.eye(64).double(), eye, 0.05)
    assert float(apart) == pytest.approx(math.log1p(63 * math.exp(-20)), rel=1e-6) == pytest.approx(1.2985e-7, rel=1e-3)


def test_the_gradient_of_info_nce():
    """(p - 1[positive]) / (n t), 0 where masked."""
    torch.manual_seed(0)
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    positive = torch.zeros(5, 7, dtype=torch.bool)
    positive[torch.arange(5), torch.arange(5)] = True
    masked = torch.zeros_like(positive)
    masked[0, 6] = masked[3, 3] = True  # a positive is never masked
    info_nce(scores, positive, 0.1, masked).backward()
    p = (scores.detach() / 0.1).masked_fill(masked & ~positive, -torch.inf).softmax(1)
    torch.testing.assert_close(scores.grad, (p - positive.double()) / (5 * 0.1))
    assert scores.grad[0, 6] == 0 and scores.grad[3, 3] < 0
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_several_positives():
    """m equal ones and nothing else give ln m; a masked duplicate changes nothing."""
    yes = torch.ones(1, 4, dtype=torch.bool)
    assert float(info_nce(torch.full((1, 4), 0.3), yes, 0.05)) == pytest.approx(math.log(4))
    scores, positive = torch.tensor([[0.9, 0.2, 0.4]]), torch.tensor([[True, False, False]])
    doubled = torch.cat([scores, scores[:, :1]], 1), torch.cat([positive, ~positive[:, :1]], 1)
    masked = torch.tensor([[False, False, False, True]])
    assert float(info_nce(*doubled, 0.05, masked)) == pytest.approx(float(info_nce(scores, positive, 0.05)))


def test_list_kl():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), torch.randn(3, 9, dtype=torch.float64)
    assert float(list_kl(teacher + torch.randn(3, 1), teacher, 0.05).detach()) == pytest.approx(0, abs=1e-12)
    value = list_kl(student, teacher, 0.5)
    assert float(value.detach()) > 0
    value.backward()
    torch.testing.assert_close(student.grad, ((student.detach() / 0.5).softmax(1) - (teacher / 0.5).softmax(1)) / (0.5 * 3))


def test_alignment_is_half_the_squared_distance():
    u, v = (torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1) for _ in range(2))
    assert float(alignment(u, v)) == pytest.approx(float(((u - v) ** 2).sum(1).mean() / 2))


def test_labels_mask_features_of_the_same_title():
    positive, masked = labels(QUERIES, FEATURES, torch.device("cpu"))
    assert positive.tolist() == [[True, False, False, False], [False, True, False, False], [False, True, True, False]]
    assert masked.tolist() == [[False] * 4, [False, False, True, False], [False] * 4]


def test_what_features_are_called_are_queries_for_all_of_that_name():
    own = {q.query: q.relevant for q in own_queries(FEATURES)}
    assert own == {
        "Night Light": ("eyes",),
        "eyes": ("eyes",),
        "Volume": ("volume", "ring"),
        "loud": ("volume",),
        "quiet": ("volume",),
        "Battery": ("saver",),
    }


def test_vectors_of_features_are_the_means_of_their_views():
    encoder = tiny()
    views = Views(encoder, FEATURES)
    found = views.means(views.bank(encoder.model))
    for feature, vector in zip(FEATURES, found, strict=True):
        mean = encoder.encode(feature.views()).double().mean(0)
        torch.testing.assert_close(vector.double(), mean / mean.norm(), atol=1e-6, rtol=0)
    chosen = torch.tensor([0, 3])
    rows = views.one_each(chosen)
    assert views.owner[rows].tolist() == [0, 3]
    torch.testing.assert_close(views.encode(encoder.model, rows), views.bank(encoder.model)[rows], atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_whole_thing():
    """A fresh bank, no dropout, one view a feature: the update is the exact softmax's over all features that a batch recomputes."""
    features = tuple(replace(f, summary="", keywords=(), path="") for f in FEATURES)
    encoder = tiny(dropout=0.0)
    model = encoder.model
    batch = batches(encoder, QUERIES, features, 3, 0.0, 0)(0)
    views = Views(encoder, features)
    method = Contrastive(hard=4, filter=10.0, teaching=0.0)  # all features are negatives of some query
    objective(method, views)(model, batch).backward()
    ours = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    whole = cosines(model(batch.ids, batch.mask), views.means(views.encode(model)))
    info_nce(whole, batch.positive, method.temperature, batch.masked).backward()
    theirs = model.layers[0].qkv.weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert float(ours.abs().max()) > 1e-3


def test_hard_negatives_are_the_best_below_the_filter():
    scores = torch.tensor([[0.9, 0.8, 0.5, 0.85], [0.1, 0.2, 0.3, 0.9]])
    positive = torch.tensor([[True, False, False, False], [False, False, False, True]])
    none = torch.zeros_like(positive)
    assert computed_anew(scores, positive, none, Contrastive(hard=0)).tolist() == [0, 3]
    assert computed_anew(scores[:1], positive[:1], none[:1], Contrastive(hard=1)).tolist() == [0, 3]
    masked = torch.tensor([[False, False, False, True]])
    assert computed_anew(scores[:1], positive[:1], masked, Contrastive(hard=1)).tolist() == [0, 1], "0.855 is the bound"
    assert computed_anew(scores[:1], positive[:1], masked, Contrastive(hard=9)).tolist() == [0, 1, 2]


def test_weights_between_start_and_end():
    a, b = {"w": torch.randn(5)}, {"w": torch.randn(5)}
    assert torch.equal(interpolated(a, b, 0.0)["w"], a["w"]) and torch.equal(interpolated(a, b, 1.0)["w"], b["w"])
    torch.testing.assert_close(interpolated(a, b, 0.25)["w"], 0.75 * a["w"] + 0.25 * b["w"])


def test_words_stay_and_lower_layers_learn_slower():
    model = tiny().model
    found = groups(model, 1.0, 0.5)
    rate = {id(p): g["lr"] for g in found for p in g["params"]}
    assert id(model.words.weight) not in rate
    assert rate[id(model.layers[1].inner.weight)] == 1.0 and rate[id(model.layers[0].inner.weight)] == 0.5
    assert rate[id(model.positions.weight)] == 0.25
    assert sum(len(g["params"]) for g in found) == len(list(model.parameters())) - 1
    assert all(p.ndim > 1 for g in found if g["weight_decay"] for p in g["params"])
