"""Files and folders that appear under their name whole and on the disk, or not at all; JSON of whatever origin."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STALE_SECONDS = 24 * 3600


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, with every fault of the text a ValueError: also one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file by way of one beside it, NAME.RANDOM.tmp, which is gone again if that fails. Of several processes
    that write the same file the last one's stays. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
        move_whole(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def move_whole(source: Path, target: Path) -> None:
    """Renames a file, or a folder with all it holds, once it is on the disk; the rename outlasts a power cut.

    Both lie on one file system. A file takes the place of `target`; a folder needs the place empty. Raises OSError.
    """
    for path in (*source.rglob("*"), source):
        _flush(path)
    source.replace(target)
    _flush(target.parent)


def sweep(folder: Path, pattern: str) -> None:
    """Removes files that a killed process left behind: those a day old, which no living one is still about to use."""
    for path in folder.glob(pattern):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
