"""One writer per output folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from t2i_adapter.errors import UserError


def lock(folder: Path) -> IO[str]:
    """Takes the folder for this process until the returned file is closed or the process ends, however it ends.

    Raises UserError if another run holds it, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8", opener=_not_through_a_link)  # noqa: SIM115
    except (OSError, ValueError) as fault:  # ValueError: a zero byte in the name
        raise UserError(f"--output_dir {folder}: cannot be written ({fault}).") from fault
    try:
        # A record lock belongs to this process alone. flock's would live on in loader workers that outlast a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as fault:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"--output_dir {folder} is in use by another run (process {holder}): wait for it, or name another folder."
        ) from fault
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _not_through_a_link(path: str, flags: int) -> int:
    """A folder that somebody else packed may hold a link to what must not be overwritten."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
