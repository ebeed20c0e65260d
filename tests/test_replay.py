"""Graphs of the column loops give what the loops give; on machines without a CUDA device the loops themselves run."""

import pytest
import torch

from smidgen.grid import Grid
from smidgen.quant.replay import replayed
from smidgen.quant.solvers import AESPA, BOA, GPTQ
from smidgen.quant.stats import Stats

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(seed: int, device: str, heads: int = 4, rows: int = 16, columns: int = 192) -> tuple[torch.Tensor, Stats]:
    g = torch.Generator().manual_seed(seed)

    def moments(n: int, d: int) -> torch.Tensor:
        x = torch.randn(n, 4 * d, d, generator=g) @ torch.randn(n, d, d, generator=g)
        return (x.mT @ x / len(x[0])).to(device)

    w = torch.randn(heads * rows, columns, generator=g).to(device)
    return w, Stats(h_in=moments(1, columns), h_out=moments(heads, rows), tokens=4 * columns)


def test_on_a_processor_the_function_itself_runs():
    calls = []

    @replayed
    def double(x: torch.Tensor, times: int) -> torch.Tensor:
        calls.append(times)
        return x * times

    assert torch.equal(double(torch.ones(3), 2), torch.full((3,), 2.0)) and calls == [2]


@cuda
def test_a_graph_is_recorded_once_per_shape_and_constant():
    calls = []

    @replayed
    def scaled(x: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((len(x), times))
        return x.mul_(times), x + 1

    for n, times in ((3, 2), (3, 2), (4, 2), (3, 5), (3, 2)):
        x = torch.rand(n, device="cuda")
        product, more = scaled(x.clone(), times)
        assert torch.equal(product, x * times) and torch.equal(more, x * times + 1)
    assert calls == [c for c in ((3, 2), (4, 2), (3, 5)) for _ in range(2)]  # once to warm up, once to record


@cuda
def test_what_cannot_be_recorded_is_called():
    @replayed
    def waits(x: torch.Tensor, times: int) -> torch.Tensor:
        return x * times if bool(x.sum() > 0) else -x  # the branch needs the value

    with pytest.warns(UserWarning, match="not recorded"):
        assert torch.equal(waits(torch.ones(3, device="cuda"), 2).cpu(), torch.full((3,), 2.0))
    assert torch.equal(waits(-torch.ones(3, device="cuda"), 2).cpu(), torch.ones(3))
    with pytest.warns(UserWarning, match="not recorded"):  # another shape: the first one's memory is not shared
        assert torch.equal(waits(torch.ones(4, device="cuda"), 2).cpu(), torch.full((4,), 2.0))


@cuda
@pytest.mark.parametrize("solver", [GPTQ(passes=2), BOA(passes=1), AESPA(steps=50), BOA(row_order=False, act_order=False)], ids=str)
@pytest.mark.parametrize("group", [None, 64])
def test_a_device_loses_what_a_processor_loses(solver, group):
    grid = Grid(3, group)
    for seed in range(3):  # the first records, the others replay
        loss = {}
        for device in ("cpu", "cuda"):
            w, stats = problem(seed, device)
            q = solver(w.double(), stats, grid)
            loss[device] = stats.loss((q.dequantize() - w).to(stats.h_in.dtype))
        assert loss["cuda"] == pytest.approx(loss["cpu"], rel=1e-3)
