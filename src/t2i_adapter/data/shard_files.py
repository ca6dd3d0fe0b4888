"""Helpers of the sharded layouts, tar and parquet: which files a location names, and which shard holds a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2i_adapter.data.addresses import Blob, base_name, local_blob, local_path
from t2i_adapter.data.names import is_litter
from t2i_adapter.data.remote import find
from t2i_adapter.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words that mark its shards' names, as in the `datasets` library."""


def find_shards(location: str, split: str, ending: str) -> list[Blob]:
    """The shards that a location names: a local folder's of one split, or those of a file, a pattern or an address.

    A folder's shards lie in it or in its folder `split`; their names end in `ending`, in any case. If none of them has
    a split's name, all belong to the split train. Raises UserError.
    """
    folder = local_path(location)
    if not folder.is_dir():
        return find(location)
    inner = _shards_in(folder / split, ending)
    if inner:
        return [local_blob(path) for path in inner]
    found = _shards_in(folder, ending)
    splits = {path: split_of(path.name, split) for path in found}
    wanted = [path for path in found if splits[path] == split]
    if not wanted and split in ("train", folder.name):
        wanted = [path for path in found if splits[path] is None]
    if wanted:
        return [local_blob(path) for path in wanted]
    folders = {path.parent.name for path in folder.glob("*/*") if path.name.lower().endswith(ending)}
    names = sorted({name or "train" for name in splits.values()} | folders)
    if not names:
        raise UserError(f"{location}: there are no files *{ending} in it.", option="data.location")
    raise UserError(f"{location} has no split {split!r}; there are: {', '.join(names)}.", option="data.split")


def _shards_in(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(ending) and not is_litter(path.name))


def split_of(name: str, wanted: str = "train") -> str | None:
    """The split whose word a file's name begins with ("train-0000.tar", "val_3.parquet"), or None.

    Any word may be `wanted`; a letter after the word makes it another word.
    """
    words = {word: split for split, several in SPLITS.items() for word in several} | {wanted: wanted}
    found = (split for word, split in words.items() if re.match(rf"{re.escape(word)}(?![A-Za-z])", name, re.I))
    return next(found, None)


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
