"""`smidgen search query`: what a device has for what somebody needs, on one line each.

    $ smidgen search query DIR "my eyes hurt when I read at night"
    1  0.71  Night light
             Settings > Display > Night light

With --json one object instead: {"query", "fits", "confidence", "hits": [{"id", "title", "summary", "path", "score"}, ...]}.
"""

import json
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from cyclopts import Parameter

from smidgen.errors import UserError
from smidgen.search.searcher import Answer, Searcher


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search query`."""

    model: Path
    "A folder of smidgen search distill."
    query: str
    "What you need, in your own words, or a keyword."
    _: KW_ONLY
    count: int = 5
    "Features shown at most."
    json: bool = False
    "Write one JSON object."


def command(config: Config) -> None:
    """Find the features that answer a query; prints them."""
    if config.count < 1:
        raise UserError(f"--count must be at least 1, got {config.count}")
    answer = Searcher.open(config.model)(config.query, config.count)
    sys.stdout.write((json.dumps({"query": config.query} | answer.row(), ensure_ascii=False) if config.json else told(answer)) + "\n")


def told(answer: Answer) -> str:
    """An answer as lines."""
    if not answer.fits:
        return f"nothing fits; the closest is {answer.hits[0].place}"
    lines = [f"{rank:>2}  {hit.score:.2f}  {hit.feature.title}\n          {hit.place}" for rank, hit in enumerate(answer.hits, start=1)]
    return "\n".join(lines)
