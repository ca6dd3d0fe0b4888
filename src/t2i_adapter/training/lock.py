"""A lock file: one run at a time writes into an output folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from t2i_adapter.errors import UserError


def lock(folder: Path) -> IO[str]:
    """Locks the folder until the returned file is closed or the process ends, even by a kill.

    Raises UserError if another run has locked it, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8", opener=_not_through_a_link)  # noqa: SIM115
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
    return file


def _not_through_a_link(path: str, flags: int) -> int:
    """Opens a file, but not through a link: in a folder from somebody else it may lead to another file of the user."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
