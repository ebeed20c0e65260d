"""`--method auto`: the recipe that did best on development data; docs/quantize.md has the figures."""

from smidgen.quant.solvers import BOA, GPTQ


def recipe(known: bool, streams: bool) -> GPTQ:
    """`known` is whether the model's attention is, `streams` whether the unquantized model's inputs can be followed too."""
    if not known:
        return GPTQ(passes=2)
    return BOA(damp=0.1, mismatch="residual", passes=2) if streams else BOA(passes=2)
