"""What the cache gives is what would be computed now, for as long as its inputs are the same."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_circles, write_tiny_sdxl

from t2i_adapter.cache.prepare import Prepared, prepare
from t2i_adapter.cache.shards import Shards
from t2i_adapter.config import BaseOptions, DataOptions
from t2i_adapter.errors import UserError
from t2i_adapter.models.base import Base, FolderBase, open_base
from t2i_adapter.sources.table import open_source

HALF = 2**-10  # float16 keeps 11 bits; encoding in another batch size moves float32 sums far less


class NothingToEncode(FolderBase):
    """The base, but loading an encoder is an error: for runs that should find everything."""

    def text_encoder(self, device: Any, dtype: Any) -> Any:
        raise AssertionError("the text encoders were loaded")

    def latent_encoder(self, device: Any) -> Any:
        raise AssertionError("the VAE was loaded")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "data", num=6, size=80)


def make(data: Path, base: Base | Path, root: Path, **options: Any) -> Prepared:
    settings: dict[str, Any] = {"resolution": 64, "in_channels": 3, "dtype": torch.float32, "device": "cpu"}
    base = base if isinstance(base, Base) else open_base(BaseOptions(name=str(base)))
    source = open_source(DataOptions(train_data_dir=str(data)), 0)
    return prepare(source, base=base, root=root, progress=False, **{**settings, **options})


def only_reading(base: Path) -> Base:
    return NothingToEncode(BaseOptions(name=str(base)), base)


def new_counts(capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """(new pairs, new captions) of the line that was printed."""
    words = capsys.readouterr().out.replace("(", "").split()
    at = [i for i, word in enumerate(words) if word.startswith("new)")]
    return int(words[at[0] - 1]), int(words[at[1] - 1])


def stored_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*.shard")}


def test_cached_facts_are_what_the_encoders_give(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    prepared = make(data, tiny_base, tmp_path / "root")
    base = open_base(BaseOptions(name=str(tiny_base)))
    encoder, text = base.latent_encoder("cpu"), base.text_encoder("cpu", torch.float32)
    for number in range(len(prepared)):
        record = prepared[number]
        path = data / "train" / f"{number:05d}.png"
        cut = np.asarray(Image.open(path).resize((64, 64), Image.Resampling.BICUBIC))
        moments = encoder.encode(torch.from_numpy(cut.copy()).permute(2, 0, 1)[None] / 255)[0].numpy()
        np.testing.assert_allclose(record.moments, moments, rtol=HALF, atol=1e-4)
        outline = Image.open(path.with_name(f"{number:05d}_outline.png")).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(record.condition, np.asarray(outline).transpose(2, 0, 1))
        assert record.geometry.time_ids() == (80, 80, 0, 0, 64, 64)
        [key] = record.captions
        states, pooled = text.encode(list(prepared.pairs[number].captions))
        np.testing.assert_allclose(prepared.text(key).states, states[0], rtol=HALF, atol=1e-3)
        np.testing.assert_allclose(prepared.text(key).pooled, pooled[0], rtol=HALF, atol=1e-3)
    assert prepared.text(prepared.text_key("")).states.shape == states[0].shape


def test_a_second_run_finds_everything_and_changes_nothing(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    first = make(data, tiny_base, root)
    assert new_counts(capsys) == (6, len({c for pair in first.pairs for c in pair.captions}) + 1)
    stored = stored_bytes(root)
    second = make(data, only_reading(tiny_base), root)
    assert new_counts(capsys) == (0, 0)
    assert stored_bytes(root) == stored
    assert np.array_equal(first[3].moments, second[3].moments)


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
    assert not np.allclose(first[0].moments, second[0].moments, atol=1e-2)
    shutil.rmtree(base)
    make(data, write_tiny_sdxl(base, vae_seed=99, text_seed=99), tmp_path / "root")
    assert new_counts(capsys) == (0, captions), "the same VAE, other text encoders"


def test_what_a_stage_depends_on_is_a_miss_and_no_more(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    make(data, tiny_base, root)
    new_counts(capsys)
    for change in ({"resolution": 32}, {"in_channels": 1}, {"condition_filter": "nearest"}):
        prepared = make(data, tiny_base, root, **change)
        assert new_counts(capsys) == (6, 0), change
    assert prepared[0].condition.shape == (3, 64, 64)
    grey = make(data, tiny_base, root, in_channels=1)
    assert new_counts(capsys) == (0, 0)
    assert grey[0].condition.shape == (1, 64, 64)


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
    assert "disc" in prepared.pairs[0].captions[0]
    assert prepared.text(prepared.text_key("a prompt")).pooled.shape == (32,)


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
    assert new_counts(capsys)[0] == 6, "two batches of 32 were kept"


def test_a_crop_is_told_truly(tiny_base: Path, tmp_path: Path) -> None:
    data = write_circles(tmp_path / "wide", num=1, size=80)
    for name in ("00000.png", "00000_outline.png"):
        path = data / "train" / name
        Image.open(path).resize((160, 80)).save(path)
    record = make(data, tiny_base, tmp_path / "root")[0]
    assert record.geometry.time_ids() == (80, 160, 0, 32, 64, 64)
    assert record.moments.shape == (8, 8, 8)


def test_processes_share_the_work(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    root, alone = tmp_path / "root", make(data, tiny_base, tmp_path / "alone")
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would spend its time on imports
    runs = [
        fork.Process(target=make, args=(data, tiny_base, root), kwargs={"rank": rank, "world": 2, "patience": 60})
        for rank in (0, 1)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=120)
    assert [run.exitcode for run in runs] == [0, 0], "each waited until the other's share was there"
    both = make(data, only_reading(tiny_base), root)
    for number in range(6):
        np.testing.assert_allclose(both[number].moments, alone[number].moments, rtol=HALF, atol=1e-4)
    [folder] = (root / "images").iterdir()
    assert len(list(folder.iterdir())) == 2, "each process wrote its own share"


def test_waiting_for_a_process_that_never_comes_ends(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 records that other processes should make did not appear"):
        make(data, tiny_base, tmp_path / "root", rank=0, world=2, patience=0.1)
    assert len(make(data, tiny_base, tmp_path / "root")) == 6


def test_a_folder_that_cannot_be_made_is_named(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data.prepared_dir: .* cannot be made"):
        make(data, tiny_base, tmp_path / "file")


SLOW_BUILD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from t2i_adapter.cache import shards
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.config import BaseOptions, DataOptions
from t2i_adapter.models.base import open_base
from t2i_adapter.sources import table
shards.SHARD_BYTES = 1  # a shard a record
class Slow(table.TableSource):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)
table.TableSource = Slow
data, base, root = sys.argv[1:]
source = table.open_source(DataOptions(train_data_dir=data), 0)
prepare(source, resolution=64, in_channels=3, base=open_base(BaseOptions(name=base)), device="cpu",
        dtype=torch.float32, root=Path(root), progress=False)
"""


def test_a_killed_build_is_taken_up_where_it_was(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, root = write_circles(tmp_path / "data", num=200, size=64), tmp_path / "root"
    with subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(data), str(tiny_base), str(root)]) as build:
        limit = time.monotonic() + 120
        while not list(root.glob("images/*/*.shard")) and build.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        build.send_signal(signal.SIGKILL)
    assert build.returncode == -signal.SIGKILL, "it was killed while it worked"
    [folder] = (root / "images").iterdir()
    found = len(Shards(folder))
    assert 1 <= found < 200
    prepared = make(data, tiny_base, root)
    assert new_counts(capsys)[0] == 200 - found
    alone = make(data, tiny_base, tmp_path / "alone")
    for number in range(0, 200, 7):
        np.testing.assert_allclose(prepared[number].moments, alone[number].moments, rtol=HALF, atol=1e-4)
