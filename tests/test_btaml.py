"""MAML, Meta-SGD and Bayesian TAML: the inner loop against slow twins, their reductions to one another, the encoder's symmetries."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from smidgen.cuda_graphs import replaying
from smidgen.errors import UserError
from smidgen.fewshot.episodes import Episode, Sampler, accuracy
from smidgen.fewshot.graphs import Graphs, Training, sized
from smidgen.fewshot.measure import norm_mode
from smidgen.fewshot.methods import Shows, btaml
from smidgen.fewshot.methods.btaml import BTAML, BTAMLConfig, divergence, modulated, sample
from smidgen.fewshot.methods.convolution import Matched, Owners, by_kernels, convolved
from smidgen.fewshot.methods.inner import (
    BLOCKS,
    EPSILON,
    Classifier,
    Inner,
    Parts,
    clipped,
    even,
    inverse_size,
    moments,
    query_loss,
)
from smidgen.fewshot.methods.maml import MAML, MAMLConfig, MetaSGD, MetaSGDConfig
from smidgen.fewshot.methods.normal import Affine, Pooled, Sums
from smidgen.fewshot.models import make
from smidgen.fit import FitConfig, fit
from smidgen.images import Images
from smidgen.run import Run

IMAGE = (1, 16, 16)
SMALL = Inner(width=4, steps=3, test_steps=4)
OFF = BTAMLConfig(omega=False, gamma=False, z=False, inner=SMALL)
FACTORIES = [
    lambda: MAML(IMAGE, MAMLConfig(0.1, SMALL)),
    lambda: MetaSGD(IMAGE, MetaSGDConfig(0.1, "classes", SMALL)),
    lambda: BTAML(IMAGE, BTAMLConfig(rate=0.1, samples=2, inner=SMALL)),
]
NAMES = ["maml", "meta-sgd", "btaml"]
METHODS = pytest.mark.parametrize("make", FACTORIES, ids=NAMES)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def task(shots: list[int], seed: int = 0, queries: int = 2) -> Episode:
    """One task in float64, of random images that have something of their class."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.rand(len(shots), *IMAGE, generator=random, dtype=torch.float64)

    def images(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return (classes[y] + torch.rand(len(y), *IMAGE, generator=random, dtype=torch.float64))[None] / 2, y[None]

    return Episode(*images(shots), *images([queries] * len(shots)), len(shots))


def padded(episode: Episode, support: int, queries: int) -> Episode:
    """With rows of padding that hold anything but zeros, so that whoever reads them is found out."""

    def fill(x: torch.Tensor, y: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([x, x.new_full((len(x), n, *IMAGE), 0.7)], 1), F.pad(y, (0, n), value=-1)

    return Episode(*fill(episode.support_x, episode.support_y, support), *fill(episode.query_x, episode.query_y, queries), episode.ways)


def batch(*episodes: Episode) -> Episode:
    """Tasks of one number of ways and queries."""
    longest = max(e.support_y.shape[1] for e in episodes)
    rows = [padded(e, longest - e.support_y.shape[1], 0) for e in episodes]
    parts = [torch.cat([getattr(e, part) for e in rows]) for part in ("support_x", "support_y", "query_x", "query_y")]
    return Episode(*parts, episodes[0].ways)


def permuted(episode: Episode, order: list[int]) -> Episode:
    """Class order[c] becomes class c."""
    inverse = torch.tensor(order).argsort()
    return replace(episode, support_y=inverse[episode.support_y], query_y=inverse[episode.query_y])


def made(make, seed: int = 0):
    """A method in float64, its parameters moved off their initial values, where symmetries could hide mistakes."""
    torch.manual_seed(seed)
    method = make().double()
    with torch.no_grad():
        for name, p in method.named_parameters():
            p += torch.randn_like(p) * (0.1 if "encoder" in name else 0.02)
    return method


def twin(method: MetaSGD | BTAML, episode: Episode, steps: int, rates=None, emphasis=None, theta=None):
    """Meta-SGD's theta_K, a loop over tasks with torch's own layers and autograd.grad; no padding allowed for: it is cut off."""
    net, ways, results = method.classifier, episode.ways, []
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)  # the head starts as a constant, of which there are no gradients
    for t in range(len(episode.support_x)):
        real = episode.support_y[t] >= 0
        x, y = episode.support_x[t][real], episode.support_y[t][real]
        start = theta or net.start(episode)
        weights = [(w[t] + zero, b[t] + zero) for w, b in start]
        alphas = [(w[t], b[t]) for w, b in (rates or method.rates(episode))]
        w_class = torch.full((ways,), 1 / ways, dtype=x.dtype) if emphasis is None else emphasis[t]
        for _ in range(steps):
            ce = F.cross_entropy(forward(net, weights, x), y, reduction="none")
            loss = sum(w_class[c] * ways / len(y) * ce[y == c].sum() for c in range(ways))
            flat = torch.autograd.grad(loss, [p for pair in weights for p in pair], create_graph=True)
            moved = [p - a * g for p, a, g in zip(sum(weights, ()), sum(alphas, ()), flat, strict=True)]
            weights = list(zip(moved[::2], moved[1::2], strict=True))
        results.append(weights)
    return results


def forward(net: Classifier, weights, x: torch.Tensor) -> torch.Tensor:
    for (w, b), shift in zip(weights[:BLOCKS], net.shift, strict=True):
        x = F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, w, b, padding=1), None, None, None, shift, True, 0.1, EPSILON)), 2)
    return x.flatten(1) @ weights[BLOCKS][0].T + weights[BLOCKS][1]


def distance(a, b) -> float:
    """Largest between two lists of weights and biases."""
    return max(float((p - q).detach().abs().max()) for pair, other in zip(a, b, strict=True) for p, q in zip(pair, other, strict=True))


def of(theta, t: int):
    return [(w[t], b[t]) for w, b in theta]


def deviation(method: nn.Module, value, prefix: str = "") -> dict[str, float]:
    """Of backward() from central differences along a random direction, relative; for every group of parameters. `value()` is the loss.

    The step is tiny: an inner gradient jumps where a rectifier bends, and the loss with it.
    """
    step, random, groups = 1e-8, torch.Generator().manual_seed(1), {}
    for name, p in method.named_parameters():
        if name.startswith(prefix):
            groups.setdefault(".".join(name.split(".")[:2]), []).append((p, torch.randn(p.shape, generator=random, dtype=p.dtype)))
    method.zero_grad()
    value().backward()
    found = {}
    for group, pairs in groups.items():
        slope, ends = sum(float((p.grad * d).sum()) for p, d in pairs), []
        for moved in (step, -step):
            with torch.no_grad():
                before = [p.clone() for p, _ in pairs]
                for p, d in pairs:
                    p += moved * d
                ends.append(float(value()))
                for (p, _), old in zip(pairs, before, strict=True):
                    p.copy_(old)
        difference = (ends[0] - ends[1]) / (2 * step)
        found[group] = abs(slope - difference) / max(abs(difference), 1e-3)
    return found


# The inner loop


def test_tasks_side_by_side_are_the_slow_twin():
    method, episode = made(FACTORIES[1]), batch(task([3, 1, 5], 1), task([2, 2, 2], 2))
    random = torch.Generator().manual_seed(0)
    emphasis = torch.rand(2, 3, generator=random, dtype=torch.float64)
    theta = method.classifier.adapt(method.classifier.start(episode), method.rates(episode), emphasis, episode, 4)
    slow = twin(method, episode, 4, emphasis=emphasis)
    for t in range(2):
        assert distance(of(theta, t), slow[t]) < 1e-10
        assert distance(of(theta, t), of(method.classifier.start(episode), t)) > 1e-2
        answer = forward(method.classifier, slow[t], episode.query_x[t])
        assert torch.allclose(method.classifier.answers(theta, episode)[t], answer, atol=1e-9)


def test_twin_has_the_same_outer_gradient():
    method, episode = made(lambda: MetaSGD(IMAGE, MetaSGDConfig(0.1, inner=SMALL))), batch(task([3, 1], 1), task([2, 2], 2))
    method(episode).backward()
    fast = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    losses = [
        F.cross_entropy(forward(method.classifier, theta, x), y)
        for theta, x, y in zip(twin(method, episode, SMALL.steps), episode.query_x, episode.query_y, strict=True)
    ]
    torch.stack(losses).mean().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-9, rtol=1e-6) for a, p in zip(fast, method.parameters(), strict=True))


@METHODS
def test_second_order_gradient_is_that_of_finite_differences(make):
    method, episode = made(make), batch(task([2, 1], 3), task([1, 3], 4))

    def value() -> torch.Tensor:
        torch.manual_seed(5)  # the same phi
        return method(episode)

    found = deviation(method, value)
    assert set(found) >= {"classifier.weights", "classifier.shift"} and max(found.values()) < 1e-4, found


def test_first_order_gradient_is_not(monkeypatch):
    exact = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: tuple(g.detach() for g in exact(*args, **options)))
    method, episode = made(FACTORIES[0]), task([2, 1], 3)
    assert max(deviation(method, lambda: method(episode)).values()) > 0.05


def test_a_part_s_convolution_is_torch_s_and_so_are_its_gradients():
    """Three parts, two of them of one task; the weight's gradient adds up over a task's parts."""
    owners = Owners(torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.float64), torch.tensor([0, 1, 0]))
    x, weight = torch.rand(3, 3, 2, 4, 5, dtype=torch.float64), torch.rand(2, 6, 3, 3, 3, dtype=torch.float64)
    plain = [F.conv2d(images.transpose(0, 1), weight[t], padding=1).transpose(0, 1) for images, t in zip(x, owners.task, strict=True)]
    torch.testing.assert_close(convolved(x, weight, owners), torch.stack(plain), rtol=1e-12, atol=1e-12)
    x, y, weight = (t.detach().requires_grad_() for t in (x[:, :2, :1], torch.stack(plain)[:, :3, :1], weight[:, :3, :2]))
    for operation, given in ((lambda *pair: convolved(*pair, owners), (x, weight)), (lambda *pair: Matched.apply(*pair, *owners), (y, x))):
        assert torch.autograd.gradcheck(operation, given) and torch.autograd.gradgradcheck(operation, given)


def test_first_moments_follow_from_those_of_the_windows():
    """Against the maps themselves, for tasks of unequal length with padding."""
    tasks = batch(task([3, 4]), task([9, 8], seed=1))
    parts = Parts.of(tasks.support_x, (tasks.support_y >= 0).double())
    weight = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    maps = parts.first(weight)
    torch.testing.assert_close(maps, convolved(parts.maps, weight, parts.owners), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(parts.windows.moments(weight), moments(maps, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@METHODS
def test_the_sizes_of_cuda_graphs_change_nothing(make):
    """Tasks padded to one width, with room for parts that are not there: loss and gradients as before."""
    method, tasks = made(make).eval(), batch(task([3, 20]), task([30, 1], seed=1), task([1, 1], seed=2))
    tensors = list(method.parameters())
    roomy = sized(tasks, (100, 20), method.classifier)
    assert roomy.support_y.shape == (3, 100) and roomy.query_y.shape == (3, 20)
    assert roomy.room == (10, 9) and Parts.least((tasks.support_y >= 0).double()) == 8  # 3 + 4 + 1; in steps of 39 / 8
    before, after = (torch.autograd.grad(method(episode), tensors, allow_unused=True) for episode in (tasks, roomy))
    assert method(roomy).item() == pytest.approx(method(tasks).item(), abs=1e-12)
    for a, b in zip(before, after, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    cut = replace(roomy, room=(7, 9))
    assert not abs(method(cut).item() - method(tasks).item()) < 1e-6  # too little room would be seen here


@METHODS
def test_with_room_no_shape_depends_on_data(make):
    """What a CUDA graph cannot have is found without a GPU: tensors without values, of which nothing can be asked."""
    method = make().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        none, labels = torch.zeros(4, 100, dtype=torch.long), torch.zeros(4, 10, dtype=torch.long)
        episode = Episode(torch.zeros(4, 100, *IMAGE), none, torch.zeros(4, 10, *IMAGE), labels, 2, room=(21, 8))
        parameters = list(method.parameters())
        gradient = torch.autograd.grad(method.loss(episode), parameters)
        assert [g.shape for g in gradient] == [p.shape for p in parameters]
        with pytest.raises(DynamicOutputShapeException):
            method.loss(replace(episode, room=None))


def derived(operation, way: torch.Tensor, *given: torch.Tensor) -> list[torch.Tensor]:
    """A value, its gradients, and the gradients of these."""
    y = operation(*given)
    first = torch.autograd.grad((y.square() * way).sum(), given, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)]


@cuda
@pytest.mark.parametrize(("tf32", "bound"), [(False, 1e-5), (True, 3e-3)])
@pytest.mark.parametrize("shape", [(3, 3, 8, 32, 32), (5, 32, 8, 16, 16), (3, 20, 3, 7, 5), (3, 64, 8, 4, 4)])
def test_kernels_of_convolution_are_what_they_stand_for(shape, tf32, bound, monkeypatch):
    """Against float64, which kernels do not compute."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    torch.manual_seed(0)
    parts, channels, part, height, width = shape
    task = torch.arange(parts, device="cuda") % 2
    x, weight, way = torch.randn(shape), torch.randn(2, 40, channels, 3, 3) / 9, torch.randn(parts, 40, part, height, width)
    found = []
    for kind in (torch.float32, torch.float64):
        owners = Owners(F.one_hot(task).T.to(kind), task)
        given = [t.cuda().to(kind).requires_grad_() for t in (x, weight)]
        assert by_kernels(given[0]) == (kind == torch.float32)
        found.append(derived(lambda x, weight, owners=owners: convolved(x, weight, owners), way.cuda(), *given))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < bound * theirs.norm()


@cuda
@pytest.mark.parametrize("shape", [(3, 3, 8, 32, 32), (5, 32, 8, 16, 16), (3, 20, 3, 7, 5), (3, 64, 8, 4, 4)])
def test_kernels_after_a_convolution_are_what_they_stand_for(shape):
    """Against torch's own operations, in float32 as well: another largest of four would be another gradient."""
    torch.manual_seed(0)
    parts, channels, part, height, width = shape
    task, counted = torch.arange(parts).cuda() % 2, (torch.rand(parts, part) < 0.7).float().cuda()
    member = F.one_hot(task).T.float()
    x, scale, shift = (t.cuda().requires_grad_() for t in (torch.randn(shape), torch.rand(2, channels) + 0.1, torch.randn(2, channels)))

    def plain(x, scale, shift):
        most = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        return (scale[task][..., None, None, None] * most + shift[task][..., None, None, None]).relu()

    def sums(x):
        return torch.cat([(power.mean((3, 4)) * counted[:, None]).sum(2) for power in (x, x.square())], 1)

    def normal(mean, variance, shift):
        scale = (variance + EPSILON).rsqrt()
        return torch.cat([scale, shift - mean * scale])

    def by_kernel(mean, variance, shift):
        return torch.cat(Affine.apply(mean, variance, shift, EPSILON))

    way = torch.randn(parts, channels, part, height // 2, width // 2).cuda()
    of_affine = torch.rand(4, channels, device="cuda"), shift, scale, shift + scale
    of_affine = of_affine[0], *(t.detach().requires_grad_() for t in of_affine[1:])
    for ours, theirs in zip(derived(by_kernel, *of_affine), derived(normal, *of_affine), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    pairs = zip(
        derived(lambda *given: Pooled.apply(*given, member, task), way, x, scale, shift)
        + derived(lambda x: Sums.apply(x, counted), way.new_ones(()), x),
        derived(plain, way, x, scale, shift) + derived(sums, way.new_ones(()), x),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@cuda
@METHODS
def test_cuda_graphs_have_the_same_loss_and_gradient(make):
    """Of batches of several sizes in turn, so that graphs share their memory; noise is drawn alike."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (20 * 70, 16, 16, 1)).byte()
    images = Images("noise", pixels, torch.arange(20).repeat_interleave(70), tuple(map(str, range(20)))).to("cuda")
    tasks, plain = Sampler(images, 5, "any", 15, tasks=2), Training(make().cuda().train())
    graphed = copy.deepcopy(plain)  # gradients of the other are added up on another stream, which a capture must not wait for
    graphed.capture(tasks)
    losses: dict[bool, list[float]] = {False: [], True: []}
    gradients: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for graphs, training in ((False, plain), (True, graphed)):
        for i in (*range(6), *range(6)):
            torch.manual_seed(i)
            training.zero_grad()
            with replaying():
                loss = training(tasks(i))
                loss.backward()
            losses[graphs].append(loss.item())
            gradients[graphs].append(torch.cat([p.grad.flatten().clone() for p in training.parameters()]))
    assert graphed.graphs is not None and len(graphed.graphs.made) > 2
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    for ours, theirs in zip(gradients[True], gradients[False], strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_any_batch_has_one_of_few_sizes():
    images = Images("noise", torch.zeros(20 * 70, 16, 16, 1).byte(), torch.arange(20).repeat_interleave(70), tuple(map(str, range(20))))
    sampler = Sampler(images, 5, "any", 15, tasks=4)
    graphs = Graphs(made(FACTORIES[2]), sampler)
    rooms = {sized(sampler(i), graphs.width, graphs.classifier).room for i in range(200)}
    assert {support for support, _ in rooms} <= set(range(16, 129, 16)) and len(rooms) > 4 and {query for _, query in rooms} == {40}


def test_cuda_graphs_are_refused_where_sizes_differ():
    images = Images("noise", torch.zeros(20 * 70, 16, 16, 1).byte(), torch.arange(20).repeat_interleave(70), tuple(map(str, range(20))))
    with pytest.raises(UserError, match="tasks of one size"):
        Graphs(make("protonet", IMAGE, 5, {}), Sampler(images, 5, "any", 15))
    even, odd = Sampler(images, 5, 1, 15), padded(task([1] * 5), 1, 0)
    with pytest.raises(UserError, match="tasks without padding"):
        Graphs(make("protonet", IMAGE, 5, {}), even)(odd)
    with pytest.raises(UserError, match="faithful_padding"):
        Graphs(MAML(IMAGE, MAMLConfig(inner=Inner(faithful_padding=True))), Sampler(images, 5, "any", 15))


def test_linear_softmax_by_hand():
    """With steps for the head alone, adaptation is softmax regression on fixed features, whose gradient is known."""
    method, episode = made(lambda: MetaSGD(IMAGE, MetaSGDConfig(0.1, inner=SMALL))), task([3, 1, 2])
    with torch.no_grad():
        for p in [*method.rates.weights[:BLOCKS], *method.rates.biases[:BLOCKS]]:
            p.zero_()
    x, y = episode.support_x[0], F.one_hot(episode.support_y[0], 3).double()
    start = of(method.classifier.start(episode), 0)
    identity = (torch.eye(method.classifier.features, dtype=torch.float64), torch.zeros(method.classifier.features, dtype=torch.float64))
    h = forward(method.classifier, [*start[:BLOCKS], identity], x)
    w, b = start[BLOCKS]
    for _ in range(5):
        error = ((h @ w.T + b).softmax(1) - y) / len(x)
        w, b = w - method.rates.weights[BLOCKS] * (error.T @ h), b - method.rates.biases[BLOCKS] * error.sum(0)
    theta = of(method.classifier.adapt(method.classifier.start(episode), method.rates(episode), even(episode), episode, 5), 0)
    assert distance([*start[:BLOCKS], (w, b)], theta) < 1e-12


def test_zero_head_is_uniform_and_its_first_bias_gradient_known():
    method, episode = made(lambda: MAML(IMAGE, MAMLConfig(1.0, SMALL))), task([3, 1, 4])
    start = method.classifier.start(episode)
    assert query_loss(method.classifier.answers(start, episode), episode).item() == pytest.approx(math.log(3), abs=1e-12)
    ones = [(torch.ones_like(w), torch.ones_like(b)) for w, b in start]
    bias = method.classifier.adapt(start, ones, even(episode), episode, 1)[BLOCKS][1][0]
    assert torch.allclose(-bias, 1 / 3 - torch.tensor([3, 1, 4], dtype=torch.float64) / 8, atol=1e-12)


@pytest.mark.parametrize("ways", [2, 6])
@METHODS
def test_any_number_of_ways_and_equivariant_to_their_order(make, ways):
    method, episode = made(make), task([1 + c % 3 for c in range(ways)])
    order = list(range(1, ways)) + [0]
    method.eval()
    with torch.no_grad():
        assert method(permuted(episode, order)).item() == pytest.approx(method(episode).item(), abs=1e-9)
    if not isinstance(method, BTAML):  # whose samples' noise stays where it is
        assert torch.allclose(method.predict(permuted(episode, order)), method.predict(episode)[..., order], atol=1e-9)


@METHODS
def test_padding_and_company_change_nothing(make):
    method, episode = made(make), task([2, 1, 3])
    answer = method.predict(episode)
    filled = method.predict(padded(episode, 5, 4))
    assert torch.allclose(filled[:, :6], answer, atol=1e-9)
    together = method.predict(batch(task([4, 4, 4], 8), episode))
    assert torch.allclose(together[1], answer[0], atol=1e-9)
    method.eval()
    with torch.no_grad():
        assert method(padded(episode, 5, 4)).item() == pytest.approx(method(episode).item(), abs=1e-9)


def test_faithful_padding_does_change_answers():
    faithful = Inner(width=4, steps=3, test_steps=4, faithful_padding=True)
    method, episode = made(lambda: MAML(IMAGE, MAMLConfig(0.1, faithful))), task([2, 1, 3])
    assert (method.predict(padded(episode, 5, 0)) - method.predict(episode)).abs().max() > 1e-3
    assert torch.allclose(method.predict(episode), made(FACTORIES[0]).predict(episode))


def test_class_weighting_gives_every_class_the_same_part():
    episode = task([3, 1, 4])
    weight = inverse_size(episode)[0] * 3 / 8  # of an image of class c
    assert torch.allclose(weight * torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64), torch.tensor(1 / 3, dtype=torch.float64))
    assert torch.allclose(inverse_size(task([2, 2, 2])), even(task([2, 2, 2])))


def test_gradients_are_clipped_entry_by_entry_in_copies_too():
    method, episode = made(FACTORIES[0]), task([2, 1])
    method(episode).backward()
    raw = {name: p.grad.clone() for name, p in method.named_parameters()}
    bound = float(max(g.abs().max() for g in raw.values())) / 3
    copied = copy.deepcopy(method)
    copied.zero_grad()
    clipped(copied, episode, bound).backward()
    for name, p in copied.named_parameters():
        assert torch.allclose(p.grad, raw[name].clamp(-bound, bound), atol=1e-12)
    assert torch.equal(method.loss(episode), method(episode))
    with torch.no_grad():
        assert torch.equal(method.loss(episode), method(episode))


# Reductions


def silent(method: BTAML) -> BTAML:
    """Whose encoder says mu = 0, sigma = 1."""
    for head in method.encoder.heads.values():
        last = head[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[len(last.bias) // 2 :] = math.log(math.e - 1)
    return method


def adapted(method, episode, steps=3):
    if isinstance(method, BTAML):
        return method.adapt(episode, {name: mu for name, (mu, _) in method.encoder(episode).items()}, steps)
    rates = method.rates(episode) if isinstance(method, MetaSGD) else None
    start = method.classifier.start(episode)
    rates = rates or [(torch.full_like(w, method.config.rate), torch.full_like(b, method.config.rate)) for w, b in start]
    return method.classifier.adapt(start, rates, even(episode), episode, steps)


def test_mean_zero_is_meta_sgd_and_constant_rates_are_maml():
    episode = batch(task([4, 1, 2], 1), task([1, 1, 6], 2))
    bayes = silent(made(lambda: BTAML(IMAGE, BTAMLConfig(rate=0.1, samples=0, inner=SMALL))))
    sgd = MetaSGD(IMAGE, MetaSGDConfig(0.1, inner=SMALL)).double()
    sgd.classifier.load_state_dict(bayes.classifier.state_dict())
    sgd.rates.load_state_dict(bayes.rates.state_dict())
    assert max(distance(of(adapted(bayes, episode), t), of(adapted(sgd, episode), t)) for t in range(2)) < 1e-6
    assert torch.allclose(bayes.predict(episode), sgd.predict(episode), atol=1e-9)
    assert bayes.eval()(episode).item() == pytest.approx(sgd.eval()(episode).item(), abs=1e-9)  # KL is 0 as well

    fresh = MetaSGD(IMAGE, MetaSGDConfig(0.25, inner=SMALL)).double()
    maml = MAML(IMAGE, MAMLConfig(0.25, SMALL)).double()
    maml.classifier.load_state_dict(fresh.classifier.state_dict())
    assert max(distance(of(adapted(fresh, episode), t), of(adapted(maml, episode), t)) for t in range(2)) < 1e-6


def test_switched_off_is_meta_sgd():
    method, episode = made(lambda: BTAML(IMAGE, OFF)), task([4, 1, 2])
    sgd = MetaSGD(IMAGE, MetaSGDConfig(inner=SMALL)).double()
    sgd.classifier.load_state_dict(method.classifier.state_dict())
    sgd.rates.load_state_dict(method.rates.state_dict())
    assert method(episode).item() == sgd(episode).item()
    assert torch.allclose(method.predict(episode), sgd.predict(episode))


@pytest.mark.parametrize("name", ["omega", "gamma", "z"])
def test_each_variable_is_switched_alone_and_does_what_it_says(name):
    config = replace(OFF, **{name: True}, rate=0.1)
    method, episode = made(lambda: BTAML(IMAGE, config)), batch(task([3, 1, 5], 1), task([2, 2, 2], 2))
    q = method.encoder(episode)
    assert list(q) == [name]
    torch.manual_seed(0)
    phi = {name: torch.randn_like(q[name][0])}
    theta, rates, emphasis = method.classifier.start(episode), method.rates(episode), even(episode)
    if name == "omega":
        emphasis = phi[name].softmax(1)
    for t in range(2):  # written out task by task, layer by layer, filter by filter
        for layer in range(BLOCKS + 1):
            (w, b), (rate_w, rate_b) = [x.clone() for x in theta[layer]], [x.clone() for x in rates[layer]]
            if name == "gamma":
                rate_w[t] *= math.exp(phi[name][t, layer])
                rate_b[t] *= math.exp(phi[name][t, layer])
            for f in range(SMALL.width if name == "z" and layer < BLOCKS else 0):
                w[t, f] *= 1 + phi[name][t, 0, layer, f]
                b[t, f] += phi[name][t, 1, layer, f]
            theta[layer], rates[layer] = (w, b), (rate_w, rate_b)
    slow = twin(method, episode, 3, rates=rates, emphasis=emphasis, theta=theta)
    fast = method.adapt(episode, phi, 3)
    assert max(distance(of(fast, t), slow[t]) for t in range(2)) < 1e-9
    assert distance(of(fast, 0), of(method.adapt(episode, {}, 3), 0)) > 1e-3


# The encoder


@pytest.fixture
def encoder() -> btaml.Encoder:
    return made(FACTORIES[2]).encoder


def means(encoder, episode) -> dict[str, torch.Tensor]:
    return {name: torch.stack(normal) for name, normal in encoder(episode).items()}


def test_sizes_are_those_of_the_notes():
    encoder = BTAML((3, 84, 84)).encoder
    assert encoder.images[-1].in_features == 4410 and BTAML((3, 32, 32)).encoder.images[-1].in_features == 640
    assert {name: head[-1].out_features for name, head in encoder.heads.items()} == {"omega": 2, "gamma": 10, "z": 512}
    assert Classifier((3, 84, 84)).features == 800 and Classifier((3, 32, 32)).features == 128 and Classifier((1, 28, 28)).features == 32
    assert isinstance(BTAML(IMAGE, BTAMLConfig(direct_omega=True)).encoder.heads["omega"], nn.Linear)


@pytest.mark.parametrize("spread", [math.log(2), 0.1])
def test_initial_posterior_is_near_zero_with_the_spread_asked_for(spread):
    torch.manual_seed(0)
    method, episode = BTAML(IMAGE, BTAMLConfig(spread=spread)).double(), task([2, 3, 1])
    for mu, sigma in method.encoder(episode).values():
        assert mu.abs().max() < 0.02 and (sigma - spread).abs().max() < 0.02


def test_order_within_classes_is_not_read_and_order_of_classes_permutes_omega(encoder):
    episode = task([3, 1, 4])
    before = means(encoder, episode)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    after = means(encoder, replace(episode, support_x=episode.support_x[:, shuffle], support_y=episode.support_y[:, shuffle]))
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in before)
    after = means(encoder, permuted(episode, [2, 0, 1]))
    assert torch.allclose(after["omega"], before["omega"][..., [2, 0, 1]], atol=1e-12)
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in ("gamma", "z"))
    assert (before["omega"][0, 0, 0] - before["omega"][0, 0, 1]).abs() > 1e-6


def test_padding_is_not_read(encoder):
    episode = task([3, 1, 4])
    before, after = means(encoder, episode), means(encoder, padded(episode, 6, 0))
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in before)


def test_duplicates_change_the_sizes_only(encoder, monkeypatch):
    episode = task([3, 1, 4])
    double = replace(episode, support_x=episode.support_x.repeat(1, 2, 1, 1, 1), support_y=episode.support_y.repeat(1, 2))
    seen = []
    encoder.interact1.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    encoder(episode), encoder(double)
    one, two = seen
    assert torch.allclose(one[..., :2], two[..., :2], atol=1e-12)
    assert torch.allclose(one[0, :, 0, 2] * 49, torch.tensor([2.0, 0, 3], dtype=torch.float64))
    assert torch.allclose(two[0, :, 0, 2] * 49, torch.tensor([5.0, 1, 7], dtype=torch.float64))
    h = encoder.images(episode.support_x[0])[4:]
    assert torch.allclose(one[0, 2, :, 0], h.mean(0)) and torch.allclose(one[0, 2, :, 1], h.var(0, correction=0))


def test_one_shot_has_variance_zero_and_finite_gradients(encoder):
    episode, seen = task([1, 1, 1]), []
    encoder.interact1.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    encoder(episode)
    assert (seen[0][..., 1] == 0).all()
    method = made(FACTORIES[2])
    method.loss(episode).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    x = encoder.images(episode.support_x[0])[:1]
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert x.var(0).isnan().all()  # the unbiased one


def test_equal_classes_get_equal_omega(encoder):
    episode = task([3, 3])
    x = episode.support_x[:, :3].repeat(1, 2, 1, 1, 1)
    mu = encoder(replace(episode, support_x=x))["omega"][0]
    assert mu[0, 0].item() == pytest.approx(mu[0, 1].item(), abs=1e-12)


# The objective


def test_divergence_by_hand_and_by_sampling():
    def normal(mu: float, sigma: float, n: int = 4):
        return {"gamma": (torch.full((1, n), mu, dtype=torch.float64), torch.full((1, n), sigma, dtype=torch.float64))}

    assert divergence(normal(0, 1), 1).item() == 0
    assert divergence(normal(1, 1), 1).item() == pytest.approx(0.5 * 4)
    torch.manual_seed(0)
    q = normal(0.7, 0.4, 400_000)
    drawn, (mu, sigma) = sample(q)["gamma"], q["gamma"]
    log_ratio = torch.distributions.Normal(mu, sigma).log_prob(drawn) - torch.distributions.Normal(0.0, 1.0).log_prob(drawn)
    assert log_ratio.mean().item() == pytest.approx(divergence(normal(0.7, 0.4, 1), 1).item(), abs=5e-3)


def test_objective_is_query_loss_plus_divergence_over_images():
    method, episode = made(FACTORIES[2]), batch(task([2, 1, 3], 1), task([4, 4, 4], 2))
    q = method.encoder(episode)
    torch.manual_seed(3)
    phi = sample(q)
    expected = 0.0
    for t, images in enumerate((6 + 6, 12 + 6)):
        ce = F.cross_entropy(method.answers(episode, phi, SMALL.steps)[t], episode.query_y[t])
        kl = sum(
            torch.distributions.kl_divergence(torch.distributions.Normal(mu[t], sigma[t]), torch.distributions.Normal(0.0, 1.0)).sum()
            for mu, sigma in q.values()
        )
        expected = expected + (ce + kl / images) / 2
    torch.manual_seed(3)
    assert method(episode).item() == pytest.approx(expected.item(), abs=1e-9)


def test_without_reparameterisation_the_encoder_hears_of_the_divergence_alone(monkeypatch):
    method, episode = made(FACTORIES[2]), task([2, 1], 3)

    def value() -> torch.Tensor:
        torch.manual_seed(5)
        return method(episode)

    assert max(deviation(method, value, "encoder.").values()) < 1e-4
    monkeypatch.setattr(btaml, "sample", lambda q: {name: phi.detach() for name, phi in sample(q).items()})
    assert max(deviation(method, value, "encoder.").values()) > 0.05
    encoder = {name: p.grad for name, p in method.encoder.named_parameters()}
    grads = torch.autograd.grad((divergence(method.encoder(episode), 1) / 7).mean(), list(method.encoder.parameters()))
    assert all(torch.allclose(encoder[n], g, atol=1e-12) for n, g in zip(encoder, grads, strict=True))


@pytest.mark.parametrize("together", [0, 13, 100])  # one by one, two and one, all three
def test_prediction_averages_softmax_outputs_of_samples(together, monkeypatch):
    monkeypatch.setitem(btaml.TOGETHER, "cpu", together)
    method, episode = made(lambda: BTAML(IMAGE, BTAMLConfig(rate=0.3, samples=3, seed=4, inner=SMALL))), task([2, 1, 3])
    q, random = method.encoder(episode), torch.Generator().manual_seed(4)
    outputs = []
    for _ in range(3):
        noise = {name: torch.randn(mu.shape[1:], generator=random).double() for name, (mu, _) in q.items()}
        phi = {name: mu + sigma * noise[name] for name, (mu, sigma) in q.items()}
        outputs.append(method.answers(episode, phi, SMALL.test_steps))
    answer = method.predict(episode)
    assert torch.allclose(answer, torch.stack(outputs).softmax(-1).mean(0), atol=1e-12)
    assert (answer - torch.stack(outputs).mean(0).softmax(-1)).abs().max() > 1e-4  # not the logits
    assert torch.equal(answer, method.predict(episode)) and not answer.requires_grad
    mean = method.answers(episode, {name: mu for name, (mu, _) in q.items()}, SMALL.test_steps).softmax(-1)
    assert torch.equal(method.validate(episode), mean) and (answer - mean).abs().max() > 1e-4


def test_insides_are_weights_and_factors():
    method, episode = made(FACTORIES[2]), batch(task([3, 1, 5], 1), task([2, 2, 2], 2))
    shown, q = method.insides(episode), method.encoder(episode)
    assert isinstance(method, Shows) and set(shown) == {"omega", "gamma"}
    assert torch.allclose(shown["omega"].sum(1), torch.ones(2, dtype=torch.float64)) and shown["omega"].shape == (2, 3)
    assert torch.allclose(shown["gamma"].log(), q["gamma"][0]) and shown["gamma"].shape == (2, BLOCKS + 1)


@pytest.mark.parametrize("name, kind", [("maml", MAML), ("meta-sgd", MetaSGD), ("btaml", BTAML)])
def test_made_by_name(name, kind):
    method = make(name, IMAGE, 3, {"width": 4, "steps": 1, "rate": 0.2, "faithful_padding": True})
    assert isinstance(method, kind) and method.config.rate == 0.2
    assert method.config.inner == Inner(width=4, steps=1, faithful_padding=True)
    assert make(name, IMAGE, 3, {}).config == kind(IMAGE).config  # the same defaults in both places
    assert norm_mode(method) == "batch statistics"


def test_modulation_leaves_the_head():
    method, episode = made(FACTORIES[2]), task([1, 1])
    theta = method.classifier.start(episode)
    z = torch.full((1, 2, BLOCKS, SMALL.width), 0.5, dtype=torch.float64)
    moved = modulated(theta, z)
    assert all(torch.allclose(m[0], 1.5 * w) and torch.allclose(m[1], b + 0.5) for m, (w, b) in zip(moved[:BLOCKS], theta, strict=False))
    assert moved[BLOCKS] is theta[BLOCKS]


# Learning


def striped() -> Images:
    """24 classes of 10 images: a pattern of its own each, under noise."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2, (24, 4, 4)).repeat(4, 1).repeat(4, 2)  # (24, 16, 16)
    labels = np.arange(24).repeat(10)
    pixels = patterns[labels] * 90 + random.integers(0, 165, (len(labels), 16, 16))
    return Images("stripes", torch.from_numpy(pixels.astype(np.uint8))[..., None], torch.from_numpy(labels), tuple(map(str, range(24))))


def test_sampler_draws_the_any_shot_tasks_of_the_notes():
    images = Images("dots", torch.zeros(520, 1, 1, 1, dtype=torch.uint8), torch.arange(8).repeat(65), tuple("abcdefgh"))
    sampler = Sampler(images, ways=5, shots="any", queries=15)
    tasks = [sampler._task(np.random.default_rng([0, i])) for i in range(1200)]
    shots = np.array([np.bincount(labels) for _, labels, *_ in tasks])
    same = (shots == shots[:, :1]).all(1)
    assert abs(same.mean() - 0.5) < 4 * 0.5 / math.sqrt(1200)
    assert abs(shots.sum(1).mean() - 127.5) < 5 and shots.min() == 1 and shots.max() == 50
    counts = np.bincount(shots[~same].ravel(), minlength=51)[1:]
    assert ((counts - counts.mean()) ** 2).sum() / counts.mean() < 90  # chi square of 49 degrees; p = 3e-4
    for support, _, query, labels, _ in tasks[:50]:
        assert not set(support) & set(query) and (np.bincount(labels) == 15).all()


@pytest.mark.parametrize("make, steps, loss", list(zip(FACTORIES, (30, 30, 80), (0.85, 0.5, 0.85), strict=True)), ids=NAMES)
def test_learns_to_learn(make, steps, loss, tmp_path):
    """Meta-training lowers the query loss on classes never seen, and adaptation beats none by far (a zero head knows nothing: ln 3)."""
    images, unseen = striped().of(list(range(16))), striped().of(list(range(16, 24)))
    torch.manual_seed(0)
    method = make()
    train = Sampler(images, ways=3, shots="any", queries=4, tasks=4)
    held_out = Sampler(unseen, ways=3, shots="any", queries=4, tasks=30, seed=1)(0)

    def held(model) -> dict[str, float]:
        probabilities = model.predict(held_out)
        loss = -probabilities.gather(-1, held_out.query_y[..., None]).log().mean()
        return {"held_out": loss.item(), "accuracy": accuracy(probabilities, held_out).mean().item()}

    config = FitConfig(steps=steps, learning_rate=1e-2, schedule="constant", clip=None, precision="float32", evaluate_every=steps)
    with Run("fewshot", config, tmp_path / "run") as run:
        result = fit(method, lambda model, episode: model.loss(episode), train, config, run, evaluate=held)
    before, after = result.evaluation(0), result.evaluation(steps)
    assert after["held_out"] < loss < 0.95 < before["held_out"] < math.log(3)
    assert after["accuracy"] > before["accuracy"] + 0.15


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Classifier((3, 8, 32)), "too small for four poolings"),
        (lambda: Inner(steps=0), "--steps of the inner loop must be positive"),
        (lambda: MAMLConfig(rate=0.0), "--rate of MAML"),
        (lambda: BTAMLConfig(samples=-1), "--samples of Bayesian TAML"),
        (lambda: BTAMLConfig(spread=0.0), "--spread of Bayesian TAML"),
        (lambda: MAML((3, 32, 32)).predict(task([1, 1])), "made for images of"),
    ],
)
def test_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()
