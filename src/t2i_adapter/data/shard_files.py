"""Helpers of the sharded layouts, tar and parquet: which files a location names, and which shard holds a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from t2i_adapter.data.addresses import Blob, base_name, local_blob, local_path
from t2i_adapter.data.folder import no_split
from t2i_adapter.data.look import walk
from t2i_adapter.data.remote import find
from t2i_adapter.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words that mark its folders and files, as in the `datasets` library."""
_WORDS = {word: split for split, words in SPLITS.items() for word in words}
_POINTER = b"version https://git-lfs"
_NUMBERED = re.compile(r"(?:.*/)?data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


def find_shards(location: str, split: str, ending: str) -> list[Blob]:
    """The shards that a location names: a local folder's of one split, or those of a file, a pattern or an address.

    A folder's shards may lie in its subfolders; their names end in `ending`, in any case. Shards whose path names no
    split belong to the split train, if no other shard does. Raises UserError.
    """
    folder = local_path(location)
    if not folder.is_dir():
        return find(location)
    names = [f"{inner}/{name}" if inner else name for inner, files in walk(folder) for name in files]
    names = [name for name in names if name.lower().endswith(ending)]
    if not names:
        raise UserError(f"{location}: there are no files *{ending} in it.", option="data.location")
    splits = {name: split_of(name, split) for name in names}
    wanted = [name for name in names if splits[name] == split]
    if not wanted and split in ("train", folder.name):
        wanted = [name for name in names if splits[name] is None]
    if not wanted:
        raise no_split(location, split, sorted({found or "train" for found in splits.values()}))
    return [local_blob(folder / name) for name in wanted]


def split_of(path: str, wanted: str = "train") -> str | None:
    """The split that a shard's path names, or None.

    A word in a folder's or its own name does ("val/0.tar", "set_test-00.parquet"), which may also be `wanted`; and
    data/NAME-00000-of-00001.parquet is of the split NAME.
    """
    known = _WORDS | {wanted.lower(): wanted}
    numbered = _NUMBERED.fullmatch(path)
    if numbered:
        return known.get(numbered[1].lower(), numbered[1])
    parts = (re.split(r"[-._ 0-9]+", part.lower()) for part in PurePosixPath(path).parts)
    return next((known[word] for part in parts for word in part if word in known), None)


def check_pointer(path: Path, name: str) -> None:
    """Raises UserError if a shard is a pointer of Git LFS: a clone without its files. `name` is for messages."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{name}: is a pointer of Git LFS, not the file. Download the files: git lfs pull")


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
