"""Pictures for the page Try: requests, the warm process that serves them, and their results in folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, write_atomic
from t2i_adapter.runs.metrics import read_file, read_json
from t2i_adapter.studio.faults import CONFLICT, NotFoundError
from t2i_adapter.studio.files import CANCELLED, PROGRESS, REQUEST, RESULT, is_id, new_id
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.jobs import last_line
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.process import SAFE_PATH, held_back, python_module

_PICTURE = re.compile(r"[0-9a-z_-]{1,80}")
MOST_KEPT = 100
"""Requests whose pictures are kept."""
MOST_WAITING = 4
"""Requests that wait at most."""
IDLE_SECONDS = 600.0
"""After this time without a request the process ends, and its memory is free again."""


class Paints:
    """The requests of one studio, and the process that serves them one after another."""

    def __init__(self, places: Places, hub: Hub) -> None:
        self._places, self._hub = places, hub
        self.folder = places.own_folder("paint")
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._waiting: list[str] = []
        self._last = time.monotonic()

    def add(self, kind: str, content: dict[str, Any]) -> str:
        """Asks for pictures ("paint") or a photo's condition ("map"); returns the request's id. Raises UserError."""
        with self._lock:
            if len(self._waiting) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} requests wait already; let one end, or cancel it.", kind=CONFLICT)
            name = new_id()
            folder = self.folder / name
            folder.mkdir()
            request = {"kind": kind, "created": time.time(), **content}
            write_atomic(folder / REQUEST, [json.dumps(request).encode()])
            self._forget()
            self._waiting.append(name)
            self._send(name)
        return name

    def read(self, name: str) -> dict[str, Any]:
        """A request and what came of it. Raises NotFoundError."""
        folder = self.folder / name
        request = read_json(folder / REQUEST) if is_id(name) else {}
        if not request:
            raise NotFoundError(f"no picture is called {name[:60]!r}")
        result = read_json(folder / RESULT)
        if not result:
            is_served = name in self._waiting
            result = {"state": "running" if is_served else "died", "progress": last_line(folder / PROGRESS)}
        return {"id": name, **request, **result}

    def all(self) -> list[dict[str, Any]]:
        """The requests that are kept, the newest first."""
        names = sorted((path.name for path in self.folder.iterdir() if is_id(path.name)), reverse=True)
        found = []
        for name in names:
            with suppress(NotFoundError):
                found.append(self.read(name))
        return found

    def picture(self, name: str, picture: str) -> bytes:
        """A PNG file that a request made. Raises NotFoundError."""
        self.read(name)
        data = read_file(self.folder / name / f"{picture}.png", 64 << 20) if _PICTURE.fullmatch(picture) else b""
        if not data:
            raise NotFoundError("there is no such picture")
        return data

    def cancel(self, name: str) -> None:
        """Gives up a request. Raises NotFoundError."""
        self.read(name)
        with self._lock:
            if name not in self._waiting or self._process is None:
                return
            (self.folder / name / CANCELLED).touch()  # the process has its name, and may not have begun with it
            if self._waiting[0] == name:
                self._process.send_signal(signal.SIGINT)
            else:
                self._waiting.remove(name)
                write_atomic(self.folder / name / RESULT, [json.dumps({"state": "cancelled"}).encode()])

    def end(self) -> None:
        """Ends the process, to free the card; what it was at is lost."""
        with self._lock:
            process, self._process = self._process, None
            waiting, self._waiting = self._waiting, []
        if process is None:
            return
        process.kill()
        process.wait(10)
        for name in waiting:
            result = {"state": "failed", "error": "The card was needed for a run. Ask again when it has ended."}
            if (self.folder / name).is_dir() and not (self.folder / name / RESULT).exists():
                write_atomic(self.folder / name / RESULT, [json.dumps(result).encode()])
            self._hub.publish("paint", {"id": name, "event": "end", **result})

    def look(self) -> None:
        """Publishes the progress of the request in work, and ends a process that nobody uses."""
        with self._lock:
            first = self._waiting[0] if self._waiting else None
            is_idle = self._process is not None and not first and time.monotonic() - self._last > IDLE_SECONDS
        if first and (found := last_line(self.folder / first / PROGRESS)):
            self._hub.publish("paint", {"id": first, "event": "progress", **found})
        if is_idle:
            self.end()

    def _send(self, name: str) -> None:
        """Hands a request to the process, which is started if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": name}) + "\n")
        self._process.stdin.flush()

    def _start(self) -> None:
        with (self._places.state / "painter.log").open("wb") as log, held_back([signal.SIGINT]):
            self._process = subprocess.Popen(
                python_module("t2i_adapter.studio.painter", str(self._places.state)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                cwd=self._places.root,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **SAFE_PATH},
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Publishes what the process says, until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            try:
                content = parse_json(line)
            except ValueError:
                continue
            if not isinstance(content, dict):
                continue
            if content.get("event") == "end":
                self._last = time.monotonic()
                with self._lock:
                    self._waiting = [name for name in self._waiting if name != content.get("id")]
            self._hub.publish("paint", content)
        with self._lock:
            if process is not self._process:
                return  # ended on purpose
            self._process = None
            waiting, self._waiting = self._waiting, []
        for name in waiting:
            result = {
                "state": "failed",
                "error": f"The process that draws ended (code {process.wait()}). {self._why()}",
            }
            write_atomic(self.folder / name / RESULT, [json.dumps(result).encode()])
            self._hub.publish("paint", {"id": name, "event": "end", **result})

    def _why(self) -> str:
        lines = read_file(self._places.state / "painter.log", 4096).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _forget(self) -> None:
        """Removes the folders of the oldest requests."""
        names = sorted(path.name for path in self.folder.iterdir() if is_id(path.name))
        for name in names[: max(0, len(names) - MOST_KEPT)]:
            if name not in self._waiting:
                shutil.rmtree(self.folder / name, ignore_errors=True)


def upload_file(places: Places, name: str) -> Path:
    """The picture that a browser sent. Raises NotFoundError."""
    file = places.state / "uploads" / f"{name}.png"
    if not is_id(name) or not file.is_file():
        raise NotFoundError("there is no such upload; send it again")
    return file
