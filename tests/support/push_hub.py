"""A hub on loopback that models are published to, with the endpoints that publishing needs, over real HTTP."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a-token-that-appears-nowhere"


@dataclass
class Hub:
    """What the server holds, and the faults that a test asks it for."""

    address: str = ""
    role: str = "write"
    fail_commits: bool = False
    trouble: str = ""
    """Fault of uploads: an HTTP status, "hung up", "silence", or "slow", which succeeds."""
    repositories: dict[str, bool] = field(default_factory=dict)  # id -> private
    files: dict[str, bytes] = field(default_factory=dict)  # "owner/name/path" -> content
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    requests: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    timeout = 20

    def do_GET(self) -> None:
        self.state.requests.append(f"GET {self.path}")
        if self.path != "/api/whoami-v2":
            self._answer({"error": "not found"}, 404)
        elif self._known():
            self._answer({"name": "someone", "type": "user", "auth": {"accessToken": {"role": self.state.role}}})
        else:
            self._answer({"error": "Unauthorized"}, 401)

    def do_PUT(self) -> None:
        self.state.requests.append(f"PUT {self.path}")
        self.state.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        self.state.requests.append(f"POST {self.path}")
        body = self._body()
        if not self._known():
            self._answer({"error": "Unauthorized"}, 401)
        elif self.path.startswith("/api/models/") and self._troubled():
            self.close_connection = True
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.state.address}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self._commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer({"error": "not found"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        if wanted.get("organization") not in (None, "someone"):
            return self._answer({"error": "You have no rights in this namespace"}, 403)
        name = f"someone/{wanted['name']}"
        exists = name in self.state.repositories
        self.state.repositories.setdefault(name, wanted.get("visibility") == "private")
        return self._answer({"url": f"{self.state.address}/{name}", "name": name}, 409 if exists else 200)

    def _commit(self, repository: str, body: bytes) -> None:
        if self.state.fail_commits:
            return self._answer({"error": "the hub is on fire"}, 400)
        for line in body.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                content = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                content = self.state.blobs[row["value"]["oid"]]
            else:
                continue
            self.state.files[f"{repository}/{row['value']['path']}"] = content
        return self._answer({"commitUrl": f"{self.state.address}/{repository}/commit/1", "commitOid": "1"})

    def _troubled(self) -> bool:
        """Applies `trouble`; returns whether the request has failed."""
        trouble = self.state.trouble
        if trouble.isdecimal():
            self._answer({"error": "out of order"}, int(trouble))
        elif trouble == "silence":
            self.state.over.wait(60)
        elif trouble == "slow":
            time.sleep(0.5)
        return trouble not in ("", "slow")

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
