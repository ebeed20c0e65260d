"""ONNX artifacts in ONNX Runtime, on a processor: needs onnxruntime and tokenizers, neither torch nor transformers.

Keys and values stay in buffers made once, which attention reads and appends to in place: binding the same buffer as `past` and
`present` spares copying the whole cache for every token. Texts are read in pieces, so that a prompt needs the
logits of one piece at a time and not of every token times every word.
"""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from smidgen.errors import UserError
from smidgen.quant.runtimes.tokenizer import TokenizerFile

PIECE = 128  # tokens read at once
PRECISE = "session.x64quantprecision"  # session option: int8 weights as uint8, whose products no kernel saturates
FILES = ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json")


class OnnxRuntime:
    """One loaded model."""

    def __init__(self, session: Any, texts: TokenizerFile, length: int, name: str) -> None:
        from onnxruntime import OrtValue

        self.session, self.length, self.name = session, length, name
        self.encode, self.decode, self.ends = texts.encode, texts.decode, texts.ends
        self.vocabulary = session.get_outputs()[0].shape[2]
        self.binding = session.io_binding()
        pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        for past in pasts:
            _, heads, _, head = past.shape
            cache = OrtValue.ortvalue_from_numpy(np.zeros((1, heads, length, head), np.float32))
            self.binding.bind_ortvalue_input(past.name, cache)
            self.binding.bind_ortvalue_output(past.name.replace("past_key_values", "present"), cache)
        self.used = 0  # tokens in the cache

    @classmethod
    def open(cls, artifact: Path, length: int = 1024, threads: int | None = None) -> "OnnxRuntime":
        """Loads a folder, or the graph in it, for up to `length` tokens or as many as the model has positions."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"running ONNX artifacts needs the package {error.name}: pip install 'smidgen[onnx]'") from error
        artifact = artifact.parent if artifact.is_file() else artifact
        missing = [f for f in FILES if not (artifact / f).is_file()]
        if missing:
            raise UserError(f"{artifact} is not an ONNX artifact: {missing[0]} is missing")
        try:
            config = json.loads((artifact / "genai_config.json").read_text())["model"]
            context, end = config["context_length"], config["eos_token_id"]
            exact = config["decoder"]["session_options"].get(PRECISE) == "1"
            session = onnxruntime.InferenceSession(artifact / "model.onnx", options(threads, exact), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen unrelated types for damaged files
            raise UserError(f"{artifact} is damaged or no model of ours: {' '.join(str(error).split())[:200]}") from error
        names = [value.name for value in [*session.get_inputs(), *session.get_outputs()[:1]]]
        if names[:3] != ["input_ids", "attention_mask", "past_key_values.0.key"] or names[-1] != "logits":
            raise UserError(f"{artifact} is a model with inputs {', '.join(names[:3])}..., not a decoder with a cache")
        return cls(session, TokenizerFile.read(artifact, end), min(length, context), f"onnxruntime {onnxruntime.__version__}")

    def logits(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Of every position of one text, from an empty cache."""
        self.used = 0
        logits = np.empty((len(tokens), self.vocabulary), np.float32)
        for i in range(0, len(tokens), PIECE):
            logits[i : i + PIECE] = self._read(tokens[i : i + PIECE])
        return logits

    def start(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        """Empties the cache, reads a prompt, and returns the logits after its last token."""
        if len(tokens) == 0:
            raise UserError("a prompt needs at least one token")
        self.used = 0
        for i in range(0, len(tokens), PIECE):
            logits = self._read(tokens[i : i + PIECE])
        return logits[-1].copy()  # not a view, which would keep the whole piece

    def step(self, token: int) -> Float32[np.ndarray, "vocab"]:
        """Reads one more token."""
        return self._read(np.array([token]))[0]

    def close(self) -> None:
        """Frees weights and cache."""
        del self.binding, self.session

    def _read(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Appends tokens to the cache; the logits after each."""
        total = self.used + len(tokens)
        if total > self.length:
            raise UserError(
                f"{total} tokens are more than the {self.length} this model was opened for, or has positions for; take a shorter text "
                "(smidgen bench: --prompt-tokens, --length)"
            )
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            raise UserError(f"tokens lie between 0 and {self.vocabulary - 1}, got {tokens.min()} to {tokens.max()}")
        self.binding.bind_cpu_input("input_ids", tokens[None].astype(np.int64))
        self.binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        logits = np.empty((1, len(tokens), self.vocabulary), np.float32)
        self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(self.binding)
        self.used = total
        return logits[0]


def options(threads: int | None = None, exact: bool = True) -> Any:
    """Of a session; `exact`: the graph has products of 8-bit codes that must not saturate, on whichever processor."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3  # errors only; they are raised as well
    if threads is not None:
        made.intra_op_num_threads = threads
    if exact and saturates():
        made.add_session_config_entry(PRECISE, "1")
    return made


def saturates() -> bool:
    """Whether this processor's uint8 by int8 products may be added in 16 bits: x86 without VNNI, or where that cannot be told."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # another system than Linux
        return True
