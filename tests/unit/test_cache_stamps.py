"""A stamp leads to the digest of its row; a damaged file of stamps only makes rows be read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from t2i_adapter.cache import stamps as stamps_module
from t2i_adapter.cache.stamps import Stamps


def digests(*values: int) -> np.ndarray:
    return np.array([[value] * 32 for value in values], np.uint8)


def remember(folder: Path, names: list[str | None], *values: int) -> None:
    stamps = Stamps(folder)
    stamps.add(names, digests(*values))
    stamps.save()


def test_what_was_remembered_is_known_and_nothing_else(tmp_path: Path) -> None:
    remember(tmp_path, ["a", None, "b"], 1, 2, 3)
    remember(tmp_path, ["c"], 4)
    found, known = Stamps(tmp_path).digests(["c", "a", None, "b2", "b"])
    assert known.tolist() == [True, True, False, False, True]
    assert np.array_equal(found[known], digests(4, 1, 3))


def test_a_folder_that_is_not_there_knows_nothing_and_is_not_made_for_nothing(tmp_path: Path) -> None:
    stamps = Stamps(tmp_path / "new")
    assert not stamps.digests(["a"])[1].any()
    stamps.add([None], digests(1))
    stamps.save()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: b"\1" + data[1:], lambda data: b""])
def test_a_damaged_file_is_skipped(tmp_path: Path, spoil: object) -> None:
    remember(tmp_path, ["a"], 1)
    [file] = tmp_path.iterdir()
    assert callable(spoil)
    file.write_bytes(spoil(file.read_bytes()))
    assert not Stamps(tmp_path).digests(["a"])[1].any()
    remember(tmp_path, ["a"], 1)
    assert Stamps(tmp_path).digests(["a"])[1].all()


def test_many_files_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps_module, "MAX_FILES", 4)
    for value in range(10):
        remember(tmp_path, [f"s{value}"], value)
        assert len(list(tmp_path.iterdir())) <= 5
    assert np.array_equal(Stamps(tmp_path).digests([f"s{value}" for value in range(10)])[0], digests(*range(10)))
