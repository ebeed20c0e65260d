"""llama.cpp through the wheel llama-cpp-py-sync: its C API, on the processor.

Nothing of the wheel is used but the library and its declarations; its own class keeps no logits of earlier positions. Where the
system is too old for the library (it needs glibc 2.38), the one inside the wheel xllamacpp serves, which cannot quantize. Flash
attention is off. Most block types multiply weights with inputs rounded to 8 bits (q8_0 or q8_K blocks, made on the fly), so
logits differ from those of the dequantized weights by what that rounding costs; keys and values are kept as float16.

`llamacpp_quantize` is llama.cpp's own quantization, for comparison.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from smidgen.errors import UserError

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15}  # LLAMA_FTYPE_MOSTLY_...
Q8_0 = 8  # GGML_TYPE_Q8_0


class LlamaCpp:
    """One loaded GGUF file."""

    name: str

    def __init__(self, model: Any, context: Any, length: int) -> None:
        """Takes what `open` made."""
        self.ffi, self.lib, self.name = library()
        self.model, self.context, self.length = model, context, length
        self.vocabulary = self.lib.llama_model_get_vocab(model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        self.used = 0

    @classmethod
    def open(cls, artifact: Path, length: int = 1024, threads: int | None = None) -> "LlamaCpp":
        """Loads a .gguf file, or the model.gguf in a folder."""
        file = artifact / "model.gguf" if artifact.is_dir() else artifact
        if not file.is_file():
            raise UserError(f"no such file: {file}")
        ffi, lib, _ = library()
        LOG.clear()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(os.fsencode(file), parameters)
        if model == ffi.NULL:
            raise UserError(f"{file} cannot be loaded by llama.cpp: {complaint()}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_ubatch = min(length, 512)
        options.n_threads = options.n_threads_batch = threads or os.cpu_count() or 1
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = lib.llama_init_from_model(model, options)
        if context == ffi.NULL:
            lib.llama_model_free(model)
            raise UserError(f"{file}: llama.cpp cannot make a context of {length} tokens: {complaint()}")
        return cls(model, context, length)

    def logits(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "length vocab"]:
        """Of every position of one text, from an empty cache."""
        self._clear()
        return self._read(tokens, len(tokens))

    def start(self, tokens: Int[np.ndarray, "length"]) -> Float32[np.ndarray, "vocab"]:
        """Empties the cache, reads a prompt, and returns the logits after its last token."""
        self._clear()
        return self._read(tokens, 1)[0]

    def step(self, token: int) -> Float32[np.ndarray, "vocab"]:
        """Reads one more token."""
        return self._read(np.array([token]), 1)[0]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, by llama.cpp's own tokenizer; none are added, but special tokens written in the text are taken as such."""
        data = text.encode()
        tokens = self.ffi.new("llama_token[]", len(data) + 1)
        n = self.lib.llama_tokenize(self.vocabulary, data, len(data), tokens, len(data) + 1, False, True)
        if n < 0:
            raise UserError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(tokens[0:n])

    def decode(self, tokens: list[int]) -> str:
        """The opposite; bytes that are no UTF-8 become U+FFFD."""
        given = self.ffi.new("llama_token[]", tokens)
        size = -self.lib.llama_detokenize(self.vocabulary, given, len(tokens), self.ffi.NULL, 0, False, True)
        text = self.ffi.new("char[]", max(size, 1))
        n = self.lib.llama_detokenize(self.vocabulary, given, len(tokens), text, size, False, True)
        return self.ffi.buffer(text, n)[:].decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether the token ends a text."""
        return bool(self.lib.llama_vocab_is_eog(self.vocabulary, token))

    def close(self) -> None:
        """Frees model and cache; a second call does nothing."""
        if self.model is not None:
            self.lib.llama_free(self.context)
            self.lib.llama_model_free(self.model)
            self.model = self.context = None

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.used = 0

    def _read(self, tokens: Int[np.ndarray, "length"], last: int) -> Float32[np.ndarray, "last vocab"]:
        """Logits of the `last` of some more tokens."""
        n = len(tokens)
        if n == 0 or self.used + n > self.length:
            raise UserError(f"llama.cpp was opened for {self.length} tokens and is asked for {self.used + n}")
        if tokens.min() < 0 or tokens.max() >= self.size:
            raise UserError(f"tokens must lie between 0 and {self.size - 1}")
        batch = self.lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self.used + i, 1, 0
            batch.logits[i] = i >= n - last
        LOG.clear()
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if status != 0:
            raise UserError(f"llama.cpp cannot read {n} tokens (status {status}): {complaint()}")
        self.used += n
        found = self.ffi.buffer(self.lib.llama_get_logits(self.context), last * self.size * 4)
        return np.frombuffer(found, np.float32).reshape(last, self.size).copy()


def llamacpp_quantize(source: Path, target: Path, kind: str, imatrix: dict[str, np.ndarray] | None = None, threads: int = 2) -> None:
    """Quantizes a 16-bit GGUF file with llama.cpp's own recipe `kind`; embeddings and head stay q8_0, as we write them.

    `imatrix` holds the mean square of every input of a layer, (in,) float32, by llama.cpp's name of its weight (blk.0.attn_q.weight).
    """
    if kind not in FILE_TYPES:
        raise UserError(f"llama.cpp's recipe must be one of {', '.join(FILE_TYPES)}, got {kind}")
    if not source.is_file():
        raise UserError(f"no such file: {source}")
    ffi, lib, _ = library()
    try:
        parameters = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    except AttributeError as error:  # cffi's word for a missing symbol
        raise UserError("the llama.cpp of xllamacpp cannot quantize; llama-cpp-py-sync's can, on systems with glibc 2.38") from error
    parameters.nthread = threads
    parameters.ftype = FILE_TYPES[kind]
    parameters.output_tensor_type = parameters.token_embedding_type = Q8_0
    alive = []  # what the structure points to
    if imatrix:
        entries = ffi.new("struct llama_model_imatrix_data[]", len(imatrix) + 1)  # the last one stays empty and ends the list
        for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
            values = np.ascontiguousarray(values, np.float32)
            alive += [ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", values), values]
            entry.name, entry.data, entry.size = alive[-3], alive[-2], len(values)
        parameters.imatrix = entries
    LOG.clear()
    partial = target.with_name(target.name + ".partial")
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(partial), parameters) != 0:
        partial.unlink(missing_ok=True)
        raise UserError(f"llama.cpp cannot quantize {source} to {kind}: {complaint()}")
    partial.rename(target)


LOG: list[str] = []  # warnings and errors since it was last emptied: the library has one log for all models
KEPT: list[Any] = []  # the callback, which C code holds a pointer to


def complaint() -> str:
    """What llama.cpp said last, on one line."""
    said = [line.strip() for line in LOG if line.strip()]
    return said[-1] if said else "it gives no reason"


def extension() -> Path | None:
    """xllamacpp's extension module, which exports most of the same C API; its build must be that of the declarations."""
    spec = find_spec("xllamacpp")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob("xllamacpp*.so"))), None)


def library() -> tuple[Any, Any, str]:
    """cffi, the C library with its log silenced, and its name and version."""
    try:
        from llama_cpp_py_sync import __llama_cpp_tag__, _cffi_bindings
    except ImportError as error:
        raise UserError("llama.cpp needs the package llama-cpp-py-sync: pip install 'smidgen[llamacpp]'") from error
    ffi: Any = _cffi_bindings.ffi
    try:
        lib: Any = _cffi_bindings.get_lib()
    except RuntimeError as error:  # its wheels are tagged for old systems, but need glibc 2.38
        other = extension()
        if other is None:
            raise UserError(
                f"llama.cpp cannot be loaded on this system, pip install 'smidgen[llamacpp]' may help: {str(error).splitlines()[0]}"
            ) from error
        lib = ffi.dlopen(str(other))
    if not KEPT:

        def log(level: int, text: Any, _: Any) -> None:
            if level >= lib.GGML_LOG_LEVEL_WARN:
                LOG.append(ffi.string(text).decode(errors="replace"))

        KEPT.append(ffi.callback("void(enum ggml_log_level, const char *, void *)", log))
        lib.llama_log_set(KEPT[0], ffi.NULL)
        lib.llama_backend_init()
    return ffi, lib, f"llama.cpp {__llama_cpp_tag__}"
