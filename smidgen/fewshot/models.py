"""The methods by name, and trained ones in a folder.

FOLDER/method.json           name, options, image shape, ways, shots, what it was trained on
FOLDER/method.safetensors    parameters and buffers

A method's options are the keyword arguments of its entry in METHODS, so that a name and a few values make it again; modules are imported
only when their method is made.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smidgen.errors import UserError
from smidgen.fewshot.data import Shape
from smidgen.fewshot.episodes import Episode, Shots
from smidgen.fewshot.networks import Conv4, Norm

DESCRIPTION, TENSORS = "method.json", "method.safetensors"


class ProtoNet(nn.Module):
    """Prototypical networks (notes 5.1): p(y = c | q) = softmax_c(-|f(q) - m_c|^2), m_c the mean of f over class c's support."""

    def __init__(self, network: Conv4) -> None:
        super().__init__()
        self.network = network

    def logits(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Negative squared distances."""
        both = self.network.embed(torch.cat([episode.support_x, episode.query_x], 1))
        support, query = both.split([episode.support_x.shape[1], episode.query_x.shape[1]], 1)
        member = F.one_hot(episode.support_y + 1, episode.ways + 1)[..., 1:].to(support)  # (tasks, support, ways)
        means = member.mT @ support / member.sum(1)[..., None]
        return -torch.cdist(query, means).square()

    def loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Cross entropy of the queries."""
        logits = self.logits(episode).flatten(0, 1)
        return F.cross_entropy(logits, episode.query_y.flatten(), ignore_index=-1)

    def predict(self, episode: Episode) -> Float[Tensor, "tasks queries ways"]:
        """Probabilities."""
        return self.logits(episode).softmax(-1)


def protonet(shape: Shape, ways: int, *, width: int = 64, norm: Norm = "inductive") -> nn.Module:
    """Prototypical networks over Conv-4."""
    return ProtoNet(Conv4(shape[0], width, norm))


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
    """MAML; any number of ways."""
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
    """Meta-SGD; balance "classes" is the 1/N_c baseline; any number of ways."""
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
    direct_omega: bool = False,
    rate: float = 0.01,
    samples: int = 10,
    sampling_seed: int = 0,
    width: int = 32,
    steps: int = 5,
    test_steps: int = 10,
    clip: float = 3.0,
    faithful_padding: bool = False,
) -> nn.Module:
    """Bayesian TAML; any number of ways."""
    from smidgen.fewshot.methods.btaml import BTAML, BTAMLConfig
    from smidgen.fewshot.methods.inner import Inner

    inner = Inner(width, steps, test_steps, clip, faithful_padding)
    return BTAML(shape, BTAMLConfig(omega, gamma, z, direct_omega, rate, samples, sampling_seed, inner))


METHODS: dict[str, Callable[..., nn.Module]] = {"protonet": protonet, "maml": maml, "meta-sgd": meta_sgd, "btaml": btaml}


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
    """Whether a value has the default's type; whole numbers are numbers, and None says nothing of its type."""
    if default is None or (isinstance(default, float) and type(value) is int):
        return True
    return type(value) is type(default)


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
