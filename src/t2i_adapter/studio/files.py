"""Names of what lies in the studio's own folder, and how a change of a file is seen."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path

REQUEST, RESULT, PROGRESS, CANCELLED = "request.json", "result.json", "progress", "cancelled"
"""In the folder of a request to the painter: what is asked for, what came of it, how far it is, that it
was given up."""
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


def new_id() -> str:
    """A name for a job, a request or an upload; names sort by time."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


def is_id(text: str) -> bool:
    """Whether `new_id` may have made this name."""
    return _ID.fullmatch(text) is not None


def stamp_of(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None if there is none. A link is not followed."""
    try:
        status = os.lstat(file)  # half the time of the method of Path, several hundred times a second
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
