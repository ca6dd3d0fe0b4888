"""Datasets in the studio: rows, search, the doctor's findings, the list of rows to skip, edited captions."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.studio import Browser, Running, running

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError
from t2i_adapter.studio import datasets as module

CAPTIONS = ("a red circle", "a blue square", "Ein grünes Dreieck", "")


def png(colour: str = "red", side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path) -> Path:
    """Pictures with a .txt beside each, and conditions."""
    (folder / "control").mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(png())
        (folder / f"{number}.txt").write_text(caption + "\n")
        (folder / "control" / f"{number}.png").write_bytes(png("white"))
    return folder


def write_lines(folder: Path, ending: bytes = b"\n", last: bytes = b"\n") -> Path:
    """The same as an image folder with metadata.jsonl, its lines written as a hand or another program writes them."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (folder / "train" / f"{number}.png").write_bytes(png())
        (folder / "train" / f"{number}_c.png").write_bytes(png("white"))
        row = {"file_name": f"{number}.png", "conditioning_image_file_name": f"{number}_c.png", "text": caption}
        text = json.dumps(row, ensure_ascii=number % 2 == 0, separators=((",", ":"), (", ", ": "))[number % 2])
        lines.append(("  " * number + text + " " * number).encode())
    (folder / "train" / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + ending.join(lines) + last)
    return folder


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Running]:
    root = tmp_path / "root"
    write_pictures(root / "pictures")
    write_lines(root / "lines")
    rows = [
        {"image": f"pictures/{n}.png", "conditioning_image": f"pictures/control/{n}.png", "text": "t"} for n in (0, 1)
    ]
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with tarfile.open(root / "shard.tar", "w") as tar:
        for name, data in (("a.png", png()), ("a.cond.png", png()), ("a.conditioning.png", png()), ("a.txt", b"t")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with running(root) as found:
        yield found


def add(studio: Running, location: str, **more: Any) -> str:
    answer = studio.owner.post("/api/data", {"values": {"location": location, **more}})
    assert answer.status == 201, answer
    return answer.json()["id"]


def captions_of(owner: Browser, data: str, query: str = "") -> list[list[str]]:
    return [row["captions"] for row in owner.get(f"/api/data/{data}/rows{query}").json()["rows"]]


def test_a_dataset_is_registered_shown_and_forgotten(studio: Running):
    owner, name = studio.owner, add(studio, "pictures")
    assert add(studio, "pictures") == name, "the same options have the same id"
    one = owner.get(f"/api/data/{name}").json()
    assert (one["count"], one["skipped"], one["report"]) == (4, 0, None)
    assert "4 pairs" in one["described"][0]
    assert captions_of(owner, name) == [[caption] for caption in CAPTIONS]
    rows = owner.get(f"/api/data/{name}/rows?from=1&n=2").json()
    assert ([row["n"] for row in rows["rows"]], rows["total"], rows["of"]) == ([1, 2], 4, 4)
    assert owner.get(f"/api/data/{name}/rows?from=99").json()["rows"] == []
    assert owner.get(f"/api/data/{name}/rows?n=201").status == 400
    owner.post(f"/api/data/{name}/remove")
    assert owner.get(f"/api/data/{name}").status == 404
    assert owner.get("/api/data").json() == []
    assert (studio.root / "pictures" / "0.txt").exists()


def test_pictures_are_small_and_from_the_cache_until_a_file_changes(studio: Running):
    owner, name = studio.owner, add(studio, "pictures")
    path = f"/api/data/{name}/rows/0/image?side=160"
    first = owner.get(path)
    assert (first.status, first.headers["content-type"], first.body[8:12]) == (200, "image/webp", b"WEBP")
    assert owner.get(path).body == first.body
    (studio.root / "pictures" / "0.png").write_bytes(png("blue", 32))
    again = Image.open(io.BytesIO(owner.get(path).body))
    assert again.size == (32, 32)
    assert owner.get(f"/api/data/{name}/rows/4/image").status == 404
    assert owner.get(f"/api/data/{name}/rows/0/depth").status == 404
    assert owner.get(f"/api/data/{name}/rows/0/image?side=161").status == 400


def test_a_broken_row_has_its_sentence_in_its_place(studio: Running):
    (studio.root / "pictures" / "1.png").write_bytes(b"broken")
    (studio.root / "pictures" / "2.txt").write_bytes(b"\xff\xfe")
    name = add(studio, "pictures")
    rows = studio.owner.get(f"/api/data/{name}/rows").json()["rows"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    answer = studio.owner.get(f"/api/data/{name}/rows/1/image")
    assert (answer.status, "1.png" in answer.error) == (415, True)


def test_a_search_finds_rows_by_their_captions(studio: Running):
    owner = studio.owner
    for name in (add(studio, "pictures"), add(studio, "lines")):
        for word, found in (
            ("A%20", [0, 1]),
            ("gr%C3%BCn", [2]),
            ("GR%C3%9CN", [2]),
            ("nothing", []),
            ("", [0, 1, 2, 3]),
        ):
            rows = owner.get(f"/api/data/{name}/rows?find={word}").json()
            assert ([row["n"] for row in rows["rows"]], rows["total"]) == (found, len(found)), word


def test_findings_of_the_doctor_are_filters(studio: Running):
    owner, name = studio.owner, add(studio, "pictures")
    report = {"findings": [{"kind": "dark", "rows": [{"number": 2}, {"number": 3}, {"number": 99}]},
                           {"kind": "odd", "rows": [{"number": 0}]}]}  # fmt: skip
    (studio.root / ".studio" / "data" / f"{name}-doctor.json").write_text(json.dumps(report))
    assert [one["rows"] for one in owner.get(f"/api/data/{name}").json()["report"]["findings"]] == [3, 1]
    assert [row["n"] for row in owner.get(f"/api/data/{name}/rows?finding=dark").json()["rows"]] == [2, 3]
    assert [row["n"] for row in owner.get(f"/api/data/{name}/rows?finding=dark&find=gr").json()["rows"]] == [2]
    assert owner.get(f"/api/data/{name}/rows?finding=none").json()["rows"] == []


def test_the_doctor_is_started_and_its_findings_are_shown(studio: Running):
    (studio.root / "pictures" / "1.png").write_bytes(b"broken")
    owner, name = studio.owner, add(studio, "pictures")
    job = owner.post(f"/api/data/{name}/doctor").json()["id"]
    deadline = time.monotonic() + 120
    while (state := studio.studio.jobs.read(job).state) in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state == "done", studio.studio.jobs.log(job, 0)
    findings = owner.get(f"/api/data/{name}").json()["report"]["findings"]
    (kind,) = (one["kind"] for one in findings if one["kind"] == "unreadable")
    assert [row["n"] for row in owner.get(f"/api/data/{name}/rows?finding={kind}").json()["rows"]] == [1]


def test_the_list_of_rows_to_skip_is_one_that_training_reads(studio: Running):
    owner, name = studio.owner, add(studio, "pictures")
    keys = [row["key"] for row in owner.get(f"/api/data/{name}/rows").json()["rows"]]
    assert owner.put(f"/api/data/{name}/skip", {"keys": keys[:2]}).json() == {"skipped": 2}
    assert owner.put(f"/api/data/{name}/skip", {"keys": keys[1:3], "on": True}).json() == {"skipped": 3}
    assert owner.put(f"/api/data/{name}/skip", {"keys": keys[:1], "on": False}).json() == {"skipped": 2}
    assert [row["skipped"] for row in owner.get(f"/api/data/{name}/rows").json()["rows"]] == [False, True, True, False]
    file = studio.root / owner.get(f"/api/data/{name}").json()["skip_file"]
    assert len(open_source(DataOptions(location="pictures", skip=str(file)), 0)) == 2
    for bad in ([1], ["a\nb"], ["a\rb"], ["a\u2028b"], [""], "x", None):
        assert owner.put(f"/api/data/{name}/skip", {"keys": bad}).status == 400, bad


def test_few_datasets_are_open_at_a_time(studio: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    names = [add(studio, "pictures", background=colour) for colour in ("red", "blue", "white", "black")]
    for name in names:
        assert studio.owner.get(f"/api/data/{name}").status == 200
        assert len(studio.studio.datasets._open) <= 2
    listed = [one["id"] for one in studio.owner.get("/api/data").json()]
    assert sorted(listed) == sorted(names)


def test_a_dataset_of_the_hub_and_a_missing_one_are_refused(studio: Running):
    for location in ("fusing/fill50k", "missing", "table.xlsx", ""):
        answer = studio.owner.post("/api/data", {"values": {"location": location}})
        assert (answer.status, answer.json()["option"]) == (400, "data.location"), location
    assert studio.owner.post("/api/data", {"values": {"location": "pictures", "skip": "x"}}).status == 400
    assert studio.owner.get("/api/data").json() == []


# Captions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["pictures", "lines"])
def test_a_caption_is_stored_and_a_stale_edit_is_refused_with_the_present_text(studio: Running, location: str):
    """Two tabs edit the same row."""
    owner, name = studio.owner, add(studio, location)
    path = f"/api/data/{name}/rows/1/captions"
    new = 'a "new"\u2028 caption\\ with ümlauts'
    answer = owner.put(path, {"captions": [new], "was": [CAPTIONS[1]]})
    assert (answer.status, answer.json()["captions"]) == (200, [new]), answer
    stale = owner.put(path, {"captions": ["of the other tab"], "was": [CAPTIONS[1]]})
    assert stale.status == 412
    assert "ümlauts" in stale.error
    assert captions_of(owner, name) == [[CAPTIONS[0]], [new], [CAPTIONS[2]], [CAPTIONS[3]]]
    assert captions_of(owner, name, "?find=new") == [[new]], "the search knows the new caption"
    assert owner.put(path, {"captions": [""], "was": [new]}).json()["captions"] == [""]


@pytest.mark.parametrize(
    ("location", "more"),
    [("table.csv", {}), ("shard.tar", {}), ("pictures", {"captions": "filename"}), ("pictures", {"captions": "none"})],
)
def test_captions_of_other_layouts_are_not_edited(studio: Running, location: str, more: dict[str, str]):
    before = (studio.root / "table.csv").read_bytes(), (studio.root / "shard.tar").read_bytes()
    name = add(studio, location, **more)
    row = studio.owner.get(f"/api/data/{name}/rows").json()["rows"][0]
    body = {"captions": ["new"], "was": row["captions"]}
    answer = studio.owner.put(f"/api/data/{name}/rows/0/captions", body)
    assert answer.status == 409, answer
    assert before == ((studio.root / "table.csv").read_bytes(), (studio.root / "shard.tar").read_bytes())


def test_a_file_that_cannot_be_written_is_a_sentence(studio: Running):
    name = add(studio, "pictures")
    (studio.root / "pictures" / "1.txt").unlink()
    (studio.root / "pictures" / "1.txt").mkdir()
    answer = studio.owner.put(f"/api/data/{name}/rows/1/captions", {"captions": ["a"], "was": ["b"]})
    assert answer.status == 400, answer


@pytest.mark.parametrize(
    "content",
    [
        *({"captions": ["a"]}, {"captions": "a", "was": ["x"]}, {"captions": [1], "was": ["x"]}),
        *({"captions": [], "was": [CAPTIONS[0]]}, {"captions": ["a\0"], "was": [CAPTIONS[0]]}),
        *({"captions": ["a" * 10_001], "was": [CAPTIONS[0]]}, {"captions": ["a", "b"], "was": [CAPTIONS[0]]}),
        *({"captions": ["\ud800"], "was": [CAPTIONS[0]]},),
    ],
)
def test_a_bad_caption_is_refused(studio: Running, content: dict[str, Any]):
    name = add(studio, "pictures")
    answer = studio.owner.put(f"/api/data/{name}/rows/0/captions", content)
    assert answer.status in (400, 409), answer
    assert (studio.root / "pictures" / "0.txt").read_text() == CAPTIONS[0] + "\n"


def opened(folder: Path) -> Source:
    return open_source(DataOptions(location=str(folder)), 0)


@pytest.mark.parametrize(("ending", "last"), [(b"\n", b"\n"), (b"\r\n", b"\r\n"), (b"\n", b""), (b"\n\n", b"\n\n")])
def test_other_lines_of_a_table_stay_equal_to_the_byte(tmp_path: Path, ending: bytes, last: bytes):
    folder = write_lines(tmp_path / "lines", ending, last)
    file = folder / "train" / "metadata.jsonl"
    before = file.read_bytes()
    for index in range(4):
        file.write_bytes(before)
        source = opened(folder)
        was = source.identify(index, "").captions
        source.write_captions(index, ("ein neuer Text, länger als der alte\nmit Zeile",), was)
        after, lines = file.read_bytes(), before.split(ending)
        assert after.count(b"\r") == before.count(b"\r")
        changed = after.split(ending)
        assert len(changed) == len(lines)
        assert [n for n, (a, b) in enumerate(zip(lines, changed, strict=True)) if a != b] == [index]
        source = opened(folder)
        assert source.identify(index, "").captions == ("ein neuer Text, länger als der alte\nmit Zeile",)
        assert [source.identify(n, "").captions[0] for n in range(4) if n != index] == [
            caption for n, caption in enumerate(CAPTIONS) if n != index
        ]
    assert list(file.parent.glob("*.tmp")) == []


def test_a_list_of_captions_stays_a_list_and_other_fields_stay(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(png())
    row = {"file_name": "0.png", "conditioning_image_file_name": "0.png", "text": ["a", "b"], "id": 10**20}
    row |= {"x": [1.50], "half": "\ud800"}
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_text(json.dumps(row) + "\n")
    opened(tmp_path).write_captions(0, ("c", "d", "e"), ("a", "b"))
    assert json.loads(file.read_text()) == {**row, "text": ["c", "d", "e"]}


def test_a_json_array_is_not_edited(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(png())
    row = {"file_name": "0.png", "conditioning_image_file_name": "0.png", "text": "a"}
    file = tmp_path / "train" / "metadata.jsonl"
    file.write_text(json.dumps([row]))
    with pytest.raises(UserError) as refused:
        opened(tmp_path).write_captions(0, ("b",), ("a",))
    assert refused.value.kind == "read_only"
    assert json.loads(file.read_text()) == [row]


def test_a_caption_is_stored_where_it_was_read(tmp_path: Path):
    """A .caption beside a picture, and a picture in a folder below."""
    folder = write_pictures(tmp_path / "pictures")
    (folder / "deep").mkdir()
    (folder / "deep" / "x.png").write_bytes(png())
    (folder / "deep" / "x.caption").write_text("old")
    (folder / "control" / "deep").mkdir()
    (folder / "control" / "deep" / "x.png").write_bytes(png())
    source = opened(folder)
    index = next(n for n in range(len(source)) if source.key(n).endswith("deep/x.png"))
    source.write_captions(index, ("new",), ("old",))
    assert (folder / "deep" / "x.caption").read_text() == "new\n"
    assert not (folder / "deep" / "x.txt").exists()
    assert opened(folder).identify(index, "").captions == ("new",)
