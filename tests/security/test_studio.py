"""The studio's server under attack: each promise of its security, by requests that break it if it does not hold.

The server is real and listens on loopback. A browser here sends whatever a hostile page or a curious neighbour could.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import socket
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.routing import Route
from support.run_folders import entries_of, write_pictures, write_run
from support.studio import Browser, Running, running, started

from t2i_adapter import cli
from t2i_adapter.config.paths import CONDITIONS, PATHS
from t2i_adapter.errors import UserError
from t2i_adapter.studio import form
from t2i_adapter.studio import jobs as jobs_module
from t2i_adapter.studio.app import PAGES
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.guard import LINK_HOURS, MOST_BODY, Keys
from t2i_adapter.studio.hub import MOST_PAGES
from t2i_adapter.studio.jobs import QUEUES
from t2i_adapter.studio.options import StudioOptions
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.routes_data import ROUTES as DATA_ROUTES
from t2i_adapter.studio.routes_jobs import ROUTES as JOB_ROUTES
from t2i_adapter.studio.routes_new import ROUTES as NEW_ROUTES
from t2i_adapter.studio.routes_release import ROUTES as RELEASE_ROUTES
from t2i_adapter.studio.routes_runs import ROUTES as RUN_ROUTES
from t2i_adapter.studio.routes_try import ROUTES as TRY_ROUTES
from t2i_adapter.studio.run import run as studio_verb

ROUTES: list[Route] = [*DATA_ROUTES, *JOB_ROUTES, *NEW_ROUTES, *RELEASE_ROUTES, *RUN_ROUTES, *TRY_ROUTES]
CHANGING = [(method, route.path) for route in ROUTES for method in (route.methods or ()) if method in ("POST", "PUT")]
READING = [route.path for route in ROUTES if "GET" in (route.methods or ())]
SECRET_WORD = "the-word-outside"
XSS = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def filled(path: str, value: str = "none") -> str:
    """A route's path with each id replaced."""
    for name in ("{run}", "{data}", "{job}", "{action}", "{upload}", "{paint}", "{picture}", "{row}", "{what}"):
        path = path.replace(name, value)
    for name in ("{step}", "{name}", "{verb}", "{recipe}", "{id}"):
        path = path.replace(name, value)
    return path


def picture(size: tuple[int, int] = (32, 32), colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(folder: Path, count: int = 3) -> Path:
    """A folder of pictures with a caption beside each and conditions in control/."""
    (folder / "control").mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture())
        (folder / f"{number}.txt").write_text(f"caption {number} {XSS}")
        (folder / "control" / f"{number}.png").write_bytes(picture(colour="white"))
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the root, that nothing may be read from or written to."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text(SECRET_WORD)
    (folder / "secret.png").write_bytes(picture(colour="#123456"))
    write_data(folder / "data")
    write_run(folder / "run", entries_of(200), record={"outcome": "finished"})
    (folder / "run" / "report.html").write_text(SECRET_WORD)
    write_pictures(folder / "run", [100])
    return folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("root")
    write_run(root / "runs" / "a", entries_of(400), record={"outcome": "finished"}, checkpoints=[400])
    write_pictures(root / "runs" / "a", [200, 400])
    (root / "runs" / "a" / "report.html").write_text(f"<h1>{XSS}</h1>")
    write_data(root / "data")
    with running(root, ("studio.example",)) as found:
        yield found


@pytest.fixture(scope="module")
def run_id(studio: Running) -> str:
    return studio.owner.get("/api/runs").json()[0]["id"]


# Where it listens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_an_address_that_others_reach_needs_expose(tmp_path: Path, host: str):
    with pytest.raises(UserError, match="ssh -L"):
        studio_verb(StudioOptions(root=str(tmp_path), host=host, port=0))
    assert list(tmp_path.iterdir()) == []


def test_the_command_listens_on_loopback_and_prints_a_link_that_works_once(tmp_path: Path):
    """Also: its folder is its user's alone, and no token is in what it prints later."""
    with started(tmp_path, tmp_path.with_name("log")) as command:
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        assert f"0100007F:{command.port:04X}" in listening
        assert f"00000000:{command.port:04X}" not in listening
        token = command.link.partition("token=")[2]
        owner = command.enter()
        assert owner.get("/api/state").status == 200
        assert Browser(command.port, "").get(f"/?token={token}").status == 401
        for name in (".studio", ".studio/links"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / ".studio" / "secret").stat().st_mode) == 0o600
    assert token not in command.log.read_text()
    assert token not in "".join(path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file())


def test_one_root_has_one_server(tmp_path: Path):
    with started(tmp_path, tmp_path.with_name("log2")), pytest.raises(UserError, match="runs in this folder already"):
        studio_verb(StudioOptions(root=str(tmp_path), port=0))


# The guard: Host, Origin, Sec-Fetch-Site, Content-Type --------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:8620", "localhost.evil.test", "127.0.0.1.evil.test", "localhost@evil.test", ""),
        *(
            "127.0.0.2",
            "[::1].evil.test",
            "[::2]",
            "0.0.0.0",
            "localhost:80:80",
            "localhost:http",
            "studio.example.org",
        ),
    ],
)
def test_another_host_is_refused(studio: Running, host: str):
    """A name of somebody else that leads to 127.0.0.1 makes a page of theirs one of the same origin."""
    assert studio.owner.get("/api/state", host=host).status == 403
    assert studio.owner.get("/", host=host).status == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8620", "[::1]", "studio.example"])
def test_own_names_are_allowed_at_any_port(studio: Running, host: str):
    """Any port: a tunnel may have another one on the browser's side."""
    assert studio.owner.get("/api/state", host=host).status == 200
    assert studio.owner.post("/api/check", {"verb": "train"}, host=host, origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "origin",
    [None, "null", "", "http://evil.test", "http://localhost", "http://localhost:1", "file://", "http://[::1]"],
)
def test_a_change_from_another_origin_is_refused(studio: Running, origin: str | None):
    for method, path in CHANGING:
        assert studio.owner.send(method, filled(path), {}, origin=origin).status == 403, path


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_a_request_from_another_site_is_refused(studio: Running, site: str):
    """A page of another port of this machine is of the same site, so it has the cookie."""
    for method, path in CHANGING:
        assert studio.owner.send(method, filled(path), {}, sec_fetch_site=site).status == 403, path
    assert studio.owner.get("/api/runs", sec_fetch_site=site).status == 403
    assert studio.owner.get("/api/events", sec_fetch_site=site).status == 403
    assert studio.owner.get("/", sec_fetch_site=site).status == 200, "a link may lead to a page"


@pytest.mark.parametrize(
    "kind",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/gif"],
)
def test_a_body_that_a_form_can_send_is_refused(studio: Running, kind: str | None):
    for method, path in CHANGING:
        assert studio.owner.send(method, filled(path), {}, content_type=kind).status == 415, path


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND"])
def test_other_methods_change_nothing(studio: Running, run_id: str, method: str):
    for path in (f"/api/runs/{run_id}", "/api/jobs", "/"):
        assert studio.owner.send(method, path, {}).status == 405
    assert "access-control-allow-origin" not in studio.owner.send(method, "/api/jobs", {}).headers


# Cookies, roles and links -------------------------------------------------------------------------------------------


def test_without_a_cookie_nothing_is_shown(studio: Running):
    for path in (*READING, *PAGES, "/static/app.js", "/api/events", "/nothing"):
        answer = studio.stranger.get(filled(path))
        assert answer.status == 401, path
    for method, path in CHANGING:
        assert studio.stranger.send(method, filled(path), {}).status == 401, path


def test_a_forged_cookie_is_refused(studio: Running, tmp_path: Path):
    keys, other = studio.studio.keys, Keys(tmp_path)
    mac = keys.cookie_value("reader").partition(".")[2]
    values = ["owner", "owner.", f"owner.{mac}", f"admin.{mac}", other.cookie_value("owner"), '"\\351"', '"', "é", ";"]
    for value in values:
        for name in (keys.cookie, other.cookie):
            answer = Browser(studio.port, f"{name}={value}").get("/api/state")
            assert answer.status == 401, (name, value)
    assert Browser(studio.port, f"{other.cookie}={keys.cookie_value('owner')}").get("/api/state").status == 401


def test_a_reader_sees_and_changes_nothing(studio: Running, run_id: str):
    before = sorted(studio.root.rglob("*"))
    assert studio.reader.get("/api/runs").json()[0]["id"] == run_id
    assert studio.reader.get("/api/state").json()["role"] == "reader"
    for method, path in CHANGING:
        answer = studio.reader.send(method, filled(path, run_id), {})
        assert (answer.status, "only shows" in answer.error) == (403, True), path
    assert sorted(studio.root.rglob("*")) == before


def test_of_two_that_open_a_link_at_once_one_gets_in(studio: Running):
    for _ in range(10):
        token, found, gate = studio.studio.keys.new_link("owner"), list[int](), threading.Barrier(4)

        def open_link(token: str = token, found: list[int] = found, gate: threading.Barrier = gate) -> None:
            gate.wait()
            found.append(studio.stranger.get(f"/?token={token}").status)

        threads = [threading.Thread(target=open_link) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [303, 401, 401, 401]


def test_a_link_sets_a_cookie_that_no_script_and_no_other_site_gets(studio: Running):
    answer = studio.stranger.get(f"/?token={studio.studio.keys.new_link('reader')}&at=/runs")
    cookie = answer.headers["set-cookie"]
    assert all(f"; {word}" in cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert answer.headers["location"] == "/?at=%2Fruns", "the token is not in the address that the browser keeps"
    assert "no-referrer" in answer.headers["referrer-policy"]
    assert Browser(studio.port, cookie.partition(";")[0]).get("/api/state").json()["role"] == "reader"


def test_an_old_a_damaged_and_an_unknown_link_are_refused(studio: Running):
    keys, links = studio.studio.keys, studio.root / ".studio" / "links"
    for content in (json.dumps({"role": "owner", "until": time.time() - 1}), "{", "[]", '{"role": "owner"}', ""):
        before = set(links.iterdir())
        token = keys.new_link("owner")
        (file,) = set(links.iterdir()) - before
        assert time.time() + (LINK_HOURS - 1) * 3600 < json.loads(file.read_text())["until"]
        file.write_text(content)
        assert studio.stranger.get(f"/?token={token}").status == 401, content
        assert set(links.iterdir()) == before
    for token in ("", "x", "../secret", "%00", "a" * 5000, "%ff", "é".encode().hex()):
        assert studio.stranger.get(f"/?token={token}").status == 401


def test_a_secret_that_a_crash_cut_or_that_is_a_link_is_made_anew(tmp_path: Path):
    (tmp_path / "known").write_bytes(b"k" * 32)
    for spoil in (lambda file: file.write_bytes(b""), lambda file: file.symlink_to(tmp_path / "known")):
        state = tmp_path / f"state{len(list(tmp_path.iterdir()))}"
        state.mkdir()
        spoil(state / "secret")
        assert Keys(state).cookie_value("owner") == Keys(state).cookie_value("owner")
        assert not (state / "secret").is_symlink()
        assert (state / "secret").stat().st_size == 32
    assert (tmp_path / "known").read_bytes() == b"k" * 32


# Headers ------------------------------------------------------------------------------------------------------------


def test_every_answer_has_the_headers_that_forbid_the_rest(
    studio: Running, run_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken() -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(studio.studio.datasets, "all", broken)
    caplog.set_level(logging.CRITICAL)
    link = studio.studio.keys.new_link("owner")
    answers = {
        200: studio.owner.get("/api/state"),
        303: studio.stranger.get(f"/?token={link}"),
        400: studio.owner.post("/api/check", b"{"),
        401: studio.stranger.get("/", accept="text/html"),
        403: studio.reader.post("/api/jobs"),
        404: studio.owner.get("/nothing"),
        405: studio.owner.send("DELETE", "/api/jobs", {}),
        413: studio.owner.post("/api/jobs", None, content_length=str(MOST_BODY + 1)),
        415: studio.owner.put("/api/uploads", b"no picture", content_type="image/png"),
        500: studio.owner.get("/api/data"),
    }
    pages = [studio.owner.get(path) for path in ("/", "/new", f"/api/runs/{run_id}/pictures/200/0", "/static/app.js")]
    for status, answer in [*answers.items(), *((200, page) for page in pages)]:
        assert answer.status == status
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers
    assert "mistake of ours" not in answers[500].body.decode()
    assert answers[200].headers["cache-control"] == "no-store"


# Paths in requests --------------------------------------------------------------------------------------------------

TRAVERSALS = [
    *("..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd"),
    *("..%5c..%5cetc", "%00", "a%00.png", "....//", "%252e%252e%252f", "%c0%ae%c0%ae", "%ff%fe", "~root", "C:%5c"),
    *("a" * 3000, "%e2%80%ae", "%f0%9f%98%80", ".studio", "secret", "..;", "20261129-205117-381624%0a", "-1", "1e9"),
]


@pytest.mark.parametrize("value", TRAVERSALS)
def test_no_id_is_a_path(studio: Running, run_id: str, value: str):
    """Each parameter of each route in turn, the others right where a right one is known."""
    for path in (*READING, "/static/{name}", "/runs/{id}"):
        for spoilt in [part for part in path.split("/") if part.startswith("{")]:
            address = path.replace(spoilt, value + spoilt.partition("}")[2]).replace("{run}", run_id)
            answer = studio.owner.get(filled(address, "0"))
            # A page is the same for every id, and a draft that nobody has written is empty.
            is_empty = answer.body == b'{"content":null,"was":null}' or path == "/runs/{id}"
            assert answer.status in (400, 404) or (answer.status == 200 and is_empty), (path, answer)
            assert b"root:x:" not in answer.body
    for method, path in CHANGING:
        if "{" in path:
            content = {"text": "", "was": "", "name": "a", "captions": ["a"], "keys": [], "yaml": ""}
            answer = studio.owner.send(method, filled(path, value), content)
            assert answer.status in (400, 404) or path in ("/api/drafts/{name}", "/api/recipes/{recipe}"), path
    assert {path.parent.name for path in studio.root.rglob("*.yaml")} <= {"recipes", "a"}


@pytest.mark.parametrize(
    "name", ["../guard.py", "%2e%2e/guard.py", "..%2fguard.py", "index.html", "vendor/LICENSES", ""]
)
def test_only_named_kinds_of_files_of_the_browser_s_code_are_served(studio: Running, name: str):
    assert studio.owner.get(f"/static/{name}").status == 404
    assert studio.owner.get("/static/app.js").headers["content-type"].startswith("text/javascript")


# Links that lead out of the root ------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path, outside: Path) -> Iterator[Running]:
    """A root from somebody else, in which everything that can be a link is one."""
    root = tmp_path / "root"
    run = write_run(root / "runs" / "a", entries_of(200), record={"outcome": "finished"})
    (root / "runs" / "elsewhere").symlink_to(outside / "run")
    (run / "control").symlink_to(outside / "run" / "control")
    (run / "report.html").symlink_to(outside / "run" / "report.html")
    (run / "README.md").symlink_to(outside / "secret.txt")
    (run / "evaluation").symlink_to(outside)
    (run / "checkpoint-7").symlink_to(outside / "run")
    (root / "recipes").symlink_to(outside)
    data = write_data(root / "data")
    for ending in ("png", "txt"):
        (data / f"1.{ending}").unlink()
        (data / f"1.{ending}").symlink_to(outside / f"secret.{ending}")
    (data / "control" / "2.png").unlink()
    (data / "control" / "2.png").symlink_to(outside / "secret.png")
    (root / "away").symlink_to(outside / "data")
    write_data(root / "deep")
    (root / "deep" / "more").symlink_to(outside / "data")
    rows = [{"image": str(outside / "secret.png"), "conditioning_image": "data/0.png", "text": "out"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "table.jsonl").symlink_to(outside / "rows.jsonl")
    with running(root) as found:
        yield found


def snapshot(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_links_are_not_followed(linked: Running, outside: Path):
    owner, before = linked.owner, snapshot(outside)
    (listed,) = owner.get("/api/runs").json()
    run = listed["id"]
    whole = owner.get(f"/api/runs/{run}").json()
    assert (whole["pictures"]["steps"], whole["pictures"]["pairs"]) == ([], [])
    for path in ("pictures/condition/0", "pictures/100/0", "report"):
        assert owner.get(f"/api/runs/{run}/{path}").status == 404, path
    assert owner.get(f"/api/adapters/{run}").json()["palette"] == []
    release = owner.get(f"/api/release/{run}").json()
    assert release["card"] == ""
    assert owner.put(f"/api/release/{run}/card", {"text": "x", "was": ""}).status == 409
    body = {"adapter": run, "checkpoint": 7, "condition": "20261129-205117-381624"}
    assert owner.post("/api/paint", body).status == 404
    assert "checkpoint" in owner.post("/api/paint", body).error
    assert [one["id"] for one in owner.get("/api/recipes").json() if one["is_own"]] == []
    assert owner.put("/api/recipes/x", {"yaml": "", "was": ""}).status == 400
    names = {entry["name"] for entry in owner.get("/api/folders").json()["folders"]}
    assert names == {"runs", "data", "deep"}
    assert snapshot(outside) == before


def test_single_pictures_of_a_run_that_are_links_are_not_shown(tmp_path: Path, outside: Path):
    run = write_run(tmp_path / "a", entries_of(200), record={"outcome": "finished"})
    write_pictures(run, [100, 200])
    shutil.rmtree(run / "control" / "step-000100")
    (run / "control" / "step-000100").symlink_to(outside / "run" / "control" / "step-000100")
    for name in ("step-000200/0.png", "0-condition.png"):
        (run / "control" / name).unlink()
        (run / "control" / name).symlink_to(outside / "secret.png")
    before = snapshot(outside)
    with running(tmp_path) as found:
        (row,) = found.owner.get("/api/runs").json()
        shown = [found.owner.get(f"/api/runs/{row['id']}/pictures/{path}").status for path in ("200/1", "target/0")]
        assert shown == [200, 200]
        for path in ("100/0", "100/1", "200/0", "condition/0"):
            assert found.owner.get(f"/api/runs/{row['id']}/pictures/{path}").status == 404, path
        assert "#123456" not in found.owner.get(f"/api/adapters/{row['id']}").json()["palette"]
    assert snapshot(outside) == before


@pytest.mark.parametrize("location", ["away", "away/0.png", "deep/more", "table.jsonl", "runs/elsewhere", "away/*.tar"])
def test_a_dataset_behind_a_link_is_refused(linked: Running, location: str):
    answer = linked.owner.post("/api/data", {"values": {"location": location}})
    assert (answer.status, answer.json()["option"]) == (400, "data.location")
    assert "outside the studio's folder" in answer.error


def test_a_row_whose_files_lie_outside_is_not_shown(linked: Running, outside: Path):
    owner, before = linked.owner, snapshot(outside)
    data = owner.post("/api/data", {"values": {"location": "data"}}).json()["id"]
    rows = owner.get(f"/api/data/{data}/rows").json()["rows"]
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    assert [owner.get(f"/api/data/{data}/rows/{n}/image").status for n in range(3)] == [200, 400, 400]
    assert owner.get(f"/api/data/{data}/rows?find={SECRET_WORD}").json()["total"] == 0
    body = {"captions": ["new"], "was": [SECRET_WORD]}
    assert owner.put(f"/api/data/{data}/rows/1/captions", body).status == 400
    assert SECRET_WORD not in owner.get(f"/api/data/{data}/rows").body.decode()
    deep = owner.post("/api/data", {"values": {"location": "deep"}}).json()["id"]
    found = owner.get(f"/api/data/{deep}/rows").json()["rows"]
    assert sum(not row["error"] for row in found) == 3
    table = owner.post("/api/data", {"values": {"location": "rows.jsonl"}}).json()["id"]
    assert owner.get(f"/api/data/{table}/rows").json()["rows"][0]["error"]
    assert owner.get(f"/api/data/{table}/rows/0/image").status == 400
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", ["", "jobs", "uploads", "data", "thumbs", "paint", "drafts", "trash"])
def test_a_studio_s_own_folder_is_no_link(tmp_path: Path, outside: Path, name: str):
    """A root that was unpacked from an archive of somebody else may hold one already."""
    root = tmp_path / "root"
    write_run(root / "runs" / "a", record={"outcome": "finished"})
    if name:
        (root / ".studio").mkdir(parents=True)
    (root / ".studio" / name if name else root / ".studio").symlink_to(outside)
    before = snapshot(outside)
    if name in ("", "jobs", "data", "thumbs", "paint"):
        with pytest.raises(UserError, match="is a link"), running(root):
            pass
    else:
        with running(root) as found:
            owner = found.owner
            run = owner.get("/api/runs").json()[0]["id"]
            assert (
                owner.put("/api/uploads", picture(), content_type="image/png").status == (400, 201)[name != "uploads"]
            )
            assert owner.put("/api/drafts/x", {"content": 1, "was": None}).status == (400, 200)[name != "drafts"]
            assert owner.post(f"/api/runs/{run}/trash", {"name": "a"}).status == (400, 200)[name != "trash"]
    assert snapshot(outside) == before


# Options ------------------------------------------------------------------------------------------------------------

WAYS_OUT = [
    *("../x", "/etc/passwd", "~/x", "~root/x", "a/../../x", "file:///etc/passwd", "file://../x", "ftp://h/x", "\0"),
    *(
        "a\0b",
        "{/etc,a}/x.tar",
        "{a,/etc}",
        "{a,..}/x",
        "a*/../../x",
        "..:1",
        "../x.safetensors:0.5",
        "zip://a::/etc/x",
    ),
    *(".studio/secret", "runs/../.studio", ".studio"),
]
LOCAL_ONLY = ["http://../../../../tmp/x", "https://x/../../y", "s3://bucket/x", "hf://a/b"]
"""A local path may look like an address; its `..` lead out of the root all the same."""
PATH_OPTIONS = sorted(
    {(verb, entry["path"]) for verb in QUEUES for entry in form.schema(verb) if entry["path"] in PATHS}
)
KIND_OPTIONS = sorted(
    {
        (verb, entry["path"])
        for verb in QUEUES
        for entry in form.schema(verb)
        if entry["path"] in CONDITIONS and not entry["choices"]
    }
)
REQUIRED = {
    "data": "data",
    "data.location": "data",
    "adapter": ["runs/a"],
    "folder": "runs/a",
    "source": "x",
    "out": "o",
}
REQUIRED |= {"repository": "a/b", "to": "comfyui", "location": "data", "kind": "canny", "model_id": "a/b"}


def values_of(verb: str) -> dict[str, Any]:
    """Values with which a verb could start."""
    return {entry["path"]: REQUIRED[entry["path"]] for entry in form.schema(verb) if entry["required"]}


@pytest.mark.parametrize(("verb", "option"), PATH_OPTIONS)
def test_no_path_option_leads_out(studio: Running, outside: Path, verb: str, option: str):
    (is_list,) = (entry["kind"] == "list" for entry in form.schema(verb) if entry["path"] == option)
    ways = [*WAYS_OUT, str(outside), str(outside / "data")]
    ways += LOCAL_ONLY[: 2 if PATHS[option] in ("dataset", "model") else 4]
    jobs = len(studio.studio.jobs.all())
    for text in ways:
        values = {**values_of(verb), option: [text] if is_list else text}
        answer = studio.owner.post("/api/jobs", {"verb": verb, "values": values})
        assert (answer.status, answer.json()["option"]) == (400, option), (text, answer)
    assert len(studio.studio.jobs.all()) == jobs


@pytest.mark.parametrize(("verb", "option"), KIND_OPTIONS)
def test_no_option_runs_code_of_the_user_s(studio: Running, verb: str, option: str):
    (is_list,) = (entry["kind"] == "list" for entry in form.schema(verb) if entry["path"] == option)
    for text in ("own.py:Own", "data/own.py:Own", "os:system", "a.b:C", "column:Own", "folder:Own", "canny,x=../y"):
        if option == "data.conditions" and text.startswith(("column:", "folder:")):
            continue  # which name a column and a folder there
        values = {**values_of(verb), option: [text] if is_list else text}
        answer = studio.owner.post("/api/jobs", {"verb": verb, "values": values})
        assert (answer.status, answer.json()["option"]) == (400, option), (text, answer)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *(
            ("data.location", text)
            for text in ("data", "./data", "shapes:16", "a,b/c d.csv", "shards/{0000..0031}.tar")
        ),
        *(("data.location", text) for text in ("shards/{train,test}-*.tar", "https://h/x/{0..9}.tar", "s3://b/x.tar")),
        *(("base.name", text) for text in ("nano", "owner/name", "models/x.safetensors", "hf://owner/name")),
        *(("data.condition", text) for text in ("canny,low=50,high=150", "lineart-net", "normal-bae,model=x")),
        *(("data.split", text) for text in ("train", "train[:10%]", "a-b_c.d")),
    ],
)
def test_what_training_reads_is_allowed(tmp_path: Path, option: str, text: str):
    check_values({option: text}, Places(tmp_path, "runs"))


def test_a_folder_of_conditions_is_confined(studio: Running):
    for text in ("folder:../x", "folder:~/x", "folder:/etc", "folder:a,../x"):
        values = {"data.location": "data", "adapter.compose": ["runs/a", "runs/b"], "data.conditions": [text, "canny"]}
        answer = studio.owner.post("/api/jobs", {"verb": "train", "values": values})
        assert (answer.status, answer.json()["option"]) == (400, "data.conditions"), text


@pytest.mark.parametrize("option", ["data.split", "validation.split", "tracking.project", "tracking.logging_dir"])
def test_a_name_that_becomes_a_folder_leads_nowhere_else(studio: Running, option: str):
    for text in ("../..", "/etc", "a/../../..", "~/x"):
        values = {"data.location": "data", option: text}
        answer = studio.owner.post("/api/jobs", {"verb": "train", "values": values})
        assert (answer.status, answer.json()["option"]) == (400, option), text


def test_every_option_that_names_a_file_is_known_as_one():
    """An option whose help speaks of a file, a folder or a hub id is confined, or stands here with its reason."""
    harmless = {
        "kinds": "shapes", "data.image_column": "a column", "image_column": "a column",
        "data.conditioning_image_column": "a column", "conditioning_image_column": "a column",
        "data.captions": "an ending", "captions": "an ending", "data.dataset_config_name": "a name",
        "base.revision": "a branch", "base_revision": "a branch", "data.dataset_revision": "a branch",
        "revision": "a branch", "base.variant": "a name in a file's name", "base_variant": "a name in a file's name",
        "name": "a name", "checkpoint": "a name", "tracking.logging_dir": "a name",
        "hub.model_id": "a repository", "model_id": "a repository", "repository": "a repository",
        "hub.license": "a word", "license": "a word", "hub.license_link": "a text", "license_link": "a text",
        "hub.license_name": "a text", "collection": "a name on the hub", "author": "a text", "to": "a choice",
        "device": "a device", "message": "a text", "validation.split": "a name",
        "split": "a name", "data.split": "a name", "card": "a size", "prompt": "a text",
        "scale_schedule": "numbers", "tag": "a name", "hub.push": "a switch", "root": "not started here",
        "runs": "not started here", "data.caption_column": "a column", "data.kind": "a choice", "layout": "a choice",
    }  # fmt: skip
    words = ("file", "folder", "path", "hub id", "picture file", ".safetensors", ".py")
    for verb in cli.VERBS:
        for entry in form.schema(verb):
            speaks = any(word in entry["help"].lower() for word in words)
            if speaks and entry["kind"] in ("text", "list") and entry["path"] not in harmless:
                assert entry["path"] in (*PATHS, *CONDITIONS), f"{verb}: {entry['path']}: {entry['help']}"


def test_paths_names_options_that_exist():
    known = {entry["path"] for verb in cli.VERBS for entry in form.schema(verb)} | set(form.HIDDEN)
    assert {*PATHS, *CONDITIONS} - known == set()


@pytest.mark.parametrize("verb", [*sorted(cli.VERBS.keys() - QUEUES.keys()), "studio", "rm -rf", "--help", "train; ls"])
def test_other_verbs_cannot_be_started(studio: Running, verb: str):
    for path in ("/api/jobs", "/api/check"):
        assert "cannot be started here" in studio.owner.post(path, {"verb": verb, "values": {}}).error


@pytest.mark.parametrize("option", ["hub.token", "hub.push", "recipe", "json", "checkpoint.resume", "nothing.such"])
def test_options_that_no_form_shows_are_refused(studio: Running, option: str):
    values = {"data.location": "data", option: "x"}
    answer = studio.owner.post("/api/jobs", {"verb": "train", "values": values})
    assert (answer.status, "no such option" in answer.error) == (400, True)
    head, _, last = option.rpartition(".")
    text = f"{head}:\n  {last}: true\n" if head else f"{last}: true\n"
    checked = studio.owner.post("/api/check", {"verb": "train", "yaml": text}).json()
    assert checked["errors"], "a recipe's text does not set it either"
    assert studio.owner.put("/api/recipes/own", {"yaml": text, "was": ""}).status == 400


def test_a_run_of_somebody_else_is_not_resumed_with_its_own_code(studio: Running, outside: Path):
    """Its options.yaml may name any file; only what may be started here is."""
    for number, (section, text) in enumerate(
        [
            ("data", "condition: data/own.py:Own"),
            ("data", f"location: {outside}"),
            ("base", "name: ~/base"),
            ("validation", "judge: own.py:Own"),
        ]
    ):
        folder = write_run(studio.root / "runs" / f"foreign-{number}", record={"outcome": "stopped"}, checkpoints=[5])
        (folder / "options.yaml").write_text(f"{section}:\n  {text}\n")
        studio.studio.places.forget_runs()
        (run,) = (run for run, path in studio.studio.places.run_folders().items() if path == folder)
        answer = studio.owner.post(f"/api/runs/{run}/resume")
        assert (answer.status, "in a terminal only" in answer.error) == (409, True), answer
        shutil.rmtree(folder)
    assert studio.studio.jobs.all() == []


def test_jobs_and_keys_of_a_folder_from_somebody_else_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A root that was unpacked from an archive may hold `.studio` with a job that waits, and a known secret."""
    monkeypatch.setattr(jobs_module, "AT_ONCE", {"device": 0, "desk": 0})  # their server does not start it either
    (tmp_path / "a").mkdir()
    with running(tmp_path / "a") as theirs:
        theirs.studio.jobs.add("conditions", ["conditions", "--sheet", "made.png", "--kinds", "own.py:Own"])
        cookie = theirs.owner.cookie
        theirs.studio.keys.new_link("owner")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    with running(tmp_path / "b") as mine:
        assert [job.state for job in mine.studio.jobs.all()] == ["cancelled"]
        assert Browser(mine.port, cookie).get("/api/state").status == 401
        assert list((tmp_path / "b" / ".studio" / "links").iterdir()) == []
        cookie = mine.owner.cookie
    with running(tmp_path / "b") as again:
        assert Browser(again.port, cookie).get("/api/state").status == 200, "a restart in its place changes nothing"


def test_a_python_file_in_the_root_is_not_imported(tmp_path: Path):
    """A process that runs in the root must not take `yaml.py` of a dataset for the library."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("yaml", "tyro", "json", "numpy", "PIL"):
        (root / f"{name}.py").write_text(f"open('imported', 'a').write({name!r})\nraise SystemExit(9)\n")
    with running(root) as found:
        body = {"verb": "make-data shapes", "values": {"out": "made", "num": 2, "size": 64}}
        job = found.owner.post("/api/jobs", body).json()["id"]
        deadline = time.monotonic() + 60
        while (state := found.studio.jobs.read(job).state) in ("queued", "running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert state == "done", found.studio.jobs.log(job, 0)
    assert not (root / "imported").exists()
    assert (root / "made").is_dir()


@pytest.mark.parametrize("option", ["hub.token", "hub.push", "recipe", "checkpoint.resume"])
def test_a_verb_that_the_studio_gives_options_of_its_own_takes_none_that_no_form_shows(studio: Running, option: str):
    answer = studio.owner.post("/api/plan", {"values": {"data.location": "shapes:8", option: "x"}})
    is_dropped = option.startswith("checkpoint.")  # a plan is of a whole run
    assert answer.status == (201 if is_dropped else 400)
    assert is_dropped or "no such option" in answer.json()["error"]
    if is_dropped:
        assert "resume" not in answer.json()["command"]
        studio.owner.post(f"/api/jobs/{answer.json()['id']}/cancel", {})


def test_a_planted_token_is_in_no_answer(studio: Running, run_id: str, monkeypatch: pytest.MonkeyPatch):
    planted = "hf_planted-token-of-the-user"
    monkeypatch.setenv("HF_TOKEN", planted)
    monkeypatch.setenv("WANDB_API_KEY", "planted-wandb-key")
    owner = studio.owner
    answers = [owner.get(filled(path, run_id)) for path in READING]
    answers += [owner.get(f"/api/release/{run_id}"), owner.get("/api/state"), owner.get("/api/form/push")]
    assert owner.get(f"/api/release/{run_id}").json()["is_logged_in"] is True
    texts = [answer.body.decode("latin-1") for answer in answers]
    assert [text for text in texts if planted in text or "planted-wandb" in text] == []
    fields = {entry["path"].rpartition(".")[2] for verb in QUEUES for entry in form.schema(verb)}
    assert fields & {"token", "secret", "password", "key"} == set()


# Pictures -----------------------------------------------------------------------------------------------------------


def animated(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def huge() -> bytes:
    """A PNG that says it has 50,000 x 50,000 pixels, in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def converted(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    return buffer.getvalue()


BAD_PICTURES = {
    "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><script>{XSS}</script></svg>'.encode(),
    "html": f"<html>{XSS}</html>".encode(),
    "empty": b"",
    "apng": animated("PNG"),
    "webp": animated("WEBP"),
    "gif": animated("GIF"),
    "bmp": converted("BMP"),
    "tiff": converted("TIFF"),
    "huge": huge(),
    "cut": picture((640, 640))[:-400],
    "head": picture()[:20],
    "json": b"{}",
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_with_a_sentence(studio: Running, name: str):
    before = sorted(studio.root.rglob("*.png"))
    for kind in ("image/png", "image/webp", "application/json"):
        answer = studio.owner.put("/api/uploads", BAD_PICTURES[name], content_type=kind)
        assert answer.status == 415, answer
        assert answer.error.endswith(".")
    assert sorted(studio.root.rglob("*.png")) == before


def test_an_upload_is_encoded_again(studio: Running):
    """What hides behind a picture's pixels, such as a page, is gone."""
    data = picture() + XSS.encode()
    sent = studio.owner.put("/api/uploads", data, content_type="image/png")
    assert (sent.status, sent.json()["width"]) == (201, 32)
    got = studio.owner.get(f"/api/uploads/{sent.json()['id']}")
    assert got.headers["content-type"] == "image/png"
    assert XSS.encode() not in got.body
    assert Image.open(io.BytesIO(got.body)).getpixel((0, 0)) == (255, 0, 0)


# Texts of others ----------------------------------------------------------------------------------------------------


def test_a_report_is_shown_in_a_sandbox(studio: Running, run_id: str):
    answer = studio.owner.get(f"/api/runs/{run_id}/report")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "allow-scripts" not in policy
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_texts_of_others_are_data_and_no_page(studio: Running):
    """Captions, names of runs and prompts travel as JSON or WebP, whose types a browser does not guess."""
    data = studio.owner.post("/api/data", {"values": {"location": "data"}}).json()["id"]
    name = "<script>alert(1)<"
    write_run(studio.root / "runs" / name, record={"outcome": "finished"})
    studio.studio.places.forget_runs()
    for path in (f"/api/data/{data}/rows", "/api/runs", "/api/adapters", "/api/folders"):
        answer = studio.owner.get(path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    refused = studio.stranger.get("/", accept="text/html", host="<script>alert(1)</script>")
    assert (refused.status, b"<script" in refused.body) == (403, False)
    shutil.rmtree(studio.root / "runs" / "<script>alert(1)<")


# Exhaustion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [str(MOST_BODY + 1), "9" * 30, "-1", "1e3", "0x10", "٣"])
def test_a_body_that_says_it_is_large_is_refused_before_it_is_read(studio: Running, length: str):
    head = f"PUT /api/uploads HTTP/1.1\r\nHost: localhost:{studio.port}\r\nOrigin: http://localhost:{studio.port}\r\n"
    head += f"Cookie: {studio.owner.cookie}\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", studio.port), timeout=10) as opened:
        opened.sendall(head.encode())
        assert opened.recv(100).split()[1] in (b"413", b"400")


def test_a_body_without_a_length_is_cut_off(studio: Running):
    """In chunks, so that nothing says how long it is."""
    head = f"PUT /api/uploads HTTP/1.1\r\nHost: localhost:{studio.port}\r\nOrigin: http://localhost:{studio.port}\r\n"
    head += f"Cookie: {studio.owner.cookie}\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + b"\0" * (1 << 20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", studio.port), timeout=20) as opened:
        opened.sendall(head.encode())
        sent = 0
        try:
            while sent <= MOST_BODY >> 20:
                opened.sendall(piece)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert opened.recv(100).split()[1] == b"413"


def test_one_page_too_many_gets_a_sentence(studio: Running):
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_PAGES):
            stack.enter_context(studio.owner.events()).until("hello")
        answer = studio.owner.get("/api/events")
        assert (answer.status, answer.error) == (429, "Too many pages are open. Close some.")
    deadline = time.monotonic() + 30
    while studio.studio.hub.is_full():
        assert time.monotonic() < deadline, "a closed page frees its place"
        studio.studio.hub.publish("device", {})
        time.sleep(0.05)


def test_values_are_bounded(tmp_path: Path):
    places = Places(tmp_path, "runs")
    for values in ({"prompt": "x" * 10_001}, {"prompt": ["x", "x" * 10_001]}, {"prompt": "a\0b"}):
        with pytest.raises(UserError):
            check_values(values, places)
    assert list(tmp_path.iterdir()) == []
