"""A quick look at a local folder: how many pictures, texts, tables and archives it holds, and which links loop."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i_adapter.data.names import is_litter, is_picture, split_ending
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_path

TEXTS = (".txt", ".caption")
"""Endings of captions beside pictures, the first one winning."""
MANIFESTS = (".jsonl", ".json", ".csv", ".tsv")
"""Endings of tables in text whose rows name pictures."""
ARCHIVES = (".zip", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_FILES = 20_000
"""Files that a quick look counts: enough to recognise a layout, and a second at most on a slow disk."""


@dataclass(frozen=True)
class Look:
    """What a folder holds.

    Attributes:
        pictures, texts: number of files with a picture's or a caption's ending, in it and in its subfolders.
        folders: number of its subfolders at any depth.
        manifests, archives: names of tables and archives in the folder itself, sorted.
        other: (ending, number) of other files, the most frequent first.
        is_whole: False if there are more files than a quick look counts.
    """

    pictures: int
    texts: int
    folders: int
    manifests: tuple[str, ...]
    archives: tuple[str, ...]
    other: tuple[tuple[str, int], ...]
    is_whole: bool

    def describe(self) -> str:
        """For example "3 pictures, 2 texts, 1 subfolder"; the first files only if it holds very many."""
        counts = {
            "picture": self.pictures,
            "text": self.texts,
            "table": len(self.manifests),
            "archive": len(self.archives),
            "other file": sum(count for _, count in self.other),
            "subfolder": self.folders,
        }
        shown = [plural(count, name) for name, count in counts.items() if count or name in ("picture", "text")]
        if self.other:
            shown[-1 if not self.folders else -2] += (
                f" ({', '.join(f'{count} {end}' for end, count in self.other[:3])})"
            )
        return ("" if self.is_whole else "at least ") + ", ".join(shown)


def look_at(folder: Path) -> Look:
    """Counts what a local folder holds."""
    counts: Counter[str] = Counter()
    other: Counter[str] = Counter()
    tops: dict[str, list[str]] = {"manifest": [], "archive": []}
    is_whole = True
    for inner, files in walk(folder):
        counts["folder"] += inner != ""
        for name in files:
            kind = _kind(name)
            counts[kind] += 1
            if kind in tops and not inner:
                tops[kind].append(name)
            if kind == "other":
                other[split_ending(name)[1] or "without ending"] += 1
        if sum(counts.values()) > _MAX_FILES:
            is_whole = False
            break
    return Look(
        counts["picture"],
        counts["text"],
        counts["folder"],
        tuple(sorted(tops["manifest"])),
        tuple(sorted(tops["archive"])),
        tuple(other.most_common()),
        is_whole,
    )


def walk(folder: Path, skip: tuple[Path, ...] = (), loops: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """(path of a folder relative to `folder`, "" for itself; its files' names) of every folder below, sorted.

    Litter and hidden entries are ignored. Links are followed; a link to a folder that contains it is not, and its path
    is appended to `loops`. `skip`: folders that are not entered. Raises UserError if a folder cannot be read.
    """
    skipped = {_identity(path) for path in skip}

    def enter(path: str, inner: str, above: tuple[tuple[int, int] | None, ...]) -> Iterator[tuple[str, list[str]]]:
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if not is_litter(entry.name):
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as fault:
            raise UserError(f"{path}: the folder cannot be read: {fault.strerror}.", kind="unreadable") from fault
        yield inner, sorted(files)
        for name in sorted(folders):
            below = f"{inner}/{name}" if inner else name
            identity = _identity(Path(path, name))
            if identity in above:
                if loops is not None:
                    loops.append(below)
            elif identity not in skipped:
                yield from enter(f"{path}/{name}", below, (*above, identity))

    yield from enter(str(folder), "", (_identity(folder),))


def unpack_command(archive: Path) -> str:
    """The command line that unpacks an archive beside itself."""
    name = archive.name.lower()
    target = archive.with_name(archive.name[: len(archive.name) - len(next(e for e in ARCHIVES if name.endswith(e)))])
    file, folder = show_path(archive), show_path(target)
    if name.endswith(".zip"):
        return f"python3 -m zipfile -e {file} {folder}"
    if name.endswith((".7z", ".rar")):
        return f"7z x {file} -o{folder}"
    return f"mkdir {folder} && tar -xf {file} -C {folder}"


def plural(count: int, noun: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _kind(name: str) -> str:
    lower = name.lower()
    if is_picture(name):
        return "picture"
    if lower.endswith(TEXTS):
        return "text"
    if lower.endswith(MANIFESTS):
        return "manifest"
    return "archive" if lower.endswith(ARCHIVES) else "other"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
