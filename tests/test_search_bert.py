"""The encoder: against transformers and sentence-transformers, fewer layers and words, batches, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from smidgen.errors import UserError
from smidgen.search.bert import NAMES, Bert, Encoder, Shape, find, keep_layers, keep_rows, load, save
from smidgen.search.vocabulary import SPECIAL, pruned

WORDS = (
    "screen sound eyes hurt read night light loud quiet battery empty phone dim amber ring volume charge slow fast my the at when".split()
)
TEXTS = ["my eyes hurt when the screen", "loud", "phone at night", "the battery empty fast my phone slow charge"]


def tokenizer(words: list[str] = WORDS) -> Tokenizer:
    """WordPiece of whole words, letters and their continuations, as BERT has it."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL, "[unused1]", *"0123456789.,:()", *letters, *("##" + c for c in letters), "界", *dict.fromkeys(words)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    made.add_special_tokens(list(SPECIAL))
    return made


def tiny(words: list[str] = WORDS, seed: int = 0, **sizes) -> Encoder:
    """A BERT with random weights: width 32, 2 layers."""
    names = tokenizer(words)
    shape = replace(Shape(names.get_vocab_size(), 32, 2, 4, 64, 40, dropout=0.1), **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Bert(shape)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # words far apart and places alike, or a few dozen updates teach nothing
                torch.nn.init.normal_(parameter, std={"words.weight": 0.45, "positions.weight": 0.05}.get(name, 0.1))
    return Encoder(model.eval(), names, shape.positions)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    save(path, encoder)
    return path


def test_it_is_the_network_of_transformers(folder, encoder):
    """Oracle: the saved folder in transformers, mean pooled by hand in float64."""
    import transformers

    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids, mask = encoder.tokens(TEXTS)
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(encoder.model(ids, mask).double(), pooled / pooled.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_loads_what_is_saved(tmp_path, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    ours = tiny(pooling=pooling)
    save(tmp_path, ours)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours.encode(TEXTS).numpy(), theirs, atol=1e-6)
    assert load(tmp_path).model.shape == ours.model.shape


def test_saved_and_loaded_it_is_the_same(folder, encoder):
    again = load(folder)
    assert again.model.shape == encoder.model.shape
    assert torch.equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_the_count_of_parameters():
    """Without the pooler's 147,840."""
    assert Shape(30522).parameters() == 22_713_216 - 147_840
    shape = Shape(50, 32, 2, 4, 64, 40)
    assert sum(p.numel() for p in Bert(shape).parameters()) == shape.parameters()


def test_padding_and_batches_change_nothing(encoder):
    together = encoder.encode(TEXTS)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    ids, mask = encoder.tokens(TEXTS[:1])
    wide = torch.cat([ids, torch.full((1, 9), 7)], 1), torch.cat([mask, torch.zeros(1, 9, dtype=torch.int64)], 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder.model(*wide), encoder.model(ids, mask), rtol=0, atol=1e-6)


def test_a_long_text_keeps_its_last_token(encoder):
    ids, mask = encoder.tokens(["night " * 100, "night"])
    assert ids.shape == (2, 40) and ids[0, -1] == 3 and mask[1].sum() == 3


def test_all_layers_kept_is_the_same_network(encoder):
    assert torch.equal(replace(encoder, model=keep_layers(encoder.model, [0, 1])).encode(TEXTS), encoder.encode(TEXTS))
    first = keep_layers(encoder.model, [1])
    assert first.shape.layers == 1 and torch.equal(first.layers[0].inner.weight, encoder.model.layers[1].inner.weight)
    with pytest.raises(UserError, match="ascending"):
        keep_layers(encoder.model, [1, 0])


def test_fewer_words_change_only_texts_that_use_the_others(encoder):
    kept_texts = ["my eyes hurt", "night"]
    small, order = pruned(encoder.tokenizer, kept_texts, size=80)
    assert len(order) == 80 == small.get_vocab_size() and order == sorted(set(order))
    assert {small.id_to_token(i): order[i] for i in range(80)} == {
        piece: i for piece, i in encoder.tokenizer.get_vocab().items() if i in set(order)
    }
    assert all(small.token_to_id(piece) is not None for piece in SPECIAL)
    assert small.token_to_id("界") is None and small.token_to_id("[unused1]") is None
    student = Encoder(keep_rows(encoder.model, order, 16), small, 16)
    assert torch.equal(student.encode(kept_texts), encoder.encode(kept_texts))
    assert small.encode("charge").tokens == ["[CLS]", "c", "##h", "##a", "##r", "##g", "##e", "[SEP]"], (
        "a word that is gone, letter by letter"
    )
    assert small.encode("screen").tokens[1:-1] == ["screen"], "the commonest of the rest"
    with pytest.raises(UserError, match="--vocabulary 20: .* allow more"):
        pruned(encoder.tokenizer, kept_texts, size=20)


def test_folders_that_are_no_encoders_are_refused(folder, tmp_path):
    for name, content, message in (
        ("config.json", {"model_type": "llama"}, "a llama model; encoders are of the BERT family"),
        ("config.json", {"model_type": "bert"}, "not the description of a BERT"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling pooling_mode_max_tokens; mean and cls"),
    ):
        broken = tmp_path / str(len(list(tmp_path.iterdir())))
        save_copy(folder, broken)
        (broken / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load(broken)
    cut = tmp_path / "cut"
    save_copy(folder, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: no readable safetensors"):
        load(cut)
    with pytest.raises(UserError, match="no encoder nowhere: give minilm-l6, a folder"):
        find("nowhere")
    assert find(str(folder)) == folder


def save_copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


def test_names_are_those_of_checkpoints(folder):
    from safetensors.torch import load_file

    names = set(load_file(folder / "model.safetensors"))
    assert {
        "embeddings.word_embeddings.weight",
        "encoder.layer.1.attention.self.key.bias",
        "encoder.layer.0.output.LayerNorm.weight",
    } <= names
    assert not [name for name in names if any(name.startswith(ours) for ours in NAMES)]


@pytest.mark.slow
def test_minilm_is_minilm():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = find("minilm-l6")
    theirs = sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(load(path).encode(TEXTS).numpy(), theirs, atol=1e-5)
