"""A browser's way to a studio, for benchmarks/studio.py: requests, streams of events, time and memory of the server."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A studio in a process of its own, and a browser's way to it."""

    def __init__(self, process: subprocess.Popen[str], began: float) -> None:
        assert process.stdout is not None
        self.process = process
        link = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        self.link_s = time.monotonic() - began
        self.address, _, self._token = link.removeprefix("http://").partition("/?token=")
        self.cookie = ""
        answer = self._ask("GET", f"/?token={self._token}")
        self.cookie = answer[1]["set-cookie"].partition(";")[0]
        self.first_byte_s = time.monotonic() - began

    def _ask(self, method: str, path: str, content: Any = None) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection(self.address, timeout=120)
        headers = {"cookie": self.cookie, "origin": f"http://{self.address}", "content-type": "application/json"}
        connection.request(method, path, None if content is None else json.dumps(content), headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body

    def get(self, path: str) -> bytes:
        status, _, body = self._ask("GET", path)
        assert status == 200, (path, status, body[:300])
        return body

    def post(self, path: str, content: Any) -> Any:
        status, _, body = self._ask("POST", path, content)
        assert status in (200, 201), (path, status, body[:300])
        return json.loads(body)

    def cpu_s(self) -> float:
        """CPU seconds that the server's process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mib(self) -> float:
        """Resident memory of the server's process."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return round(int(found[1]) / 1024, 1)


@contextmanager
def studio(root: Path) -> Iterator[Server]:
    """The command `t2i-adapter studio`, until the end of the block."""
    command = [sys.executable, "-m", "t2i_adapter", "studio", str(root), "--port", "0", "--no_open_browser"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, began)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


class Page(threading.Thread):
    """An open page: reads the stream of events. chunks: (when, bytes) as they came."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.chunks: list[tuple[float, bytes]] = []
        self._connection = HTTPConnection(server.address, timeout=60)
        self._connection.request("GET", "/api/events", headers={"cookie": server.cookie})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.start()

    def run(self) -> None:
        with suppress(OSError, HTTPException):  # the server ends while it is read
            while data := self._answer.read1(1 << 20):
                self.chunks.append((time.monotonic(), data))

    def events(self, name: str) -> list[tuple[float, Any]]:
        """(when it came, its data) of each event of a name."""
        found, rest = [], b""
        for at, data in self.chunks:
            *whole, rest = (rest + data).split(b"\n\n")
            for event in whole:
                match = re.search(rb"^event: (\S+)\ndata: (.*)$", event, re.MULTILINE)
                if match and match[1].decode() == name:
                    found.append((at, json.loads(match[2])))
        return found


def milliseconds(action: Callable[[], object], times: int = 1) -> float:
    """Median time of an action."""
    found = []
    for _ in range(times):
        began = time.monotonic()
        action()
        found.append(1000 * (time.monotonic() - began))
    return round(statistics.median(found), 1)


def share_of_core(server: Server, seconds: float) -> float:
    """CPU time over wall time of the server that nobody asks anything."""
    before = server.cpu_s()
    time.sleep(seconds)
    return round((server.cpu_s() - before) / seconds, 4)
