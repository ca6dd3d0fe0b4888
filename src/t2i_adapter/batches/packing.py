"""Packs the samples of a batch into one block of memory, and hands it from a loader process to the training process.

A loader process reuses a few slots of shared memory for its batches, and the training process copies each batch out.
New shared memory for every batch costs page faults in both processes: at SDXL's record size one loader process then
builds 0.44 to 0.74 times as many samples a second (`benchmarks/loading.py`,
benchmarks/results/loading_2cpu_2026-11-29.json). Without loader processes nothing is shared: a batch is packed into
memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_adapter.batches.choices import DrawnSample
from t2i_adapter.types import PartialBatch, SampleKeys

PREFETCH = 2
"""Batches that a loader process builds ahead."""
SLOTS = PREFETCH + 1
"""The training process may still copy one batch while PREFETCH others are built."""
ALIGNMENT = 64
ARRAYS = ("moments", "pixels", "condition", "text", "pooled", "noise", "latent_noise")
PER_NOISE = ("noise", "latent_noise")
"""Arrays with K rows a sample, one for each noise sample."""


@dataclass(frozen=True)
class Column:
    """Where the (B,...) array of a field lies in the batch's memory. If `channels` is set, axis 1 holds one channel
    that stands for this many equal ones."""

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
    """A batch: `columns` lie in `memory`, and `fields` are the other fields of a `PartialBatch`.

    `slot` names the shared memory (loader process, slot), or is None. `memory` is None if this slot was sent before.
    """

    columns: tuple[Column, ...]
    fields: dict[str, Any]
    memory: Tensor | None
    slot: tuple[int, int] | None = None


class SharedSlots:
    """The slots of shared memory of one loader process."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._memory: list[Tensor | None] = [None] * SLOTS
        self._turn = 0

    def pack(self, samples: Sequence[DrawnSample]) -> Packed:
        self._turn = (self._turn + 1) % SLOTS
        columns = _lay_out(samples)
        memory = self._memory[self._turn]
        is_new = memory is None or len(memory) < columns[-1].end
        if memory is None or is_new:
            memory = torch.empty(columns[-1].end, dtype=torch.uint8).share_memory_()
            self._memory[self._turn] = memory
        _write(samples, columns, memory)
        slot = self._worker, self._turn
        return Packed(columns, _fields(samples), memory if is_new else None, slot)


def pack(samples: Sequence[DrawnSample], *, pin: bool) -> Packed:
    """A batch in memory of its own."""
    columns = _lay_out(samples)
    memory = torch.empty(columns[-1].end, dtype=torch.uint8, pin_memory=pin)
    _write(samples, columns, memory)
    return Packed(columns, _fields(samples), memory)


def unpack(
    packed: Packed, slots: dict[tuple[int, int], Tensor], key: Callable[[int], str], *, pin: bool
) -> PartialBatch:
    """The batch, copied out of shared memory.

    Args:
        slots: the shared memory that loader processes have sent; new slots are added.
        key: returns the key of a sample by its number.
        pin: whether the batch lies in pinned memory, from which a GPU copies while the host goes on.
    """
    memory = packed.memory
    if packed.slot is not None:
        shared = slots[packed.slot] = slots[packed.slot] if memory is None else memory
        size = packed.columns[-1].end
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pin).copy_(shared[:size])
    assert memory is not None
    arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
    arrays |= {column.name: _tensor(memory, column) for column in packed.columns}
    arrays |= {name: arrays[name].flatten(0, 1) for name in PER_NOISE}
    fields = dict(packed.fields)
    keys = SampleKeys(fields.pop("numbers"), key)
    ints = {name: torch.tensor(fields.pop(name), pin_memory=pin) for name in ("time_ids", "timesteps")}
    factors = fields.pop("weights")
    weights = torch.tensor(factors, dtype=torch.float32, pin_memory=pin) if factors else None
    return PartialBatch(**arrays, **ints, **fields, keys=keys, weights=weights)


def _array(sample: DrawnSample, name: str) -> np.ndarray | None:
    if name in ("text", "pooled"):
        return sample.text and (sample.text.states if name == "text" else sample.text.pooled)
    return getattr(sample if name in PER_NOISE else sample.record, name)


def _fields(samples: Sequence[DrawnSample]) -> dict[str, Any]:
    return {
        "captions": tuple(sample.caption for sample in samples),
        "time_ids": [sample.time_ids for sample in samples],
        "timesteps": [timestep for sample in samples for timestep in sample.timesteps],
        "numbers": tuple(sample.number for sample in samples),
        "bad": tuple(bad for sample in samples for bad in sample.bad),
        "weights": [sample.weights for sample in samples if sample.weights is not None],
    }


def _lay_out(samples: Sequence[DrawnSample]) -> tuple[Column, ...]:
    """A column for every field that all samples have. A field that one sample does not have is encoded later for all
    samples."""
    columns: list[Column] = []
    end = 0
    for name in ARRAYS:
        rows = [row for sample in samples if (row := _array(sample, name)) is not None]
        if len(rows) < len(samples):
            continue
        shape, channels = rows[0].shape, None
        if name == "condition" and all(row.strides[0] == 0 for row in rows):
            shape, channels = (1, *shape[1:]), shape[0]
        start = -(-end // ALIGNMENT) * ALIGNMENT
        columns.append(Column(name, start, (len(samples), *shape), rows[0].dtype, channels))
        end = columns[-1].end
    return tuple(columns)


def _write(samples: Sequence[DrawnSample], columns: Sequence[Column], memory: Tensor) -> None:
    data = memory.numpy()
    for column in columns:
        whole = data[column.offset : column.end].view(column.dtype).reshape(column.shape)
        for row, sample in zip(whole, samples, strict=True):
            array = _array(sample, column.name)
            assert array is not None
            row[...] = array[:1] if column.channels else array


def _tensor(memory: Tensor, column: Column) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    whole = memory[column.offset : column.end].view(dtype).view(column.shape)
    return whole if column.channels is None else whole.expand(-1, column.channels, *column.shape[2:])
