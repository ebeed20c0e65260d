"""MxML: what a mixture must equal, what must not matter to its weights, and that training finds the member that knows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, Sampler, accuracy
from smidgen.fewshot.methods import Shows
from smidgen.fewshot.methods.mxml import (
    Ensemble,
    MxML,
    NormalisedProtoNet,
    WeightNetwork,
    differences,
    log_weights,
    mixed,
    prototypes,
)
from smidgen.fewshot.methods.mxml_stages import conv4_mixture, train_members, train_weights
from smidgen.fewshot.methods.prototypes import cross_entropy
from smidgen.fewshot.sets import SetsSampler, held_out, joined
from smidgen.fit import FitConfig
from smidgen.images import Images
from smidgen.networks import Conv4
from smidgen.run import Run

NORMALISE = ["none", "softmax", "sum"]
FREE = ["none", "product"]  # whose weights do not sum to one
FORMS = ["authors", "invariant"]
QUICK = FitConfig(steps=40, learning_rate=1e-3, schedule="constant", clip=None, precision="float32")
WAYS, SIZE = 3, 16


@pytest.fixture
def run(tmp_path):
    with Run("fewshot", QUICK, tmp_path / "run") as run:
        yield run


def images(name="set", classes=12, each=12, channels=1, size=SIZE, seed=0, noise=30.0) -> Images:
    """A random pattern of 4 x 4 fields per class, and noise."""
    random = np.random.default_rng(seed)
    patterns = random.uniform(60, 200, (classes, 1, 4, 4, channels)).repeat(size // 4, 2).repeat(size // 4, 3)
    pixels = (patterns + random.normal(0, noise, (classes, each, size, size, channels))).clip(0, 255).astype(np.uint8)
    labels = torch.arange(classes).repeat_interleave(each)
    return Images(name, torch.from_numpy(pixels).flatten(0, 1), labels, tuple(f"{name} {c}" for c in range(classes)))


def tasks(shots=2, queries=4, **options) -> Episode:
    return Sampler(images(), WAYS, shots, queries, tasks=2, **options)(0)


def mixture(members=3, form="authors", transductive=True, normalise="none", width=8, seed=0) -> MxML:
    """Untrained, with weights far from equal and far from saturated; every member has batch statistics of its own."""
    torch.manual_seed(seed)
    model = conv4_mixture((1, SIZE, SIZE), members, WAYS if form == "authors" else None, width, form, transductive, normalise)
    for member in model.members:
        member.train()
        member.embed(torch.rand(1, 32, 1, SIZE, SIZE))
    with torch.no_grad():
        model.network.dense.weight *= 20
    return model.eval()


def state(module: nn.Module) -> dict:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Given(nn.Module):
    """A member over features: their first `width` numbers, from `at` on; the logits of a ProtoNet."""

    def __init__(self, at: int, width: int) -> None:
        super().__init__()
        self.at, self.width = at, width

    def embed(self, x):
        return x[..., self.at : self.at + self.width]

    def classify(self, embedded):
        return -differences(embedded).sum(-1)

    def loss(self, episode):
        return cross_entropy(
            self.classify(episode.with_features(self.embed(episode.support_x), self.embed(episode.query_x))), episode.query_y
        )


# --- members (4.2) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 3])
def test_member_is_a_protonet_of_features_of_length_ten(shots):
    """Against loops in float64; one-shot logits lie in [-400, 0], and prototypes of several shots are shorter than 10."""
    torch.manual_seed(2)
    episode, member = tasks(shots), NormalisedProtoNet(Conv4(1, 8)).double().eval()
    episode = replace(episode, support_x=episode.support_x.double(), query_x=episode.query_x.double())
    p = member.predict(episode)
    for t in range(2):
        h_s, h_q = (member.network(x[t]).flatten(1) for x in (episode.support_x, episode.query_x))
        f_s, f_q = (10 * h / (h.norm(dim=1, keepdim=True) + 1e-8) for h in (h_s, h_q))
        mean = torch.stack([f_s[episode.support_y[t] == c].mean(0) for c in range(WAYS)])
        logits = torch.stack([torch.stack([-((q - m) ** 2).sum() for m in mean]) for q in f_q])
        assert torch.allclose(p[t], logits.softmax(1), atol=1e-12)
        assert -400 <= logits.min() <= logits.max() <= 0
        assert (mean.norm(dim=1) < 10 - 1e-6).all() == (shots > 1)


@torch.no_grad()
def test_padding_is_in_no_prototype_and_no_loss():
    episode = tasks(2)
    padded = joined([episode, Sampler(images(), WAYS, 5, 7)(1)])
    assert padded.support_y[0].tolist()[-3:] == [-1] * 3 and padded.query_y[0].tolist()[-3:] == [-1] * 3
    for model in (mixture(), mixture(form="invariant"), mixture(transductive=False), NormalisedProtoNet(Conv4(1, 8)).eval()):
        assert torch.allclose(model.predict(padded)[:2, : 4 * WAYS], model.predict(episode), atol=1e-5)
        a, b = (float(model.loss(e)) for e in (episode, Sampler(images(), WAYS, 5, 7)(1)))
        assert float(model.loss(padded)) == pytest.approx((2 * a + b) / 3, abs=1e-4)


def test_padding_is_not_in_batch_statistics():
    episodes = Sampler(images(), WAYS, 2, 4)(0), Sampler(images(), WAYS, 5, 7)(1)
    padded, plain = (NormalisedProtoNet(Conv4(1, 8)) for _ in range(2))
    plain.load_state_dict(padded.state_dict())
    padded.loss(joined(episodes))
    real = [e_x.flatten(0, 1) for e in episodes for e_x in (e.support_x, e.query_x)]
    plain.embed(torch.cat(real)[None])
    for a, b in zip(padded.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_class_means():
    features, y = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [5.0, 5.0], [9.0, 9.0]]]), torch.tensor([[0, 0, 1, -1]])
    assert prototypes(features, y, 3).tolist() == [[[2.0, 2.0], [5.0, 5.0], [0.0, 0.0]]]


# --- the network (4.3) -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transductive", [True, False])
def test_authors_network_is_their_convolutions(transductive):
    """Members in the batch axis, a valid 1 x N convolution, a 1 x 1 convolution, the mean over queries, dense, sigmoid, x 100."""
    torch.manual_seed(0)
    m, t, n, f = 4, 6, 3, 5
    network, e = WeightNetwork(f, n, transductive=transductive), torch.rand(1, m, t, n, f)
    first, second = nn.Conv2d(f, 512, (1, n)), nn.Conv2d(512, 128, 1)
    with torch.no_grad():
        first.weight.copy_(network.cell[0].weight.view(512, n, f).movedim(2, 1)[:, :, None])
        first.bias.copy_(network.cell[0].bias)
        second.weight.copy_(network.cell[2].weight[..., None, None])
        second.bias.copy_(network.cell[2].bias)
    h = second(first(e[0].movedim(-1, 1)).relu()).relu()  # (members, 128, queries, 1)
    h = h.mean(2, keepdim=True) if transductive else h
    expected = 100 * network.dense(h[..., 0].mT).sigmoid()[..., 0]
    assert torch.allclose(log_weights(network(e, torch.ones(1, t)), "none").exp()[0], expected, rtol=1e-4)


@pytest.mark.parametrize(("features", "ways"), [(1600, 10), (64, 5)])
def test_authors_network_has_as_many_parameters_as_the_notes_say(features, ways):
    assert sum(p.numel() for p in WeightNetwork(features, ways).parameters()) == ways * features * 512 + 512 + 65_664 + 129


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transductive", [True, False])
def test_order_of_members_permutes_weights(form, transductive):
    model, episode, order = mixture(3, form, transductive), tasks(), [2, 0, 1]
    w = model.weights(episode)
    turned = MxML([model.members[i] for i in order], model.network).eval()
    assert w.std(1).min() > 1e-3, "weights must differ for it to mean something"
    assert torch.allclose(turned.weights(episode), w[:, order], rtol=1e-4)
    assert torch.allclose(turned.predict(episode), model.predict(episode), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_classes(form):
    """Relabelled classes are predicted under their new labels; the authors' 1 x N filter sees another task."""
    model, episode, new = mixture(3, form), tasks(), torch.tensor([1, 2, 0])
    relabelled = replace(episode, support_y=new[episode.support_y], query_y=new[episode.query_y])
    difference = (model.predict(relabelled)[..., new] - model.predict(episode)).abs().max()
    changed = (model.weights(relabelled) / model.weights(episode) - 1).abs().max()
    if form == "invariant":
        assert difference < 1e-4 and changed < 1e-3
    else:
        assert changed > 1e-2
    for member in model.members:
        assert torch.allclose(member.predict(relabelled)[..., new], member.predict(episode), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_transductive_weights_do_not_depend_on_the_order_of_queries(form):
    model, episode = mixture(3, form), tasks()
    order = torch.randperm(4 * WAYS, generator=torch.Generator().manual_seed(0))
    turned = replace(episode, query_x=episode.query_x[:, order], query_y=episode.query_y[:, order])
    assert model.weights(episode).shape == (2, 3, 1)
    assert torch.allclose(model.weights(turned), model.weights(episode), rtol=1e-4)
    other = replace(episode, query_x=episode.query_x.flip(0))
    assert not torch.allclose(model.weights(other), model.weights(episode), rtol=1e-3), "they do depend on the queries"


@pytest.mark.parametrize("form", FORMS)
def test_inductive_weights_of_a_query_do_not_depend_on_the_others(form):
    model, episode = mixture(3, form, transductive=False), tasks()
    w = model.weights(episode)
    assert w.shape == (2, 3, 4 * WAYS)
    alone = replace(episode, query_x=episode.query_x[:, :1], query_y=episode.query_y[:, :1])
    assert torch.allclose(model.weights(alone), w[..., :1], rtol=1e-4)
    assert torch.allclose(model.predict(alone), model.predict(episode)[:, :1], atol=1e-5)
    together = mixture(3, form)
    assert not torch.allclose(together.weights(alone), together.weights(episode), rtol=1e-3), "transductive ones do"
    assert torch.allclose(together.weights(alone), w[..., :1], rtol=1e-4), "of a single query both are the same"


def test_invariant_network_takes_any_number_of_ways():
    model = mixture(2, "invariant")
    for ways in (2, 7):
        assert model.predict(Sampler(images(), ways, 1, 2)(0)).shape == (1, 2 * ways, ways)


# --- the mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transductive", [True, False])
def test_one_member_or_equal_members_are_that_member(normalise, form, transductive):
    model, episode = mixture(3, form, transductive, normalise), tasks()
    alone = model.members[1]
    for members in ([alone], [alone] * 4):
        p, expected = MxML(members, model.network, normalise).eval().predict(episode), alone.predict(episode)
        assert torch.equal(p.argmax(-1), expected.argmax(-1))
        assert torch.allclose(p, expected, atol=1e-5) == (normalise != "none")


@torch.no_grad()
@pytest.mark.parametrize("normalise", NORMALISE)
def test_equal_weights_are_the_uniform_ensemble(normalise):
    model, episode = mixture(3, normalise=normalise), tasks()
    nn.init.zeros_(model.network.dense.weight)
    uniform = Ensemble(model.members).eval()
    expected = torch.stack([m.predict(episode) for m in model.members]).mean(0)
    assert torch.allclose(uniform.predict(episode), expected, atol=1e-6)
    assert torch.equal(model.predict(episode).argmax(-1), expected.argmax(-1))
    assert float(uniform.loss(episode)) == pytest.approx(float(cross_entropy(expected.log(), episode.query_y)), rel=1e-4)
    if normalise != "none":
        assert torch.allclose(model.predict(episode), expected, atol=1e-6)


def test_mixture_by_hand():
    """The docstring's numbers, and a weight of 0 removes a member."""
    log_p, log_w = torch.tensor([[[[0.9, 0.1]], [[0.2, 0.8]]]]).log(), torch.tensor([[[3.0], [1.0]]]).log()
    assert torch.allclose(mixed(log_p, log_w, "none"), torch.tensor([2.9, 1.1]))
    assert torch.allclose(mixed(log_p, log_w - math.log(4), "sum").exp(), torch.tensor([0.725, 0.275]))
    assert torch.allclose(mixed(log_p, torch.tensor([[[0.0], [-math.inf]]]), "sum").exp(), torch.tensor([0.9, 0.1]))


def test_scores_are_weighted_sums_of_probabilities():
    """Brute force in float64, weights per query."""
    random = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 4, 5, generator=random, dtype=torch.float64).softmax(-1)
    a = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    w = 100 * a.sigmoid()
    scores = sum(w[:, m, :, None] * p[:, m] for m in range(3))
    assert torch.allclose(mixed(p.log(), log_weights(a, "none"), "none"), scores)
    assert torch.allclose(mixed(p.log(), log_weights(a, "sum"), "sum").exp(), scores / w.sum(1)[..., None])
    w = torch.nn.functional.softplus(a) / 100
    logarithms = sum(w[:, m, :, None] * p[:, m].log() for m in range(3))
    assert torch.allclose(mixed(p.log(), log_weights(a, "product"), "product"), logarithms)
    share = a.softmax(1)
    assert torch.allclose(mixed(p.log(), log_weights(a, "softmax"), "softmax").exp(), sum(share[:, m, :, None] * p[:, m] for m in range(3)))


def test_a_product_hears_how_sure_members_are():
    """One member is sure of class 0, two lean to class 1: a vote has it two to one, their certainty the other way."""
    log_p = torch.tensor([[[[-1.0, -200.0]], [[-70.0, 0.0]], [[-70.0, 0.0]]]])
    even = torch.zeros(1, 3, 1)
    assert mixed(log_p, log_weights(even, "sum"), "sum").argmax() == 1
    assert mixed(log_p, log_weights(even, "product"), "product").argmax() == 0


@pytest.mark.parametrize("normalise", [*NORMALISE, "product"])
def test_certain_members_and_saturated_weights_give_finite_gradients(normalise):
    """Probabilities of e^-400 and weights of e^-200 are 0 in float32."""
    logits = torch.tensor([[[[-400.0, 0.0]], [[-390.0, 0.0]]]])
    a = torch.tensor([[[300.0], [-200.0]]], requires_grad=True)
    loss = cross_entropy(mixed(logits.log_softmax(-1), log_weights(a, normalise), normalise), torch.tensor([[0]]))
    loss.backward()
    assert loss.isfinite() and a.grad is not None and a.grad.isfinite().all()


def test_insides_are_what_is_mixed():
    episode = tasks()
    for transductive in (True, False):
        model = mixture(3, transductive=transductive)
        assert isinstance(model, Shows)
        assert torch.allclose(model.insides(episode)["weights"], model.weights(episode).mean(-1))


# --- tasks of several sets -------------------------------------------------------------------------------------------


def test_sets_are_drawn_uniformly_whatever_their_sizes():
    sets = images("small", 4, 8, seed=1), images("large", 12, 12, seed=2), images("third", 5, 8, seed=3)
    sampler = SetsSampler(sets, WAYS, 1, 2, tasks=4)
    counts = np.bincount([s for i in range(300) for s in sampler.chosen(i)])
    assert abs(counts - 400).max() < 4 * math.sqrt(1200 * 2 / 9), counts


def test_batches_of_sets_are_always_the_same_and_each_task_is_of_one_set():
    sets = images("a", seed=1), images("b", seed=2)
    sampler = SetsSampler(sets, WAYS, 2, 3, tasks=3, seed=5)
    batch, again = sampler(4), SetsSampler(sets, WAYS, 2, 3, tasks=3, seed=5)(4)
    assert torch.equal(batch.support_x, again.support_x) and torch.equal(batch.query_x, again.query_x)
    for t, s in enumerate(sampler.chosen(4)):
        own = Sampler(sets[s], WAYS, 2, 3, seed=5)(12 + t)
        assert torch.equal(batch.support_x[t], own.support_x[0]) and torch.equal(batch.query_y[t], own.query_y[0])
        assert torch.equal(batch.classes[t], own.classes[0] + s * len(sets[0].classes))
    assert not torch.equal(sampler(5).support_x, batch.support_x)
    unequal = SetsSampler(sets, WAYS, "any", 2, tasks=3)(0)
    assert (unequal.support_y.min(), unequal.support_x.shape[0]) == (-1, 3)


def test_last_classes_are_held_out():
    train, rest = held_out(images("x", 10))
    assert train.classes + rest.classes == images("x", 10).classes and len(rest.classes) == 2


def test_refusals():
    with pytest.raises(UserError, match=r"a has images of 16 x 16 with 1 channel, b of 16 x 16 with 3 channels; resize"):
        SetsSampler((images("a"), images("b", channels=3)), WAYS)
    with pytest.raises(UserError, match="b of 20 x 20"):
        SetsSampler((images("a"), images("b", size=20)), WAYS)
    with pytest.raises(UserError, match="b has 4 classes"):
        SetsSampler((images("a"), images("b", classes=4)), 5, 1, 2)
    with pytest.raises(UserError, match="at least one data set"):
        SetsSampler(())
    with pytest.raises(UserError, match="cannot be held out"):
        held_out(images(), 0.01)
    with pytest.raises(UserError, match="fixed number of ways"):
        WeightNetwork(8)
    with pytest.raises(UserError, match="leave the number out"):
        WeightNetwork(8, 5, "invariant")
    with pytest.raises(UserError, match="made for 3 ways, the task has 4"):
        mixture().predict(Sampler(images(), 4, 1, 2)(0))
    with pytest.raises(UserError, match="give 8, 16 features"):
        MxML([NormalisedProtoNet(Conv4(1, w)) for w in (8, 16)], WeightNetwork(8, WAYS)).predict(tasks())
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])
    with pytest.raises(UserError, match="enlarge"):
        conv4_mixture((1, 8, 8), 2, WAYS)


def test_refused_trainings(run):
    member, sampler = NormalisedProtoNet(Conv4(1, 8)), Sampler(images(), WAYS, 1, 2)
    with pytest.raises(UserError, match="2 members need as many samplers, got 1"):
        train_members([member, NormalisedProtoNet(Conv4(1, 8))], [sampler], QUICK, run)
    with pytest.raises(UserError, match="listed twice"):
        train_members([member, member], [sampler, sampler], QUICK, run)


# --- training --------------------------------------------------------------------------------------------------------


def test_members_trained_together_become_what_they_do_alone(tmp_path):
    config, sets = replace(QUICK, steps=4), [images("a", seed=1), images("b", seed=2)]
    samplers = [Sampler(s, WAYS, 1, 3, seed=i) for i, s in enumerate(sets)]

    def members():
        torch.manual_seed(0)
        return [NormalisedProtoNet(Conv4(1, 8)) for _ in sets]

    def trained(members, samplers, name, **options):
        with Run("fewshot", config, tmp_path / name) as run:
            return train_members(members, samplers, config, run, **options)

    together, alone, before = members(), members(), state(members()[0])
    result = trained(together, samplers, "together", validation=samplers, episodes=2)
    for i, member in enumerate(alone):
        trained([member], samplers[i : i + 1], f"alone {i}")
        assert same(state(member), state(together[i])) and not member.training
    assert not same(state(together[0]), before)
    figures = result.evaluation(4)
    assert len(figures["member_accuracies"]) == 2 and figures["held_out"] == pytest.approx(sum(figures["member_losses"]) / 2)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_stage_two_leaves_members_as_they_are(run, normalise):
    """To the bit, batch statistics included; with weight decay too. The network moves."""
    model = mixture(2, normalise=normalise)
    members, network = state(model.members), state(model.network)
    sampler = SetsSampler((images("a", seed=1), images("b", seed=2)), WAYS, 1, 3, tasks=2)
    config = replace(QUICK, steps=3, weight_decay=0.1, evaluate_every=2)
    result = train_weights(model, sampler, config, run, validation=sampler, episodes=2)
    assert same(state(model.members), members) and not same(state(model.network), network)
    assert 0 <= result.evaluation(3)["accuracy"] <= 1
    assert not model.training and not any(m.training for m in model.train().members.modules())


def knowing(i: int, knows: int | None = None, ways: int = WAYS) -> Episode:
    """Tasks of features: one half tells the class, the other is noise; which one, of members 0 and 1, is drawn unless given."""
    random = np.random.default_rng([7, i])
    tasks, shots, queries, width = 4, 1, 5, 6
    knows = int(random.integers(2)) if knows is None else knows
    centres = random.normal(0, 1, (tasks, ways, 1, width))
    parts = []
    for each in (shots, queries):
        exact = centres + random.normal(0, 0.1, (tasks, ways, each, width))
        noise = random.normal(0, 1, (tasks, ways, each, width))
        both = [exact, noise] if knows == 0 else [noise, exact]
        y = np.tile(np.arange(ways).repeat(each), (tasks, 1))
        parts += [torch.from_numpy(np.concatenate(both, -1).reshape(tasks, -1, 2 * width)).float(), torch.from_numpy(y)]
    return Episode(*parts, ways)


@pytest.mark.parametrize(
    ("form", "transductive", "normalise"),
    [
        *(("authors", True, n) for n in [*NORMALISE, "product"]),
        ("invariant", True, "sum"),
        ("authors", False, "none"),
        ("invariant", False, "softmax"),
    ],
)
def test_training_finds_the_member_that_knows(run, form, transductive, normalise):
    """Which member knows changes from task to task, so that no constant weights would do: half right, half noise, an ensemble fails."""
    torch.manual_seed(0)
    model = MxML([Given(0, 6), Given(6, 6)], WeightNetwork(6, WAYS if form == "authors" else None, form, transductive), normalise)
    test = [(k, knowing(10_000 + i, k)) for i in range(12) for k in (0, 1)]

    def right(method):
        return float(torch.cat([accuracy(method.predict(e), e) for _, e in test]).mean())

    exact = float(torch.cat([accuracy(model.members[k].classify(_features(model.members[k], e)), e) for k, e in test]).mean())
    uniform, before = right(Ensemble(model.members)), right(model)
    train_weights(model, knowing, replace(QUICK, steps=150 if normalise in FREE else 60, learning_rate=3e-3), run)
    assert exact > 0.99 and max(uniform, before) < 0.95
    with torch.no_grad():
        share = torch.cat([w[:, k] / w.sum(1) for k, e in test for w in [model.weights(e)]])
    if transductive:
        # unnormalised weights are an inverse temperature as well: once the right member leads, more of it is more of both
        assert right(model) > exact - (0.02 if normalise in FREE else 0.01) and share.mean() > (0.8 if normalise in FREE else 0.95)
    else:
        assert right(model) > (uniform + exact) / 2 and share.mean() > 0.6


def _features(member, episode):
    return episode.with_features(member.embed(episode.support_x), member.embed(episode.query_x))


def test_both_stages_on_images(run, tmp_path):
    """Two sets, a member each; then tasks of classes that neither has seen."""
    sets = [images("a", 10, seed=1), images("b", 10, channels=1, seed=2)]
    train, rest = zip(*(held_out(s, 0.3) for s in sets), strict=True)
    torch.manual_seed(0)
    model = conv4_mixture((1, SIZE, SIZE), 2, WAYS, 8)
    config = replace(QUICK, steps=15, learning_rate=1e-2)
    train_members(model.members, [Sampler(s, WAYS, 1, 3) for s in train], config, run)
    with Run("fewshot", QUICK, tmp_path / "weights") as second:
        train_weights(model, SetsSampler(rest, WAYS, 1, 3, tasks=2), replace(config, learning_rate=1e-3), second)
    episode = SetsSampler(rest, WAYS, 1, 5, tasks=8)(99)
    assert float(accuracy(model.predict(episode), episode).mean()) > 0.8
