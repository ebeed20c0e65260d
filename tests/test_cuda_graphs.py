"""What a capture is told, seen without a GPU, and that replays follow the parameters."""

import pytest
import torch
from torch import nn

from smidgen.cuda_graphs import captured


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_capture_has_the_precision_set_and_remembers_no_weights(precision, monkeypatch):
    """Torch refuses to capture while weights that were cast are kept, as `fit`'s autocast does."""
    seen = []

    def capture(module, tensors, allow_unused_input, pool):
        seen.append((module(*tensors).dtype, torch.is_autocast_cache_enabled(), allow_unused_input, pool))
        torch.rand(3)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    module, before = nn.Linear(4, 2), torch.get_rng_state()
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        assert captured(module, (torch.ones(3, 4),), (0, 1)) is module
        assert torch.is_autocast_cache_enabled()
    assert seen == [(precision or torch.float32, False, True, (0, 1))]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_replays_follow_the_parameters(precision):
    torch.manual_seed(0)
    module, x = nn.Linear(4, 2).cuda(), torch.randn(3, 4, device="cuda")
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        graph = captured(module, (x,))
        with torch.no_grad():
            module.weight.mul_(3)
        torch.testing.assert_close(graph(x).float(), nn.functional.linear(x, module.weight, module.bias).float(), rtol=1e-2, atol=1e-2)
