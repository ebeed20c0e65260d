"""Fewer words: half of a small BERT is the table of its 30,522 pieces; a phone's queries need a quarter of them.

Kept are the special pieces, the characters of Latin script, digits and ASCII signs, whole and as continuations (##a), every piece of the
given texts, and the commonest others up to the size: BERT's uncased vocabulary lists its words by how common they are. WordPiece takes
the longest piece it knows, so that a text whose pieces are all kept is cut as before, and others fall into smaller pieces.
"""

import json
import unicodedata
from collections.abc import Iterable

from tokenizers import Tokenizer

from smidgen.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def pruned(tokenizer: Tokenizer, texts: Iterable[str], size: int) -> tuple[Tokenizer, list[int]]:
    """A tokenizer that knows `size` pieces, and their numbers in the old one, ascending; all of them if there are no more."""
    specification = json.loads(tokenizer.to_str())
    model = specification["model"]
    if model["type"] != "WordPiece":
        raise UserError(f"a {model['type']} tokenizer cannot lose pieces; the encoder has to be of the BERT family (WordPiece)")
    vocabulary: dict[str, int] = model["vocab"]
    kept = {vocabulary[piece] for piece in SPECIAL if piece in vocabulary}
    kept |= {i for piece, i in vocabulary.items() if _is_basic(piece)}
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        kept.update(encoding.ids)
    if len(kept) > size and len(vocabulary) > size:
        raise UserError(f"--vocabulary {size}: characters and the pieces of features and queries are {len(kept)} already; allow more")
    common = (i for piece, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i not in kept and _is_word(piece))
    kept.update(i for i, _ in zip(common, range(size - len(kept)), strict=False))
    order = sorted(kept)
    return _renumbered(specification, {old: new for new, old in enumerate(order)}), order


def _renumbered(specification: dict, number: dict[int, int]) -> Tokenizer:
    """The tokenizer with new numbers, without the pieces that have none."""
    model = specification["model"]
    model["vocab"] = {piece: number[i] for piece, i in sorted(model["vocab"].items(), key=lambda item: item[1]) if i in number}
    specification["added_tokens"] = [t | {"id": number[t["id"]]} for t in specification["added_tokens"] if t["id"] in number]
    processor = specification["post_processor"] or {}
    for piece in processor.get("special_tokens", {}).values():  # TemplateProcessing
        piece["ids"] = [number[i] for i in piece["ids"]]
    for end in ("sep", "cls"):  # BertProcessing
        if end in processor:
            processor[end][1] = number[processor[end][1]]
    specification["truncation"] = specification["padding"] = None
    return Tokenizer.from_str(json.dumps(specification))


def _is_basic(piece: str) -> bool:
    """One character of Latin script, a digit or an ASCII sign."""
    character = piece.removeprefix("##") or piece
    return len(character) == 1 and (character.isascii() or unicodedata.name(character, "").startswith("LATIN"))


def _is_word(piece: str) -> bool:
    """Letters that a Latin keyboard can write; BERT's list has other scripts and unused entries too."""
    letters = piece.removeprefix("##")
    return letters.isascii() and letters.isalnum()
