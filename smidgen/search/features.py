"""Features of a device, and queries for them, as people write them: JSON Lines.

    FEATURES   {"id": "night_light", "title": "Night Light", "summary": "Tints the screen amber", "keywords": ["blue light", "eyes"],
                "path": "Settings > Display"}
               summary, keywords and path may be missing; description (help text) and options (choices of a list) are read where they
               are there; other fields are left alone
    QUERIES    {"query": "my eyes hurt when I read at night", "relevant": ["night_light"], "kind": "contextual"}
               relevant: ids, the best first, none of them for the kind none; kind: contextual (the default), keyword, typo or none

A feature is known by several texts, its views: queries are matched with all of them. Titles alone mean little (there are five
called Privacy), so every view says where it is.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from smidgen.errors import UserError

Kind = Literal["contextual", "keyword", "typo", "none"]
T = TypeVar("T")
KINDS: tuple[Kind, ...] = get_args(Kind)
FEATURES = "features.jsonl"  # in the folder of a model
CATALOGUE = Path(__file__).parent / "data" / "catalogue.jsonl"
QUERIES = Path(__file__).parent / "data" / "queries.jsonl"
NONE = Path(__file__).parent / "data" / "none.jsonl"  # queries that no phone answers
LONGEST = 2000  # characters of a text; far beyond what an encoder reads, and a sign of another file


@dataclass(frozen=True)
class Feature:
    """Something a device can do, under a name."""

    id: str
    title: str
    summary: str = ""
    keywords: tuple[str, ...] = ()
    path: str = ""
    "Menus to it, 'Settings > Display'; the title is not in it."
    description: str = ""
    "Help text."
    options: tuple[str, ...] = ()
    "What can be chosen there."

    @property
    def screen(self) -> str:
        """The last menu of the path, without what all paths begin with."""
        menus = self.path.split(" > ")
        return menus[-1] if len(menus) > 1 else ""

    def views(self) -> tuple[str, ...]:
        """Texts that stand for it: its name, what it says of itself, what else it is called, and everything.

        >>> Feature("n", "Night Light", "Tints the screen amber", ("blue light", "eyes"), "Settings > Display").views()[:3]
        ('Night Light (Display)', 'Night Light: Tints the screen amber (Display)', 'Night Light: blue light, eyes (Display)')
        """
        where = f" ({self.screen})" if self.screen else ""
        said = ". ".join(filter(None, (self.summary, self.description)))
        called = ", ".join((*self.keywords, *self.options))
        texts = [self.title + where, *(f"{self.title}: {text}{where}" for text in (said, called) if text)]
        return (*texts, self.everything()) if self.everything() not in texts else tuple(texts)

    def everything(self) -> str:
        """All fields in one text."""
        return ". ".join(filter(None, (self.title, self.summary, self.description, ", ".join((*self.keywords, *self.options)), self.path)))

    def row(self) -> dict[str, Any]:
        """As `read_features` reads it."""
        return {name: value for name, value in asdict(self).items() if value or name in ("id", "title")}


@dataclass(frozen=True)
class Query:
    """What somebody typed, and what would have answered it."""

    query: str
    relevant: tuple[str, ...]
    "Ids of features, the best first; empty where nothing fits."
    kind: Kind = "contextual"


def read_features(path: Path) -> tuple[Feature, ...]:
    """Features of a JSONL file, in its order; refused whole, with the line, when one of them cannot be used."""
    features = tuple(_rows(path, _feature))
    _distinct(path, (f.id for f in features), "id")
    if not features:
        raise UserError(f"{path}: holds no features; it needs a JSON object with id and title on every line")
    return features


def read_queries(path: Path, features: Sequence[Feature] | None = None) -> tuple[Query, ...]:
    """Queries of a JSONL file; `features`: those that `relevant` may name."""
    queries = tuple(_rows(path, _query))
    if not queries:
        raise UserError(f"{path}: holds no queries; it needs a JSON object with query and relevant on every line")
    known = None if features is None else {f.id for f in features}
    for number, query in enumerate(queries, start=1):
        unknown = [] if known is None else [name for name in query.relevant if name not in known]
        if unknown:
            raise UserError(f"{path}, query {number}: relevant names {unknown[0]!r}, which is no id of a feature")
    return queries


def write_features(path: Path, features: Iterable[Feature]) -> None:
    """The file `read_features` reads."""
    path.write_text("".join(json.dumps(f.row(), ensure_ascii=False) + "\n" for f in features), encoding="utf-8")


def write_queries(path: Path, queries: Iterable[Query]) -> None:
    """The file `read_queries` reads."""
    path.write_text("".join(json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in queries), encoding="utf-8")


def _rows(path: Path, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `read` makes of every line; its UserErrors get the place put before them."""
    if not path.is_file():
        raise UserError(f"no such file: {path} (JSON Lines, one object a line)")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); one whole object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: {type(row).__name__} instead of a JSON object")
        try:
            yield read(row)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error


def _feature(row: dict[str, Any]) -> Feature:
    name, title = _text(row, "id"), _text(row, "title")
    for field, value in (("id", name), ("title", title)):
        if not value:
            raise UserError(f"a feature without {field}")
    rest = {field: _text(row, field) for field in ("summary", "path", "description")}
    return Feature(name, title, keywords=_texts(row, "keywords"), options=_texts(row, "options"), **rest)


def _query(row: dict[str, Any]) -> Query:
    text, relevant, kind = _text(row, "query"), _texts(row, "relevant"), row.get("kind", "contextual")
    if not text:
        raise UserError("an empty query")
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}; there are {', '.join(KINDS)}")
    if "relevant" not in row or bool(relevant) == (kind == "none"):
        raise UserError("relevant must list the ids that answer the query, or be [] with kind none")
    if len(set(relevant)) < len(relevant):
        raise UserError("relevant names a feature twice")
    return Query(text, relevant, kind)


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise UserError(f"{field} is {json.dumps(value)[:40]}, not text")
    if len(value) > LONGEST:
        raise UserError(f"{field} has {len(value)} characters; {LONGEST} at most")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{field} holds half a character (a lone surrogate)")
    return " ".join(value.split())


def _texts(row: dict[str, Any], field: str) -> tuple[str, ...]:
    values = row.get(field)
    values = [] if values is None else values
    if not isinstance(values, list):
        raise UserError(f"{field} is {json.dumps(values)[:40]}, not a list of texts")
    return tuple(filter(None, (_text({field: value}, field) for value in values)))


def _distinct(path: Path, names: Iterable[str], field: str) -> None:
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if name in seen:
            raise UserError(f"{path}: {field} {name!r} of feature {number} is that of feature {seen[name]} already; ids must differ")
        seen[name] = number
