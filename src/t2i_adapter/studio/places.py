"""Ids and folders: the only module that turns what a browser sends into a path.

A browser names runs, folders and files by ids that this server made. A path that is typed into an option, such as the
place of a dataset, must lie below the root, links resolved.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic
from t2i_adapter.runs.find import Listed, find_runs
from t2i_adapter.runs.metrics import read_file
from t2i_adapter.studio.faults import NotFoundError

STATE = ".studio"
"""In the root: the studio's own folder."""
_PLACE = "place"
"""In `STATE`: which folder of which machine it is."""
_SLUG = re.compile(r"[^a-z0-9]+")
_RESCAN_SECONDS = 2.0
MOST_ENTRIES = 2000
"""Entries of a folder that the picker lists at most."""
DATA_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet", ".tar")
"""Endings of files that may be datasets."""


@dataclass(frozen=True)
class Entry:
    """A folder, or a file that may be a dataset, in the picker."""

    id: str
    name: str
    is_folder: bool


class Places:
    """The folders below one root."""

    def __init__(self, root: Path, runs: str) -> None:
        """root: an existing folder. runs: where new runs go, below it. Raises UserError."""
        self.root = root.resolve()
        self.state = self.root / STATE
        if self.state.is_symlink():
            raise UserError(f"{self.state}: is a link, which the studio does not follow; remove it")
        self.runs = self.confine(runs, "runs")
        self._salt = secrets.token_bytes(16)
        self._listed: dict[str, Path] = {}
        self._runs: dict[str, Path] = {}
        self._known: dict[Path, Listed] = {}
        self._scanned = -1e9
        self._lock = threading.Lock()

    def relative(self, path: Path) -> str:
        """The path as commands name it, which run in the root."""
        try:
            return str(path.resolve().relative_to(self.root))
        except ValueError:
            return str(path)

    def confine(self, text: str, option: str) -> Path:
        """A path that a user typed, absolute, links resolved. Raises UserError unless it lies below the root."""
        if "\0" in text:
            raise UserError(f"{text!r}: a path has no zero byte", option=option)
        if text.startswith("~"):
            raise UserError(f"{text}: write the path in full, without ~", option=option)
        try:
            path = (self.root / text).resolve()
        except (OSError, RuntimeError, ValueError) as fault:
            raise UserError(f"{text}: cannot be read ({fault})", option=option) from None
        if not path.is_relative_to(self.root):
            raise UserError(
                f"{text}: lies outside the studio's folder, which is {self.root}. Use a path below it, or start the "
                "studio in a folder that holds it.",
                option=option,
            )
        if path.is_relative_to(self.root / STATE):
            raise UserError(f"{text}: is the studio's own folder; use another one", option=option)
        return path

    def own_folder(self, name: str) -> Path:
        """A folder of the studio's own, created if it is missing. Raises UserError if it is a link: in a root from
        somebody else it may lead anywhere."""
        folder = self.state / name
        if folder.is_symlink():
            raise UserError(f"{folder}: is a link, which the studio does not follow; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_from_elsewhere(self) -> bool:
        """Whether the studio's folder was made at another place, or by somebody else: it was moved, or unpacked."""
        return read_file(self.state / _PLACE).decode("utf-8", "replace") != self._place()

    def settle(self) -> None:
        """Marks the studio's folder as made here."""
        write_atomic(self.state / _PLACE, [self._place().encode()])

    def _place(self) -> str:
        """A digest that nobody else can write: of this machine, this user, and the folder."""
        machine = read_file(Path("/etc/machine-id")).decode("utf-8", "replace")
        return _digest(f"{machine}\0{os.getuid()}\0{self.state}\0{self.state.stat().st_ino}", 64)

    # Runs ----------------------------------------------------------------------------------------------------------

    def run_folders(self) -> dict[str, Path]:
        """Id -> folder of every run below the root; looked for at most every two seconds."""
        with self._lock:
            if time.monotonic() - self._scanned > _RESCAN_SECONDS:
                self._runs = {self.run_id(folder): folder for folder in find_runs(self.root, known=self._known)}
                self._scanned = time.monotonic()
            return self._runs

    def known_runs(self) -> dict[str, Path]:
        """As `run_folders`, without a look for new ones."""
        return self._runs

    def run_id(self, folder: Path) -> str:
        """A name for URLs: the folder's name and a digest of its path."""
        relative = self.relative(folder)
        slug = _SLUG.sub("-", Path(relative).name.lower()).strip("-")[:40] or "run"
        return f"{slug}-{_digest(relative)}"

    def run_folder(self, run: str) -> Path:
        """The folder of a run. Raises NotFoundError."""
        folder = self.run_folders().get(run)
        if folder is None:
            self._scanned = -1e9  # it may have begun since
            folder = self.run_folders().get(run)
        if folder is None or not folder.is_dir():
            raise NotFoundError(f"no run is called {run[:80]!r}; it may have been moved or deleted")
        return folder

    def forget_runs(self) -> None:
        """Makes the next call look for runs again."""
        self._scanned = -1e9

    # Picker --------------------------------------------------------------------------------------------------------

    def listed(self, place: str) -> Path:
        """The folder or file behind an id of the picker; "" is the root. Raises NotFoundError."""
        if not place:
            return self.root
        path = self._listed.get(place)
        if path is None or not path.exists() or not path.resolve().is_relative_to(self.root):
            raise NotFoundError("this folder is no longer listed; begin again from the top")
        return path

    def children(self, place: str) -> Iterator[Entry]:
        """The folders, and the files that may be datasets, in a listed folder, by name. Raises NotFoundError."""
        folder = self.listed(place)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name.casefold())
        except OSError as fault:
            raise NotFoundError(f"{folder.name}: {fault.strerror}") from None
        shown = [entry for entry in entries if not entry.name.startswith(".") and _is_offered(entry)]
        for entry in shown[:MOST_ENTRIES]:
            path = Path(entry.path)
            key = hashlib.sha256(self._salt + os.fsencode(path)).hexdigest()[:16]
            self._listed[key] = path
            yield Entry(key, entry.name, entry.is_dir(follow_symlinks=False))


def _is_offered(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir(follow_symlinks=False):
        return True
    return entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(DATA_ENDINGS)


def _digest(text: str, letters: int = 8) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:letters]
