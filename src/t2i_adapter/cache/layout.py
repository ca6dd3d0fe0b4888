"""Where prepared records lie, what each folder of them says of itself, and whether the disk has room.

ROOT/images/FINGERPRINT/    records of pictures, about.json
ROOT/texts/FINGERPRINT/     records of captions, about.json
ROOT/stamps/                digests of files that have not changed since
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError
from t2i_adapter.files import show_bytes, write_atomic

ABOUT = "about.json"
KINDS = ("images", "texts")
STAMPS, NOTES = "stamps", "notes"
ROOM_TO_LEAVE = 256 * 2**20


def open_folder(root: Path, kind: str, fingerprint: str, about: Mapping[str, Any]) -> Path:
    """The folder of records that were made alike, made where need be and marked as used now.

    `about` says for people what it holds. Raises UserError where it cannot be made or written.
    """
    folder = root / kind / fingerprint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ABOUT).is_file():
            os.utime(folder / ABOUT)
        else:
            write_atomic(folder / ABOUT, [json.dumps(about, indent=1).encode()])
    except OSError as fault:
        raise UserError(
            f"--data.prepared_dir: {folder} cannot be made ({fault.strerror}). Name a folder that can be written."
        ) from fault
    return folder


def check_room(root: Path, need: int, free: int | None = None) -> None:
    """Raises UserError where `need` bytes do not fit on the disk of `root`."""
    free = shutil.disk_usage(root).free if free is None else free
    if need and need + ROOM_TO_LEAVE > free:
        raise UserError(
            f"--data.prepared_dir {root}: at least {show_bytes(need)} are needed for prepared pictures and captions, "
            f"beside {show_bytes(ROOM_TO_LEAVE)} to spare, and {show_bytes(free)} are free. "
            "Make room, name a folder on another disk, or keep nothing (--data.cache none)."
        )
