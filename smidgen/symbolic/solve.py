"""`smidgen symbolic solve`: one question, its answer, or why there is none.

    smidgen symbolic solve RUN "What is 48 less than 1032?"        {"answer": "984", "confidence": 0.998, ...}

RUN is a training or an export, or a .onnx file; with an exported model nothing here loads torch. `--explain` draws, on standard error, what
happened to every token and the grid it made.
"""

import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter
from rich.console import Console

from smidgen.errors import UserError
from smidgen.symbolic.answering import By, Network, Solved, solve
from smidgen.symbolic.card import Card
from smidgen.symbolic.layout import EMPTY, Cells, cells, weights
from smidgen.symbolic.runtime import exported_file, open_exported

LETTERS = "uP."  # TLU, NLP, no-op in drawings
SURE = 0.5  # a cell below is drawn in brackets
LEGEND = "u: onto the top list  P: onto a new one  .: left out  sure: tenths of the action's probability  (x): below a half  $: the end"


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen symbolic solve`."""

    model: Path
    "A run of smidgen symbolic train or export, or a .onnx file."
    question: str
    "As the model's task asks; of bAbI: the story and the question."
    _: KW_ONLY
    by: By = "auto"
    "Who answers: the network, the exact back end, or whoever may (auto)."
    explain: bool = False
    "Draw the grid the question was laid out on."
    threads: int = 1
    "Of an exported model."


def command(config: Config) -> dict[str, Any]:
    """Answer one question, or say why not."""
    if config.threads < 1:
        raise UserError(f"--threads must be at least 1, got {config.threads}")
    network = open_network(config.model, config.threads)
    started = time.perf_counter()
    solved = solve(network, config.question, config.by)
    milliseconds = 1000 * (time.perf_counter() - started)
    if config.explain:
        Console(stderr=True, highlight=False).print(explained(solved, network.card), markup=False, soft_wrap=True)
    doubts = {} if solved.answer is not None else {"guess": solved.guess, "reason": solved.reason}
    return {"answer": solved.answer, "confidence": round(solved.confidence, 4), "by": solved.by, **doubts, "ms": round(milliseconds, 2)}


def open_network(path: Path, threads: int = 1) -> Network:
    """A trained or an exported model."""
    file = exported_file(path)
    if file is not None:
        return open_exported(file, threads)
    if not path.exists():
        raise UserError(f"no such model: {path}")
    from smidgen.symbolic.settle import open_trained

    return open_trained(path)


def explained(solved: Solved, card: Card) -> str:
    """A drawing of the layout, in text."""
    said = solved.said
    if said is None or said.actions is None or card.rows is None or card.columns is None:
        return "this model lays nothing out on a grid" if said is not None else "the question was not read"
    symbols = shown(card, solved.question)
    width = max(map(len, symbols)) + 1
    letters = [LETTERS[a] for a in said.actions.argmax(-1).tolist()]
    tenths = [str(min(9, int(10 * p))) for p in said.actions.max(-1).tolist()]
    told = {"token": symbols, "action": letters, "sure": tenths}
    lines = [f"{name:8}" + "".join(part.rjust(width) for part in row) for name, row in told.items()]
    laid = cells(weights(said.actions[None], card.rows, card.columns)[0])
    drawn = [f"row {row:<4}" + "".join(cell.rjust(width + 2) for cell in drawn_row(laid, row, symbols)) for row in range(laid.rows)]
    return "\n".join([*lines, "", *drawn, "", LEGEND])


def drawn_row(laid: Cells, row: int, symbols: list[str]) -> list[str]:
    """Its cells up to the last that is not empty."""
    written = [
        "·" if token == EMPTY else symbols[token] if weight >= SURE else f"({symbols[token]})"
        for token, weight in zip(laid.token[row].tolist(), laid.weight[row].tolist(), strict=True)
    ]
    last = max((i for i, cell in enumerate(written) if cell != "·"), default=0)
    return written[: last + 1]


def shown(card: Card, question: str) -> list[str]:
    """The question's tokens with visible spaces, and its end."""
    visible = {" ": "_", "\n": "/"}
    return [visible.get(symbol, symbol) for symbol in card.tokens.split(question)] + ["$"]
