"""Remote files: they are found, downloaded once, and deleted when the folder is full; errors name the address."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.object_store import (
    Rows,
    WebServer,
    read_rows,
    serve_folder,
    serve_s3,
    write_manifest,
    write_parquet_shards,
)
from support.object_store import write_tar_shards as write_tars
from support.tiny import write_circles

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import remote
from t2i_adapter.data.addresses import expand
from t2i_adapter.data.remote import ask
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.data.store import Store
from t2i_adapter.errors import UserError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return read_rows(write_circles(tmp_path / "circles", num=4) / "train")


@pytest.fixture
def web(rows: Rows, tmp_path: Path) -> Iterator[WebServer]:
    """Serves tar/0000.tar and 0001.tar, parquet/train-*.parquet, and flat/ with pictures and pairs.csv."""
    write_tars(tmp_path / "tar", rows)
    write_parquet_shards(tmp_path / "parquet", rows)
    flat = tmp_path / "flat"
    flat.mkdir()
    for row in rows:
        for part in ("image", "condition"):
            (flat / row[part].name).write_bytes(row[part].read_bytes())
    names = [{**row, "image": row["image"].name, "condition": row["condition"].name} for row in rows]
    write_manifest(flat / "pairs.csv", names)
    with serve_folder(tmp_path) as server:
        yield server


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def open_at(place: str, kept: Path, **options: Any) -> Source:
    return open_source(DataOptions(location=place, prepared_dir=str(kept), **options), seed=0)


def fault_of(place: str, kept: Path, index: int = 0, **options: Any) -> str:
    with pytest.raises(UserError) as fault:
        open_at(place, kept, **options)[index]
    assert "\n" not in str(fault.value)
    return str(fault.value)


def read_all(source: Source) -> list[str]:
    return [source[i].digest for i in range(len(source))]


def test_braces() -> None:
    assert expand("a") == ["a"]
    assert expand("{08..11}.tar") == ["08.tar", "09.tar", "10.tar", "11.tar"]
    assert expand("{8..10}") == ["8", "9", "10"]
    assert expand("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    for pattern, count in (("{0..999999999}/{a,b}", "2,000,000,000"), ("{3..1}", "0")):
        with pytest.raises(UserError, match=f"stands for {count} files; allowed are 1 to 1,000,000"):
            expand(pattern)


@pytest.mark.parametrize("inner", ["tar/{0000..0001}.tar", "parquet/train-0000{0,1}-of-00002.parquet"])
def test_stamps_of_shards_are_equal_in_two_runs(web: WebServer, kept: Path, inner: str) -> None:
    first, again = (open_at(f"{web.address}/{inner}", kept) for _ in range(2))
    stamps = [first.stamp(i) for i in range(4)]
    assert None not in stamps and len(set(stamps)) == 4
    assert [again.stamp(i) for i in range(4)] == stamps
    assert read_all(first) == read_all(again)


def test_a_shard_is_fetched_once_and_again_only_when_it_has_changed(web: WebServer, kept: Path, tmp_path: Path) -> None:
    place = f"{web.address}/tar/{{0000..0001}}.tar"
    digests = read_all(open_at(place, kept))
    assert read_all(open_at(place, kept)) == digests
    assert [web.asked[f"GET /tar/000{i}.tar"] for i in (0, 1)] == [1, 1]
    (tmp_path / "tar" / "0001.tar").write_bytes((tmp_path / "tar" / "0000.tar").read_bytes())
    assert read_all(open_at(place, kept)) == digests[:2] * 2
    assert [web.asked[f"GET /tar/000{i}.tar"] for i in (0, 1)] == [1, 2]


def test_an_address_may_have_a_query(web: WebServer, kept: Path) -> None:
    source = open_at(f"{web.address}/tar/0000.tar?signature=a/b", kept)
    assert [source[i].key for i in range(2)] == ["0000.tar/00000", "0000.tar/00002"]


def test_a_file_whose_own_name_looks_like_a_pattern(kept: Path, rows: Rows, tmp_path: Path) -> None:
    write_tars(tmp_path / "[2]{a}", rows, shards=1)
    assert len(open_at(f"{tmp_path}/[2]{{a}}/0000.tar", kept)) == 4


def test_an_index_outlives_its_fetched_shard(web: WebServer, kept: Path) -> None:
    place = f"{web.address}/tar/{{0000..0001}}.tar"
    digests = read_all(open_at(place, kept))
    for path in (kept / "fetched").iterdir():
        path.unlink()
    before = web.asked["GET /tar/0000.tar"]
    source = open_at(place, kept)
    assert web.asked["GET /tar/0000.tar"] == before, "opening reads the kept index"
    assert read_all(source) == digests
    assert web.asked["GET /tar/0000.tar"] == before + 1


def test_a_damaged_index_is_made_again(web: WebServer, kept: Path) -> None:
    place = f"{web.address}/tar/0000.tar"
    digests = read_all(open_at(place, kept))
    for path in (kept / "indices").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert read_all(open_at(place, kept)) == digests


def test_many_threads_fetch_a_file_once(web: WebServer, kept: Path) -> None:
    store, blob = Store(kept), ask(f"{web.address}/tar/0000.tar")
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(store.local(blob).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == 8 and len(set(found)) == 1
    assert web.asked["GET /tar/0000.tar"] == 1


def test_a_forked_process_fetches_for_itself(web: WebServer, kept: Path) -> None:
    place = f"{web.address}/tar/{{0000..0001}}.tar"
    source = open_at(place, kept)
    for path in (kept / "fetched").iterdir():
        path.unlink()
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(read_all(source)))
    child.start()
    digests = answers.get(timeout=60)
    child.join(timeout=30)
    assert len(set(digests)) == 4 and digests == read_all(source)


def test_the_least_recently_used_files_are_deleted_when_the_folder_is_full(web: WebServer, kept: Path) -> None:
    names = [f"{web.address}/flat/0000{i}.png" for i in range(4)]
    blobs = [ask(name) for name in names]
    store = Store(kept, limit=sum(blob.size for blob in blobs[:3]) + blobs[3].size // 2)
    paths = [store.local(blob) for blob in blobs[:3]]
    (kept / "fetched" / "killed.1.tmp").write_bytes(b"x")
    store.local(blobs[0])
    store.local(blobs[3])
    left = [path.exists() for path in paths]
    assert left[0], "it was used after the others"
    assert not left[1], "it was used first"
    assert store.place(blobs[3]).exists()
    assert (kept / "fetched" / "killed.1.tmp").exists(), "another process may be writing it"
    os.utime(kept / "fetched" / "killed.1.tmp", (0, 0))
    store.local(blobs[1])
    assert not (kept / "fetched" / "killed.1.tmp").exists()


def test_a_request_that_fails_twice_is_retried(web: WebServer, kept: Path) -> None:
    web.failures = 2
    assert len(open_at(f"{web.address}/tar/0000.tar", kept)) == 2


@pytest.mark.parametrize(("status", "tries"), [(503, "3 tries"), (403, "1 try")])
def test_an_address_that_always_fails_is_named(web: WebServer, kept: Path, status: int, tries: str) -> None:
    web.failures, web.status = 1000, status
    url = f"{web.address}/tar/0000.tar"
    message = fault_of(url, kept)
    assert message.startswith(f"{url}: cannot be read ({tries}): {status}")


def test_a_missing_shard_is_named(web: WebServer, kept: Path, tmp_path: Path) -> None:
    assert fault_of(f"{web.address}/tar/{{0000..0002}}.tar", kept) == f"{web.address}/tar/0002.tar: no such file there."
    pattern = f"{tmp_path}/tar/{{0000..0002}}.tar"
    assert fault_of(pattern, kept) == f"--data {tmp_path}/tar/0002.tar: no such file."
    assert fault_of(f"{tmp_path}/tar/x*.tar", kept) == f"--data {tmp_path}/tar/x*.tar: names no file."


def test_an_address_that_nobody_answers_is_named(kept: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/0000.tar"
    assert fault_of(url, kept).startswith(f"{url}: cannot be read (3 tries): ")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/0.tar", "simplecache::http://127.0.0.1/0.tar"])
def test_other_kinds_of_addresses_are_refused(url: str, kept: Path) -> None:
    assert "addresses of this kind are not supported; allowed are http, https, s3, hf" in fault_of(url, kept)


def test_parquet_from_a_server_without_ranges(web: WebServer, kept: Path) -> None:
    web.has_ranges = False
    place = f"{web.address}/parquet/train-{{00000,00001}}-of-00002.parquet"
    assert len(set(read_all(open_at(place, kept)))) == 4


def test_a_remote_manifest_names_pictures_beside_it(web: WebServer, kept: Path, tmp_path: Path) -> None:
    place = f"{web.address}/flat/pairs.csv"
    local = open_at(str(tmp_path / "flat" / "pairs.csv"), kept)
    source = open_at(place, kept)
    assert source.stamp(0) is None
    assert read_all(source) == read_all(local)
    stamp = source.stamp(0)
    read_all(source)
    assert stamp is not None and source.stamp(0) == stamp
    assert web.asked["GET /flat/00000.png"] == 1


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ("../tar/0000.tar", "leaves the data folder http://"),
        ("/etc/passwd", "leaves the data folder http://"),
        ("file:///etc/passwd", "names a local file, but the table comes from http://"),
        ("nothing.png", "/flat/nothing.png: no such file there"),
    ],
)
def test_a_remote_manifest_reads_no_local_file(
    web: WebServer, kept: Path, tmp_path: Path, image: str, part: str
) -> None:
    (tmp_path / "flat" / "bad.csv").write_text(f"image,conditioning_image,text\n{image},00000_outline.png,x\n")
    message = fault_of(f"{web.address}/flat/bad.csv", kept)
    assert part in message and "line 2, column image" in message


def test_rows_of_an_image_folder_may_not_name_addresses(web: WebServer, kept: Path, tmp_path: Path) -> None:
    line = f'{{"image": "{web.address}/flat/00000.png", "conditioning_image": "x.png", "text": "x"}}\n'
    (tmp_path / "flat" / "metadata.jsonl").write_text(line)
    message = fault_of(str(tmp_path / "flat"), kept)
    assert "is an address; only files are read" in message and message.endswith("--data FOLDER/metadata.jsonl")


def test_s3_by_glob_and_its_faults(rows: Rows, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
    write_tars(tmp_path / "up" / "tar", rows)
    (tmp_path / "up" / "tar" / "._0000.tar").write_bytes(b"Mac OS X")
    local = read_all(open_at(str(tmp_path / "up" / "tar"), kept))
    with serve_s3(tmp_path / "up") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        source = open_at("s3://pairs/tar/*.tar", kept)
        assert read_all(source) == local and source.stamp(0) is not None
        assert fault_of("s3://pairs/tar/9.tar", kept) == "s3://pairs/tar/9.tar: no such file there."
        assert "names no file" in fault_of("s3://pairs/none/*.tar", kept)
        assert "s3://nobody/0.tar: no such file there" in fault_of("s3://nobody/0.tar", kept)


WITHOUT_S3FS = """
import sys
sys.modules["s3fs"] = None
from t2i_adapter.data.remote import find
try:
    find("s3://pairs/{0..1}.tar")
except Exception as fault:
    print(type(fault).__name__, fault)
"""


def test_s3_without_its_package_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_S3FS], capture_output=True, text=True, timeout=60)
    line = (
        "UserError s3://pairs/0.tar: s3:// needs a package that is not installed: pip install 'sdxl-t2i-adapter[s3]'\n"
    )
    assert done.stdout == line


def test_a_folder_that_cannot_be_made_names_the_flag(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert fault_of(f"{web.address}/tar/0000.tar", tmp_path / "file").startswith(
        f"--data.prepared_dir {tmp_path}/file/"
    )


def test_indices_are_made_once(kept: Path) -> None:
    made: list[int] = []

    def make() -> pa.Table:
        made.append(1)
        return pa.table({"x": [1, 2]})

    assert [Store(kept).index("key", make).column("x").to_pylist() for _ in range(2)] == [[1, 2], [1, 2]]
    Store(kept).index("other", make)
    assert len(made) == 2
