"""Sentence encoders: input_ids and attention_mask (n, length) -> vectors (n, width) of length 1; tokenizer.json beside the graph.

Words are looked up in a table of bytes with a scale each, as in `smidgen search distill`.
"""

import copy
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.quant.others.other import Other, Sample
from smidgen.quant.writing import writing
from smidgen.search.bert import Bert, load
from smidgen.search.export import OUTPUT, ByteWords
from smidgen.texts import SELF, read_text

LENGTH = 128  # tokens of a calibration text


class Vectors(nn.Module):
    """A BERT whose arguments are called as everybody calls them."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Int[Tensor, "n length"], attention_mask: Int[Tensor, "n length"]) -> Float[Tensor, "n width"]:
        """Vectors of length 1."""
        return self.bert(input_ids, attention_mask)


def sentence_encoder(folder: Path, name: str, source: str | None) -> Other:
    """The encoder of a folder as sentence-transformers has it."""
    encoder = load(folder, LENGTH)
    assert isinstance(encoder.model, Bert)
    compact = copy.deepcopy(encoder.model)
    compact.words = ByteWords(compact.words.weight)  # pyright: ignore[reportAttributeAccessIssue]  it looks up words as the other does

    def samples(count: int, seed: int) -> list[Sample]:
        if source == SELF:
            raise UserError("an encoder writes no text of its own; give --calibration a text file, or FILE.jsonl:FIELD")
        texts = [line.strip() for line in read_text(source or "docstrings:torch").splitlines() if line.strip()]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count]
        encoded = (encoder.tokens([texts[i]]) for i in order.tolist())
        return [Sample.of(input_ids=ids, attention_mask=mask) for ids, mask in encoded]

    def complete(artifact: Path, integers: bool) -> None:
        with writing(artifact):
            encoder.tokenizer.save(str(artifact / "tokenizer.json"))

    kept = "words (8 bits, a scale each), positions, norms, attention scores and softmax, pooling"
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    return Other(
        Path(name).resolve().name if Path(name).exists() else name,
        Vectors(encoder.model).eval(), Vectors(compact).eval(), (OUTPUT,), samples, axes, complete=complete, high_precision=kept,
    )  # fmt: skip
