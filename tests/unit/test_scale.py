"""What a run holds and does for each row of a large dataset, and that a resume costs the same anywhere in it.

`benchmarks/scale.py` measures the same with ten million rows.
"""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scale
import scale_data
from support.sources import open_at

from t2i_adapter.batches import order as order_module
from t2i_adapter.batches.loader import make_partial_batches
from t2i_adapter.batches.order import LargePermutation, Order
from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.records import pack_text, unpack_text
from t2i_adapter.cache.shards import Shards, ShardWriter
from t2i_adapter.config.tree import BaseOptions, Config, DataOptions, TrainOptions
from t2i_adapter.data.source import MAX_ROWS, Source, open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.open import open_base
from t2i_adapter.training.held_out import choose_held_out

FEW, MANY = 70_000, 140_000  # more than `shards.BLOCK`, whose memory does not grow
MOST: dict[str, tuple[int, int]] = {"live": (12, 24), "table": (40, 90), "tar": (60, 150), "cached": (48, 180)}
"""Part -> bytes that numpy and Python may hold for a row when the first batch is there, and at the peak. One Python
object a row would take 50 and more."""


def config_of(part: str, place: Path, root: Path) -> Config:
    data: DataOptions = scale.options_of(part, place)
    return Config(data=replace(data, prepared_dir=str(root)), train=TrainOptions(batch_size=4, seed=0))


def open_dataset(config: Config, root: Path) -> CachedDataset | LiveDataset:
    """As a run does: pairs are left out for the measurement of control."""
    held_out = choose_held_out(config, open_source(config.data, 0))
    context = PrepareContext(open_base(BaseOptions()), "cpu", torch_float(), root, progress=False, quiet=True)
    return prepare(held_out.training, config.data, context, in_channels=3)


def torch_float() -> Any:
    import torch

    return torch.float32


def batches(dataset: CachedDataset | LiveDataset, config: Config, at: float) -> Iterator[Any]:
    first = int(len(dataset) * at) // 4
    return make_partial_batches(
        dataset, config, rank=0, world=1, start_step=first, stop_step=first + 1000, num_timesteps=1000
    )


def held(part: str, place: Path, root: Path) -> tuple[int, int]:
    """Bytes that are held when the first batch is there, and the peak."""
    config = config_of(part, place, root)
    tracemalloc.start()
    source = batches(open_dataset(config, root), config, 0.5)
    next(source)
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("part", MOST)
def test_a_row_takes_a_few_bytes_and_no_python_object(part: str, tmp_path: Path) -> None:
    few, many = (scale.write(part, tmp_path / str(rows), rows) for rows in (FEW, MANY))
    held(part, *few)  # what is loaded once is not counted
    open_dataset(config_of(part, *many), many[1])  # tar shards have their index now
    (few_held, few_peak), (many_held, many_peak) = held(part, *few), held(part, *many)
    a_row, a_row_at_peak = ((many - few) / (MANY - FEW) for few, many in ((few_held, many_held), (few_peak, many_peak)))
    print(f"{part}: {a_row:.1f} bytes a row, {a_row_at_peak:.1f} at the peak")
    most_held, most_peak = MOST[part]
    assert a_row < most_held
    assert a_row_at_peak < most_peak


@pytest.mark.parametrize("part", ["live", "cached"])
def test_the_first_batch_costs_the_same_at_the_end_of_an_epoch(part: str, tmp_path: Path) -> None:
    place, root = scale.write(part, tmp_path, MANY)
    config = config_of(part, place, root)
    dataset = open_dataset(config, root)

    def seconds(at: float) -> float:
        began = time.process_time()
        next(batches(dataset, config, at))
        return time.process_time() - began

    seconds(0.5)  # imports
    first, last = min(seconds(0.0) for _ in range(3)), min(seconds(0.9) for _ in range(3))
    print(f"{part}: {first * 1e3:.1f} ms at row 0, {last * 1e3:.1f} ms at nine tenths")
    assert last < first + 0.2, "skipping 126,000 draws would take seconds"


@pytest.mark.parametrize("size", [4, 5, 8, 100, 1023, 4097])
def test_a_large_permutation_has_every_row_once_in_an_order_of_its_key(size: int) -> None:
    rows = [[LargePermutation(size, [0, seed])[place] for place in range(size)] for seed in range(3)]
    assert all(sorted(one) == list(range(size)) for one in rows)
    assert size < 6 or len(set(map(tuple, rows))) == 3


def test_a_large_permutation_takes_no_memory_and_is_like_chance() -> None:
    tracemalloc.start()
    permutation = LargePermutation(MAX_ROWS, [1, 2])
    rows = np.array([permutation[place] for place in range(20_000)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22
    assert len(set(rows.tolist())) == 20_000
    cells = np.bincount(rows * 64 // MAX_ROWS, minlength=64)
    assert 30 < ((cells - 312.5) ** 2 / 312.5).sum() < 110, "chi-square with 63 degrees of freedom"
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03


def test_a_large_table_has_every_row_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGE_ROWS", 999)
    order = Order((np.arange(1000),), (1000,), 5, global_batch=8)
    epochs = [[order.number(draw) for draw in range(epoch * 1000, epoch * 1000 + 1000)] for epoch in range(2)]
    assert epochs[0] != epochs[1] and all(sorted(one) == list(range(1000)) for one in epochs)
    assert order.number(1700) == epochs[1][700]


def test_a_permutation_of_a_table_takes_four_bytes_a_row() -> None:
    groups = (np.arange(400_000, dtype=np.int32),)
    tracemalloc.start()
    order = Order(groups, (400_000,), 0, global_batch=8)
    order.number(0)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4.2 * 400_000


def test_more_rows_than_an_int32_counts_are_refused(tmp_path: Path) -> None:
    rows, group = 2**26, pa.table({"image": pa.nulls(2**20), "text": pa.nulls(2**20)})
    with pq.ParquetWriter(tmp_path / "00.parquet", group.schema) as writer:
        for _ in range(rows // len(group)):
            writer.write_table(group)
    for number in range(1, 32):
        os.link(tmp_path / "00.parquet", tmp_path / f"{number:02d}.parquet")
    assert len(open_at(f"{tmp_path}/{{00..30}}.parquet", condition="canny")) == 31 * rows
    with pytest.raises(UserError, match=r"has 2,147,483,648 rows; at most 2,147,483,647 are supported. Name some"):
        open_at(f"{tmp_path}/*.parquet", condition="canny")


def test_a_subset_of_all_rows_holds_the_numbers_that_it_was_given(tmp_path: Path) -> None:
    source: Source = open_at(scale_data.write_parquet(tmp_path / "rows", 1000), condition="canny")
    numbers = np.arange(3, 1000, 7, dtype=np.int32)
    some = source.subset(numbers)
    assert some._numbers is numbers
    assert [some.key(index) for index in (0, 1)] == [source.key(3), source.key(10)]
    assert some.subset(np.array([1, 2])).key(1) == source.key(17)


def test_records_are_read_by_row_after_the_keys_are_gone_here_and_in_a_loader_process(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(5):
            states = np.full((77, 4), number, np.float32)
            writer.add(bytes([number]) * 32, pack_text(states, states[0], tokens=1, name="caption"))
    shards = Shards(tmp_path)
    rows = shards.find(np.array([[number] * 32 for number in range(5)], np.uint8))
    shards.forget_keys()
    for some in (shards, pickle.loads(pickle.dumps(shards))):
        assert [unpack_text(some.read(int(row))).states[0, 0] for row in rows] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="key"):
        shards.find(np.zeros((1, 32), np.uint8))
