"""The index of a tar shard: which members form a sample, and at which byte each begins.

No member's name is used as a path. Links, devices and members whose names lead out of the archive are refused.
Archives that are joined end to end in one file (`cat a.tar b.tar`) are all read.
"""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name
from t2i_adapter.data.names import PICTURE_ENDINGS, is_litter, same_form
from t2i_adapter.data.shard_files import check_pointer
from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json

PARTS = ("image", "condition", "txt", "json")
VERSION = 2
MISSING = -1
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20
_UNPACK = {
    b"\x1f\x8b": "gzip -dc",
    b"BZh": "bzip2 -dc",
    b"\xfd7zXZ\0": "xz -dc",
    b"\x28\xb5\x2f\xfd": "zstd -dc",
    b"\x04\x22\x4d\x18": "lz4 -dc",
}
"""First bytes of a compressed file -> the command that unpacks it."""
_PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_MAX_ENDINGS = 50  # that an index counts
_SHOWN_JSON, _MAX_JSON, _MAX_CELL = 10, 2**16, 100  # .json members, bytes of one, letters of a value


class Member(NamedTuple):
    """A plain file in an archive: its name, the number of its archive in the file, first byte, and size in bytes."""

    name: str
    archive: int
    start: int
    size: int


Sample = dict[str, Member]
"""Part of a sample -> its member."""


def part_endings(options: DataOptions) -> dict[str, list[str]]:
    """Part of a sample -> the endings, in small letters, that its member may have after the stem."""
    conditions = dict.fromkeys(["cond", "conditioning_image", options.conditioning_image_column.lower()])
    return {
        "image": [*PICTURE_ENDINGS, *(f".{options.image_column.lower()}{ending}" for ending in PICTURE_ENDINGS)],
        "condition": [f".{name}{ending}" for name in conditions for ending in PICTURE_ENDINGS],
        "txt": [options.captions.lower() if options.captions.startswith(".") else ".txt"],
        "json": [".json"],
    }


def index_shard(path: Path, name: str, endings: dict[str, list[str]]) -> pa.Table:
    """One row a sample: its stem, and position and size in bytes of each part; both are -1 if the part is missing.

    The schema's metadata holds JSON: under "unused" the numbers of the members that belong to no sample, under "cells"
    the texts, shortened, of the first .json members by key.
    `name` is the shard's name in messages. Raises UserError that names the shard and the member.
    """
    part_of = {ending: part for part, ends in endings.items() for ending in ends}
    groups: dict[tuple[int, str], dict[str, list[Member]]] = {}
    litter: list[str] = []
    for member in _read_members(path, name):
        if is_litter(member.name):
            litter.append(member.name)
            continue
        stem, ending = split_name(member.name)
        groups.setdefault((member.archive, stem), {}).setdefault(ending, []).append(member)
    samples: dict[str, Sample] = {}
    unused: Counter[str] = Counter()
    for (archive, stem), members in groups.items():
        for full_stem, sample in _group(stem, members, part_of, name, unused).items():
            other = samples.setdefault(full_stem, sample)
            if other is not sample:
                raise UserError(
                    f"{name}: archives {next(iter(other.values())).archive + 1} and {archive + 1} of those that are "
                    f"joined in this file both have a sample {full_stem}. Keep the archives in files of their own."
                )
    counts: dict[str, Any] = {"litter": len(litter), "first_litter": _as_text(litter[0]) if litter else ""}
    counts["endings"] = dict(unused.most_common(_MAX_ENDINGS))
    return _to_table(samples).replace_schema_metadata(
        {"unused": json.dumps(counts), "cells": json.dumps(_first_cells(path, samples))}
    )


def _first_cells(path: Path, samples: dict[str, Sample]) -> dict[str, Any]:
    """The values of the first .json members, by key: texts and the first text of lists, shortened; null for others."""
    members = (sample["json"] for sample in samples.values() if "json" in sample)
    cells: dict[str, Any] = {}
    with path.open("rb") as file:
        for member in itertools.islice(members, _SHOWN_JSON):
            file.seek(member.start)
            with suppress(ValueError):
                row = parse_json(file.read(min(member.size, _MAX_JSON)).decode("utf-8-sig"))
                for key, value in row.items() if isinstance(row, dict) else ():
                    first = value[0] if isinstance(value, list) and value else value
                    cells[key] = first[:_MAX_CELL] if isinstance(first, str) else None
    return cells


def split_name(member: str) -> tuple[str, str]:
    """ "a/b.cond.png" -> ("a/b", ".cond.png"): at the first dot of the last name, in Unicode's composed form."""
    folder, slash, base = _as_text(same_form(member.removeprefix("./"))).rpartition("/")
    stem, dot, ending = base.partition(".")
    return folder + slash + stem, dot + ending


def _group(
    stem: str, members: dict[str, list[Member]], part_of: dict[str, str], name: str, unused: Counter[str]
) -> dict[str, Sample]:
    """The samples, by stem, among members whose names are equal up to the first dot. Raises UserError.

    Members whose whole ending is known form the sample `stem`, as in WebDataset. The others are split at the longest
    known ending, so that a.v2.jpg and a.v2.txt form the sample a.v2. An image alone (a.canny.png) is unused beside
    such a sample of a shorter stem (a). So are members of a stem without a picture (README.txt).
    """
    found: dict[str, Sample] = {stem: {}}
    for ending, several in members.items():
        low = ending.lower()
        known = low if low in part_of else _longest(low, part_of)
        if known is None:
            unused[_last_ending(low)] += len(several)
            continue
        sample = found.setdefault(stem + ending[: len(ending) - len(known)], {})
        for member in several:
            other = sample.setdefault(part_of[known], member)
            if other is not member:
                raise UserError(
                    f"{name}: sample {stem} has two members for its {part_of[known]}, {_as_text(other.name)} and "
                    f"{_as_text(member.name)}; one is allowed. Remove one."
                )
    used = {}
    for full_stem, sample in found.items():
        is_whole = "image" in sample and len(sample) > 1
        if sample.keys() & {"image", "condition"} and (is_whole or not any(map(found.get, _shorter(full_stem, stem)))):
            used[full_stem] = sample
        else:
            unused.update(split_name(member.name)[1].lower() for member in sample.values())
    return used


def _shorter(full_stem: str, stem: str) -> Iterator[str]:
    """ "a.b.c", "a" -> "a", "a.b"."""
    for place in range(len(stem), len(full_stem)):
        if full_stem[place] == ".":
            yield full_stem[:place]


def _longest(ending: str, part_of: dict[str, str]) -> str | None:
    """The longest known ending that `ending` ends in, or None."""
    start = ending.find(".", 1)
    while start != -1:
        if ending[start:] in part_of:
            return ending[start:]
        start = ending.find(".", start + 1)
    return None


def _last_ending(ending: str) -> str:
    return f".{ending.rpartition('.')[2]}" if ending else "no ending"


def _read_members(path: Path, name: str) -> Iterator[Member]:
    """The plain files of all archives in a file. Raises UserError."""
    try:
        with path.open("rb") as file:
            check_pointer(path, name)
            _check_plain(file, name)
            start, archive = 0, 0
            while start is not None:
                file.seek(start)
                end = start
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                    for info in tar:
                        _check_member(info, name, end)
                        if info.isreg():
                            end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                            yield Member(info.name, archive, info.offset_data, info.size)
                start, archive = _next_archive(file, name, end, start, archive), archive + 1
    except tarfile.TarError as fault:
        raise UserError(f"{name}: truncated, or not a tar file: {fault}. Copy it again.") from fault
    except OSError as fault:
        raise UserError(f"{name}: cannot be read: {fault.strerror or fault}.") from fault


def _check_plain(file: IO[bytes], name: str) -> None:
    """Raises UserError if the file is compressed: pictures are read by their position in the file."""
    start = file.read(8)
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{name}: is a zip archive. Unpack it (unzip FILE -d FOLDER) and name the folder.")
    command = next((command for mark, command in _UNPACK.items() if start.startswith(mark)), None)
    if command:
        base = base_name(name)
        plain = base
        for ending in _PACKED_ENDINGS:
            plain = plain.removesuffix(ending)
        plain = f"{plain.removesuffix('.tgz').removesuffix('.tar')}.tar"
        raise UserError(
            f"{name}: compressed, and shards are read at any position. Unpack it: {command} {base} > "
            f"{plain if plain != base else 'plain.tar'}"
        )


def _check_member(member: tarfile.TarInfo, name: str, end: int) -> None:
    """Raises UserError if a member cannot be used. `end`: the first byte after the member before it."""
    shown = repr(_as_text(member.name))
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        raise UserError(f"{name}: member {shown} leads out of the archive, which is not allowed.")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(
            f"{name}: member {shown} is a link or a device; only plain files are allowed. "
            "tar --dereference --hard-dereference stores the files that links point to."
        )
    if member.size < 0 or member.offset_data < end:
        raise UserError(f"{name}: damaged: the header of member {shown} puts it before the end of the last one.")


def _next_archive(file: IO[bytes], name: str, end: int, start: int, archive: int) -> int | None:
    """The first byte of the archive that follows the one that ends at byte `end`; None at the end of the file.

    Raises UserError if no block of zeros is there, which `tarfile` does not check.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(end)
    block = file.read(_BLOCK)
    if block != bytes(_BLOCK):
        if archive and end == start:
            raise UserError(
                f"{name}: {size - end:,} bytes follow the end of the archive and are not a tar archive. Write it again."
            )
        raise UserError(f"{name}: truncated: it ends at byte {size:,} without an end mark. Copy it again.")
    place = end + _BLOCK
    while chunk := file.read(_CHUNK):
        left = chunk.lstrip(b"\0")
        if left:
            place += len(chunk) - len(left)
            return place - place % _BLOCK
        place += len(chunk)
    return None


def _as_text(name: str) -> str:
    """A member's name; bytes that are not UTF-8 become escapes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _to_table(samples: dict[str, Sample]) -> pa.Table:
    columns = {"stem": pa.array(list(samples), pa.large_string())}
    for part in PARTS:
        found: Iterable[Member | None] = [sample.get(part) for sample in samples.values()]
        columns[f"{part}_at"] = pa.array([member.start if member else MISSING for member in found], pa.int64())
        columns[f"{part}_size"] = pa.array([member.size if member else MISSING for member in found], pa.int64())
    return pa.table(columns)
