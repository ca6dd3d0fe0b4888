"""The local folder of downloaded files, bounded in size, and of the indices of shards.

Processes of one machine share it: a file is downloaded once, under a temporary name, then renamed. If the folder is
full, the least recently used files are deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.data.addresses import Blob
from t2i_adapter.data.remote import download
from t2i_adapter.errors import UserError
from t2i_adapter.files import STALE_SECONDS, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

FETCHED_BYTES = 64 * 2**30
"""Largest size of the folder of downloaded files."""
_UNKNOWN_BYTES = 2**30  # largest download of a file whose size the server does not send
_SUM_BYTES = 4


class Store:
    """Downloaded files and shard indices below the cache's root; folders are made at the first write."""

    def __init__(self, root: Path, limit: int = FETCHED_BYTES) -> None:
        self._fetched = root / "fetched"
        self._indices = root / "indices"
        self.limit = limit

    def local(self, blob: Blob) -> Path:
        """The local path of a file, which is downloaded first if needed. Raises UserError that names the URL."""
        if not blob.is_remote:
            return Path(blob.name)
        path = self.place(blob)
        if not _touch(path):
            with self._locked(path.name):
                if not _touch(path):
                    self._make_room(blob.size)
                    download(blob, path, most=blob.size or min(self.limit, _UNKNOWN_BYTES))
        return path

    def place(self, blob: Blob) -> Path:
        """The path that a remote file has once it is downloaded."""
        name = hashlib.sha256((blob.stamp or blob.name).encode()).hexdigest()[:40]
        return self._fetched / name

    def index(self, key: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table that `make` returns for `key`: made once, then read from the disk."""
        import pyarrow as pa

        path = self._indices / (hashlib.sha256(key.encode()).hexdigest()[:40] + ".arrow")
        with suppress(OSError):
            content = memoryview(path.read_bytes())
            if content[:_SUM_BYTES] == _sum(content[_SUM_BYTES:]):
                return pa.ipc.open_file(pa.py_buffer(content[_SUM_BYTES:])).read_all()
        table = make()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        _make_folder(self._indices)
        write_atomic(path, [_sum(sink.getbuffer()), sink.getbuffer()])
        return table

    def _make_room(self, need: int) -> None:
        """Deletes the least recently used files until `need` more bytes fit the limit and the disk.

        A temporary file is deleted only if it is a day old: the process that wrote it was killed.
        """
        held = list(_held(self._fetched))
        total, free = sum(state.st_size for state, _ in held), shutil.disk_usage(self._fetched).free
        for state, path in sorted(held, key=lambda one: one[0].st_atime):
            is_temporary = path.suffix == ".tmp"
            is_stale = is_temporary and time.time() - state.st_mtime > STALE_SECONDS
            if is_stale or (not is_temporary and (total + need > self.limit or need > free)):
                path.unlink(missing_ok=True)
                total, free = total - state.st_size, free + state.st_size
        if need > free:
            raise UserError(
                f"{self._fetched}: {need / 1e9:.1f} GB are needed for a remote file and {free / 1e9:.1f} GB are free. "
                "Free some space, or name a folder on another disk.",
                option="data.prepared_dir",
            )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One thread of one process downloads a file; the others wait for it."""
        _make_folder(self._fetched)
        with (self._fetched / f".lock-{name[:2]}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _sum(data: Any) -> bytes:
    """Checksum of an index: arrow would read wrong numbers from a damaged one without an error."""
    return zlib.crc32(data).to_bytes(_SUM_BYTES, "little")


def _held(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """The files of a folder. Skips a file that another process renames or deletes meanwhile."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            with suppress(FileNotFoundError):
                yield path.stat(), path


def _touch(path: Path) -> bool:
    """Sets a downloaded file's access time to now, which marks it as used. False if the file is missing."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        text = f"{folder} cannot be made ({fault.strerror}). Name a folder that can be written."
        raise UserError(text, option="data.prepared_dir") from fault
