"""The verbs `cache ls`, `cache verify` and `cache rm`: options on top, the verbs below. Importing this module loads no
numpy and no torch."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from t2i_adapter.errors import UserError, flag, redact
from t2i_adapter.files import cache_root, parse_json, show_bytes

DAY = 24 * 3600
SHOWN = 12  # letters of a fingerprint


@dataclass(frozen=True)
class CacheOptions:
    """Where the cache is."""

    prepared_dir: str | None = None
    """Folder of the cache; None is $T2I_ADAPTER_CACHE, or ~/.cache/t2i_adapter/prepared."""


@dataclass(frozen=True)
class RemoveOptions:
    """What to remove: some folders by fingerprint, folders that were not used for some days, or all."""

    fingerprints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Fingerprints as `cache ls` shows them; their first letters are enough."""
    unused_days: float | None = None
    """Remove folders that no run has used for this many days."""
    all: bool = False
    """Remove everything; needs --yes."""
    yes: bool = False
    """Confirm --all."""
    prepared_dir: str | None = None
    """Folder of the cache; None is $T2I_ADAPTER_CACHE, or ~/.cache/t2i_adapter/prepared."""


@dataclass(frozen=True)
class Folder:
    """A folder of records.

    Attributes:
        kind: "images" or "texts".
        about: the content of its about.json; empty if that cannot be read.
        files: its shards.
        size: bytes of the shards.
        unused: seconds since it was last used.
    """

    path: Path
    kind: str
    about: dict[str, Any]
    files: tuple[Path, ...]
    size: int
    unused: float

    @classmethod
    def of(cls, path: Path) -> Folder:
        from t2i_adapter.cache.context import ABOUT
        from t2i_adapter.cache.shard_file import SUFFIX

        files = tuple(sorted(path.glob(f"*{SUFFIX}")))
        newest = max(one.stat().st_mtime for one in (path / ABOUT, *files, path) if one.exists())
        try:
            about = dict(parse_json((path / ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            about = {}
        size = sum(file.stat().st_size for file in files)
        return cls(path, path.parent.name, about, files, size, time.time() - newest)

    def describe(self) -> str:
        """One line: fingerprint, kind, number of records, bytes, when it was last used, about.json."""
        records = sum(map(_count_records, self.files))
        about = redact(", ".join(f"{name} {value}" for name, value in self.about.items())) or "made by an older version"
        days = f"{self.unused / DAY:.0f} days ago" if self.unused >= DAY else "today"
        name = self.path.name[:SHOWN]
        return f"{name}  {self.kind:<6}  {records:>9,} records  {show_bytes(self.size):>9}  {days:<12}  {about}"


def ls(options: CacheOptions) -> None:
    """Prints a line for each folder of records, the last used first, and the sum of their bytes."""
    root = _root(options.prepared_dir)
    found = sorted(folders(root), key=lambda folder: folder.unused)
    for folder in found:
        print(folder.describe())
    print(f"{show_bytes(sum(folder.size for folder in found))} in {len(found)} folders at {root}")


def verify(options: CacheOptions) -> None:
    """Reads every record and prints the damaged files. Exits with code 1 if there are any."""
    from t2i_adapter.cache.context import bar
    from t2i_adapter.cache.shard_file import damage

    root = _root(options.prepared_dir)
    files = [file for folder in folders(root) for file in folder.files]
    faults = {file: fault for file in bar(files, len(files), "reading") if (fault := damage(file))}
    for file, fault in faults.items():
        print(f"{file}: {fault}")
    if faults:
        print(f"{len(faults)} of {len(files)} files are damaged: delete them, and their records are made again.")
        raise SystemExit(1)
    print(f"{len(files)} files are undamaged at {root}")


def rm(options: RemoveOptions) -> None:
    """Removes folders of records and prints a line for each. Raises UserError."""
    from t2i_adapter.cache.context import STAMPS

    chosen = [bool(options.fingerprints), options.unused_days is not None, options.all]
    if sum(chosen) != 1:
        raise UserError(
            f"{'nothing to remove' if not any(chosen) else 'more than one choice'} is named: name FINGERPRINTS (see "
            f"`cache ls`), {flag('unused_days')} or {flag('all')}."
        )
    root = _root(options.prepared_dir)
    found = folders(root)
    if options.all and not options.yes:
        size = show_bytes(sum(folder.size for folder in found))
        raise UserError(f"removes {len(found)} folders with {size} at {root}: add {flag('yes')}.", option="all")
    if options.fingerprints:
        found = [_named(found, name) for name in dict.fromkeys(options.fingerprints)]
    elif options.unused_days is not None:
        found = [folder for folder in found if folder.unused > options.unused_days * DAY]
    for folder in found:
        _remove(folder.path)
        print(f"removed {folder.path.name[:SHOWN]} ({folder.kind}, {show_bytes(folder.size)})")
    if options.all:
        _remove(root / STAMPS)
    print(f"{show_bytes(sum(folder.size for folder in found))} freed at {root}")


def _root(prepared_dir: str | None) -> Path:
    """The cache's folder. Raises UserError for a cache on object storage."""
    if "://" in (prepared_dir or ""):
        raise UserError(f"{prepared_dir}: only folders; use your storage's own tools.", option="prepared_dir")
    return cache_root(prepared_dir)


def folders(root: Path) -> list[Folder]:
    """The folders of records under `root`; other files are ignored."""
    from t2i_adapter.cache.context import KINDS

    return [Folder.of(path) for kind in KINDS for path in sorted((root / kind).glob("*")) if path.is_dir()]


def _remove(path: Path) -> None:
    """Removes a folder. Of a symbolic link only the link is removed, not the folder that it points to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=not path.exists())


def _named(found: list[Folder], name: str) -> Folder:
    """The one folder whose fingerprint begins with `name`. Raises UserError."""
    matching = [folder for folder in found if name and folder.path.name.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(folder.path.name[:SHOWN] for folder in (matching or found)) or "none"
    raise UserError(f"FINGERPRINTS {name}: {len(matching) or 'no'} folders begin with it. Known: {known}.")


def _count_records(file: Path) -> int:
    from t2i_adapter.cache.shard_file import DamagedShardError, read_index

    try:
        return len(read_index(file))
    except (OSError, DamagedShardError):
        return 0
