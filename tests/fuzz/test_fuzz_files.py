"""Files of any content: pictures, rows, archives, shards, records. Damage is detected, or the content read is right.

Some tests assert only that no exception other than a `UserError` escapes; their docstrings say so.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support.icc import grey_profile, rgb_profile

from t2i_adapter.cache.shard_file import Record, damage
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.cache.stamps import Stamps
from t2i_adapter.config.tree import AdapterOptions, DataOptions
from t2i_adapter.data.picture import StoredPicture, decode
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import complete_card
from t2i_adapter.export.card_text import Facts
from t2i_adapter.export.measured import read_evaluation
from t2i_adapter.files import parse_json
from t2i_adapter.models.adapter import build_adapter, load_adapter
from t2i_adapter.models.record import FILE_NAME, Metadata, read_metadata


def times(share: float) -> int:
    """`share` of the examples of the current profile, for tests that are faster or slower than others."""
    return int(share * settings().max_examples)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)
HOSTILE = (b"[" * 100_000, b"9" * 5_000, b'"\\ud800"', b"1e999", b"NaN", b"\xff", b"", b"{", b"null", b"[]", b"{}")


def spoil(content: bytes, place: int, change: int) -> bytes:
    """Changes one byte, or cuts the content, at `place`."""
    place %= max(1, len(content))
    if not content or change % 4 == 0:
        return content[:place]
    return content[:place] + bytes([content[place] ^ (change % 255 + 1)]) + content[place + 1 :]


SPOILS = st.tuples(st.integers(0, 2**31), st.integers(0, 2**16))


@given(st.binary(max_size=100))
@pytest.mark.parametrize("hostile", HOSTILE)
def test_json_is_read_or_a_value_error(hostile: bytes, content: bytes):
    """Asserts only that no exception other than ValueError escapes."""
    for text in (hostile, content):
        with suppress(ValueError):
            parse_json(text)


# Pictures -------------------------------------------------------------------------------------------------------------


def stored(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    options: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        options = {"exif": exif, "icc_profile": grey_profile(1.8) if mode == "L" else rgb_profile()}
    Image.fromarray(values).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = {
    (kind, mode): stored(kind, mode) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF") for mode in ("RGB", "L")
}
GOOD["PNG", "P"] = stored("PNG", "P")


@given(st.sampled_from(sorted(GOOD)), st.lists(SPOILS, min_size=1, max_size=4))
@settings(max_examples=times(5))
def test_a_damaged_picture_is_a_picture_or_a_line(kind: tuple[str, str], spoils: list[tuple[int, int]]):
    content = GOOD[kind]
    for place, change in spoils:
        content = spoil(content, place, change)
    try:
        picture = decode(StoredPicture("x", content), is_photo=True)
        assert picture.mode == "RGB"
    except UserError as fault:
        assert str(fault).startswith("x: ")


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undamaged picture x.png."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "x.png").write_bytes(GOOD["PNG", "RGB"])
    return folder


def read_all(place: Path | str, cache: Path, **options: Any) -> int:
    """Number of rows that can be read. Every other row must raise a UserError, and no other exception may escape."""
    num_good = 0
    try:
        source = open_source(DataOptions(location=str(place), prepared_dir=str(cache), **options), seed=0)
    except UserError:
        return 0
    for number in range(len(source)):
        source.stamp(number)
        try:
            sample = source[number]
            source.identify(number)
        except UserError:
            source.key(number).encode()
            continue
        for text in (sample.key, *sample.captions):
            text.encode()
        json.dumps(dict(sample.meta)).encode()
        num_good += 1
    return num_good


CELL = st.one_of(
    JSON, st.sampled_from(["x.png", "../x.png", "/etc/passwd", "http://[", "file:///etc/passwd", "\0", "\ud800"])
)
ROW = st.dictionaries(
    st.sampled_from(["image", "conditioning_image", "text", "file_name", "conditioning_image_file_name", "other"]), CELL
)


@given(rows=st.lists(ROW | JSON, min_size=1, max_size=4), tail=st.binary(max_size=20))
def test_any_rows_are_read_or_refused(pairs: Path, rows: list[Any], tail: bytes):
    table = pairs / "rows.jsonl"
    good = {"image": "x.png", "conditioning_image": "x.png", "text": "a"}
    lines = [json.dumps(row).encode() for row in (good, *rows)]
    table.write_bytes(b"\n".join([*lines, tail]))
    assert read_all(table, pairs / "cache") >= 1


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_line_is_one_bad_row(pairs: Path, hostile: bytes):
    table = pairs / "rows.jsonl"
    good = json.dumps({"image": "x.png", "conditioning_image": "x.png", "text": "a"}).encode()
    table.write_bytes(good + b"\n" + hostile + b"\n" + good + b"\n")
    assert read_all(table, pairs / "cache") == 2


@given(cells=st.lists(st.lists(st.text(max_size=8), min_size=3, max_size=3), max_size=3), tail=st.binary(max_size=12))
@settings(max_examples=times(0.5))
def test_any_csv_is_read_or_refused(pairs: Path, cells: list[list[str]], tail: bytes):
    """Asserts only that no exception other than a UserError escapes."""
    text = io.StringIO()
    csv.writer(text).writerows([["image", "conditioning_image", "text"], ["x.png", "x.png", "a"], *cells])
    (pairs / "rows.csv").write_bytes(text.getvalue().encode("utf-8", "surrogatepass") + tail)
    read_all(pairs / "rows.csv", pairs / "cache")


def tar_of_pairs() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.png", GOOD["PNG", "RGB"]), ("a.cond.png", GOOD["PNG", "RGB"]), ("a.txt", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TAR = tar_of_pairs()
HEADERS = [place + inner for place in range(0, len(TAR), 512) for inner in (0, 100, 124, 130, 148, 156, 157, 257, 345)]


@given(st.lists(st.tuples(st.sampled_from(HEADERS) | st.integers(0, len(TAR)), st.integers(0, 2**16)), max_size=3))
@settings(max_examples=times(2))
def test_a_damaged_tar_is_read_or_refused(spoils: list[tuple[int, int]]):
    """Asserts only that no exception other than a UserError escapes."""
    content = TAR
    for place, change in spoils:
        content = spoil(content, place, change)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "0.tar").write_bytes(content)
        read_all(Path(folder) / "0.tar", Path(folder) / "cache")


@given(st.lists(SPOILS, min_size=1, max_size=3))
def test_a_damaged_index_of_a_tar_is_rebuilt(pairs: Path, spoils: list[tuple[int, int]]):
    """The index lies in the cache; a damaged one would point the reader to wrong bytes."""
    shard, cache = pairs / "0.tar", pairs / "indexed"
    shard.write_bytes(TAR)
    shutil.rmtree(cache, ignore_errors=True)  # the index of the example before
    assert read_all(shard, cache) == 1
    (index,) = (cache / "indices").iterdir()
    undamaged = index.read_bytes()
    for place, change in spoils:
        index.write_bytes(spoil(index.read_bytes(), place, change))
    assert read_all(shard, cache) == 1
    assert index.read_bytes() == undamaged


# The cache ------------------------------------------------------------------------------------------------------------


def write_shard(folder: Path) -> tuple[Path, list[bytes]]:
    keys = [bytes([n]) * 32 for n in range(3)]
    with ShardWriter(folder) as writer:
        for n, key in enumerate(keys):
            writer.add(key, Record({"a": np.full((2, 3), n, np.float16), "b": np.arange(5)}, {"n": n}, n))
    (shard,) = folder.glob("*.shard")
    return shard, keys


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    return write_shard(tmp_path_factory.mktemp("shard"))


@given(spoils=SPOILS)
@settings(max_examples=times(5))
def test_a_damaged_shard_gives_what_was_written_or_a_line(shard: tuple[Path, list[bytes]], spoils: tuple[int, int]):
    file, keys = shard
    content = file.read_bytes()
    spoilt = spoil(content, *spoils)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_bytes(spoilt)
        assert damage(copy) is not None, "a changed byte is not detected"
        records = Shards(Path(folder))
        for n, key in enumerate(keys):
            try:
                record = records[key]
            except (KeyError, UserError):
                continue
            assert record.tag == n and record.facts == {"n": n}
            assert (record.arrays["a"] == n).all() and record.arrays["b"].tolist() == [0, 1, 2, 3, 4]


@given(header=JSON, arrays=JSON)
def test_a_forged_record_is_refused(header: Any, arrays: Any):
    """A checksum is no signature: whoever can write to a shared cache can write any header.

    Asserts only that no exception other than a DamagedShardError escapes.
    """
    import struct
    import zlib

    from t2i_adapter.cache.shard_file import DamagedShardError, unpack

    for content in (
        header,
        {"arrays": arrays, "facts": {}, "tag": 0},
        {"arrays": {"a": arrays}, "facts": {}, "tag": 0},
    ):
        text = json.dumps(content).encode()
        body = text + b" " * (-(8 + len(text)) % 16) + bytes(64)
        data = struct.pack("<II", len(body) - 64, zlib.crc32(body)) + body
        with suppress(DamagedShardError):
            unpack(memoryview(data), check=True)


@given(st.binary(max_size=200))
def test_stamps_of_any_content_return_no_digest(content: bytes):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.stamps").write_bytes(content)
        _, known = Stamps(Path(folder)).digests(["a", None])
        assert not known.any()


# The adapter's folder -------------------------------------------------------------------------------------------------

UNET = {"block_out_channels": (8, 8, 8), "addition_embed_type": "text_time"}
RECORD: dict[str, Any] = {"schema": 1, "base": {"name": "nano"}, "resolution": 64, "steps": 1, "seed": 0}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    save_adapter(build_adapter(AdapterOptions(num_res_blocks=1), UNET), folder, metadata=RECORD, fp16=False)
    return folder


@given(st.sampled_from([*RECORD, "base.name", "condition", "data", "optim", "training", "versions", "x"]), JSON)
@example("resolution", 10**400)
@example("resolution", -16)
@example("seed", float("inf"))
def test_any_record_is_taken_or_refused(key: str, value: Any):
    outer, _, inner = key.partition(".")
    content = {**RECORD, outer: {**RECORD["base"], inner: value} if inner else value}
    try:
        record = Metadata.from_dict(content)
    except UserError as fault:
        assert str(fault)
        return
    record.without_local_paths()
    assert Metadata.from_dict(record.to_dict()) == record


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_record_is_a_line(tmp_path: Path, hostile: bytes):
    (tmp_path / FILE_NAME).write_bytes(hostile)
    with pytest.raises(UserError):
        read_metadata(tmp_path)


@given(spoils=SPOILS)
@settings(max_examples=times(0.5))
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_damaged_adapter_is_loaded_or_refused(adapter: Path, name: str, spoils: tuple[int, int]):
    """Asserts only that no exception other than a UserError escapes: diffusers' layout has no checksum."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        shutil.copytree(adapter, copy)
        content = (adapter / name).read_bytes()
        place = spoils[0] % min(len(content), 2_000)  # the header, and the bytes after it
        (copy / name).write_bytes(spoil(content, place, spoils[1]))
        refused_or_done(lambda: load_adapter(str(copy)))


@given(
    key=st.sampled_from(["channels", "in_channels", "num_res_blocks", "downscale_factor", "adapter_type"]), value=JSON
)
@example("channels", [10**9, 10**9, 10**9, 10**9])
@example("num_res_blocks", 10**9)
@settings(max_examples=times(0.5))
def test_an_adapters_config_of_any_values_is_loaded_or_refused(adapter: Path, key: str, value: Any):
    """Asserts only that no exception other than a UserError escapes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        shutil.copytree(adapter, copy)
        config = json.loads((adapter / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, key: value}))
        refused_or_done(lambda: load_adapter(str(copy)))


@given(header=JSON)
def test_a_safetensors_header_of_any_content_is_refused(adapter: Path, header: Any):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        shutil.copytree(adapter, copy)
        text = json.dumps(header).encode()
        file = copy / "diffusion_pytorch_model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        with pytest.raises(UserError):
            load_adapter(str(copy))


def test_a_safetensors_header_of_an_impossible_length_is_refused(tmp_path: Path):
    save_file({"x": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter"}))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    for length in (2**63, 2**64 - 1, 10**9, 0):
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
        with pytest.raises(UserError):
            load_adapter(str(tmp_path))


def refused_or_done(call: Callable[[], object]) -> None:
    """Runs `call`; it may succeed or raise a UserError with a text."""
    try:
        call()
    except UserError as fault:
        assert str(fault)


# The card -------------------------------------------------------------------------------------------------------------


@given(head=JSON, numbers=JSON)
@example("&a [*a]", None)
@example(["ab"], None)  # dict(["ab"]) is {"a": "b"}
def test_a_card_and_an_evaluation_of_any_content(head: Any, numbers: Any):
    """Asserts only that no exception other than a UserError escapes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        marks = "<!-- evaluation -->\n<!-- end of evaluation -->"
        card = f"---\n{json.dumps(head)}\n---\n{marks}\n"
        facts = Facts(Metadata(base={"name": "nano"}), {}, "me/x")

        def add_evaluation() -> None:
            complete_card(card, facts, measured=read_evaluation(root), licence={"license": "mit"})

        (root / "sheet.png").write_bytes(GOOD["PNG", "RGB"])
        pair = {"metrics": {"iou": {"adapter": 0.5}}}
        good = {"iou": {"adapter": {"mean": 0.5, "ci95": [0.4, 0.6]}}}
        for content in (
            numbers,
            {"num": 1, "metrics": numbers},
            {"num": numbers, "metrics": {"iou": {"a": numbers}}},
            {"num": 1, "metrics": good, "pairs": [{**pair, "prompt": numbers}], "settings": numbers},
            {"num": 1, "metrics": good, "pairs": numbers, "settings": {"data": numbers, "not_measured": numbers}},
        ):
            (root / "evaluation.json").write_text(json.dumps(content))
            refused_or_done(add_evaluation)
        refused_or_done(lambda: complete_card(card, facts))
