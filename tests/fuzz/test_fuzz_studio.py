"""Every route of the studio's server with any method, path, query and body: an answer of JSON, never a mistake of ours.

Jobs are put into the queue but not started.
"""

from __future__ import annotations

import io
import json
import logging
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.routing import Route
from support.run_folders import entries_of, write_pictures, write_run
from support.studio import Running, running

from t2i_adapter.studio import form, jobs
from t2i_adapter.studio.jobs import QUEUES
from t2i_adapter.studio.routes_data import ROUTES as DATA_ROUTES
from t2i_adapter.studio.routes_jobs import ROUTES as JOB_ROUTES
from t2i_adapter.studio.routes_new import ROUTES as NEW_ROUTES
from t2i_adapter.studio.routes_release import ROUTES as RELEASE_ROUTES
from t2i_adapter.studio.routes_runs import ROUTES as RUN_ROUTES
from t2i_adapter.studio.routes_try import ROUTES as TRY_ROUTES

ROUTES: list[Route] = [*DATA_ROUTES, *JOB_ROUTES, *NEW_ROUTES, *RELEASE_ROUTES, *RUN_ROUTES, *TRY_ROUTES]
BYTES = io.BytesIO()
Image.new("RGB", (16, 16), "red").save(BYTES, "PNG")
PICTURE = BYTES.getvalue()
FINE = {200, 201, 202, 400, 404, 405, 409, 412, 413, 415}
"""No 500, which is ours; 401 and 403 are of the guard, which lets these requests pass."""
STRANGE = [
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "\n",
        "\u202e",
        "\U0001f600",
        "\ud800",
        "é",
        "-",
        "--help",
        "None",
        "null",
        "true",
        "-1",
    ),
    *(
        "1e999",
        "9" * 400,
        "0x10",
        "a" * 300,
        "a/b",
        "~",
        "{a,b}",
        "{0..9}",
        "*",
        "%s",
        "'",
        '"',
        "<b>",
        "runs/a",
        "data",
    ),
    *("canny", "canny,low=a", "column:x", "folder:data", "nano", "train", "auto", "x.jsonl", "rows.jsonl", "condition"),
]
OPTIONS = sorted({entry["path"] for verb in QUEUES for entry in form.schema(verb)} | set(form.HIDDEN))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(STRANGE))
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
VALUES = st.dictionaries(
    st.sampled_from(OPTIONS) | st.text(max_size=6), LEAVES | st.lists(LEAVES, max_size=3), max_size=5
)
KEYS = (
    *("verb", "values", "yaml", "was", "text", "name", "captions", "keys", "on", "content", "data", "size", "split"),
    *("to", "dry_run", "private", "model_id", "license", "license_name", "max_steps", "allow_changed", "adapter"),
    *("checkpoint", "condition", "upload", "card", "processes"),
)
BODIES = st.fixed_dictionaries(
    {}, optional={key: VALUES | TREES if key == "values" else st.sampled_from(sorted(QUEUES)) | TREES for key in KEYS}
)
RAW = st.one_of(
    BODIES.map(lambda body: json.dumps(body).encode()),
    TREES.map(lambda tree: json.dumps(tree).encode()),
    st.binary(max_size=60),
    st.builds(lambda cut, more: PICTURE[:cut] + more, st.integers(0, len(PICTURE)), st.binary(max_size=8)),
)
KNOWN: dict[str, list[str]] = {}
"""Parameter of a route -> ids that exist; filled by the fixture."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("beside") / "root"
    write_run(root / "runs" / "a", entries_of(200), record={"outcome": "finished"}, checkpoints=[100])
    write_pictures(root / "runs" / "a", [100, 200])
    write_run(root / "runs" / "b", [{"step": 1, "loss": float("nan")}], record={"outcome": "stopped", "steps": None})
    (root / "runs" / "b" / "run.json").write_text('{"outcome": [], "started": 1e999, "steps": NaN}')
    (root / "runs" / "b" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": "x"}\n[]\n{"gain": 1}\n{')
    (root / "runs" / "b" / "options.yaml").write_text("[")
    (root / "runs" / b"not-\xffutf8".decode("utf-8", "surrogateescape")).mkdir()
    write_run(root / "runs" / b"not-\xffutf8".decode("utf-8", "surrogateescape"))
    (root / "data" / "control").mkdir(parents=True)
    for number in range(3):
        (root / "data" / f"{number}.png").write_bytes(PICTURE)
        (root / "data" / f"{number}.txt").write_text(f"caption {number}")
        (root / "data" / "control" / f"{number}.png").write_bytes(PICTURE if number else b"broken")
    rows = [{"image": "data/0.png", "conditioning_image": "data/0.png", "text": "a"}, [], {"image": 5, "text": None}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch, running(root) as found:
        patch.setattr(jobs, "AT_ONCE", dict.fromkeys(jobs.AT_ONCE, 0))
        owner = found.owner
        data = [owner.post("/api/data", {"values": {"location": one}}).json()["id"] for one in ("data", "rows.jsonl")]
        job = owner.post("/api/jobs", {"verb": "conditions", "values": {}}).json()["id"]
        KNOWN.update(
            run=[row["id"] for row in owner.get("/api/runs").json()], data=data, row=["0", "1", "2"], job=[job],
            what=["image", "condition"], action=["pause", "cancel", "kill", "up", "down"], name=["0", "1", "new"],
            step=["100", "condition"], verb=[*QUEUES], recipe=["mine"],
            upload=[owner.put("/api/uploads", PICTURE, content_type="image/png").json()["id"]],
        )  # fmt: skip
        assert len(KNOWN["run"]) == 3
        before = stamps(root.parent)
        yield found
        assert stamps(root.parent) == before, "a file was changed that no browser may change"
        assert {path.name for path in root.parent.iterdir()} == {"root"}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """(method, path with query, body) of a request."""
    route = draw(st.sampled_from(ROUTES))
    methods = [*sorted(route.methods or ()), "GET", "PUT", "POST", "DELETE"]
    parts = []
    for part in route.path.split("/"):
        if part.startswith("{"):
            name, ending = part[1:].split("}")
            known = st.deferred(lambda name=name: st.sampled_from(KNOWN.get(name, ["x"])))
            text = draw(known | known | st.sampled_from(STRANGE) | st.text(max_size=8))
            parts.append(quote(text, safe="", errors="surrogatepass") + ending)
        else:
            parts.append(part)
    names = st.sampled_from(["n", "from", "find", "finding", "side", "at", "runs", "token", "after", "x"])
    texts = st.sampled_from(STRANGE) | st.integers().map(str) | st.text(max_size=8)
    pairs = draw(st.dictionaries(names, texts, max_size=2))
    query = "&".join(f"{name}={quote(text, errors='surrogatepass')}" for name, text in pairs.items())
    return draw(st.sampled_from(methods)), "/".join(parts) + (f"?{query}" if query else ""), draw(RAW)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes if a file does, of all files but those that a browser may write: the studio's, a run's, recipes and
    captions."""
    found = {}
    for path in folder.rglob("*"):
        inner = path.relative_to(folder).parts
        if path.is_file() and not {".studio", "runs", "recipes"} & set(inner) and path.suffix not in (".txt", ".jsonl"):
            found[str(path)] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def check(studio: Running, method: str, path: str, body: bytes) -> None:
    kind = "image/png" if "uploads" in path else "application/json"
    answer = studio.owner.send(method, path, body, content_type=kind)
    assert answer.status in FINE, (method, path, body, answer)
    if method == "HEAD":
        return
    if answer.status >= 400:
        found = answer.json()
        assert found.keys() == {"error", "option"}
        assert found["error"]
        assert "\n" not in found["error"]
    elif answer.headers["content-type"] == "application/json":
        json.loads(answer.body, parse_constant=pytest.fail)


@settings(max_examples=settings().max_examples * 10)
@given(asked=requests())
@example(asked=("PUT", "/api/drafts/new", b'{"content": 1e999, "was": null}'))
@example(asked=("PUT", "/api/drafts/new", b'{"content": "\\ud800", "was": null}'))
@example(asked=("POST", "/api/jobs", b"[" * 100_000))
@example(asked=("POST", "/api/check", b'{"verb": "train", "values": {"train.seed": ' + b"9" * 5000 + b"}}"))
@example(asked=("POST", "/api/check", json.dumps({"verb": "train", "yaml": "[" * 20_000}).encode()))
@example(asked=("POST", "/api/data", json.dumps({"values": {"location": "a" * 5000}}).encode()))
@example(asked=("POST", "/api/data", b'{"values": {"location": "data", "resolution": "x", "kind": []}}'))
def test_any_request_has_an_answer(studio: Running, caplog: pytest.LogCaptureFixture, asked: tuple[str, str, bytes]):
    with caplog.at_level(logging.WARNING):
        check(studio, *asked)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


@settings(max_examples=settings().max_examples * 3)
@given(verb=st.sampled_from(sorted(QUEUES)), values=VALUES)
def test_any_values_of_a_verb_are_a_command_or_a_sentence(studio: Running, verb: str, values: dict[str, Any]):
    body = json.dumps({"verb": verb, "values": values}).encode()
    check(studio, "POST", "/api/check", body)
    check(studio, "POST", "/api/jobs", body)
    check(studio, "POST", "/api/plan", body)


def test_any_bytes_leave_the_server_alive(studio: Running):
    """What is no HTTP at all."""
    draw = random.Random(0)
    for number in range(60):
        with socket.create_connection(("127.0.0.1", studio.port), timeout=5) as opened:
            head = [b"", b"GET ", b"GET / HTTP/1.1\r\n", b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\n"][number % 4]
            opened.sendall(head + draw.randbytes(draw.randrange(200)) + b"\r\n\r\n")
    assert studio.owner.get("/api/state").status == 200
