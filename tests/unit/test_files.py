"""Files and folders are written atomically: complete, or not at all."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i_adapter.files import move_atomic, sweep, write_atomic


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.shard"
    for content in (b"old", b"new and longer"):
        write_atomic(path, [content[:2], memoryview(content)[2:]])
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def full_disk() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.shard"
    write_atomic(path, [b"old"])
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, full_disk())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "about.json"

    def interrupted() -> Iterator[bytes]:
        yield b"first"
        write_atomic(path, [b"second"])

    write_atomic(path, interrupted())
    assert path.read_bytes() == b"first", "the last one's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_moves_with_all_it_holds_after_it_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside, final = tmp_path / ".aside", tmp_path / "final"
    (aside / "inner").mkdir(parents=True)
    (aside / "inner" / "a").write_text("a")
    flushed: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, final.exists()))
        real(handle)

    inodes = [path.stat().st_ino for path in (aside / "inner" / "a", aside / "inner", aside)]
    monkeypatch.setattr(os, "fsync", fsync)
    move_atomic(aside, final)
    assert (final / "inner" / "a").read_text() == "a"
    assert not aside.exists()
    assert {(inode, False) for inode in inodes} <= set(flushed), "everything was on the disk before the rename"
    assert flushed[-1] == (tmp_path.stat().st_ino, True), "and the rename after it"


def test_a_folder_never_replaces_one_that_holds_something(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with pytest.raises(OSError):
        move_atomic(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").read_text() == "b"


def test_only_what_is_a_day_old_is_swept(tmp_path: Path) -> None:
    for name, age in (("old.tmp", 2 * 86400), ("young.tmp", 3600), ("old.txt", 2 * 86400)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path, "*.tmp")
    sweep(tmp_path / "nowhere", "*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.txt", "young.tmp"]


def test_what_is_old_is_decided_by_the_clock_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock is ten days ahead of the disk's, which another machine has."""
    (tmp_path / "young.tmp").write_text("")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * 86400)
    sweep(tmp_path, "*.tmp")
    assert [path.name for path in tmp_path.iterdir()] == ["young.tmp"]
