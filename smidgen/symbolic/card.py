"""What goes with a model's weights: how to read a question, how sure its answers are, which rules it found. No torch.

An exported model carries it inside its file; a trained one as card.json beside its weights.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from smidgen.symbolic.confidence import Calibration
from smidgen.symbolic.exact import Rule
from smidgen.symbolic.vocabulary import Vocabulary


@dataclass(frozen=True)
class Card:
    """Of one trained model."""

    model: str
    "By name."
    task: str
    tokens: Vocabulary
    answers: Vocabulary
    length: int
    "Tokens of the longest question the task has, of any split: no longer one was ever measured."
    rows: int | None
    columns: int | None
    "Of the grid; none: a model without."
    network: Calibration
    "Of the network's answers."
    exact: Calibration | None = None
    "Of those of the exact back end; none: it has no rules."
    rules: Mapping[str, Rule] = field(default_factory=dict)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def of(text: str) -> "Card":
        """Of its JSON; ValueError, KeyError or TypeError if it is none."""
        read: dict[str, Any] = json.loads(text)
        for name in ("tokens", "answers"):
            read[name] = Vocabulary(tuple(read[name]["symbols"]), read[name]["unit"])
        for name in ("network", "exact"):
            read[name] = read[name] and Calibration(**read[name])
        read["rules"] = {rest: Rule(**rule | {"coefficients": tuple(rule["coefficients"])}) for rest, rule in read["rules"].items()}
        return Card(**read)
