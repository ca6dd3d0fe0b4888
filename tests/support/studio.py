"""A real studio on loopback, in this process or as the command, and a browser that can send anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from t2i_adapter.errors import UserError
from t2i_adapter.studio.app import make_app
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run import open_studio
from t2i_adapter.studio.server import Studio


class Answer(NamedTuple):
    """headers: by their names in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of an error."""
        return self.json()["error"]


@dataclass(frozen=True)
class Browser:
    """Sends requests as a page of the studio does. cookie: "" sends none."""

    port: int
    cookie: str

    def send(self, method: str, path: str, content: Any = None, /, **headers: str | None) -> Answer:
        """content: bytes as they are, else as JSON. headers: with `_` for `-`; None leaves out a usual one."""
        usual: dict[str, str | None] = {"host": f"localhost:{self.port}", "cookie": self.cookie or None}
        if method not in ("GET", "HEAD"):
            usual |= {"origin": f"http://localhost:{self.port}", "content-type": "application/json"}
        usual |= {name.replace("_", "-"): value for name, value in headers.items()}
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        if body is not None and not {"content-length", "transfer-encoding"} & usual.keys():
            usual["content-length"] = str(len(body))
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in usual.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
                connection.send(body or b"")
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str, /, **headers: str | None) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, path: str, content: Any = None, /, **headers: str | None) -> Answer:
        return self.send("POST", path, {} if content is None else content, **headers)

    def put(self, path: str, content: Any, /, **headers: str | None) -> Answer:
        return self.send("PUT", path, content, **headers)

    @contextlib.contextmanager
    def events(self, path: str = "/api/events") -> Iterator[Stream]:
        """The stream of events."""
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"GET {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\nCookie: {self.cookie}\r\n\r\n"
        with opened:
            opened.sendall(head.encode())
            yield Stream(opened)


class Stream:
    """A stream of events that is being read."""

    def __init__(self, opened: socket.socket) -> None:
        self._socket, self.text = opened, ""

    def until(self, word: str) -> str:
        """Reads until the text holds `word`; returns all text so far."""
        while word not in self.text:
            data = self._socket.recv(1 << 16)
            assert data, f"the stream ended without {word!r}:\n{self.text}"
            self.text += data.decode()
        return self.text


@dataclass(frozen=True)
class Running:
    """A studio that runs in this process."""

    studio: Studio
    root: Path
    port: int

    @property
    def owner(self) -> Browser:
        return Browser(self.port, self._cookie("owner"))

    @property
    def reader(self) -> Browser:
        return Browser(self.port, self._cookie("reader"))

    @property
    def stranger(self) -> Browser:
        return Browser(self.port, "")

    def _cookie(self, role: Any) -> str:
        keys = self.studio.keys
        return f"{keys.cookie}={keys.cookie_value(role)}"


@contextlib.contextmanager
def running(root: Path, names: tuple[str, ...] = ()) -> Iterator[Running]:
    """A studio in a folder, which becomes the working folder as it does in the command."""
    places = Places(root, "runs")
    places.state.mkdir(exist_ok=True, mode=0o700)
    studio, before = open_studio(places), Path.cwd()
    os.chdir(places.root)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(studio, names), log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            ws="none", timeout_graceful_shutdown=1, log_config=None,
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(studio, places.root, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        for job in studio.jobs.all():
            with contextlib.suppress(UserError):  # it does not run
                studio.jobs.kill(job.id)
        os.chdir(before)


@dataclass(frozen=True)
class Started:
    """`t2i-adapter studio` as a process of its own. seconds: from the command to the line with the link."""

    process: subprocess.Popen[str]
    link: str
    seconds: float
    log: Path

    @property
    def port(self) -> int:
        return int(re.findall(r":(\d+)/", self.link)[0])

    def enter(self) -> Browser:
        """Opens the link; works once."""
        answer = Browser(self.port, "").get(self.link.partition(str(self.port))[2])
        assert answer.status == 303, answer
        return Browser(self.port, answer.headers["set-cookie"].partition(";")[0])


@contextlib.contextmanager
def started(root: Path, log: Path, **environment: str) -> Iterator[Started]:
    """Starts the command in a folder. log: gets what it prints to stderr."""
    words = [sys.executable, "-m", "t2i_adapter", "studio", str(root), "--port", "0", "--no_open_browser"]
    begun = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", env={**os.environ, **environment}
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield Started(process, found[0], time.monotonic() - begun, log)
                break
        else:
            raise AssertionError(log.read_text())
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
