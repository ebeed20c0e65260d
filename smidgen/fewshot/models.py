"""The methods by name, and trained ones in a folder.

FOLDER/method.json           name, options, image shape, ways, shots, what it was trained on
FOLDER/method.safetensors    parameters and buffers

A method's options are the fields of the dataclasses its entry in METHODS names, so that a name and a few values make it again.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.errors import UserError
from smidgen.fewshot.data import Shape
from smidgen.fewshot.episodes import Shots
from smidgen.fewshot.methods.btaml import BTAML, BTAMLConfig
from smidgen.fewshot.methods.inner import Inner
from smidgen.fewshot.methods.maml import MAML, MAMLConfig, MetaSGD, MetaSGDConfig
from smidgen.fewshot.methods.mxml import Form, MxML, Normalise, NormalisedProtoNet, WeightNetwork
from smidgen.fewshot.methods.propagation import LabelPropagation, Propagation
from smidgen.fewshot.methods.prototypes import ProtoNet
from smidgen.fewshot.methods.simpleshot import SimpleShot, base_mean
from smidgen.fewshot.methods.tpn import TPN, graph_for, started
from smidgen.images import Images
from smidgen.networks import Conv4, Norm

TRAINED = "trained"  # folder of a run of `smidgen fewshot train`
DESCRIPTION, TENSORS = "method.json", "method.safetensors"


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Conv-4."""

    width: int = 64
    "Filters of a convolution."
    norm: Norm = "inductive"
    "inductive, or transductive: batch norm by the statistics of the batch, queries and all."

    def made(self, shape: Shape) -> Conv4:
        """For images of that shape."""
        if self.width < 1:
            raise UserError(f"--option.width must be positive, got {self.width}")
        if self.norm not in ("inductive", "transductive"):
            raise UserError(f"--option.norm is inductive or transductive, got {self.norm}")
        self.maps(shape)
        return Conv4(shape[0], self.width, self.norm)

    def maps(self, shape: Shape) -> Shape:
        """What it makes of an image: every block halves it, rounding down."""
        _, height, across = shape
        if min(height, across) < 16:
            raise UserError(f"Conv-4 halves images four times: they need 16x16 pixels or more, these have {height}x{across}")
        return self.width, height // 16, across // 16


@dataclass(frozen=True)
class OneSigma:
    """Of unlearned propagation."""

    sigma: float = 0.0
    "0: chosen by the spread of each task."


@dataclass(frozen=True)
class Learned:
    """Of TPN."""

    guard: bool = False
    "sigma above 0 (tpn.py)."
    prototypes: float = 0.0
    "Weight of a ProtoNet's loss on the same embeddings."
    start: float = 0.3
    "sigma of every node before training; 0: as the layers draw it."


@dataclass(frozen=True)
class Mixture:
    """Of MxML."""

    members: Sequence[Mapping[str, Any]] = ()
    "Names and options of normalised prototypical networks."
    form: Form = "authors"
    "Of the network that weighs: authors for one number of ways, invariant for any."
    inductive: bool = False
    "A weight per query instead of one per task."
    normalise: Normalise = "none"
    "Of the weights: none, sum, softmax, product."


# --- methods ---------------------------------------------------------------------------------------------------------


def protonet(shape: Shape, ways: int, network: Network) -> nn.Module:
    """Prototypical networks."""
    return ProtoNet(network.made(shape))


def simpleshot(shape: Shape, ways: int, network: Network) -> nn.Module:
    """SimpleShot; the base classes' mean is taken when the backbone is trained (`settle`)."""
    return SimpleShot(network.made(shape), torch.zeros(math.prod(network.maps(shape))))


def label_propagation(shape: Shape, ways: int, network: Network, one: OneSigma, propagation: Propagation) -> nn.Module:
    """Label propagation with one sigma."""
    return LabelPropagation(network.made(shape), one.sigma or None, propagation)


def tpn(shape: Shape, ways: int, network: Network, propagation: Propagation, learned: Learned) -> nn.Module:
    """Transductive propagation network."""
    backbone = network.made(shape)
    return TPN(backbone, started(graph_for(network.maps(shape)), learned.start), propagation, learned.guard, learned.prototypes)


def maml(shape: Shape, ways: int, config: MAMLConfig, inner: Inner) -> nn.Module:
    """MAML."""
    return MAML(shape, replace(config, inner=inner))


def meta_sgd(shape: Shape, ways: int, config: MetaSGDConfig, inner: Inner) -> nn.Module:
    """Meta-SGD; with --option.balance classes the baseline that weighs classes by 1/N_c."""
    return MetaSGD(shape, replace(config, inner=inner))


def btaml(shape: Shape, ways: int, config: BTAMLConfig, inner: Inner) -> nn.Module:
    """Bayesian TAML."""
    return BTAML(shape, replace(config, inner=inner))


def normalised_protonet(shape: Shape, ways: int, network: Network) -> nn.Module:
    """A member of MxML, to be trained first."""
    return NormalisedProtoNet(network.made(shape))


def mxml(shape: Shape, ways: int, mixture: Mixture) -> nn.Module:
    """A mixture of trained members."""
    if not mixture.members:
        raise UserError("mxml mixes trained methods: give their runs with --members; each is trained by --method normalised-protonet")
    made = [make(member["name"], shape, ways, member["options"]) for member in mixture.members]
    networks = [member for member in made if isinstance(member, NormalisedProtoNet)]
    if len(networks) < len(made):
        raise UserError("--members: the members of mxml are trained by --method normalised-protonet")
    with torch.no_grad():
        sizes = {network.eval().embed(torch.zeros(1, 1, *shape)).shape[-1] for network in networks}
    if len(sizes) > 1:
        raise UserError(f"--members: they have {', '.join(map(str, sorted(sizes)))} features; all must have the same number")
    network = WeightNetwork(sizes.pop(), ways if mixture.form == "authors" else None, mixture.form, not mixture.inductive)
    return MxML(networks, network, mixture.normalise)


METHODS: dict[str, tuple[Callable[..., nn.Module], tuple[type, ...]]] = {
    "protonet": (protonet, (Network,)),
    "simpleshot": (simpleshot, (Network,)),
    "label-propagation": (label_propagation, (Network, OneSigma, Propagation)),
    "tpn": (tpn, (Network, Propagation, Learned)),
    "maml": (maml, (MAMLConfig, Inner)),
    "meta-sgd": (meta_sgd, (MetaSGDConfig, Inner)),
    "btaml": (btaml, (BTAMLConfig, Inner)),
    "normalised-protonet": (normalised_protonet, (Network,)),
    "mxml": (mxml, (Mixture,)),
}
"What makes a method of (shape, ways, *options), and the dataclasses of its options."


def make(name: str, shape: Shape, ways: int, options: Mapping[str, Any]) -> nn.Module:
    """An untrained method."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    build, kinds = METHODS[name]
    defaults = {f.name: f.default for kind in kinds for f in fields(kind) if f.name != "inner"}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"--option.{option}: {name} has no such option; it has {', '.join(defaults) or 'none'}")
        if not _like(value, defaults[option]):
            raise UserError(f"--option.{option} {value}: not a value like the default, {defaults[option]}")
    chosen = [kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options}) for kind in kinds]
    return build(shape, ways, *chosen)


def _like(value: Any, default: Any) -> bool:
    """Whether a value has the default's type; whole numbers are numbers, and a list of members is one as JSON has it."""
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


# --- trained ones ----------------------------------------------------------------------------------------------------


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
    assert isinstance(mixture, MxML)
    for member, folder in zip(mixture.members, folders, strict=True):
        member.load_state_dict(load(folder).state_dict())


def settle(method: nn.Module, sets: Sequence[Images], batch: int = 256) -> bool:
    """What is taken from the training images when the backbone is trained: SimpleShot's mean. Whether there was anything to take."""
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
