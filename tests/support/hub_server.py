"""A hub on loopback that serves repositories of datasets and models from folders, with the endpoints that reading them
needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[tuple[str, str], Path]
"""(name, revision) -> folder of the files at that revision."""


@contextmanager
def serve(repositories: Repositories) -> Iterator[str]:
    """Serves the repositories while the block runs; yields the address for HF_ENDPOINT."""

    class Handler(HubHandler):
        pass

    Handler.repositories = repositories
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    repositories: ClassVar[Repositories] = {}

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length", 0))
        self._request = json.loads(self.rfile.read(size) or b"{}")
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        for (name, revision), folder in self.repositories.items():
            sha = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
            for label, kind in product((revision, sha), ("datasets", "models")):
                files_at = f"/datasets/{name}" if kind == "datasets" else f"/{name}"
                if path.startswith(f"{files_at}/resolve/{label}/"):
                    return self._file(folder, path.split(f"/resolve/{label}/")[1], sha, body)
                about = f"/api/{kind}/{name}"
                if path == f"{about}/revision/{label}" or (path == about and revision == "main"):
                    files = [{"rfilename": str(file.relative_to(folder))} for file in files_of(folder)]
                    return self._json({"id": name, "sha": sha, "siblings": files, "private": False})
                if path.startswith(f"{about}/tree/{label}"):
                    return self._tree(folder, path.split(f"/tree/{label}")[1].strip("/"))
                if path == f"{about}/paths-info/{label}":
                    asked = self._request.get("paths", [])
                    found = [folder / one for one in asked if (folder / one).is_file()]
                    return self._json([entry(file, folder) for file in found])
        return self._missing("RepoNotFound")

    def _file(self, folder: Path, name: str, sha: str, body: bool) -> None:
        path = folder / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not span:
            return self._send(200, data, headers, body)
        start, end = int(span[1]), min(int(span[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self._send(206, data[start : end + 1], headers, body)

    def _tree(self, folder: Path, inner: str) -> None:
        top = folder / inner
        if not top.is_dir():
            return self._missing("EntryNotFound")
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        found = sorted(top.rglob("*") if deep else top.iterdir())
        return self._json([entry(path, folder) for path in found])

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True)

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code}, self.command != "HEAD")

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def entry(file: Path, folder: Path) -> dict[str, object]:
    kind = "file" if file.is_file() else "directory"
    content = file.read_bytes() if file.is_file() else b""
    oid = hashlib.sha1(content).hexdigest()
    return {"type": kind, "path": str(file.relative_to(folder)), "size": len(content), "oid": oid}
