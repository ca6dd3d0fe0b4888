"""Who may do what: one middleware before every route.

A browser shows a link's token once and gets a cookie. Other web pages cannot use that cookie: the Host must be a name
of this server, what changes something must come from this server's own pages (Origin, Sec-Fetch-Site) and in a form
that no HTML form can send (Content-Type). The headers of every answer keep a page from loading or running anything
else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlencode

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t2i_adapter.files import write_atomic
from t2i_adapter.runs.metrics import number, read_file, read_json

Role = Literal["owner", "reader"]
LINK_HOURS = 12
"""How long an unused link works."""
MOST_BODY = 64 << 20
"""Bytes of a request's body at most."""
SECRET_BYTES = 32
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_READS = ("GET", "HEAD")
_BODIES = ("application/json", "image/png", "image/jpeg", "image/webp")
"""Types of what a page may send: no HTML form of another site can send one of them without asking this server first."""
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
REPORT_CSP = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
"""For a page of a run, which holds names and captions of any origin: it is shown in a frame and runs no script."""


class Keys:
    """The secrets of one studio, in files of its own folder that only its user can read."""

    def __init__(self, state: Path) -> None:
        self._links = state / "links"
        self._links.mkdir(mode=0o700, exist_ok=True, parents=True)
        self._secret = _secret(state / "secret")
        self.cookie = f"t2i_studio_{self._sign('name')[:8]}"
        """Name of the cookie. Cookies ignore ports, so each studio has a name of its own."""

    def new_link(self, role: Role) -> str:
        """A token that can be used once."""
        for old in self._links.iterdir():
            with suppress(FileNotFoundError):  # used meanwhile
                if old.stat(follow_symlinks=False).st_mtime < time.time() - LINK_HOURS * 3600:
                    old.unlink()
        token = secrets.token_urlsafe(32)
        file = self._links / _digest(token)
        write_atomic(file, [json.dumps({"role": role, "until": time.time() + LINK_HOURS * 3600}).encode()])
        file.chmod(0o600)
        return token

    def use_link(self, token: str) -> str | None:
        """The value of the cookie that a token is worth; None if it is unknown, used or too old. It works once."""
        file = self._links / _digest(token)
        used = file.with_suffix(".used")
        try:
            file.rename(used)  # only one of two requests can
        except OSError:
            return None
        content = read_json(used)
        used.unlink()
        if (number(content.get("until")) or 0) < time.time():
            return None
        return self.cookie_value("reader" if content.get("role") == "reader" else "owner")

    def cookie_value(self, role: Role) -> str:
        return f"{role}.{self._sign(role)}"

    def role_of(self, header: str) -> Role | None:
        """The role that a Cookie header proves."""
        try:
            found = SimpleCookie(header).get(self.cookie)
        except CookieError:
            return None
        value = found.value if found else ""
        roles: tuple[Role, ...] = ("owner", "reader")
        given = value.encode("utf-8", "replace")
        return next((role for role in roles if hmac.compare_digest(given, self.cookie_value(role).encode())), None)

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def remove_keys(state: Path) -> None:
    """Makes all cookies and links of a studio's folder worthless."""
    (state / "secret").unlink(missing_ok=True)
    links = state / "links"
    if links.is_symlink():
        links.unlink()
    shutil.rmtree(links, ignore_errors=True)


def _secret(file: Path) -> bytes:
    """The bytes that cookies are signed with, made at the first start. Two processes that start at once agree."""
    if len(found := read_file(file)) >= SECRET_BYTES:
        return found
    file.unlink(missing_ok=True)  # cut by a crash, or a link
    temporary = file.with_name(f"secret.{secrets.token_hex(4)}")
    place = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(place, "wb") as opened:
        opened.write(secrets.token_bytes(SECRET_BYTES))
    with suppress(FileExistsError):
        os.link(temporary, file)
    temporary.unlink()
    return read_file(file)


class Guard:
    """ASGI middleware: refuses what it cannot be sure of, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp, keys: Keys, names: Iterable[str] = ()) -> None:
        """names: of the server, besides those of this machine itself."""
        self._app, self._keys = app, keys
        self._names = {*_LOCAL, *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return None  # a websocket is closed by the server
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is None and scope["path"] == "/" and "token=" in scope["query_string"].decode("latin-1"):
            return await self._enter(scope, headers, send)
        if refused is None:
            role = self._keys.role_of(headers.get("cookie", ""))
            refused = self._role_refusal(scope, role)
            scope["role"] = role
        if refused is not None:
            status, text = refused
            return await _answer(send, status, text, is_page="text/html" in headers.get("accept", ""))
        return await self._app(scope, _limited(receive), _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, sentence) if the request did not come from a page of this server; None if it may have."""
        host = headers.get("host", "")
        if _name_of(host) not in self._names:
            return 403, (
                f"{host or 'no name'}: this server does not go by that name. Open it as localhost, or start it with "
                "--host_name."
            )
        is_own = headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        if not is_own and (scope["method"] not in _READS or scope["path"].startswith("/api/")):
            return 403, "The request comes from another site."
        if scope["method"] in _READS:
            return None
        origin = headers.get("origin")
        if origin is None or re.sub(r"^https?://", "", origin.lower()) != host.lower():
            return 403, "The request does not come from a page of this server."
        if headers.get("content-type", "").partition(";")[0].strip().lower() not in _BODIES:
            return 415, f"The body must be one of {', '.join(_BODIES)}."
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdecimal() or int(length) > MOST_BODY:
            return 413, f"A body has at most {MOST_BODY >> 20} MiB."
        return None

    def _role_refusal(self, scope: Scope, role: Role | None) -> tuple[int, str] | None:
        if role is None:
            return 401, "Open the link that `t2i-adapter studio` printed. `t2i-adapter studio --link` prints another."
        if role == "reader" and scope["method"] not in _READS:
            return 403, "This link only shows. Ask the studio's owner for another one to change something."
        return None

    async def _enter(self, scope: Scope, headers: dict[str, str], send: Send) -> None:
        """Changes the token of a link for a cookie."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        value = self._keys.use_link(query.pop("token", [""])[0])
        if value is None and self._keys.role_of(headers.get("cookie", "")) is None:
            text = "This link was used already, or is too old. `t2i-adapter studio --link` prints another."
            return await _answer(send, 401, text, is_page=True)
        rest = urlencode({name: values[0] for name, values in query.items()})
        more = [(b"location", f"/?{rest}".rstrip("?").encode())]
        if value is not None:
            cookie = f"{self._keys.cookie}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
            more.append((b"set-cookie", cookie.encode()))
        await send({"type": "http.response.start", "status": 303, "headers": [*_headers(), *more]})
        await send({"type": "http.response.body", "body": b""})
        return None


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    found = re.fullmatch(r"(\[[0-9a-f:]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host.lower())
    return found[1] if found else ""


def _headers(csp: str = CSP) -> list[tuple[bytes, bytes]]:
    fixed = {
        "content-security-policy": csp,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
    }
    return [(name.encode(), value.encode()) for name, value in fixed.items()]


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", ())}
            message["headers"] = [*message.get("headers", ()), *(pair for pair in _headers() if pair[0] not in own)]
            if b"cache-control" not in own:
                message["headers"].append((b"cache-control", b"no-store"))
        await send(message)

    return sending


class BodyTooLargeError(Exception):
    """A body without a length grew beyond `MOST_BODY`."""


def _limited(receive: Receive) -> Receive:
    total = 0

    async def receiving() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MOST_BODY:
            raise BodyTooLargeError
        return message

    return receiving


async def _answer(send: Send, status: int, text: str, *, is_page: bool) -> None:
    if is_page:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        body, kind = f"<!doctype html><meta charset=utf-8><title>Studio</title><p>{escaped}</p>".encode(), "text/html"
    else:
        body, kind = json.dumps({"error": text, "option": None}).encode(), "application/json"
    more: list[Any] = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": [*_headers(), *more]})
    await send({"type": "http.response.body", "body": body})


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
