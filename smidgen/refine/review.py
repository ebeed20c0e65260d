"""A page for the images a person should look at: keep, relabel or drop, by keyboard; `smidgen refine --review`.

It is served to this computer alone. Every decision is a line of a file before the page says so,

    {"path": "vi/a.png", "decision": "relabel", "label": "iv"}      decision null takes an earlier one back

and the last line about an image counts; who stops and comes again goes on where they were.
"""

import io
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from smidgen.errors import UserError
from smidgen.refine.folder import Finding

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).parent.parent / "templates" / "review.html"
REVIEW = "review.jsonl"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Item:
    """An image to look at."""

    path: str
    verdict: str
    label: str
    proposed: str
    reason: str
    score: float
    "In [0, 1], low is suspicious."

    @staticmethod
    def of(finding: Finding) -> "Item":
        """With the lowest of its scores."""
        score = min(finding.scores.values(), default=0.0)
        return Item(finding.path, finding.verdict, finding.label, finding.proposed, finding.reason, score)


@dataclass(frozen=True)
class Answer:
    """A person's decision."""

    path: str
    decision: Literal["keep", "relabel", "drop"]
    label: str
    "Of relabel."


class Decisions:
    """What was decided, kept in a file line by line."""

    def __init__(self, file: Path, items: Sequence[Item], classes: Sequence[str]) -> None:
        self.file, self.items, self.classes = file, tuple(items), tuple(classes)
        self.known = {item.path for item in items}
        self.made: dict[str, Answer] = {}
        self.lock = threading.Lock()
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # a last line cut short was never confirmed
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, UserError) as error:
                raise UserError(f"{file}, line {number}: not a decision about these images ({error}); mend or remove the line") from error

    def add(self, row: Any) -> None:
        """Checks a decision, writes it down, and then takes it."""
        with self.lock:
            line = json.dumps(self._take(row))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")

    def _take(self, row: Any) -> dict[str, str | None]:
        if not isinstance(row, dict) or row.get("path") not in self.known:
            raise UserError("a decision is about one of the images shown")
        path, decision, label = row["path"], row.get("decision"), row.get("label", "")
        if decision not in ("keep", "relabel", "drop", None):
            raise UserError(f"a decision is keep, relabel or drop, not {decision!r}")
        if decision == "relabel" and label not in self.classes:
            raise UserError(f"there is no class {label!r}")
        label = label if decision == "relabel" else ""
        self.made.pop(path, None)
        if decision is not None:
            self.made[path] = Answer(path, decision, label)
        return {"path": path, "decision": decision, "label": label}


def application(decisions: Decisions, picture: Callable[[str], Image.Image], finish: Callable[[], None] = lambda: None) -> "Starlette":
    """The page and what it asks for; `picture` opens an image by its path, `finish` is called when the person says that they are done."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    async def page(_: "Request") -> "Response":
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def state(_: "Request") -> "Response":
        made = {path: asdict(answer) for path, answer in decisions.made.items()}
        items = [asdict(item) | {"decided": made.get(item.path)} for item in decisions.items]
        return JSONResponse({"classes": decisions.classes, "items": items})

    async def image(request: "Request") -> "Response":
        number = request.path_params["number"]
        if number >= len(decisions.items):
            return JSONResponse({"error": "no such image"}, 404)
        png = await run_in_threadpool(encoded, picture, decisions.items[number].path)
        return Response(png, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    async def decide(request: "Request") -> "Response":
        if request.headers.get("content-type") != "application/json":  # another site's page cannot send this type unasked
            return JSONResponse({"error": "send JSON"}, 415)
        try:
            decisions.add(json.loads(await request.body()))
        except (ValueError, UserError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({"decided": len(decisions.made)})

    async def done(request: "Request") -> "Response":
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "send JSON"}, 415)
        finish()
        return JSONResponse({"decided": len(decisions.made)})

    routes = [
        Route("/", page),
        Route("/state", state),
        Route("/image/{number:int}", image),
        Route("/decide", decide, methods=["POST"]),
        Route("/done", done, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def encoded(picture: Callable[[str], Image.Image], path: str) -> bytes:
    """PNG; photos no larger than a screen shows."""
    image = picture(path)
    image.thumbnail((1024, 1024))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def serve(decisions: Decisions, picture: Callable[[str], Image.Image], say: Callable[[str], None], port: int = 0) -> dict[str, Answer]:
    """Serves the page until the person is done; what they decided, by path. Port 0: any free one."""
    import socket

    import uvicorn

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--review-port {port}: cannot be served on ({error.strerror}); choose another, or 0 for any free one"
            ) from error
        server = uvicorn.Server(uvicorn.Config(application(decisions, picture, lambda: stop()), log_level="error", lifespan="off"))

        def stop() -> None:
            server.should_exit = True

        say(f"{len(decisions.items)} images to look at: http://{HOST}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])
    return decisions.made


def check_installed() -> None:
    """Before hours of work end in a page that cannot be served."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--review needs the package {error.name}: pip install 'smidgen[refine]'") from error
