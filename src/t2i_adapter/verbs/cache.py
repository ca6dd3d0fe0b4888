"""The verbs `cache ls`, `cache verify` and `cache rm`."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_adapter.cache.layout import ABOUT, KINDS, STAMPS
from t2i_adapter.cache.progress import bar
from t2i_adapter.cache.shards import SUFFIX, DamagedShardError, damage, read_index
from t2i_adapter.errors import UserError, redact
from t2i_adapter.files import cache_root, parse_json, show_bytes
from t2i_adapter.verbs.cache_options import CacheOptions, RemoveOptions

DAY = 24 * 3600
SHOWN = 12  # letters of a fingerprint


@dataclass(frozen=True)
class Held:
    """A folder of records: what it says of itself, its shard files, their bytes, seconds since it was last used."""

    folder: Path
    kind: str
    about: dict[str, Any]
    files: tuple[Path, ...]
    size: int
    unused: float

    @classmethod
    def of(cls, folder: Path) -> Held:
        about = folder / ABOUT
        files = tuple(sorted(folder.glob(f"*{SUFFIX}")))
        newest = max(path.stat().st_mtime for path in (about, *files, folder) if path.exists())
        try:
            told = dict(parse_json(about.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            told = {}
        size = sum(path.stat().st_size for path in files)
        return cls(folder, folder.parent.name, told, files, size, time.time() - newest)

    def describe(self) -> str:
        """One line: fingerprint, kind, records, bytes, when it was last used, what it is of."""
        records = sum(_records(file) for file in self.files)
        of = redact(", ".join(f"{name} {value}" for name, value in self.about.items())) or "made by an older version"
        days = f"{self.unused / DAY:.0f} days ago" if self.unused >= DAY else "today"
        name = self.folder.name[:SHOWN]
        return f"{name}  {self.kind:<6}  {records:>9,} records  {show_bytes(self.size):>9}  {days:<12}  {of}"


def ls(options: CacheOptions) -> None:
    """Prints a line for each folder of records, the last used first, and their sum."""
    root = cache_root(options.prepared_dir)
    held = sorted(folders(root), key=lambda one: one.unused)
    for one in held:
        print(one.describe())
    print(f"{show_bytes(sum(one.size for one in held))} in {len(held)} folders at {root}")


def verify(options: CacheOptions) -> None:
    """Reads every record; names the files that are damaged. Exit code 1 where there are any."""
    root = cache_root(options.prepared_dir)
    files = [file for one in folders(root) for file in one.files]
    found = {file: damage(file) for file in bar(files, len(files), "reading", True)}
    for file, fault in found.items():
        if fault:
            print(f"{file}: {fault}")
    bad = sum(fault is not None for fault in found.values())
    if bad:
        print(f"{bad} of {len(files)} files are damaged: delete them, and what they held is made anew.")
        raise SystemExit(1)
    print(f"{len(files)} files are whole at {root}")


def rm(options: RemoveOptions) -> None:
    """Removes folders of records, with a line for each. Raises UserError."""
    chosen = [bool(options.fingerprints), options.unused_days is not None, options.all]
    if sum(chosen) != 1:
        got = "nothing is" if not any(chosen) else "more than one is"
        raise UserError(f"what to remove: {got} named; give FINGERPRINTS (see `cache ls`), --unused_days, or --all.")
    root = cache_root(options.prepared_dir)
    held = folders(root)
    if options.all and not options.yes:
        size = show_bytes(sum(one.size for one in held))
        raise UserError(f"--all: would remove {len(held)} folders with {size} at {root}; add --yes to do it.")
    if options.fingerprints:
        held = [_named(held, name) for name in dict.fromkeys(options.fingerprints)]
    elif options.unused_days is not None:
        held = [one for one in held if one.unused > options.unused_days * DAY]
    for one in held:
        _remove(one.folder)
        print(f"removed {one.folder.name[:SHOWN]} ({one.kind}, {show_bytes(one.size)})")
    if options.all:
        _remove(root / STAMPS)
    print(f"{show_bytes(sum(one.size for one in held))} freed at {root}")


def folders(root: Path) -> list[Held]:
    """The folders of records under `root`. Nothing else there is ever looked at."""
    return [Held.of(path) for kind in KINDS for path in sorted((root / kind).glob("*")) if path.is_dir()]


def _remove(folder: Path) -> None:
    """A link is removed itself: what it leads to may be anyone's."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=not folder.exists())


def _named(held: list[Held], name: str) -> Held:
    found = [one for one in held if name and one.folder.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(one.folder.name[:SHOWN] for one in (found or held)) or "none"
    raise UserError(f"FINGERPRINTS {name}: {len(found) or 'no'} folders have it; there are: {known}.")


def _records(file: Path) -> int:
    try:
        return len(read_index(file))
    except (OSError, DamagedShardError):
        return 0
