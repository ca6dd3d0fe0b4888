"""Helpers of the sharded layouts, tar and parquet: which files a location names, and which shard holds a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2i_adapter.data.addresses import Blob, base_name
from t2i_adapter.files import user_path


def shard_pattern(location: str, split: str, suffix: str) -> str:
    """The glob of a local folder's shards of one split; any other location is a pattern already."""
    folder = user_path(location)
    if not folder.is_dir():
        return location
    if any((folder / split).glob(f"*{suffix}")):
        return str(folder / split / f"*{suffix}")
    named = f"{split}*{suffix}"
    return str(folder / (named if any(folder.glob(named)) else f"*{suffix}"))


def starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(N,) counts -> (N+1,) int64: the first number of each part, then the sum."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def part_of(first: np.ndarray, index: int) -> int:
    """The part that holds number `index`. `first`: as `starts` returns it."""
    return int(np.searchsorted(first, index, side="right")) - 1


def labels(blobs: Sequence[Blob]) -> list[str]:
    """Short names of shards: file names, or whole paths if two files have one name."""
    short = [base_name(blob.name) for blob in blobs]
    return short if len(set(short)) == len(short) else [blob.name for blob in blobs]


def describe(blobs: Sequence[Blob]) -> str:
    """ "data/0000.tar", or "16 shards, data/0000.tar to 0015.tar"."""
    first, last = blobs[0].name, labels(blobs)[-1]
    return first if len(blobs) == 1 else f"{len(blobs)} shards, {first} to {last}"
