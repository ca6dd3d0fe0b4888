"""A hub on loopback that models are published to and downloaded from, over real HTTP, as the hub's API answers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_a-token-that-appears-nowhere"
MAIN = "main"
Files = dict[str, bytes]
"""path -> content"""


@dataclass
class Repository:
    """branches and tags name commits; a commit is all its files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # commit -> title
    pull_requests: list[str] = field(default_factory=list)  # commits

    def add(self, files: Files, title: str) -> str:
        """Adds a commit and returns its name, 40 hex digits."""
        commit = hashlib.sha1(f"{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[commit], self.titles[commit] = dict(files), title
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit's name stands for."""
        return {**{commit: commit for commit in self.commits}, **self.tags, **self.branches}.get(revision)


@dataclass
class Hub:
    """What the server holds, and the faults that a test asks it for."""

    address: str = ""
    role: str = "write"
    fail_commits: bool = False
    has_discussions: bool = True
    trouble: str = ""
    """Fault of uploads: an HTTP status, "hung up", "silence", or "slow", which succeeds."""
    models: dict[str, Repository] = field(default_factory=dict)
    collections: dict[str, list[str]] = field(default_factory=dict)  # slug -> ids of models
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    requests: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def repositories(self) -> dict[str, bool]:
        """id -> private"""
        return {name: model.private for name, model in self.models.items()}

    @property
    def files(self) -> Files:
        """ "owner/name/path" -> content of main"""
        return {
            f"{name}/{path}": content
            for name, model in self.models.items()
            for path, content in model.commits[model.branches[MAIN]].items()
        }

    def add(self, name: str, files: Files, **facts: Any) -> Repository:
        """Makes a repository that holds the files."""
        model = self.models[name] = Repository(**facts)
        model.branches[MAIN] = model.add(files, "files")
        return model


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
        self.state.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            if self._known():
                return self._answer({"name": "someone", "type": "user", "auth": {"accessToken": {"role": self._role}}})
            return self._answer({"error": "Unauthorized"}, 401)
        if path.startswith("/blob/"):
            assert "Authorization" not in self.headers, "the token goes to the hub only"
            return self._send(200, self.state.blobs[path.removeprefix("/blob/")], {})
        if found := re.fullmatch(r"/api/collections/(.+)", path):
            return self._collection(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(refs)|/revision/(.+))?", path):
            return self._model(found[1], bool(found[2]), found[3] or MAIN)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3])
        return self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET  # noqa: N815 - the base class's names

    def do_PUT(self) -> None:
        self.state.requests.append(f"PUT {self.path}")
        self.state.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        self.state.requests.append(f"POST {self.path}")
        body, path = self._body(), unquote(urlsplit(self.path).path)
        wants_pr = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        if not self._known():
            self._answer({"error": "Unauthorized"}, 401)
        elif path.startswith("/api/models/") and self._troubled():
            self.close_connection = True
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            errors = [{"message": fault} for fault in card_faults(json.loads(body)["content"])]
            self._answer({"warnings": [], "errors": errors}, 400 if errors else 200)
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.state.address}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/collections/(.+)/items", path):
            self._add_item(found[1], json.loads(body)["item"])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|tag)/(.+)", path):
            self._change(found[1], found[2], found[3], body, wants_pr)
        else:
            self._answer({"error": "not found"}, 404)

    @property
    def _role(self) -> str:
        return self.state.role

    def _add_item(self, slug: str, item: dict[str, Any]) -> None:
        items = self.state.collections[slug]
        if item["id"] in items:
            return self._answer({"error": "The item is in the collection"}, 409)
        assert item["type"] == "model"
        items.append(item["id"])
        return self._collection(slug)

    def _collection(self, slug: str) -> None:
        if slug not in self.state.collections:
            return self._answer({"error": "Collection not found"}, 404)
        items = [{"_id": name, "id": name, "type": "model", "position": 0} for name in self.state.collections[slug]]
        facts = {"slug": slug, "title": "t", "owner": {}, "items": items, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        return self._answer({**facts, "position": 0, "private": False, "theme": "green", "upvotes": 0})

    def _create(self, wanted: dict[str, Any]) -> None:
        if wanted.get("organization") not in (None, "someone"):
            return self._answer({"error": "You have no rights in this namespace"}, 403)
        name = f"someone/{wanted['name']}"
        exists = name in self.state.models
        if not exists:
            self.state.add(name, {}, private=wanted.get("visibility") == "private")
        return self._answer({"url": f"{self.state.address}/{name}", "name": name}, 409 if exists else 200)

    def _visible(self, name: str) -> Repository | None:
        """The repository; None, and an answer, if it is missing or private."""
        model = self.state.models.get(name)
        if model is None or (model.private and not self._known()):
            self._fail("RepoNotFound", 404 if self._known() else 401)
            return None
        return model

    def _change(self, name: str, what: str, revision: str, body: bytes, wants_pr: bool) -> None:
        if (model := self._visible(name)) is None:
            return None
        commit = model.find(revision)
        if what in ("preupload", "commit", "tag") and commit is None:
            return self._fail("RevisionNotFound", 404)
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        if not name.startswith("someone/") and not wants_pr:
            return self._answer({"error": "You have no right to write here"}, 403)
        if what == "branch":
            if revision in model.branches:
                return self._answer({"error": "Reference exists"}, 409)
            start = model.find(json.loads(body or b"{}").get("startingPoint", MAIN))
            assert start
            model.branches[revision] = start
            return self._answer({})
        if what == "tag":
            tag = json.loads(body)["tag"]
            if tag in model.tags:
                return self._answer({"error": "Tag exists"}, 409)
            assert commit
            model.tags[tag] = commit
            return self._answer({})
        assert commit
        return self._commit(name, model, revision, commit, body, wants_pr)

    def _commit(self, name: str, model: Repository, revision: str, parent: str, body: bytes, wants_pr: bool) -> None:
        if self.state.fail_commits:
            return self._answer({"error": "the hub is on fire"}, 400)
        if wants_pr and not self.state.has_discussions:
            return self._answer({"error": "Discussions are disabled for this repo"}, 403)
        files, title = dict(model.commits[parent]), ""
        for line in body.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "header":
                title = row["value"]["summary"]
            elif row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                files[row["value"]["path"]] = self.state.blobs[row["value"]["oid"]]
        commit = model.add(files, title)
        answer = {"commitUrl": f"{self.state.address}/{name}/commit/{commit}", "commitOid": commit}
        if wants_pr:
            model.pull_requests.append(commit)
            answer["pullRequestUrl"] = f"{self.state.address}/{name}/discussions/{len(model.pull_requests)}"
        else:
            model.branches[revision] = commit
        return self._answer(answer)

    def _model(self, name: str, wants_refs: bool, revision: str) -> None:
        if (model := self._visible(name)) is None:
            return None
        if wants_refs:
            kinds = {"branches": ("heads", model.branches), "tags": ("tags", model.tags)}
            refs = {
                kind: [{"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": to} for ref, to in found.items()]
                for kind, (place, found) in kinds.items()
            }
            return self._answer({**refs, "converts": []})
        commit = model.find(revision)
        if commit is None:
            return self._fail("RevisionNotFound", 404)
        files = [{"rfilename": path, "size": len(data)} for path, data in model.commits[commit].items()]
        return self._answer({"id": name, "sha": commit, "siblings": files, "private": model.private})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        """Small files are sent; for large ones the hub answers with the place of their content."""
        if (model := self._visible(name)) is None:
            return None
        if model.gated:
            return self._fail("GatedRepo", 403)
        commit = model.find(revision)
        if commit is None:
            return self._fail("RevisionNotFound", 404)
        data = model.commits[commit].get(path)
        if data is None:
            return self._fail("EntryNotFound", 404)
        digest = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(".safetensors"):
            return self._send(200, data, headers)
        self.state.blobs[digest] = data
        store = self.state.address.replace("127.0.0.1", "localhost")  # another host, as the hub's store of large files
        place = {"Location": f"{store}/blob/{digest}", "X-Linked-Size": str(len(data))}
        return self._send(302, b"", {**headers, **place, "X-Linked-Etag": f'"{digest}"'})

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

    def _fail(self, code: str, status: int) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def card_faults(text: str) -> list[str]:
    """What the hub refuses in a card's front matter, by its documentation of model cards."""
    return list(_faults(yaml.safe_load(text.split("---\n", 2)[1])))


def _faults(head: dict[str, Any]) -> Iterator[str]:
    if head.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        yield '"base_model_relation" is not one of its values'
    if head.get("license") == "other" and not (head.get("license_name") and head.get("license_link")):
        yield '"license: other" needs "license_name" and "license_link"'
    for key in ("tags", "datasets"):
        if not all(isinstance(item, str) for item in head.get(key, [])):
            yield f'"{key}" must be a list of texts'
    for entry in head.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {}).get("url"), str):
            yield '"widget" must have "text" and "output.url"'
    for model in head.get("model-index", []):
        if not isinstance(model.get("name"), str):
            yield '"model-index[0].name" is required'
        for result in model.get("results", []):
            if not result.get("task", {}).get("type") or not result.get("metrics"):
                yield '"model-index[0].results[0]" needs "task.type" and "metrics"'
            if not (result.get("dataset", {}).get("type") and result["dataset"].get("name")):
                yield '"model-index[0].results[0].dataset" needs "type" and "name"'
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                    yield '"metrics" need "type" and "value"'
