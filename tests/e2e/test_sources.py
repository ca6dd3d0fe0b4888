"""The embedded base trains on every layout, from the command line."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.object_store import (
    Rows,
    read_rows,
    serve_folder,
    serve_s3,
    write_manifest,
    write_paired,
    write_parquet_shards,
    write_tar_shards,
)
from support.runs import losses

from t2i_adapter.cli import main

EMOJI = Path(__file__).resolve().parents[1] / "assets" / "emoji"
ONE_SHARD = {
    "an image folder": "folder",
    "a folder of pictures": "paired",
    "a manifest": "flat/pairs.csv",
    "parquet shards": "flat/pairs.parquet",
}
"""Layout -> location. They hold equal pairs in one order, so the losses are equal."""


@pytest.fixture(scope="module")
def rows() -> Rows:
    return read_rows(EMOJI / "test")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> Path:
    """One set of pairs in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    shutil.copytree(EMOJI / "test", folder / "folder" / "train")
    write_paired(folder / "paired", rows)
    flat = folder / "flat"
    flat.mkdir()
    for row in rows:
        for picture in (row["image"], row["condition"]):
            (flat / picture.name).write_bytes(picture.read_bytes())
    names = [{**row, "image": row["image"].name, "condition": row["condition"].name} for row in rows]
    for suffix in ("jsonl", "csv", "parquet"):
        write_manifest(flat / f"pairs.{suffix}", names)
    write_tar_shards(folder / "tar", rows)
    write_parquet_shards(folder / "parquet", rows)
    return folder


def words(out: Path, *data: str) -> list[str]:
    return [
        *("train", "--output_dir", str(out), *data, "--data.resolution=128", "--data.num_workers=0"),
        *("--train.batch_size=2", "--train.max_steps=2", "--train.seed=3", "--tracking.report_to=none"),
        *("--tracking.log_every=1", "--checkpoint.every=2"),
    ]


def finite_losses(out: Path) -> list[float]:
    found = losses(out)
    assert len(found) == 2 and all(math.isfinite(loss) for loss in found)
    assert (out / "diffusion_pytorch_model.safetensors").is_file()
    return found


def train(out: Path, *data: str) -> list[float]:
    assert main(words(out, *data)) == 0
    return finite_losses(out)


@pytest.fixture(scope="module")
def expected(layouts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(tmp_path_factory.mktemp("jsonl") / "out", f"--data={layouts}/flat/pairs.jsonl")


@pytest.mark.parametrize(("what", "place"), ONE_SHARD.items())
def test_every_layout_of_the_same_pairs_trains_to_the_same_losses(
    what: str, place: str, layouts: Path, expected: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "out", f"--data={layouts / place}") == expected
    assert f"read as {what}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def from_shards(layouts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of a run from local shards, by folder."""
    out = tmp_path_factory.mktemp("shards")
    patterns = {"tar": "tar/*.tar", "parquet": "parquet/train-{00000..00001}-of-00002.parquet"}
    return {name: train(out / name, f"--data={layouts}/{one}") for name, one in patterns.items()}


def test_shards_hold_the_same_pairs_in_another_order(from_shards: dict, expected: list[float]) -> None:
    assert from_shards["tar"] == from_shards["parquet"] != expected


@pytest.fixture(scope="module")
def web(layouts: Path) -> Iterator[str]:
    with serve_folder(layouts) as server:
        yield server.address


@pytest.mark.parametrize("pattern", ["tar/{0000,0001}.tar", "parquet/train-0000{0..1}-of-00002.parquet"])
def test_shards_over_http(pattern: str, web: str, from_shards: dict, tmp_path: Path) -> None:
    assert train(tmp_path / "out", f"--data={web}/{pattern}") == from_shards[pattern.split("/")[0]]


def test_a_manifest_of_addresses(web: str, rows: Rows, tmp_path: Path, expected: list[float]) -> None:
    named = [{**row, **{part: f"{web}/flat/{row[part].name}" for part in ("image", "condition")}} for row in rows]
    manifest = write_manifest(tmp_path / "pairs.jsonl", named)
    assert train(tmp_path / "out", f"--data={manifest}") == expected


def test_shards_on_s3(layouts: Path, from_shards: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
    with serve_s3(layouts) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        for pattern in ("tar/*.tar", "parquet/*.parquet"):
            name = pattern.split("/")[0]
            assert train(tmp_path / name, f"--data=s3://pairs/{pattern}") == from_shards[name]


def test_an_emoji_package(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="the extra [emoji] is not installed")
    icons = {f"thing-{n}": {"body": f'<circle cx="16" cy="16" r="{n + 3}" fill="#f00"/>'} for n in range(9)}
    data = json.dumps({"prefix": "x", "height": 32, "icons": icons}).encode()
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    train(tmp_path / "out", f"--data={tmp_path}/emoji.tgz")


def test_shapes_and_an_annotator(tmp_path: Path, layouts: Path) -> None:
    train(tmp_path / "own", "--data=shapes:4", "--data.condition=depth")
    train(tmp_path / "made", f"--data={layouts}/flat/pairs.csv", "--data.condition=canny")


HUB = """
import sys
from t2i_adapter.cli import main
for out, *more in (("whole",), ("streamed", "--data.streaming")):
    assert main([*sys.argv[1:], "--output_dir", out, "--data=someone/pairs", *more]) == 0
"""


def test_a_hub_set_whole_and_streamed(layouts: Path, tmp_path: Path) -> None:
    from support.hub_server import serve

    options = words(tmp_path)
    del options[1:3]
    with serve({("someone/pairs", "main"): layouts / "parquet"}) as address:
        done = subprocess.run(
            [sys.executable, "-c", HUB, *options],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout
    assert "8 pairs from someone/pairs (split train)" in done.stdout
    assert "8 pairs from someone/pairs (split train, 2 shards)" in done.stdout
    finite_losses(tmp_path / "whole"), finite_losses(tmp_path / "streamed")
