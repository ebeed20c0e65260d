"""From a question to an answer, or to none: what `smidgen symbolic solve` does, with a trained model or an exported one. No torch.

1. A question that is empty, or has symbols the model does not know, is refused; one that does not fit is not answered.
2. The network says which symbols it takes for the answer, and where it put the tokens.
3. Where there are rules, the exact back end reads the layout. Where it is sure enough its answer counts, else the network's, if
   that is sure enough; else there is none. Either one can be asked alone.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from smidgen.errors import UserError
from smidgen.symbolic import exact
from smidgen.symbolic.card import Card
from smidgen.symbolic.confidence import Calibration
from smidgen.symbolic.tasks import Batch
from smidgen.symbolic.tasks.babi import phrased

By = Literal["auto", "network", "exact"]


@dataclass(frozen=True)
class Said:
    """What a network makes of one question."""

    symbols: Int[np.ndarray, "*length"]
    "Of its answer in reading order; or a label."
    log_probability: float
    "Of all of it."
    actions: Float[np.ndarray, "tokens 3"] | None
    "Probabilities of each token's list actions; none: a model without a grid."


@runtime_checkable
class Network(Protocol):
    """A model that answers."""

    @property
    def card(self) -> Card:
        """What goes with it."""
        ...

    def __call__(self, tokens: Int[np.ndarray, "tokens"]) -> Said:
        """Of a question with its end."""
        ...

    def many(self, batch: Batch) -> list[Said]:
        """Of many."""
        ...


@dataclass(frozen=True)
class Solved:
    """The answer to a question."""

    question: str
    answer: str | None
    confidence: float
    "Probability that it is right, or that the guess is; 0 without a guess."
    by: Literal["network", "exact"]
    "Who gave it."
    guess: str | None = None
    "What would have been said, had it been surer."
    reason: str = ""
    "Why there is no answer."
    said: Said | None = None


def solve(network: Network, question: str, by: By = "auto") -> Solved:
    """Reads, asks, decides."""
    card = network.card
    question = phrased(question) if card.task.startswith("babi") else question
    check(question, card, by)
    tokens = card.tokens.encode([question])[0][0]
    if len(tokens) > card.length:
        reason = f"{len(tokens)} tokens with the end, more than the {card.length} of the longest question of {card.task}"
        return Solved(question, None, 0.0, "network", reason=reason)
    return decide(question, network(tokens), card, by)


def decide(question: str, said: Said, card: Card, by: By = "auto") -> Solved:
    """Whose answer counts."""
    if by == "network" or card.exact is None:
        return by_network(question, card, said)
    found = by_rules(question, card, said)
    if by == "exact" or found.answer is not None:
        return found
    other = by_network(question, card, said)
    return other if other.answer is not None else replace(other, reason=f"exact back end: {found.reason}; network: {other.reason}")


def check(question: str, card: Card, by: By) -> None:
    """Refuses what cannot be read."""
    if not question.strip():
        raise UserError("the question is empty")
    unknown = card.tokens.unknown(question)
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UserError(f"{named}: not among the {len(card.tokens.symbols)} {card.tokens.unit} the model knows from {card.task}")
    if by == "exact" and card.exact is None:
        raise UserError(f"this {card.model} has no rules for an exact answer: it found none in its training questions; ask --by network")


def by_rules(question: str, card: Card, said: Said) -> Solved:
    """By the exact back end."""
    assert card.exact is not None and said.actions is not None and card.rows is not None and card.columns is not None
    outcome = exact.answer(exact.read(question, said.actions, card.rows, card.columns), card.rules)
    if outcome.answer is None:
        return Solved(question, None, 0.0, "exact", None, outcome.reason, said)
    return decided(question, outcome.answer, outcome.score, card.exact, "exact", said)


def by_network(question: str, card: Card, said: Said) -> Solved:
    """By the network alone."""
    text = text_of(said, card)
    if cut_in_two(question, said, card):
        return Solved(question, None, 0.0, "network", text, f"a number is longer than the {card.columns} slots of a row", said)
    return decided(question, text, float(np.exp(said.log_probability)), card.network, "network", said)


def decided(
    question: str,
    text: str,
    score: float,
    calibration: Calibration,
    by: Literal["network", "exact"],
    said: Said,
) -> Solved:
    """An answer if it is sure enough, else a guess."""
    probability = calibration.probability(score)
    if score >= calibration.threshold:
        return Solved(question, text, probability, by, None, "", said)
    reason = "never sure enough on the questions held out to measure that"
    if calibration.threshold <= 1:
        reason = f"not sure enough: {probability:.3f}, answers need {calibration.probability(calibration.threshold):.3f}"
    return Solved(question, None, probability, by, text, reason, said)


def cut_in_two(question: str, said: Said, card: Card) -> bool:
    """Whether a list is so long that it lost a digit of a number whose other digits it still held."""
    if said.actions is None or card.columns is None or card.tokens.unit != "characters":
        return False
    edges = [tokens[-card.columns - 1 :][:2] for tokens in exact.lists(said.actions) if len(tokens) > card.columns]
    return any(lost + 1 == kept and question[lost : kept + 1].isdecimal() for lost, kept in edges)


def text_of(said: Said, card: Card) -> str:
    """What a network says."""
    if card.answers.unit == "labels":
        return card.answers.symbols[int(said.symbols)]
    return card.answers.decode(said.symbols)
