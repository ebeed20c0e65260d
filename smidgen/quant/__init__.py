"""Quantization of language models: `smidgen quantize`."""
