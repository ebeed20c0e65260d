"""Quantize one matrix three ways and compare what the layer loses on correlated inputs.

python examples/quantize_matrix.py
"""

import torch

from smidgen.grid import Grid
from smidgen.quant.solvers import BOA, GPTQ, RTN
from smidgen.quant.stats import Stats

torch.manual_seed(0)
heads, dim, width, tokens = 4, 16, 64, 2048
weight = torch.randn(heads * dim, width)
inputs = torch.randn(tokens, width) @ torch.randn(width, width)
keys = torch.randn(heads, tokens, dim) @ torch.randn(heads, dim, dim)
stats = Stats((inputs.T @ inputs / tokens)[None], keys.mT @ keys / tokens)

for solver in (RTN(), GPTQ(), BOA()):
    quantized = solver(weight, stats, Grid(bits=3))
    loss = stats.loss(quantized.dequantize() - weight) / stats.loss(weight)
    print(f"{type(solver).__name__:5} relative loss {loss:.4f}")
