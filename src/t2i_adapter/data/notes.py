"""Small files by which the processes of one run work together in a cache that all of them see.

Only what every network file system has is used: a file is created if it does not exist (O_EXCL), written under a
temporary name and renamed, and read by its name. No file is locked, and no machine's clock is compared with another's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from t2i_adapter.data import remote
from t2i_adapter.files import STALE_SECONDS, write_atomic

NOTES = "notes"
"""In a cache: a folder for each run."""


class Notes(Protocol):
    """Small files by name, which all processes of a run see. `FolderNotes` has them in a folder."""

    def create(self, name: str, data: bytes) -> bool:
        """Creates the file. False if it exists: of several processes that create a file, one gets True."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces the file."""
        ...

    def read(self, name: str) -> bytes | None:
        """The file's content; None if it is missing."""
        ...


class FolderNotes:
    """`Notes` in a folder, which is made by the first file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, name: str, data: bytes) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self.folder / name).open("xb") as file:  # O_EXCL
                file.write(data)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / name, [data])

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return (self.folder / name).read_bytes()
        return None


class ObjectNotes:
    """`Notes` on object storage below an s3 address. `create` needs a server that supports conditional writes."""

    def __init__(self, url: str) -> None:
        self.url = url

    def create(self, name: str, data: bytes) -> bool:
        return remote.create(f"{self.url}/{name}", data)

    def write(self, name: str, data: bytes) -> None:
        remote.write(f"{self.url}/{name}", data)

    def read(self, name: str) -> bytes | None:
        return remote.read(f"{self.url}/{name}")


def sweep_notes(root: Path) -> None:
    """Removes the notes of runs that wrote none for a day."""
    for path in _entries(root / NOTES):
        with suppress(OSError):  # another process removes it too
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from folder.iterdir()
