"""`prepare` fills the cache that `train` uses; `cache` lists, verifies and removes its records."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from support.tiny import write_circles

from t2i_adapter.cli import main


@pytest.fixture
def flags(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--base.name", str(tiny_base), "--data", str(tiny_data), "--data.resolution", "64"),
        *("--data.num_workers", "0", "--data.prepared_dir", str(tmp_path / "cache"), "--train.seed", "1"),
        *("--output_dir", str(tmp_path / "run")),
    ]


@pytest.fixture
def cache(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A cache that holds the tiny data, its messages read."""
    assert main(["prepare", *flags]) == 0
    capsys.readouterr()
    return tmp_path / "cache"


def stored(cache: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in cache.rglob("*.shard")}


def test_training_finds_what_was_prepared_whatever_else_changes(
    flags: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = stored(cache)
    assert len(kept) == 2
    assert not (tmp_path / "run" / "checkpoint-1").exists(), "prepare trains nothing"
    for number, change in enumerate(
        (
            ("--optim.lr", "1e-3"),
            ("--data.proportion_empty_prompts", "0.5"),
            ("--train.batch_size", "3"),
            ("--objective.min_snr_gamma", "5", "--train.gradient_accumulation_steps", "2"),
        )
    ):
        run = ("--output_dir", str(tmp_path / f"run{number}"), "--train.max_steps", "1", "--tracking.report_to", "none")
        assert main(["train", *flags, *run, *change]) == 0
        assert re.search(r"prepared: 8 pairs \(0 new\), \d+ captions \(0 new\)", capsys.readouterr().out), change
        assert stored(cache) == kept, change


def test_a_dry_run_of_prepare_prints_the_plan_and_errors_name_their_option(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 pairs from" in out
    assert "resolution: 64" in out
    assert not (tmp_path / "cache").exists()
    assert main(["prepare", *flags, "--data.cache", "none"]) == 2
    assert "--data.cache none: without a cache there is nothing to prepare" in capsys.readouterr().err
    assert main(["prepare", *flags, "--train.seed", "None", "--data.max_train_samples", "3"]) == 2
    assert "selects rows by the seed" in capsys.readouterr().err


def test_ls_shows_each_folder_the_last_used_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [images], [texts] = (cache / "images").iterdir(), (cache / "texts").iterdir()
    old = time.time() - 9 * 86400
    for path in (*images.iterdir(), images):
        os.utime(path, (old, old))
    assert main(["cache", "ls", "--prepared_dir", str(cache)]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert re.match(rf"{texts.name[:12]}  texts .* \d+ records .* today .*arithmetic float32", first)
    assert re.match(rf"{images.name[:12]}  images .* 8 records .* 9 days ago .*resolution 64", second)
    assert re.search(r"in 2 folders at ", total)
    assert main(["cache", "ls", "--prepared_dir", str(cache / "nothing")]) == 0
    assert "0 KB in 0 folders" in capsys.readouterr().out


def test_verify_names_damaged_files_and_exits_with_1(
    flags: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "verify", "--prepared_dir", str(cache)]) == 0
    assert "2 files are undamaged" in capsys.readouterr().out
    [path] = cache.glob("images/*/*.shard")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["cache", "verify", "--prepared_dir", str(cache)])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert f"{path}: its bytes do not match their checksum" in out
    assert "1 of 2 files are damaged" in out
    path.unlink()
    assert main(["prepare", *flags]) == 0
    assert "8 pairs (8 new)" in capsys.readouterr().out


def test_rm_removes_the_named_folders(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--prepared_dir", str(cache))
    [images], [texts] = (cache / "images").iterdir(), (cache / "texts").iterdir()
    for wrong, said in (
        ((), "nothing to remove is named"),
        (("--all", "--unused_days", "1"), "more than one choice is named"),
        (("--all",), "2 folders .* add --yes"),
        (("nonsense",), "no folders begin with it. Known: .*" + images.name[:12]),
    ):
        assert main(["cache", "rm", *wrong, *where]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert images.exists()
    assert texts.exists()
    old = time.time() - 9 * 86400
    for path in (*images.iterdir(), images):
        os.utime(path, (old, old))
    assert main(["cache", "rm", "--unused_days", "10", *where]) == 0
    assert images.exists()
    assert main(["cache", "rm", "--unused_days", "8", *where]) == 0
    assert not images.exists()
    assert main(["cache", "rm", texts.name[:9], *where]) == 0
    assert not texts.exists()
    assert "freed at" in capsys.readouterr().out


def test_a_cache_on_object_storage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (("ls",), ("verify",), ("rm", "--all")):
        assert main(["cache", *verb, "--prepared_dir", "s3://bucket/x"]) == 2
        assert "--prepared_dir s3://bucket/x: only folders; use your storage's own tools" in capsys.readouterr().err


def test_rm_all_leaves_other_files_alone(cache: Path) -> None:
    (cache / "mine.txt").write_text("mine")
    assert main(["cache", "rm", "--all", "--yes", "--prepared_dir", str(cache)]) == 0
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["mine.txt"]


def test_bad_rows_are_listed_in_the_run_s_folder(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_circles(tmp_path / "data", num=8, size=64)
    (data / "train" / "00002.png").write_bytes(b"")
    skip = ("--data.on_bad_sample", "skip", "--data.max_bad_share", "0.2", "--data", str(data))
    assert main(["prepare", *flags, *skip]) == 0
    assert f"1 of 8 rows cannot be used and are skipped; listed in {tmp_path / 'run'}" in capsys.readouterr().out
    assert "00002.png" in (tmp_path / "run" / "bad_samples.jsonl").read_text()
