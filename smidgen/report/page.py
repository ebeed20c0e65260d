"""What a page is made of, and how it becomes HTML (`templates/report.html`)."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smidgen.report.words import show


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    numeric: bool = False
    best: bool = False

    @staticmethod
    def of(name: str, value: Any) -> "Cell":
        """The value of a metric, in a column of such values."""
        return Cell(show(name, value), numeric=True)


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture and what is said under it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """What a model writes after a prompt; `shared` is how both texts begin."""

    prompt: str
    shared: str
    before: str
    after: str


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is not drawn."""

    title: str
    _: KW_ONLY
    note: str = ""
    table: Table | None = None
    facts: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)
    "Heading -> text to copy."
    half: bool = False
    "May stand beside another half."


@dataclass(frozen=True)
class Page:
    """All that the template draws."""

    kind: str
    title: str
    subtitle: str
    sections: list[Section]


def render(page: Page) -> str:
    """The page as HTML; whatever comes from a file is escaped."""
    folder = FileSystemLoader(Path(__file__).parent.parent / "templates")
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(page=page) + "\n"
