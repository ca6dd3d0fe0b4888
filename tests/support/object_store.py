"""Remote data on loopback: a web server with byte ranges, an S3 server, and writers of every dataset layout."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
import shutil
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

BUCKET = "pairs"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

Rows = list[dict[str, Any]]


@dataclass
class WebServer:
    """The behaviour of the server, and its requests so far.

    Attributes:
        address: URL of the served folder.
        failures: number of next requests that are answered with `status`.
        has_ranges: whether the server supports range requests.
        asked: number of requests for each "METHOD /path".
    """

    address: str
    failures: int = 0
    status: int = 503
    has_ranges: bool = True
    asked: Counter[str] = field(default_factory=Counter)


@contextmanager
def serve_folder(folder: Path) -> Iterator[WebServer]:
    """Serves the folder's files while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_GET  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

        def _answer(self) -> None:
            inner = unquote(urlsplit(self.path).path)
            web.asked[f"{self.command} {inner}"] += 1
            if web.failures:
                web.failures -= 1
                return self._send(web.status, b"")
            path = folder / inner.lstrip("/")
            if not path.is_file():
                return self._send(404, b"")
            data = path.read_bytes()
            mark = hashlib.sha1(data).hexdigest()
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not span or not web.has_ranges:
                return self._send(200, data, ETag=f'"{mark}"')
            start, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            part = data[start : end + 1]
            return self._send(206, part, **{"ETag": f'"{mark}"', "Content-Range": f"bytes {start}-{end}/{len(data)}"})

        def _send(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web = WebServer(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Runs an S3 server whose bucket holds the folder's files; yields the environment variables to reach it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # by default it logs each request
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        env = {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client = boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.put_object(Bucket=BUCKET, Key=str(path.relative_to(folder)), Body=path.read_bytes())
        yield env
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()  # a later server at this address would get the old connections


@contextmanager
def as_user(env: dict[str, str], *actions: str) -> Iterator[dict[str, str]]:
    """While the block runs, the S3 server of `serve_s3` checks who asks; yields `env` with the keys of a user who may
    do only these actions, such as "s3:GetObject"."""
    import boto3

    options = {"endpoint_url": env["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    iam = boto3.client("iam", **options, **keys)
    name = f"user-{uuid.uuid4().hex[:8]}"
    iam.create_user(UserName=name)
    if actions:
        allowed = [{"Effect": "Allow", "Action": list(actions), "Resource": "*"}]
        policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
        iam.put_user_policy(UserName=name, PolicyName="allowed", PolicyDocument=policy)
    made = iam.create_access_key(UserName=name)["AccessKey"]
    _check_rights_after(env, "0")
    try:
        yield {**env, "AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}
    finally:
        _check_rights_after(env, "inf")


def _check_rights_after(env: dict[str, str], requests: str) -> None:
    address = f"{env['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    plain = {"Content-Type": "text/plain"}
    with urlopen(Request(address, requests.encode(), plain, method="POST")) as answer:
        answer.read()


def read_rows(split: Path) -> Rows:
    """Reads the rows of an image folder's split, with the paths of the pictures under "image" and "condition"."""
    rows = [json.loads(line) for line in (split / "metadata.jsonl").read_text().splitlines()]
    return [
        {
            "image": split / row["file_name"],
            "condition": split / row["conditioning_image_file_name"],
            "text": row["text"],
        }
        for row in rows
    ]


def write_paired(folder: Path, rows: Rows) -> Path:
    """Writes the folders images/ and conditions/, and captions in .txt files."""
    for name in ("images", "conditions"):
        (folder / name).mkdir(parents=True)
    for row in rows:
        shutil.copy(row["image"], folder / "images")
        shutil.copy(row["condition"], folder / "conditions" / row["image"].name)
        (folder / "images" / row["image"].name).with_suffix(".txt").write_text(row["text"] + "\n")
    return folder


def write_manifest(path: Path, rows: Rows) -> Path:
    """Writes `rows` to a .jsonl, .csv or .parquet file, with paths or URLs of the pictures."""
    columns = {"image": "image", "conditioning_image": "condition", "text": "text"}
    table = [{column: str(row[part]) for column, part in columns.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def write_parquet_shards(folder: Path, rows: Rows, shards: int = 2, group: int = 2) -> Path:
    """Writes train-NNNNN.parquet with pictures as `datasets` stores them, `group` rows a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = [
            {
                "image": {"bytes": row["image"].read_bytes(), "path": row["image"].name},
                "conditioning_image": {"bytes": row["condition"].read_bytes(), "path": None},
                "text": row["text"],
            }
            for row in rows[shard::shards]
        ]
        path = folder / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=group)
    return folder


def write_tar_shards(folder: Path, rows: Rows, shards: int = 2) -> Path:
    """Writes NNNN.tar with STEM.png, STEM.cond.png and a caption, alternately in .txt and in .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for number, row in enumerate(rows[shard::shards]):
            stem = row["image"].stem
            members[f"{stem}.png"] = row["image"].read_bytes()
            members[f"{stem}.cond.png"] = row["condition"].read_bytes()
            if number % 2:
                members[f"{stem}.json"] = json.dumps({"text": row["text"], "number": number}).encode()
            else:
                members[f"{stem}.txt"] = row["text"].encode() + b"\n"
        write_tar(folder / f"{shard:04d}.tar", members)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
