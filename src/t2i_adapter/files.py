"""Files and folders: atomic writes, checksums, paths that users write and that are shown to them, JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError

STALE_SECONDS = 24 * 3600


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`; text that is nested too deeply is a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file by way of `atomic_path`. If several processes write the same file, the last one wins. Raises
    OSError."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(chunks)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, NAME.RANDOM.tmp. When the block ends, the file is flushed to the disk and renamed
    to `path`; if it raises, the file is removed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        move_atomic(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_atomic(source: Path, target: Path) -> None:
    """Flushes a file, or a folder with its content, to the disk, then renames it; the rename survives a power cut.

    Both must be on one file system. A file replaces `target`; a folder needs `target` not to exist. Raises OSError.
    """
    for path in (*source.rglob("*"), source):
        _flush(path)
    source.replace(target)
    _flush(target.parent)


def sweep(folder: Path, pattern: str) -> None:
    """Removes files that a killed process left behind: those that match and are a day old."""
    found = list(folder.glob(pattern))
    if not found:
        return
    # By the clock of the disk: that of this machine may be days ahead of the one that a file on NFS was written by.
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            now = os.fstat(file.fileno()).st_mtime
    except OSError:  # a folder that cannot be written to
        return
    for path in found:
        try:
            if now - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process has removed it
            continue


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(**parts: Any) -> str:
    """Name for a folder of records made with the same options and weights: sha256 over the named parts, 32 digits."""
    text = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256(path: Path, *, from_disk: bool = False) -> str:
    """Checksum (hex) of a file. from_disk: drops the file from the page cache first, if the system can, so that the
    bytes come from the disk. Raises OSError."""
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def show_path(path: str | Path) -> str:
    """A path as a shell reads it, for everything that is printed to be used again: results, and parts of commands.

    It is quoted if a shell needs that, `~/` stays in front of the quotes, and a leading dash becomes `./-`. Sentences
    of errors name paths as they are.
    """
    text = str(path)
    if text.startswith("~/"):
        return "~/" + show_word(text[2:]) if text[2:] else text
    return show_word(f"./{text}" if text.startswith("-") else text)


def show_command(*words: str | Path) -> str:
    """A command line that a shell reads back as these words. A `Path` is shown by `show_path`."""
    return " ".join(show_path(word) if isinstance(word, Path) else show_word(word) for word in words)


def show_word(text: str) -> str:
    """One word as a shell reads it; control characters and bytes that are not UTF-8 are escaped, as in $'a\\n'."""
    if text.isprintable():
        return shlex.quote(text)
    shown = "".join(letter if letter.isprintable() and letter not in "\\'" else _escape(letter) for letter in text)
    return f"$'{shown}'"


def _escape(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    is_byte = "\udc80" <= letter <= "\udcff"  # a byte of a name that is not UTF-8
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape" if is_byte else "replace"))


def user_path(text: str | Path) -> Path:
    """A path that a user wrote, `~` and `~NAME` expanded. Raises UserError if there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        if str(text).partition("/")[0] == "~":
            raise UserError(f"{text}: {_NO_HOME}. Set HOME, or write the folder in full.") from None
        raise UserError(f"{text}: the path begins with ~ and an unknown user name; write the folder in full.") from None


_NO_HOME = "there is no home folder, because HOME is not set and this user has no entry in /etc/passwd"


def cache_folder(kind: str, named: str | None, variable: str, *, option: str | None = None) -> Path:
    """A folder of cached files: `named`, else the environment variable's, else ~/.cache/t2i_adapter/KIND.

    Raises UserError, with the option of `named`, if there is no home folder.
    """
    named = named or os.environ.get(variable)
    if named:
        return user_path(named)
    try:
        return Path.home() / ".cache" / "t2i_adapter" / kind
    except RuntimeError:
        text = f"{_NO_HOME}: set {variable} or HOME" + (", or name a folder here" if option else "")
        raise UserError(f"{text}.", option=option) from None


def cache_root(named: str | None) -> Path:
    """Local folder of everything that is cached of datasets: `named` (data.prepared_dir) if it is a folder, else
    $T2I_ADAPTER_CACHE, else ~/.cache/t2i_adapter/prepared. Raises UserError."""
    is_folder = "://" not in (named or "")
    variable = os.environ.get("T2I_ADAPTER_CACHE", "")
    if "://" in variable:
        text = f"{variable}: T2I_ADAPTER_CACHE names a local folder; name the address here"
        raise UserError(text, option="data.prepared_dir")
    return cache_folder("prepared", named if is_folder else None, "T2I_ADAPTER_CACHE", option="data.prepared_dir")


def output_folder(out: str) -> Path:
    """The folder that the option `out` names; creates it if it is missing. Raises UserError."""
    folder = user_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{out}: the folder cannot be created ({fault.strerror}).", option="out") from fault
    return folder


def show_bytes(count: float) -> str:
    """A number of bytes for people: "1.5 GB", "12 MB" or "3 KB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} KB"


def show_seconds(seconds: float) -> str:
    """A duration for people: "12 s", "3.5 min", "2 h 5 min" or "3 days 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    hours = minutes / 60
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} days {int(hours % 24)} h"
