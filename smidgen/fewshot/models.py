"""The methods by name, and trained ones in a folder.

FOLDER/method.json           name, options, image shape, ways, shots, what it was trained on
FOLDER/method.safetensors    parameters and buffers

A method's options are the keyword arguments of its entry in METHODS, so that a name and a few values make it again; modules are imported
only when their method is made.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.data import Shape
from smidgen.fewshot.episodes import Shots
from smidgen.images import Images
from smidgen.networks import Conv4, Norm

TRAINED = "trained"  # folder of a run of `smidgen fewshot train`
DESCRIPTION, TENSORS = "method.json", "method.safetensors"


def protonet(shape: Shape, ways: int, *, width: int = 64, norm: Norm = "inductive") -> nn.Module:
    """Prototypical networks over Conv-4."""
    from smidgen.fewshot.methods.prototypes import ProtoNet

    return ProtoNet(conv4(shape, width, norm))


def simpleshot(shape: Shape, ways: int, *, width: int = 64, norm: Norm = "inductive") -> nn.Module:
    """SimpleShot over Conv-4; the base classes' mean is taken when the backbone is trained (`settle`)."""
    from smidgen.fewshot.methods.simpleshot import SimpleShot

    return SimpleShot(conv4(shape, width, norm), torch.zeros(math.prod(maps(shape, width))))


def label_propagation(
    shape: Shape,
    ways: int,
    *,
    width: int = 64,
    norm: Norm = "inductive",
    sigma: float = 0.0,
    k: int = 20,
    alpha: float = 0.99,
    balance: float = 0.0,
) -> nn.Module:
    """Label propagation over Conv-4 with one sigma, 0: chosen by the spread of each task."""
    from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation

    return LabelPropagation(conv4(shape, width, norm), sigma or None, Propagation(k, alpha, balance))


def tpn(
    shape: Shape,
    ways: int,
    *,
    width: int = 64,
    norm: Norm = "inductive",
    k: int = 20,
    alpha: float = 0.99,
    balance: float = 0.0,
    guard: bool = False,
    prototypes: float = 0.0,
    start: float = 0.3,
) -> nn.Module:
    """Transductive propagation network over Conv-4; `start` is what sigma is of every node before training, 0: as the layers draw it."""
    from smidgen.fewshot.methods.propagation import Propagation
    from smidgen.fewshot.methods.tpn import TPN, graph_for, started

    return TPN(conv4(shape, width, norm), started(graph_for(maps(shape, width)), start), Propagation(k, alpha, balance), guard, prototypes)


def maml(
    shape: Shape,
    ways: int,
    *,
    rate: float = 0.5,
    width: int = 32,
    steps: int = 5,
    test_steps: int = 10,
    clip: float = 3.0,
    faithful_padding: bool = False,
) -> nn.Module:
    """MAML."""
    from smidgen.fewshot.methods.inner import Inner
    from smidgen.fewshot.methods.maml import MAML, MAMLConfig

    return MAML(shape, MAMLConfig(rate, Inner(width, steps, test_steps, clip, faithful_padding)))


def meta_sgd(
    shape: Shape,
    ways: int,
    *,
    rate: float = 0.01,
    balance: Literal["images", "classes"] = "images",
    width: int = 32,
    steps: int = 5,
    test_steps: int = 10,
    clip: float = 3.0,
    faithful_padding: bool = False,
) -> nn.Module:
    """Meta-SGD; with --option.balance classes the baseline that weighs classes by 1/N_c."""
    from smidgen.fewshot.methods.inner import Inner
    from smidgen.fewshot.methods.maml import MetaSGD, MetaSGDConfig

    return MetaSGD(shape, MetaSGDConfig(rate, balance, Inner(width, steps, test_steps, clip, faithful_padding)))


def btaml(
    shape: Shape,
    ways: int,
    *,
    omega: bool = True,
    gamma: bool = True,
    z: bool = True,
    bayesian: bool = True,
    direct_omega: bool = False,
    rate: float = 0.01,
    samples: int = 10,
    seed: int = 0,
    width: int = 32,
    steps: int = 5,
    test_steps: int = 10,
    clip: float = 3.0,
    faithful_padding: bool = False,
) -> nn.Module:
    """Bayesian TAML."""
    from smidgen.fewshot.methods.btaml import BTAML, BTAMLConfig
    from smidgen.fewshot.methods.inner import Inner

    inner = Inner(width, steps, test_steps, clip, faithful_padding)
    return BTAML(shape, BTAMLConfig(omega, gamma, z, bayesian, direct_omega, rate, samples, seed, inner))


def normalised_protonet(shape: Shape, ways: int, *, width: int = 64, norm: Norm = "inductive") -> nn.Module:
    """A member of MxML, to be trained first."""
    from smidgen.fewshot.methods.mxml import NormalisedProtoNet

    return NormalisedProtoNet(conv4(shape, width, norm))


def mxml(
    shape: Shape,
    ways: int,
    *,
    members: Sequence[Mapping[str, Any]] = (),
    form: Literal["authors", "invariant"] = "authors",
    inductive: bool = False,
    normalise: Literal["none", "softmax", "sum", "product"] = "none",
) -> nn.Module:
    """A mixture; `members` are names and options of trained normalised prototypical networks."""
    from smidgen.fewshot.methods.mxml import MxML, NormalisedProtoNet, WeightNetwork

    if not members:
        raise UserError("mxml mixes trained methods: give their runs with --members; each is trained by --method normalised-protonet")
    made = [make(member["name"], shape, ways, member["options"]) for member in members]
    networks = [member for member in made if isinstance(member, NormalisedProtoNet)]
    if len(networks) < len(made):
        raise UserError("--members: the members of mxml are trained by --method normalised-protonet")
    with torch.no_grad():
        sizes = {networks[i].eval().embed(torch.zeros(1, 1, *shape)).shape[-1] for i in range(len(networks))}
    if len(sizes) > 1:
        raise UserError(f"--members: they have {', '.join(map(str, sorted(sizes)))} features; all must have the same number")
    network = WeightNetwork(sizes.pop(), ways if form == "authors" else None, form, not inductive)
    return MxML(networks, network, normalise)


METHODS: dict[str, Callable[..., nn.Module]] = {
    "protonet": protonet,
    "simpleshot": simpleshot,
    "label-propagation": label_propagation,
    "tpn": tpn,
    "maml": maml,
    "meta-sgd": meta_sgd,
    "btaml": btaml,
    "normalised-protonet": normalised_protonet,
    "mxml": mxml,
}


def conv4(shape: Shape, width: int, norm: Norm) -> Conv4:
    """Checked for images it can read."""
    if width < 1:
        raise UserError(f"--option.width must be positive, got {width}")
    if norm not in ("inductive", "transductive"):
        raise UserError(f"--option.norm is inductive or transductive, got {norm}")
    maps(shape, width)
    return Conv4(shape[0], width, norm)


def maps(shape: Shape, width: int) -> Shape:
    """What Conv-4 makes of an image: every block halves it, rounding down."""
    _, height, across = shape
    if min(height, across) < 16:
        raise UserError(f"Conv-4 halves images four times: they need 16x16 pixels or more, these have {height}x{across}")
    return width, height // 16, across // 16


@dataclass(frozen=True)
class Description:
    """What a folder says of the method in it."""

    name: str
    shape: Shape
    "Channels, height and width of its images."
    ways: int
    shots: Shots
    "Trained with."
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    "Trained on."

    def check(self, shape: Shape, source: str) -> None:
        """Refuses images of another shape."""
        if shape != self.shape:
            ours, theirs = ("x".join(map(str, s)) for s in (self.shape, shape))
            raise UserError(
                f"{source} has images of {theirs} (channels x height x width), the model reads {ours}; add --resize or train anew"
            )


def make(name: str, shape: Shape, ways: int, options: Mapping[str, Any]) -> nn.Module:
    """An untrained method."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    known = inspect.signature(METHODS[name]).parameters.values()
    defaults = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"--option.{option}: {name} has no such option; it has {', '.join(defaults) or 'none'}")
        if not _like(value, defaults[option]):
            raise UserError(f"--option.{option} {value}: not a value like the default, {defaults[option]}")
    return METHODS[name](shape, ways, **options)


def _like(value: Any, default: Any) -> bool:
    """Whether a value has the default's type; whole numbers are numbers, and a list of members is one as JSON has it."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def save(folder: Path, method: nn.Module, description: Description) -> None:
    """Writes a method that `load` makes again."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous().clone() for name, t in method.state_dict().items()}, folder / TENSORS)
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n")


def describe(folder: Path) -> Description:
    """What a folder holds."""
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder} holds no trained method: it has no {DESCRIPTION} and {TENSORS}; give a run of smidgen fewshot train")
    try:
        read = json.loads((folder / DESCRIPTION).read_text())
        return Description(**read | {"shape": tuple(read["shape"])})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{folder / DESCRIPTION}: damaged, or of another version") from error


def load(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The method that `save` wrote, in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = describe(folder)
    method = make(described.name, described.shape, described.ways, described.options)
    try:
        method.load_state_dict(load_file(folder / TENSORS))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / TENSORS}: damaged, or not of the method {DESCRIPTION} tells of") from error
    return method.to(device).eval()


def load_members(mixture: nn.Module, folders: Sequence[Path]) -> None:
    """The trained parameters of the members of a mixture just made."""
    from smidgen.fewshot.methods.mxml import MxML

    assert isinstance(mixture, MxML)
    for member, folder in zip(mixture.members, folders, strict=True):
        member.load_state_dict(load(folder).state_dict())


def settle(method: nn.Module, sets: Sequence[Images], batch: int = 256) -> bool:
    """What is taken from the training images when the backbone is trained: SimpleShot's mean. Whether there was anything to take."""
    from smidgen.fewshot.methods.simpleshot import SimpleShot, base_mean

    if not isinstance(method, SimpleShot):
        return False
    method.eval()
    index = [torch.arange(len(images.labels), device=images.pixels.device) for images in sets]
    batches = (images.floats(part) for images, rows in zip(sets, index, strict=True) for part in rows.split(batch))
    method.mean.copy_(base_mean(method.backbone, batches))
    return True


def trained_folder(path: Path) -> Path:
    """Where the method is, of a run or of its folder."""
    return path / TRAINED if (path / TRAINED).is_dir() else path
