"""A batch in one piece of memory, and how loader processes hand it over.

Fresh shared memory costs a page fault every 4 KiB, in both processes, which is more than all the rest of a batch. So
a loader process writes its batches into a few slots, over and over, and the training process copies each one out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_adapter.batches.item import Item
from t2i_adapter.types import PartialBatch

PREFETCH = 2
"""Batches a loader process is asked for ahead of the one that is used."""
SLOTS = PREFETCH + 1
"""A batch is asked for while the one PREFETCH before it is handed out, so that one may still be read."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Column:
    """Where a field's (B, ...) array lies in the batch's memory. `channels` is set where axis 1 is one channel that
    stands for so many alike."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    channels: int | None

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class Packed:
    """A batch: the first `size` bytes of `memory` hold `columns`; `fields` are the rest of a `PartialBatch`.

    Of a loader process `slot` tells which memory that is, and `memory` is None where it was sent before.
    """

    size: int
    columns: tuple[Column, ...]
    fields: dict[str, Any]
    memory: Tensor | None
    slot: tuple[int, int] | None = None


class SharedSlots:
    """The shared memory of a loader process, a slot for each batch that is on its way."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._memory: list[Tensor | None] = [None] * SLOTS
        self._turn = 0

    def pack(self, items: Sequence[Item]) -> Packed:
        self._turn = (self._turn + 1) % SLOTS
        columns, size = _lay_out(items)
        memory = self._memory[self._turn]
        is_new = memory is None or len(memory) < size
        if memory is None or is_new:
            memory = torch.empty(size, dtype=torch.uint8).share_memory_()
            self._memory[self._turn] = memory
        _write(items, columns, memory)
        slot = self._worker, self._turn
        return Packed(size, columns, _fields(items), memory if is_new else None, slot)


def pack(items: Sequence[Item], *, pin: bool) -> Packed:
    """A batch in memory of its own."""
    columns, size = _lay_out(items)
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    _write(items, columns, memory)
    return Packed(size, columns, _fields(items), memory)


def unpack(packed: Packed, slots: dict[tuple[int, int], Tensor], *, pin: bool) -> PartialBatch:
    """The batch, in memory that nobody writes to again. `slots` keeps what loader processes have sent."""
    memory = packed.memory
    if packed.slot is not None:
        memory = slots[packed.slot] = slots[packed.slot] if memory is None else memory
        memory = torch.empty(packed.size, dtype=torch.uint8, pin_memory=pin).copy_(memory[: packed.size])
    assert memory is not None
    arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
    arrays |= {column.name: _tensor(memory, column) for column in packed.columns}
    arrays |= {name: arrays[name].flatten(0, 1) for name in DRAWN}
    fields = dict(packed.fields)
    whole = {name: torch.tensor(fields.pop(name)) for name in ("time_ids", "timesteps")}
    return PartialBatch(**arrays, **whole, **fields)


def _arrays(item: Item) -> Mapping[str, np.ndarray | None]:
    return {
        "moments": item.record.moments,
        "pixels": item.record.pixels,
        "condition": item.record.condition,
        "text": item.text and item.text.states,
        "pooled": item.text and item.text.pooled,
        "noise": item.noise,
        "latent_noise": item.latent_noise,
    }


DRAWN = ("noise", "latent_noise")
"""Of these every sample has a row for each of its draws of noise."""
ARRAYS = ("moments", "pixels", "condition", "text", "pooled", "noise", "latent_noise")


def _fields(items: Sequence[Item]) -> dict[str, Any]:
    return {
        "captions": tuple(item.caption for item in items),
        "time_ids": [item.time_ids for item in items],
        "timesteps": [timestep for item in items for timestep in item.timesteps],
        "keys": tuple(item.record.key for item in items),
        "bad": tuple(bad for item in items for bad in item.bad),
    }


def _lay_out(items: Sequence[Item]) -> tuple[tuple[Column, ...], int]:
    """Place of every field that all items have, and the bytes of all. A field that one of them lacks is still to be
    made for all."""
    columns: list[Column] = []
    end = 0
    every = [_arrays(item) for item in items]
    for name in ARRAYS:
        rows = [row for arrays in every if (row := arrays[name]) is not None]
        if len(rows) < len(items):
            continue
        shape, channels = rows[0].shape, None
        if name == "condition" and all(row.strides[0] == 0 for row in rows):
            shape, channels = (1, *shape[1:]), shape[0]
        start = -(-end // ALIGNMENT) * ALIGNMENT
        columns.append(Column(name, start, (len(items), *shape), rows[0].dtype, channels))
        end = columns[-1].end
    return tuple(columns), end


def _write(items: Sequence[Item], columns: Sequence[Column], memory: Tensor) -> None:
    data = memory.numpy()
    for column in columns:
        whole = data[column.offset : column.end].view(column.dtype).reshape(column.shape)
        for row, item in zip(whole, items, strict=True):
            array = _arrays(item)[column.name]
            assert array is not None
            row[...] = array[:1] if column.channels else array


def _tensor(memory: Tensor, column: Column) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    whole = memory[column.offset : column.end].view(dtype).view(column.shape)
    return whole if column.channels is None else whole.expand(-1, column.channels, *column.shape[2:])
