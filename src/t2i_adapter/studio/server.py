"""What the routes share: the studio's parts, and how a function becomes an endpoint."""

from __future__ import annotations

import errno
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from t2i_adapter.errors import UserError, plain_flag, redact
from t2i_adapter.files import parse_json
from t2i_adapter.studio.datasets import Datasets
from t2i_adapter.studio.encode import Json
from t2i_adapter.studio.faults import CHANGED, CONFLICT, READ_ONLY, UNREADABLE, NotFoundError
from t2i_adapter.studio.guard import BodyTooLargeError, Keys
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.jobs import Jobs
from t2i_adapter.studio.paints import Paints
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run_views import Runs

_OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that was sent, not of the disk."""
_STATUS = {CONFLICT: 409, READ_ONLY: 409, CHANGED: 412, UNREADABLE: 415}


@dataclass(frozen=True)
class Studio:
    """The parts of a server."""

    places: Places
    keys: Keys
    jobs: Jobs
    paints: Paints
    runs: Runs
    hub: Hub
    datasets: Datasets


@dataclass(frozen=True)
class Call:
    """A request as an endpoint gets it. body: of a request that has one; query: a parameter's last value."""

    studio: Studio
    path: dict[str, str]
    query: dict[str, str]
    body: bytes
    role: str

    def json(self) -> dict[str, Any]:
        """The body as a mapping. Raises UserError."""
        return self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        try:
            found = parse_json(self.body)
        except ValueError:
            raise UserError("The body is not JSON.") from None
        if not isinstance(found, dict):
            raise UserError("The body must be a JSON object.")
        _check_values(found)
        return found

    def text(self, name: str, default: str | None = None, most: int = 10_000) -> str:
        """A text of the body. Raises UserError."""
        found = self.json().get(name, default)
        if not isinstance(found, str) or len(found) > most or "\0" in found:
            raise UserError(f"{name}: a text of at most {most:,} letters is needed.")
        return found

    def number(self, name: str, default: int = 0, most: int = 10**9) -> int:
        """A whole number of the query, from 0. Raises UserError."""
        found = self.query.get(name, str(default))
        if not found.isascii() or not found.isdecimal() or len(found) > 15 or int(found) > most:
            raise UserError(f"{name}: a whole number from 0 to {most:,} is needed, not {found[:40]!r}.")
        return int(found)


Endpoint = Callable[[Call], Any]


def route(method: str, path: str, function: Endpoint, status: int = 200) -> Route:
    """A route whose function runs in a thread. It returns JSON, or a `Response`."""

    async def answer(request: Request) -> Response:
        try:
            body = await request.body() if method not in ("GET", "HEAD") else b""
            call = Call(
                request.app.state.studio,
                dict(request.path_params),
                dict(request.query_params),
                body,
                request.scope.get("role") or "",
            )
            found = await run_in_threadpool(function, call)
        except BodyTooLargeError:
            return problem(413, "The body is too large.")
        except ClientDisconnect:
            return problem(400, "The browser went away.")
        except NotFoundError as fault:
            return problem(404, str(fault))
        except UserError as fault:
            return problem(_STATUS.get(fault.kind, 400), fault.message(plain_flag), fault.option)
        except OSError as fault:
            kind = 400 if fault.errno in _OF_A_NAME else 500
            return problem(kind, redact(f"{fault.filename or 'A file'}: {fault.strerror or fault}."))
        return found if isinstance(found, Response) else Json(found, status_code=status)

    functools.update_wrapper(answer, function)
    return Route(path, answer, methods=[method])


def problem(status: int, text: str, option: str | None = None, headers: Mapping[str, str] | None = None) -> Json:
    """An error as every route answers it, in one line."""
    return Json({"error": " ".join(text.split()), "option": option}, status_code=status, headers=headers)


def _check_values(value: Any) -> None:
    """Raises UserError for what JSON of Python allows, and neither a browser nor a file can hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_values(name)
            _check_values(item)
    elif isinstance(value, list):
        for item in value:
            _check_values(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError("The body holds a number that is not finite.")
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError("The body holds half a letter (a lone surrogate), which is not text.")
