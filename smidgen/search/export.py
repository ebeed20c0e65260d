"""An encoder as a device loads it: ONNX with pooling inside, or a table of bytes.

    input_ids        int64 (n, length)
    attention_mask   int64 (n, length)
    vectors          float32 (n, width)          of length 1

Eight bits: the table of words is int8 with a scale per word, looked up before it is multiplied out; matrix products are ONNX Runtime's
dynamic quantization, int8 weights with a scale per output channel, uint8 activations with one per call. Positions and norms stay float.
On x86 processors without VNNI sums of such products can saturate; all that came after 2019 have it, and ARM has no such limit.
"""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int8
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.search.bert import Bert, Encoder
from smidgen.search.static import Table

if TYPE_CHECKING:
    import onnx

NETWORK, TABLE = "encoder.onnx", "encoder.npz"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "vectors"
OPSET = 20


class ByteWords(nn.Module):
    """A table of words in int8, a scale each.

    |w - scale code| <= scale / 2 in every number, scale = max |w| / 127.
    """

    def __init__(self, words: Float[Tensor, "vocabulary width"]) -> None:
        super().__init__()
        codes, scale = bytes_of(words)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale[:, None])

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Rows of words."""
        return self.get_buffer("codes")[ids].float() * self.get_buffer("scale")[ids]


def bytes_of(rows: Float[Tensor, "n width"]) -> tuple[Int8[Tensor, "n width"], Float32[Tensor, "n"]]:
    """Codes and scales of rows; a row of zeros stays one.

    >>> bytes_of(torch.tensor([[1.0, -0.5]]))[0].tolist()
    [[127, -64]]
    """
    scale = rows.detach().float().abs().amax(1) / 127
    codes = (rows.detach().float() / scale.clamp(min=1e-12)[:, None]).round()
    return codes.to(torch.int8), scale


def export(encoder: Encoder, folder: Path, bits: int = 8) -> Path:
    """Writes encoder.onnx, or encoder.npz of a table, into a folder; `bits`: 8, or 32 for a network in float."""
    if bits not in (8, 32):
        raise UserError(f"--bits must be 8 or 32, got {bits}")
    if isinstance(encoder.model, Table):
        codes, scale = bytes_of(encoder.model.rows)
        np.savez(folder / TABLE, codes=codes.cpu().numpy(), scale=scale.cpu().numpy())
        return folder / TABLE
    try:
        import onnx
        import onnxruntime  # noqa: F401 (quantizes)
        import onnxscript  # noqa: F401 (torch imports it late)
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs the package {error.name}: pip install onnx onnxscript onnxruntime") from error
    assert isinstance(encoder.model, Bert)
    model = graph(encoder.model, bits)
    onnx.save(model, folder / NETWORK)
    return folder / NETWORK


def graph(model: Bert, bits: int) -> "onnx.ModelProto":
    """The network's graph."""
    model = copy.deepcopy(model).cpu().eval()
    if bits == 8:
        model.words = ByteWords(model.words.weight)  # pyright: ignore[reportAttributeAccessIssue]  it looks up words as the other does
    n, length = torch.export.Dim("n", min=1), torch.export.Dim("length", min=2, max=model.shape.positions)
    ids, mask = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)  # one tensor for both would become one input
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec")  # torch.export about its own classes
        warnings.filterwarnings("ignore", "# The axis name")  # both inputs share their axes; meant so
        program = torch.onnx.export(
            model,
            (ids, mask),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes={"ids": {0: n, 1: length}, "mask": {0: n, 1: length}},
            verbose=False,
        )
    assert program is not None
    return quantized(program.model_proto) if bits == 8 else program.model_proto


def quantized(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Matrix products with constant weights in eight bits."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # has its shapes; spares a warning that it has none
        onnx.save(model, source)
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(target)
