"""Exporters: each writes what one family of runtimes loads, and says beforehand what it can hold."""

from smidgen.quant.export.compressed_tensors import CompressedTensors

EXPORTERS = {"compressed-tensors": CompressedTensors}
