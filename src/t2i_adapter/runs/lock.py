"""A lock file: one run at a time writes into an output folder, and others can see that it does."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from pathlib import Path
from typing import IO

from t2i_adapter.errors import UserError

FILE = ".lock"
"""In a run's folder: the locked file, which holds the number of the process that locked it last."""
_held: dict[tuple[int, int], tuple[int, IO[str]]] = {}
"""(device, inode) of each file that was locked here -> the process that locked it, the open file."""
_LINUX, _DARWIN = "hhqqi4x", "qqihh"
"""Layout of C's `struct flock`: type, whence, start, length, process; on macOS start, length, process, type, whence."""


def lock(folder: Path) -> IO[str]:
    """Locks the folder until the returned file is closed or the process ends, even by a kill.

    Raises UserError if another run has locked it, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / FILE, "a+", encoding="utf-8", opener=_not_through_a_link)  # noqa: SIM115
    except (OSError, ValueError) as fault:  # ValueError: a zero byte in the name
        raise UserError(f"{folder}: cannot be written ({fault}).", option="output_dir") from fault
    try:
        # A record lock belongs to this process alone. A flock would stay with loader workers that outlive a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as fault:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{folder} is in use by another run (process {holder}): wait for it, or name another folder.",
            option="output_dir",
        ) from fault
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    status = os.fstat(file.fileno())
    _held[status.st_dev, status.st_ino] = os.getpid(), file
    return file


def holder(folder: Path) -> int | None:
    """The process that has locked the folder, 0 if its number is unknown; None if no process has, or if it cannot be
    read. It takes no lock, so it disturbs no run that begins meanwhile."""
    file = folder / FILE
    try:
        status = file.stat(follow_symlinks=False)
        own = _held.get((status.st_dev, status.st_ino))
        # A process loses its lock as soon as it closes any handle of the file, so its own lock is looked up here.
        if own and own[0] == os.getpid() and not own[1].closed:
            return own[0]
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        return _holder(handle)
    except OSError:
        return None
    finally:
        os.close(handle)


def _holder(handle: int) -> int | None:
    """The process whose lock would refuse an exclusive one, by F_GETLK."""
    is_darwin = sys.platform == "darwin"
    layout = _DARWIN if is_darwin else _LINUX
    lock = (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if is_darwin else (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = struct.unpack(layout, fcntl.fcntl(handle, fcntl.F_GETLK, struct.pack(layout, *lock)))
    kind, process = (found[3], found[2]) if is_darwin else (found[0], found[4])
    return None if kind == fcntl.F_UNLCK else max(0, process)


def _not_through_a_link(path: str, flags: int) -> int:
    """Opens a file, but not through a link: in a folder from somebody else it may lead to another file of the user."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
