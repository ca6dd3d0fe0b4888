"""Cached records equal what the encoders compute, and a changed input makes new records."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import Run, until
from support.tiny import write_circles, write_tiny_sdxl

from t2i_adapter.cache import context as folders
from t2i_adapter.cache import shards, texts
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.shards import Shards
from t2i_adapter.config.tree import BaseOptions, DataOptions
from t2i_adapter.data import source
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.types import Sample

HALF = 2**-10  # float16 keeps 11 bits; encoding in another batch size moves float32 sums far less


class NothingToEncode(Base):
    """A base whose encoders may not be loaded: for runs that should find everything in the cache."""

    def text_encoder(self, device: Any, dtype: Any) -> Any:
        raise AssertionError("the text encoders were loaded")

    def latent_encoder(self, device: Any) -> Any:
        raise AssertionError("the VAE was loaded")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "data", num=6, size=80)


def make(data: Path, base: Base | Path, root: Path, **options: Any) -> CachedDataset:
    """`prepare` with the fields of DataOptions and PrepareContext and its own arguments in one call."""
    base = base if isinstance(base, Base) else open_base(BaseOptions(name=str(base)))

    def named(cls: type) -> dict[str, Any]:
        return {name: options.pop(name) for name in list(options) if name in cls.__dataclass_fields__}

    context = PrepareContext(
        **{
            "base": base,
            "device": "cpu",
            "dtype": torch.float32,
            "root": root,
            "progress": False,
            **named(PrepareContext),
        }
    )
    data_options = DataOptions(**{"location": str(data), "resolution": 64, **named(DataOptions)})
    facts = prepare(open_source(data_options, 0), data_options, context, **{"in_channels": 3, **options})
    assert isinstance(facts, CachedDataset)
    return facts


def moments(prepared: CachedDataset, number: int, view: int = 0) -> np.ndarray:
    found = prepared.fetch(number, view).moments
    assert found is not None
    return found


def only_reading(base: Path) -> Base:
    return NothingToEncode(BaseOptions(name=str(base)), base)


def new_counts(capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """(new pairs, new captions) of the line that was printed."""
    words = capsys.readouterr().out.replace("(", "").split()
    at = [i for i, word in enumerate(words) if word.startswith("new)")]
    return int(words[at[0] - 1]), int(words[at[1] - 1])


def stored_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*.shard")}


def test_a_narrow_range_of_16_bits_is_one_line(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, path in enumerate(sorted((data / "train").glob("*_outline.png"))):
        depth = np.linspace(600 + number, 4800, 80 * 80).astype(np.uint16).reshape(80, 80)
        Image.fromarray(depth).save(path)
    make(data, tiny_base, tmp_path / "root", flip=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "6 new conditions have 16 bits: they use 6% of the 16-bit range (600 to 4800" in line
    make(data, tiny_base, tmp_path / "root", flip=True)
    assert "warning" not in capsys.readouterr().out


def test_cached_records_are_what_the_encoders_compute(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    prepared = make(data, tiny_base, tmp_path / "root")
    base = open_base(BaseOptions(name=str(tiny_base)))
    encoder, text = base.latent_encoder("cpu"), base.text_encoder("cpu", torch.float32)
    for number in range(len(prepared)):
        record = prepared.fetch(number, 0)
        path = data / "train" / f"{number:05d}.png"
        cut = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.BICUBIC))
        encoded = encoder.encode(torch.from_numpy(cut.copy()).permute(2, 0, 1)[None] / 255)[0].numpy()
        np.testing.assert_allclose(record.moments, encoded, rtol=HALF, atol=1e-4)
        outline = Image.open(path.with_name(f"{number:05d}_outline.png")).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(record.condition, np.asarray(outline).transpose(2, 0, 1))
        assert record.geometry.time_ids() == (80, 80, 0, 0, 64, 64)
        [caption] = prepared.captions(number)
        states, pooled = text.encode([caption])
        kept = prepared.text(caption)
        assert kept is not None
        np.testing.assert_allclose(kept.states, states[0], rtol=HALF, atol=1e-3)
        np.testing.assert_allclose(kept.pooled, pooled[0], rtol=HALF, atol=1e-3)
    assert prepared.text("") is not None
    assert prepared.text("what nobody said") is None


def test_a_second_run_finds_everything_and_changes_nothing(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    first = make(data, tiny_base, root)
    assert new_counts(capsys) == (6, len({c for number in range(6) for c in first.captions(number)}) + 1)
    stored = stored_bytes(root)
    second = make(data, only_reading(tiny_base), root)
    assert new_counts(capsys) == (0, 0)
    assert stored_bytes(root) == stored
    assert np.array_equal(moments(first, 3), moments(second, 3))


def test_moved_data_and_moved_weights_are_found_again(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    make(data, tiny_base, tmp_path / "root")
    moved, base = tmp_path / "elsewhere", tmp_path / "base"
    shutil.copytree(data, moved)
    shutil.copytree(tiny_base, base)
    assert len(make(moved, only_reading(base), tmp_path / "root")) == 6


def test_other_weights_at_the_same_path_are_made_anew(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    first = make(data, write_tiny_sdxl(base), tmp_path / "root")
    captions = new_counts(capsys)[1]
    shutil.rmtree(base)
    second = make(data, write_tiny_sdxl(base, vae_seed=99), tmp_path / "root")
    assert new_counts(capsys) == (6, 0), "another VAE, the same text encoders"
    assert not np.allclose(moments(first, 0), moments(second, 0), atol=1e-2)
    shutil.rmtree(base)
    make(data, write_tiny_sdxl(base, vae_seed=99, text_seed=99), tmp_path / "root")
    assert new_counts(capsys) == (0, captions), "the same VAE, other text encoders"


def test_what_a_stage_depends_on_is_a_miss_and_no_more(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    make(data, tiny_base, root)
    new_counts(capsys)
    changes: list[dict[str, Any]] = [
        {"resolution": 32},
        {"in_channels": 1},
        {"condition_kind": "labels"},
        {"crop": "random"},
        {"buckets": "generated", "bucket_step": 32},
        {"background": "black"},
        {"condition": "canny"},
    ]
    for change in changes:
        prepared = make(data, tiny_base, root, **change)
        assert new_counts(capsys) == (6, 0), change
    assert prepared.fetch(0, 0).condition.shape == (3, 64, 64)
    grey = make(data, tiny_base, root, in_channels=1)
    assert new_counts(capsys) == (0, 0)
    assert grey.fetch(0, 0).condition.shape == (1, 64, 64)


def test_changed_pictures_and_captions_are_made_and_no_more(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    make(data, tiny_base, root)
    new_counts(capsys)
    path = data / "train" / "00002.png"
    Image.new("RGB", (80, 80), "pink").save(path)
    metadata = data / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("circle", "disc", 1))
    prepared = make(data, tiny_base, root, extra_captions=("", "a prompt"))
    assert new_counts(capsys) == (1, 2)
    assert "disc" in prepared.captions(0)[0]
    prompt = prepared.text("a prompt")
    assert prompt is not None
    assert prompt.pooled.shape == (32,)


def test_a_bad_row_is_named_and_what_was_made_before_it_is_kept(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_circles(tmp_path / "many", num=70, size=64)
    path = data / "train" / "00069.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="00069.png: damaged picture"):
        make(data, tiny_base, tmp_path / "root")
    path.write_bytes(whole)
    make(data, tiny_base, tmp_path / "root")
    assert new_counts(capsys)[0] == 1, "all others were kept"


def test_unchanged_files_are_not_read_again(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = tmp_path / "root", []
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.suffix == ".png":
            read.append(path.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    first = make(data, tiny_base, root)
    assert len(read) >= 12, "pictures are read by this function, or this test sees nothing"
    read.clear()
    second = make(data, only_reading(tiny_base), root)
    assert read == []
    assert np.array_equal(moments(first, 5), moments(second, 5))
    path = data / "train" / "00003.png"
    os.utime(path, ns=(1, 1))  # touched, its bytes as before
    new_counts(capsys)
    make(data, only_reading(tiny_base), root)
    assert read == ["00003.png", "00003_outline.png"]
    assert new_counts(capsys) == (0, 0), "the content is the key"


def test_a_file_that_changed_under_the_same_size_and_date_is_named(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = data / "train" / "00002.png"
    Image.new("RGB", (80, 80), "pink").save(path, compress_level=0)
    state = path.stat()
    make(data, tiny_base, tmp_path / "root")
    Image.new("RGB", (80, 80), "navy").save(path, compress_level=0)
    assert path.stat().st_size == state.st_size
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match=r"00002\.png \(line 3\): its files have changed .* new date"):
        make(data, tiny_base, tmp_path / "root", resolution=32)
    os.utime(path)
    assert len(make(data, tiny_base, tmp_path / "root", resolution=32)) == 6


def test_views_are_records_of_their_own_and_more_of_them_cost_no_more(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    plain = make(data, tiny_base, root)
    new_counts(capsys)
    flipped = make(data, tiny_base, root, flip=True)
    assert flipped.views == 2
    assert np.array_equal(moments(flipped, 2, 0), moments(plain, 2))
    mirrored = flipped.fetch(2, 1)
    assert np.array_equal(mirrored.condition, plain.fetch(2, 0).condition[..., ::-1])
    assert mirrored.geometry.flipped
    make(data, only_reading(tiny_base), root)
    capsys.readouterr()
    three = make(data, tiny_base, root, crop="random", views=3, resolution=48)
    kept = stored_bytes(root)
    five = make(data, tiny_base, root, crop="random", views=5, resolution=48)
    assert stored_bytes(root).items() > kept.items()
    for view in range(3):
        assert np.array_equal(moments(three, 4, view), moments(five, 4, view))
    assert len({five.fetch(number, view).geometry.top_left for number in range(6) for view in range(5)}) == 1
    wide = write_circles(tmp_path / "wide", num=1, size=80)
    for path in (wide / "train").glob("*.png"):
        Image.open(path).resize((240, 80)).save(path)
    crops = make(wide, tiny_base, root, crop="random", views=5)
    assert len({crops.fetch(0, view).geometry.top_left for view in range(5)}) > 1


def test_samples_are_grouped_by_crop_size(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "data", num=6, size=128)
    for number in (1, 4):
        for path in (data / "train").glob(f"{number:05d}*.png"):
            Image.open(path).resize((256, 128)).save(path)
    prepared = make(data, tiny_base, tmp_path / "root", resolution=128, buckets="generated", bucket_step=32)
    assert sorted(group.tolist() for group in prepared.groups) == [[0, 2, 3, 5], [1, 4]]
    sizes = [{prepared.fetch(int(n), 0).geometry.target for n in group} for group in prepared.groups]
    assert [len(size) for size in sizes] == [1, 1]
    assert sizes[0] != sizes[1]
    for group in prepared.groups:
        for number in group:
            record = prepared.fetch(int(number), 0)
            height, width = record.geometry.target
            assert moments(prepared, int(number)).shape == (8, height // 8, width // 8)
            assert record.condition.shape == (3, height, width)


def spoil(data: Path, *numbers: int) -> None:
    for number in numbers:
        path = data / "train" / f"{number:05d}.png"
        path.write_bytes(path.read_bytes()[:100])


def test_one_error_reports_several_bad_rows(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "many", num=30, size=64)
    spoil(data, 7, 12)
    with pytest.raises(UserError, match="2 rows that cannot be used: .*00007.png.*00012.png.*sample skip"):
        make(data, tiny_base, tmp_path / "root")
    for number in range(2, 14):
        (data / "train" / f"{number:05d}.png").unlink()
    with pytest.raises(UserError, match="The first 10 rows that cannot be used") as fault:
        make(data, tiny_base, tmp_path / "root")
    assert str(fault.value).count("no such file") == 10


def test_bad_rows_are_skipped_and_listed(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, listed = write_circles(tmp_path / "many", num=20, size=64), tmp_path / "run" / "bad_samples.jsonl"
    spoil(data, 7)
    (data / "train" / "00012.png").unlink()
    skip: dict[str, Any] = {"on_bad_sample": "skip", "bad_list": listed}
    with pytest.raises(UserError, match="2 of 20 rows cannot be used, and --data.max_bad_share 0.05 allows 1"):
        make(data, tiny_base, tmp_path / "root", **skip, max_bad_share=0.05)
    assert len(listed.read_text().splitlines()) == 2, "also where the run ends by them"
    for _ in range(2):
        prepared = make(data, tiny_base, tmp_path / "root", **skip, max_bad_share=0.1)
        assert len(prepared) == 18
        assert prepared.shards == (18,)
        assert "2 of 20 rows cannot be used and are skipped" in capsys.readouterr().out
    keys = [prepared.key(number) for number in range(18)]
    assert keys == [f"train/{number:05d}.png (line {number + 1})" for number in range(20) if number not in (7, 12)]
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["key"] for row in rows] == ["train/00007.png (line 8)", "train/00012.png (line 13)"], "once each"
    assert "damaged picture" in rows[0]["reason"]
    assert "no such file" in rows[1]["reason"]


def test_rows_that_hold_the_pictures_of_a_bad_row_are_bad_too(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "many", num=6, size=64)
    spoil(data, 1)
    for name in ("{}.png", "{}_outline.png"):
        shutil.copy(data / "train" / name.format("00001"), data / "train" / name.format("00004"))
    prepared = make(data, tiny_base, tmp_path / "root", on_bad_sample="skip", max_bad_share=0.5)
    assert prepared.numbers.tolist() == [0, 2, 3, 5]


def test_processes_exchange_bad_rows(tiny_base: Path, tmp_path: Path) -> None:
    data, root = write_circles(tmp_path / "many", num=8, size=64), tmp_path / "root"
    spoil(data, 3)
    together = {"world": 2, "run_id": "m", "timeout": 60, "on_bad_sample": "skip", "max_bad_share": 0.2}
    fork = multiprocessing.get_context("fork")
    runs = [
        fork.Process(target=make, args=(data, tiny_base, root), kwargs={"rank": rank, **together}) for rank in (0, 1)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=120)
    assert [run.exitcode for run in runs] == [0, 0], "nobody waited for the record that cannot be"


def test_size_is_estimated_from_the_first_batch_and_checked(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(data, tiny_base, tmp_path / "root")
    said = re.search(r"pictures: 6 new, about (\d+) KB", capsys.readouterr().out)
    assert said
    stored = sum(map(len, stored_bytes(tmp_path / "root" / "images").values()))
    assert float(said[1]) == pytest.approx(stored / 1e3, rel=0.2)
    moments_alone = 6 * 16 * 8 * 8
    free = SimpleNamespace(free=folders.SPARE_BYTES + moments_alone)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="--data.prepared_dir .* are needed .* are free"):
        make(data, tiny_base, tmp_path / "full")
    assert stored_bytes(tmp_path / "full" / "images"), "what was made is kept"


def test_captions_are_cached_up_to_a_size_and_encoded_when_drawn_beyond_it(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 2 * (77 * 48 + 32)
    for options, limit, kept, said in (
        ({}, 100 * each, True, "distinct"),
        ({}, 3 * each, False, "would take over"),
        ({"text_cache": "disk"}, 3 * each, True, "distinct"),
        ({"text_cache": "live"}, 100 * each, False, "--data.text_cache live"),
        ({"shuffle_tags": True}, 100 * each, False, "tags are shuffled"),
    ):
        monkeypatch.setattr(texts, "MAX_AUTO_BYTES", limit)
        prepared = make(data, tiny_base, tmp_path / "root", **options)
        assert (prepared.text("") is not None) == kept, options
        assert said in capsys.readouterr().out
    with pytest.raises(UserError, match="--data.text_cache disk: shuffled tags"):
        make(data, tiny_base, tmp_path / "root", text_cache="disk", shuffle_tags=True)


@pytest.mark.parametrize("text_cache", ["disk", "live"])
def test_each_sample_keeps_its_own_captions(data: Path, tiny_base: Path, tmp_path: Path, text_cache: str) -> None:
    metadata = data / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    told = [("red",), ("blue", "red"), ("",), ("green", "green", "blue"), ("red",), ("white", "")]
    lines = [json.dumps({**row, "text": list(texts)}) for row, texts in zip(rows, told, strict=True)]
    metadata.write_text("\n".join(lines))
    prepared = make(data, tiny_base, tmp_path / "root", text_cache=text_cache)
    assert [prepared.captions(number) for number in range(6)] == told


def test_captions_are_cached_with_their_prefix(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    prepared = make(data, tiny_base, tmp_path / "root", caption_prefix="floral ")
    [caption] = prepared.captions(0)
    assert prepared.text(caption) is None
    assert prepared.text(f"floral {caption}") is not None


def test_captions_that_are_too_long_are_counted_every_time(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    for number, words in ((2, 80), (4, 90), (5, 75)):
        lines[number] = json.dumps({**json.loads(lines[number]), "text": "circle " * words})
    metadata.write_text("\n".join(lines))
    for _ in range(2):
        make(data, tiny_base, tmp_path / "root")
        said = capsys.readouterr().out
        assert "captions: 2 of 7 have more than 75 tokens" in said or "captions: 2 of 6 have more" in said
        assert "The longest has 90: " in said


def test_a_million_rows_take_arrays(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    prepared = make(data, tiny_base, tmp_path / "root")
    held = {name: value for name, value in vars(prepared).items() if isinstance(value, np.ndarray)}
    assert {name: value.nbytes for name, value in held.items()} == {"numbers": 4 * 6, "rows": 4 * 6, "digests": 8 * 6}
    assert prepared.table is not None
    assert (prepared.table.numbers.nbytes, prepared.table.ends.nbytes) == (4 * 6, 8 * 6)
    again = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(moments(again, 3), moments(prepared, 3))
    assert again.captions(3) == prepared.captions(3)


def test_the_crop_is_where_its_geometry_says(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "wide", num=1, size=80)
    for name in ("00000.png", "00000_outline.png"):
        path = data / "train" / name
        Image.open(path).resize((160, 80)).save(path)
    record = make(data, tiny_base, tmp_path / "root").fetch(0, 0)
    assert record.geometry.time_ids() == (80, 160, 0, 32, 64, 64)
    assert record.moments is not None
    assert record.moments.shape == (8, 8, 8)


def test_processes_share_the_work(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    root, alone = tmp_path / "root", make(data, tiny_base, tmp_path / "alone")
    together = {"world": 2, "run_id": "m", "timeout": 60}
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend its time on imports
    runs = [
        fork.Process(target=make, args=(data, tiny_base, root), kwargs={"rank": rank, **together}) for rank in (0, 1)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=120)
    assert [run.exitcode for run in runs] == [0, 0], "each waited until the other's share was there"
    both = make(data, only_reading(tiny_base), root)
    for number in range(6):
        np.testing.assert_allclose(moments(both, number), moments(alone, number), rtol=HALF, atol=1e-4)
    [folder], [states] = (root / "images").iterdir(), (root / "texts").iterdir()
    assert len(Shards(folder)) == 6, "each picture once"
    assert len(Shards(states)) == 7, "each caption once"


def test_a_process_that_never_comes_is_not_waited_for(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert len(make(data, tiny_base, tmp_path / "root", rank=0, world=2, run_id="m", timeout=0.1)) == 6


def test_a_folder_that_cannot_be_made_is_named(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data.prepared_dir .*: the folder cannot be created"):
        make(data, tiny_base, tmp_path / "file")


def slow_down() -> None:
    """Each read of a pair takes 0.1 s from now on, and each record is a shard of its own."""
    read = source.Source.__getitem__

    def read_slowly(self: source.Source, index: int) -> Sample:
        time.sleep(0.1)
        return read(self, index)

    source.Source.__getitem__ = read_slowly
    shards.SHARD_BYTES = 1


def test_a_killed_build_continues_from_its_finished_records(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, root = write_circles(tmp_path / "data", num=40, size=64), tmp_path / "root"
    named = ("--base.name", str(tiny_base), "--data", str(data), "--data.resolution", "64")
    build = Run(tmp_path, "prepare", *named, "--data.prepared_dir", str(root), before=slow_down)
    until(lambda: list(root.glob("images/*/*.shard")))
    build.send(signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL, "it was killed while it worked"
    [folder] = (root / "images").iterdir()
    found = len(Shards(folder))
    assert 1 <= found < 40
    prepared = make(data, tiny_base, root)
    assert new_counts(capsys)[0] == 40 - found
    alone = make(data, tiny_base, tmp_path / "alone")
    for number in range(0, 40, 3):
        np.testing.assert_allclose(moments(prepared, number), moments(alone, number), rtol=HALF, atol=1e-4)
