"""Parts of a dataset that jobs prepare without knowing of each other (`data.part`), and what is missing of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t2i_adapter.cache.context import ABOUT
from t2i_adapter.cache.shards import Shards
from t2i_adapter.config.tree import Part
from t2i_adapter.errors import flag
from t2i_adapter.files import parse_json

PARTS = "parts.json"
"""Beside the image records that were made in parts: the number of parts, and of rows of the whole dataset."""
SHOWN = 8
"""Missing parts that a message names."""


def cut(shards: Sequence[int], count: int) -> np.ndarray:
    """(count + 1,) int64: part k of `count` has the rows from the k-th to the next of these numbers, k from 0.

    Parts are consecutive rows of about equal number. A part ends where a stored shard ends if that moves its end by at
    most a quarter of a part, so that few shards are read for two parts.

    shards: number of rows of each stored shard, in order.
    """
    total = sum(shards)
    even = np.arange(count + 1, dtype=np.int64) * total // count
    ends = np.concatenate([[0], np.cumsum(np.asarray(shards, np.int64))])
    after = np.clip(np.searchsorted(ends, even), 1, len(ends) - 1)
    nearest = np.where(even - ends[after - 1] <= ends[after] - even, ends[after - 1], ends[after])
    return np.where(abs(nearest - even) * 4 * count <= total, nearest, even)


def rows_of(shards: Sequence[int], part: Part) -> np.ndarray:
    """Row numbers of a part, ascending; none if there are more parts than rows."""
    bounds = cut(shards, part.parts)
    return np.arange(bounds[part.number - 1], bounds[part.number])


def write_parts(images: Shards, count: int, rows: int) -> None:
    """Notes that a dataset of `rows` rows is prepared in `count` parts, for the run that trains on it."""
    images.write_note(PARTS, json.dumps({"count": count, "rows": rows}).encode())


def describe_missing(images: Shards, shards: Sequence[int], numbers: np.ndarray, about: Mapping[str, Any]) -> str:
    """Words about rows without records: their parts, or that parts were made with other options; "" if neither."""
    known = _read(images.read_note(PARTS))
    count, rows = known.get("count"), known.get("rows")
    if isinstance(count, int) and rows != sum(shards):
        return (
            f"{count} parts were prepared of {rows} pairs, and this run has {sum(shards)}: choose rows by equal options"
        )
    if isinstance(count, int):
        found = np.unique(np.searchsorted(cut(shards, count), numbers, side="right"))
        parts = [Part(int(number), count) for number in found]
        more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        names = ", ".join(map(str, parts[:SHOWN]))
        return f"of part {names}{more}; `t2i-adapter prepare` makes them with {flag('data.part')} {parts[0]}"
    return other_options(images, about)


def other_options(images: Shards, about: Mapping[str, Any]) -> str:
    """Words about parts that were prepared with other options, in the folders beside that of `images`; "" if there are
    none."""
    for other in images.beside(PARTS):
        theirs = _read(other(ABOUT))
        differences = [
            f"{name} {theirs.get(name)}, here {value}" for name, value in about.items() if theirs.get(name) != value
        ]
        count = _read(other(PARTS)).get("count")
        return f"{count} parts were prepared with other options: {'; '.join(differences) or 'other weights'}"
    return ""


def _read(content: bytes | None) -> dict[str, Any]:
    try:
        return dict(parse_json(content or b"{}"))
    except (ValueError, TypeError):
        return {}
