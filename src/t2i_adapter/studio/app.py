"""The application: every route of the server, behind the guard."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from t2i_adapter.studio.guard import Guard
from t2i_adapter.studio.routes_data import ROUTES as DATA_ROUTES
from t2i_adapter.studio.routes_jobs import ROUTES as JOB_ROUTES
from t2i_adapter.studio.routes_new import ROUTES as NEW_ROUTES
from t2i_adapter.studio.routes_release import ROUTES as RELEASE_ROUTES
from t2i_adapter.studio.routes_runs import ROUTES as RUN_ROUTES
from t2i_adapter.studio.routes_try import ROUTES as TRY_ROUTES
from t2i_adapter.studio.server import Studio, problem
from t2i_adapter.studio.watch import Watch

WEB = Path(__file__).parent / "web"
PAGES = ("/", "/data", "/data/{id}", "/new", "/runs/{id}", "/jobs/{id}", "/compare")
PAGES += ("/try", "/try/{id}", "/release", "/release/{id}")
"""Addresses that the browser's own code shows."""
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
_FILE = re.compile(r"(pages/|vendor/)?[a-z][a-z0-9_-]*\.(js|css|svg)")


async def _page(_: Request) -> Response:
    return FileResponse(WEB / "index.html", media_type="text/html; charset=utf-8")


async def _static(request: Request) -> Response:
    """A file of the browser's code. It may be kept by the browser, but is asked for again."""
    name = request.path_params["name"]
    file = WEB / name
    if not _FILE.fullmatch(name) or not file.is_file():
        return problem(404, "There is no such file.")
    return FileResponse(file, media_type=_KINDS[file.suffix], headers={"cache-control": "no-cache"})


async def _events(request: Request) -> Response:
    """The stream of events; a page that comes back names the last one that it has, as a header or as `after`."""
    hub = request.app.state.studio.hub
    last = request.headers.get("last-event-id") or request.query_params.get("after", "")
    after = int(last) if last.isascii() and last.isdecimal() and len(last) < 16 else None
    if hub.is_full():
        return problem(429, "Too many pages are open. Close some.")
    return StreamingResponse(hub.stream(after), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def make_app(studio: Studio, host_names: tuple[str, ...] = ()) -> Guard:
    """The application of a studio, behind its guard. Its thread runs while the server does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watch = Watch(studio.hub, studio.jobs, studio.runs, studio.paints)
        watch.start()
        try:
            yield
        finally:
            studio.hub.close()
            watch.stop()
            studio.paints.end()

    routes = [
        *(Route(path, _page) for path in PAGES),
        Route("/static/{name:path}", _static),
        Route("/api/events", _events),
        *DATA_ROUTES,
        *NEW_ROUTES,
        *JOB_ROUTES,
        *RELEASE_ROUTES,
        *RUN_ROUTES,
        *TRY_ROUTES,
    ]
    handlers = {404: _missing, 405: _not_allowed, 500: _broken}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.studio = studio
    return Guard(app, studio.keys, host_names)  # outermost, so that its headers are on every answer


async def _missing(request: Request, _: Exception) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return FileResponse(WEB / "index.html", status_code=404, media_type="text/html; charset=utf-8")
    return problem(404, "There is no such page.")


async def _not_allowed(request: Request, fault: Exception) -> Response:
    return problem(405, f"{request.method} is not allowed here.", headers=getattr(fault, "headers", None))


async def _broken(_: Request, __: Exception) -> Response:
    return problem(500, "The studio made a mistake; its terminal shows where. Nothing was lost.")


class Server(uvicorn.Server):
    """Ends the streams of events before it waits for its requests to end: an open page would hold it for ever."""

    def __init__(self, config: uvicorn.Config, studio: Studio) -> None:
        super().__init__(config)
        self._hub = studio.hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._hub.close()
        await super().shutdown(sockets)
