"""The tokenizer inside a GGUF file, from tokenizer.json. llama.cpp has one algorithm for each of these:

    byte-level BPE (GPT-2, Llama 3, Qwen)                             "gpt2": tokens, merges, the name of a pre-tokenizer
    BPE of sentencepiece with byte fallback (Llama 2, Phi-3, Gemma)   "llama": tokens and scores; blanks are U+2581, no merges

The second joins, again and again, the two neighbours whose union has the highest score, the leftmost of equals, whichever pair it
is; tokenizer.json joins listed pairs only, in their order. So a token's score is minus the rank of the merge that makes it, and
both agree on every text if they make every single token out of the same two parts: a merge inside a text happens as it would if
its characters stood alone, so a first difference would show in the token it makes. `scores` checks that for every token.

    merges   a b, ab c, b c        scores   ab 0, abc -1, bc -2       "abc" -> ab c -> abc in both

Not the same are three things, in llama.cpp's treatment of texts and not of tokens. It puts a blank before the text and after every
special token in it, as sentencepiece and the normalizer Prepend do, while Metaspace puts none before a text that begins with one,
and its scheme "first" none after special tokens. It keeps the blanks around special tokens that ask to have them stripped. And of
special tokens that overlap it takes the longest, tokenizer.json the leftmost.
"""

import json
from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from typing import Any

from smidgen.errors import UserError

BLANK = "\u2581"


class Kind(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Writes either kind; a UserError for tokenizers llama.cpp has no algorithm for."""
    if not tokenizer.is_fast:
        raise UserError("gguf export reads tokenizer.json, and this tokenizer has none")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(f"gguf export knows BPE tokenizers; this one is {model['type']}")
    listed = with_fallback(spec, tokenizer.unk_token_id) if model["byte_fallback"] else byte_level(spec)
    if max(listed) >= vocabulary:
        raise UserError(f"the tokenizer has {max(listed) + 1} tokens, the model {vocabulary}")
    tokens = [listed.get(i, (f"[PAD{i}]", Kind.UNUSED)) for i in range(vocabulary)]
    writer.add_token_list([t for t, _ in tokens])
    writer.add_token_types([k for _, k in tokens])
    if model["byte_fallback"]:
        prefix, split = blanks(spec)
        added = [t.replace(" ", BLANK) for t, k in tokens if k in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)]
        score = scores(merges_of(model), [t for t, k in tokens if k in (Kind.NORMAL, Kind.BYTE)], added, split)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([score.get(t, 0.0) for t, _ in tokens])
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(spec))
        writer.add_token_merges([" ".join(pair) for pair in merges_of(model)])
        writer.add_add_space_prefix(False)
    add_special(writer, tokenizer)


def add_special(writer: Any, tokenizer: Any) -> None:
    """Which tokens begin and end texts, and the chat template."""
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for name, i in ids.items():
        if i is not None:
            add[name](i)
    around = tokenizer("")["input_ids"]  # what it puts around every text
    writer.add_add_bos_token(ids["bos"] is not None and around[:1] == [ids["bos"]])
    writer.add_add_eos_token(ids["eos"] is not None and len(around) > 1 and around[-1] == ids["eos"])
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()])


def merges_of(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs that become one token, the first to be joined first."""
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    return [(a, b) for a, b in pairs]


# --- byte-level BPE ---------------------------------------------------------------------------------------------------

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split_by(regex: str) -> dict[str, Any]:
    """A pre-tokenizer that isolates the matches of a pattern."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> the steps in tokenizer.json
    "gpt-2": [GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
    "llama-bpe": [split_by(LLAMA3), BYTES],
    "qwen2": [split_by(QWEN2), BYTES],
}


def byte_level(spec: dict[str, Any]) -> dict[int, tuple[str, Kind]]:
    """Text and kind of every token by its number."""
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        raise UserError(
            f"gguf export knows tokenizers that leave the text as it is; this one has a {spec['normalizer']['type']} normalizer"
        )
    listed = {i: (t, Kind.NORMAL) for t, i in spec["model"]["vocab"].items()}
    return listed | {a["id"]: (a["content"], Kind.CONTROL if a["special"] else Kind.USER_DEFINED) for a in spec["added_tokens"]}


def pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name of the way tokenizer.json splits text into words; a UserError if it has none we know.

    llama.cpp's own converter knows the vocabularies of published models by hash; the steps are what it stands for, and
    survive a new vocabulary.
    """
    plain = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps(spec["pre_tokenizer"], "pretokenizers")]
    for name, known in PRE_TOKENIZERS.items():
        if plain == known:
            return name
    kinds = " + ".join(str(s.get("type")) for s in plain)
    raise UserError(
        f"gguf export knows the pre-tokenizers of {', '.join(PRE_TOKENIZERS)}; this tokenizer splits by {kinds} with other options"
    )


def steps(spec: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a sequence, which are listed under `name`, or the only step; one of no type if there is none."""
    return spec[name] if spec is not None and spec["type"] == "Sequence" else [spec or {}]


# --- BPE with byte fallback -------------------------------------------------------------------------------------------

PREPEND = {"type": "Prepend", "prepend": BLANK}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}  # Gemma's: no blank is left
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]


def with_fallback(spec: dict[str, Any], unknown: int | None) -> dict[int, tuple[str, Kind]]:
    """Text and kind of every token by its number."""
    model = spec["model"]
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges") if model.get(k)]
    if odd:
        raise UserError(f"gguf cannot hold a BPE tokenizer with byte fallback and {odd[0]}")
    missing = [t for i, t in enumerate(BYTE_TOKENS) if t not in model["vocab"] and (i > 127 or chr(i) not in model["vocab"])]
    if missing:
        raise UserError(f"the tokenizer falls back to bytes, but has no token for {len(missing)} of them, the first is {missing[0]}")
    normalizer = steps(spec["normalizer"], "normalizers")
    listed = {i: (t, Kind.NORMAL) for t, i in model["vocab"].items()}
    listed |= {model["vocab"][t]: (t, Kind.BYTE) for t in BYTE_TOKENS if t in model["vocab"]}
    for added in spec["added_tokens"]:
        text, special = added["content"], added["special"]
        if PREPEND in normalizer and added["normalized"] and not special:  # it is looked for as U+2581 + text
            raise UserError(f"gguf cannot hold the added token {text!r}: it is found in normalized text; add it with normalized=False")
        if REPLACE in normalizer and added["normalized"]:  # looked for when blanks are U+2581; llama.cpp looks before
            text = text.replace(BLANK, " ")
        if BLANK in text and text in model["vocab"] and not special:
            continue  # looked for while blanks are blanks: it is found by merges only
        listed[added["id"]] = (text, Kind.CONTROL if special else Kind.USER_DEFINED)
    if unknown is not None:
        listed[unknown] = (listed[unknown][0], Kind.UNKNOWN)
    return listed


def blanks(spec: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a blank is put before a text, and whether no token may reach from one word into the next.

    >>> blanks({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, "pre_tokenizer": None})
    (True, False)
    """
    normalizer, words = steps(spec["normalizer"], "normalizers"), steps(spec["pre_tokenizer"], "pretokenizers")
    if normalizer in ([PREPEND, REPLACE], [REPLACE]) and words in ([{}], [NO_SPLIT]):
        return PREPEND in normalizer, False
    metaspace = words[0]
    if normalizer == [{}] and len(words) == 1 and metaspace.get("type") == "Metaspace" and metaspace["replacement"] == BLANK:
        return metaspace["prepend_scheme"] != "never", metaspace["split"]
    kinds = " + ".join(str(s["type"]) for s in normalizer + words if s)
    raise UserError(f"gguf export knows byte-fallback tokenizers that only turn blanks into U+2581; this one does {kinds or 'nothing'}")


def scores(merges: list[tuple[str, str]], tokens: list[str], added: list[str], split: bool) -> dict[str, float]:
    """Minus the rank of the merge that makes a token; a UserError if with them llama.cpp would join what the merges do not.

    `added` tokens are cut out of a text before anything is merged, so none with such a part is ever made. `split` says that a
    word ends before every U+2581.

    >>> scores([("a", "b"), ("ab", "c"), ("b", "c")], ["a", "b", "c", "ab", "abc", "bc"], [], split=False)
    {'ab': 0.0, 'abc': -1.0, 'bc': -2.0}
    """
    never = len(merges)
    rank = {pair: i for i, pair in reversed(list(enumerate(merges))) if not (split and pair[1].startswith(BLANK))}
    made = {t: parts(t, lambda a, b: rank.get((a, b))) for t in [*tokens, *added] if len(t) > 1}
    order = {t: never if pair is None else rank[pair] for t, pair in made.items()}
    for token, pair in made.items():
        other = parts(token, lambda a, b: order.get(a + b))
        if other != pair and not any(a in token for a in added):
            say = ["no merge" if p is None else " + ".join(map(repr, p)) for p in (pair, other)]
            raise UserError(f"gguf cannot hold this tokenizer: the token {token!r} is made by {say[0]}, but by {say[1]} in llama.cpp")
    return {t: -float(r) for t, r in order.items()}


def parts(token: str, rank: Callable[[str, str], int | None]) -> tuple[str, str] | None:
    """The two pieces joined last when a token's characters are merged, lowest rank first, then leftmost; None if it is not made."""
    pieces = list(token)
    while True:
        ranks = [(r, i) for i, (a, b) in enumerate(pairwise(pieces)) if (r := rank(a, b)) is not None]
        if not ranks:
            return None
        i = min(ranks)[1]
        if len(pieces) == 2:
            return pieces[0], pieces[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
