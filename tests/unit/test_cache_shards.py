"""Shards are whole or not there, and damage is found and named."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from t2i_adapter.cache import shards as shards_module
from t2i_adapter.cache.prepare import check_room
from t2i_adapter.cache.records import pack_image, pack_text, text_key, to_half, unpack_image
from t2i_adapter.cache.shards import Record, Shards, ShardWriter
from t2i_adapter.errors import UserError
from t2i_adapter.types import Geometry


def record(value: int) -> Record:
    return Record({"a": np.full((2, 3), value, np.float16), "b": np.arange(value, dtype=np.uint8)}, {"n": value})


def write(folder: Path, *values: int) -> None:
    with ShardWriter(folder) as writer:
        for value in values:
            writer.add(f"key{value}", record(value))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def test_what_is_written_is_read_back_and_read_only(tmp_path: Path) -> None:
    write(tmp_path / "new", 0, 1, 5)
    shards = Shards(tmp_path / "new")
    assert len(shards) == 3
    assert "key5" in shards
    assert "key9" not in shards
    for value in (0, 1, 5):
        read = shards[f"key{value}"]
        assert read.facts == {"n": value}
        for name, array in record(value).arrays.items():
            assert read.arrays[name].dtype == array.dtype
            assert np.array_equal(read.arrays[name], array)
    with pytest.raises(ValueError, match="read-only"):
        shards["key5"].arrays["a"][0, 0] = 1


def test_several_writers_add_to_one_folder(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    reader = Shards(tmp_path)
    write(tmp_path, 2, 3)  # 2 is there twice, which harms nobody
    assert "key3" not in reader
    reader.refresh()
    assert [f"key{n}" in reader for n in (1, 2, 3)] == [True] * 3
    assert reader["key2"].facts == {"n": 2}


def test_a_shard_is_written_when_it_is_large_or_old_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 24)  # two records of 12 bytes
    write(tmp_path / "large", 0, 0, 1)
    with ShardWriter(tmp_path / "many") as writer:
        for number in range(4):
            writer.add(f"{number}", record(0))
    assert len(files(tmp_path / "many")) == 2
    monkeypatch.setattr(shards_module, "SHARD_SECONDS", 0.0)
    write(tmp_path / "old", 1, 2, 3)
    assert len(files(tmp_path / "old")) == 3


def test_what_was_added_before_an_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 7"), ShardWriter(tmp_path) as writer:
        writer.add("key1", record(1))
        raise UserError("row 7 is bad")
    assert "key1" in Shards(tmp_path)


def test_a_shard_that_was_cut_off_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    first = files(tmp_path)[0]
    whole = first.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:size])
        assert len(Shards(tmp_path)) == 1
        assert f"{first} is damaged" in capsys.readouterr().err
    first.write_bytes(whole)
    assert len(Shards(tmp_path)) == 2


def test_a_flipped_bit_is_found_when_the_record_is_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    [path] = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[1] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="do not match their checksum.*Delete that file") as fault:
        Shards(tmp_path)["key3"]
    assert str(path) in str(fault.value)


def test_a_deleted_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    shards = Shards(tmp_path)
    files(tmp_path)[0].unlink()
    with pytest.raises(UserError, match="cannot be read"):
        shards["key3"]


def test_leftovers_of_a_killed_writer_are_ignored_and_swept_when_old(tmp_path: Path) -> None:
    young, old = tmp_path / "young.tmp", tmp_path / "old.tmp"
    for path in (young, old):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert len(Shards(tmp_path)) == 0
    write(tmp_path, 1)
    assert young.exists(), "another process may be writing it"
    assert not old.exists()


def test_a_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write(tmp_path, 4)
    shards = Shards(tmp_path)
    assert shards["key4"].facts == {"n": 4}
    assert pickle.loads(pickle.dumps(shards))["key4"].facts == {"n": 4}


def test_more_shards_than_maps_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN", 2)
    for value in range(1, 6):
        write(tmp_path, value)
    shards = Shards(tmp_path)
    held = [shards[f"key{value}"] for value in range(1, 6)]
    assert [int(one.arrays["a"][0, 0]) for one in held] == [1, 2, 3, 4, 5]
    assert len(shards._maps) == 2


def test_conditions_are_kept_without_loss_and_compressed() -> None:
    condition = np.zeros((3, 64, 64), np.uint8)
    condition[:, 10:12] = np.arange(64)
    moments = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    geometry = Geometry((80, 64), (80, 64), (8, 0), (64, 64))
    packed = pack_image(moments, condition, geometry, name="x")
    assert packed.arrays["condition"].nbytes < condition.nbytes / 20
    read = unpack_image(packed, "x", ("c",))
    assert np.array_equal(read.condition, condition)
    assert np.array_equal(read.moments, moments.astype(np.float16))
    assert (read.geometry, read.captions, read.key) == (geometry, ("c",), "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_numbers_beyond_half_precision_are_an_error_by_name(value: float) -> None:
    with pytest.raises(UserError, match="caption 'x': its encoder gave numbers"):
        pack_text(np.full((2, 2), value, np.float32), np.zeros(2, np.float32), name="caption 'x'")
    assert to_half(np.float32([65504]), "x") == 65504


def test_text_keys_depend_on_caption_and_encoder() -> None:
    keys = {text_key(caption, encoder) for caption in ("a", "b", "") for encoder in ("1", "2")}
    assert len(keys) == 6


def test_too_little_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    check_room(tmp_path, 0, free=0)
    check_room(tmp_path, 10**9, free=2 * 10**9)
    with pytest.raises(UserError, match=r"at least 5\.0 GB are needed .* 2\.0 GB are free"):
        check_room(tmp_path, 5 * 10**9, free=2 * 10**9)
