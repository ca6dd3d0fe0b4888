"""Shards are written atomically, damage is found and named, and the index of a million records lies in arrays."""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from t2i_adapter.cache import shards as shards_module
from t2i_adapter.cache.context import check_room
from t2i_adapter.cache.keys import Keys
from t2i_adapter.cache.records import (
    pack_condition,
    pack_image,
    pack_text,
    size_of_tag,
    text_key,
    to_half,
    unpack_condition,
    unpack_image,
    view_keys,
)
from t2i_adapter.cache.shard_file import Record, damage
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.errors import UserError
from t2i_adapter.types import Geometry


def record(value: int) -> Record:
    return Record({"a": np.full((2, 3), value, np.float16), "b": np.arange(value, dtype=np.uint8)}, {"n": value}, value)


def key(value: int) -> bytes:
    return value.to_bytes(32, "big")


def write(folder: Path, *values: int) -> None:
    with ShardWriter(folder) as writer:
        for value in values:
            writer.add(key(value), record(value))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def test_what_is_written_is_read_back_and_read_only(tmp_path: Path) -> None:
    write(tmp_path / "new", 0, 1, 5)
    shards = Shards(tmp_path / "new")
    assert len(shards) == 3
    assert key(5) in shards
    assert key(9) not in shards
    for value in (0, 1, 5):
        read = shards[key(value)]
        assert (read.facts, read.tag) == ({"n": value}, value)
        for name, array in record(value).arrays.items():
            assert read.arrays[name].dtype == array.dtype
            assert np.array_equal(read.arrays[name], array)
    with pytest.raises(ValueError, match="read-only"):
        shards[key(5)].arrays["a"][0, 0] = 1


def test_several_writers_add_to_one_folder(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    reader = Shards(tmp_path)
    write(tmp_path, 2, 3)  # 2 is there twice, which harms nobody
    assert key(3) not in reader
    reader.refresh()
    assert [key(n) in reader for n in (1, 2, 3)] == [True] * 3
    assert reader[key(2)].facts == {"n": 2}


def test_a_shard_is_written_when_it_is_large_or_old_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 2 * sum(map(len, shards_module.pack(record(0)))))
    write(tmp_path / "large", 0, 0, 1)
    with ShardWriter(tmp_path / "many") as writer:
        for number in range(4):
            writer.add(key(number), record(0))
    assert len(files(tmp_path / "many")) == 2
    monkeypatch.setattr(shards_module, "SHARD_SECONDS", 0.0)
    write(tmp_path / "old", 1, 2, 3)
    assert len(files(tmp_path / "old")) == 3


def test_what_was_added_before_an_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 7"), ShardWriter(tmp_path) as writer:
        writer.add(key(1), record(1))
        raise UserError("row 7 is bad")
    assert key(1) in Shards(tmp_path)


def test_a_truncated_shard_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("place", [5, 20, 100])
def test_a_flipped_bit_is_found_when_the_record_is_read(tmp_path: Path, place: int) -> None:
    write(tmp_path, 3)
    [path] = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    assert "checksum" in str(damage(path))
    with pytest.raises(UserError, match="do not match their checksum.*Delete that file") as fault:
        Shards(tmp_path)[key(3)]
    assert str(path) in str(fault.value)


def test_a_record_is_checked_on_its_first_read_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3, 4)
    shards, checks = Shards(tmp_path), []
    real = shards_module.unpack
    monkeypatch.setattr(shards_module, "unpack", lambda data, check: checks.append(check) or real(data, check=check))
    for value in (3, 3, 4):
        assert shards[key(value)].facts == {"n": value}
    assert checks == [True, False, True]
    assert pickle.loads(pickle.dumps(shards))[key(3)].facts == {"n": 3}
    assert checks[-1], "another process checks for itself"


def test_a_deleted_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    shards = Shards(tmp_path)
    files(tmp_path)[0].unlink()
    with pytest.raises(UserError, match="cannot be read"):
        shards[key(3)]


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
    assert shards[key(4)].facts == {"n": 4}
    assert pickle.loads(pickle.dumps(shards))[key(4)].facts == {"n": 4}


def test_more_shards_than_maps_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN", 2)
    for value in range(1, 6):
        write(tmp_path, value)
    shards = Shards(tmp_path)
    held = [shards[key(value)] for value in range(1, 6)]
    assert [int(one.arrays["a"][0, 0]) for one in held] == [1, 2, 3, 4, 5]
    assert len(shards._maps) == 2


def test_every_key_is_found_and_no_other_even_where_they_begin_alike() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (1000, 32), np.uint8)
    keys[:300, :8] = keys[0, :8]  # as if hashes agreed in their first 8 bytes
    keys[700] = keys[5]
    wanted = np.concatenate([keys, keys ^ 1, keys[:1]])
    rows = Keys(keys).find(wanted)
    expected = np.concatenate([np.arange(1000), np.full(1000, -1), [0]])
    expected[700] = 5  # of equal keys the first
    assert np.array_equal(rows, expected)
    table = Keys(keys)
    assert [table.find_one(key.tobytes()) for key in wanted] == expected.tolist()
    assert Keys(keys[:0]).find(wanted[:2]).tolist() == [-1, -1]
    assert Keys(keys[:0]).find_one(wanted[0].tobytes()) == -1


def test_the_index_of_a_million_records_lies_in_arrays(tmp_path: Path) -> None:
    count = 200_000
    tracemalloc.start()
    index = np.zeros(count, shards_module.INDEX)
    index["key"] = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    data = index.tobytes()
    tail = shards_module.TAIL.pack(count, shards_module.zlib.crc32(data), shards_module.MAGIC)
    (tmp_path / "x.shard").write_bytes(data + tail)
    del data
    shards = Shards(tmp_path)
    held = tracemalloc.get_traced_memory()[0] - index.nbytes
    tracemalloc.stop()
    assert len(shards) == count
    assert held < 80 * count, "52 bytes a record, 16 to find it, 4 for its shard, 1 for its check"
    assert len(pickle.dumps(shards)) < 80 * count


def conditions() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    lines = (draw.random((64, 48)) < 0.1).astype(np.uint8) * 255
    ramp = np.tile(np.arange(48, dtype=np.uint8), (64, 1))
    return {
        "lines": lines[None],
        "lines in three channels": np.stack([lines] * 3),
        "two greys": np.stack([lines // 255 * 13 + 200] * 3),
        "one value": np.full((3, 64, 48), 255, np.uint8),
        "zero": np.zeros((1, 64, 48), np.uint8),
        "grey": ramp[None],
        "grey in three channels": np.stack([ramp] * 3),
        "colour": np.stack([ramp, ramp[::-1, ::-1], ramp // 7]),
        "two values, but not alike in the channels": np.stack([lines, 255 - lines, lines]),
        "noise": draw.integers(0, 256, (3, 64, 48), np.uint8),
    }


@pytest.mark.parametrize("name", conditions())
def test_conditions_are_kept_without_loss(name: str) -> None:
    condition = conditions()[name]
    stored, packing = pack_condition(condition)
    read = unpack_condition(stored, packing)
    assert read.shape == condition.shape
    assert np.array_equal(read, condition)
    assert stored.nbytes <= condition.nbytes
    if "lines" in name or "two greys" in name:
        assert stored.nbytes <= condition[0].nbytes / 8, "a bit a pixel"
    if name == "grey in three channels":
        assert stored.nbytes < condition[0].nbytes


def test_an_image_record_comes_back_whole() -> None:
    condition = conditions()["colour"]
    moments = np.random.default_rng(0).standard_normal((8, 8, 6)).astype(np.float32)
    geometry = Geometry((80, 64), (80, 64), (8, 0), (64, 48), flipped=True)
    packed = pack_image(moments, condition, geometry, name="x")
    assert size_of_tag(packed.tag) == (64, 48)
    read = unpack_image(shards_module.unpack(memoryview(b"".join(shards_module.pack(packed))), check=True))
    assert np.array_equal(read.condition, condition)
    assert read.moments is not None
    assert np.array_equal(read.moments, moments.astype(np.float16))
    assert read.geometry == geometry


def test_each_view_of_a_picture_has_a_key_of_its_own() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (5, 32), np.uint8)
    keys = np.concatenate([view_keys(digests, view) for view in (0, 1, 63)])
    assert len({row.tobytes() for row in keys}) == 15


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_numbers_beyond_half_precision_are_an_error_by_name(value: float) -> None:
    with pytest.raises(UserError, match="caption 'x': the text encoders returned NaN, inf or numbers beyond 65504"):
        pack_text(np.full((2, 2), value, np.float32), np.zeros(2, np.float32), tokens=3, name="caption 'x'")
    assert to_half(np.float32([65504]), "x", ("the VAE", "")) == 65504


def test_text_keys_depend_on_caption_and_encoder() -> None:
    keys = {text_key(caption, encoder) for caption in ("a", "b", "") for encoder in ("1", "2")}
    assert len(keys) == 6


def test_too_little_room_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    check_room(tmp_path, 0, free=0)
    check_room(tmp_path, 10**9, free=2 * 10**9)
    with pytest.raises(UserError, match=r"at least 5\.0 GB are needed .* 2\.0 GB are free"):
        check_room(tmp_path, 5 * 10**9, free=2 * 10**9)
