"""`smidgen search serve`: a page that answers while one types, and the JSON behind it.

    GET /api/search?q=my+eyes+hurt&count=10    {"query", "fits", "confidence", "hits": [{"id", "title", "summary", "path", "score"}], "ms"}
    GET /api/about                             {"features", "examples", "answers", "latency_ms_p50", "latency_ms_p95"}
    GET /                                      the page

What cannot be answered is {"error": a line that says why} with status 400, 404 or 405. Nothing is written, not even what was asked: there
is no access log. The page's three files are read at the start and the paths above are all there are, so no request can name a file.

Queries wait for one of a few threads, each on one core, and are answered in the order they came. `smidgen search add` may run meanwhile:
the folder is opened again when its index has been replaced.
"""

import os
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cyclopts import Parameter

from smidgen.errors import UserError
from smidgen.search.folder import INDEX
from smidgen.search.searcher import Searcher

if TYPE_CHECKING:
    from starlette.applications import Starlette

WEB = Path(__file__).parent / "web"
PAGE = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"), "/style.css": ("style.css", "text/css")}
MOST = 50  # features an answer may have
REMEMBERED = 1000  # answers whose time is kept
THREADS = min(4, os.cpu_count() or 1)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Options of `smidgen search serve`."""

    model: Path
    "A folder of smidgen search distill."
    _: KW_ONLY
    port: int = 8000
    "0 takes a free one."
    host: str = "127.0.0.1"
    "Address to listen at; the default serves this machine alone, 0.0.0.0 everybody who can reach it."


def command(config: Config) -> dict[str, Any]:
    """Serve the search page and its API until interrupted."""
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError("smidgen search serve needs starlette and uvicorn: pip install 'smidgen[serve]'") from error
    shelf = Shelf(config.model)
    listening = bound(config.host, config.port)
    host, port = listening.getsockname()[:2]
    server = uvicorn.Server(uvicorn.Config(application(shelf), log_level="warning", access_log=False, ws="none"))
    sys.stderr.write(f"http://{f'[{host}]' if ':' in host else host}:{port}  ({len(shelf().features)} features; Ctrl-C stops)\n")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # how uvicorn says that it was stopped, after it has finished what it was at
        pass
    return shelf.about()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens, or a reason."""
    if not 0 <= port < 65536:
        raise UserError(f"--port must be between 0 and 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port or --host") from error


class Shelf:
    """The model being served, and how fast it was."""

    def __init__(self, folder: Path) -> None:
        self.searcher = Searcher.open(folder, mapped=False)
        self.stamp = self._stamp()
        self.lock = threading.Lock()
        self.answers = 0
        self.milliseconds: deque[float] = deque(maxlen=REMEMBERED)

    def __call__(self) -> Searcher:
        """The model as it lies in the folder now."""
        if self._stamp() != self.stamp:
            with self.lock:
                stamp = self._stamp()
                if stamp != self.stamp:
                    try:
                        self.searcher = Searcher.open(self.searcher.folder, mapped=False)
                    except UserError as error:
                        sys.stderr.write(f"smidgen: {error}; serving what was there before\n")
                    self.stamp = stamp
        return self.searcher

    def search(self, query: str, count: int) -> dict[str, Any]:
        """An answer for JSON, timed."""
        started = time.perf_counter()
        answer = self()(query, count)
        milliseconds = 1e3 * (time.perf_counter() - started)
        with self.lock:
            self.answers += 1
            self.milliseconds.append(milliseconds)
        return {"query": query} | answer.row() | {"ms": round(milliseconds, 3)}

    def about(self) -> dict[str, Any]:
        """What is served, and percentiles over the last answers."""
        with self.lock:
            times = list(self.milliseconds)
        p50, p95 = np.percentile(times, (50, 95)).tolist() if times else (None, None)
        searcher = self.searcher
        return {
            "features": len(searcher.features),
            "examples": list(searcher.settings.examples),
            "answers": self.answers,
            "latency_ms_p50": p50,
            "latency_ms_p95": p95,
        }

    def _stamp(self) -> tuple[int, int, int]:
        """Changes when the index is replaced."""
        try:
            found = (self.searcher.folder / INDEX).stat()
        except FileNotFoundError:  # the folder was taken away; what was read goes on being served
            return self.stamp
        return found.st_ino, found.st_mtime_ns, found.st_size


def application(shelf: Shelf) -> "Starlette":
    """The routes; nothing else is answered."""
    from anyio import CapacityLimiter, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limiter = CapacityLimiter(THREADS)

    async def search(request: Request) -> Response:
        try:
            query, count = request.query_params.get("q", ""), counted(request.query_params.get("count", "10"))
            return JSONResponse(await to_thread.run_sync(shelf.search, query, count, limiter=limiter), headers=HEADERS)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400, headers=HEADERS)

    async def about(request: Request) -> Response:
        return JSONResponse(shelf.about(), headers=HEADERS)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS | dict(error.headers or {}))

    def file(name: str, kind: str) -> Any:
        content = (WEB / name).read_bytes()

        async def page(request: Request) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        return page

    pages = [Route(path, file(name, kind)) for path, (name, kind) in PAGE.items()]
    api = [Route("/api/search", search), Route("/api/about", about)]
    return Starlette(routes=[*pages, *api], exception_handlers={HTTPException: refused})


def counted(text: str) -> int:
    """The number of features asked for."""
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MOST):
        raise UserError(f"count must be a number from 1 to {MOST}, got {text[:20]!r}")
    return int(text)
