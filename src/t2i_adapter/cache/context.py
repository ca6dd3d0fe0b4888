"""What preparing a cache works with: the device, the cache folder, disk space, other processes, progress bars.

A cache folder ROOT holds

    images/FINGERPRINT/    image records and about.json
    texts/FINGERPRINT/     text records and about.json
    stamps/                digests of files that were read before (`stamps`)
    notes/RUN/             what the processes of one run write for each other (`crew`)

A cache may lie on object storage below an address instead. Then ROOT is a local folder with bounded copies.

Importing this module loads no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from t2i_adapter.cache.crew import Crew
from t2i_adapter.cache.mirror import Mirror
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cache.stamps import Stamps
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.notes import NOTES, FolderNotes, Notes, ObjectNotes
from t2i_adapter.data.store import Store
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import cache_root, fingerprint, show_bytes, write_atomic
from t2i_adapter.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from t2i_adapter.models.base import Base

ABOUT = "about.json"
KINDS = ("images", "texts")
STAMPS = "stamps"
SPARE_BYTES = 256 * 2**20
"""Disk space that a cache leaves free."""
TIMEOUT_SECONDS = 1800.0
"""How long a process waits for the next record of another process."""

In = TypeVar("In")
Out = TypeVar("Out")


class CachePlace(NamedTuple):
    """Where a cache is: its local folder, and the mirror of its address if it is on object storage."""

    root: Path
    mirror: Mirror | None = None


def cache_place(options: DataOptions) -> CachePlace:
    """The cache that the options name. Raises UserError."""
    root, url = cache_root(options.prepared_dir), options.prepared_dir or ""
    if "://" not in url:
        return CachePlace(root)
    url = url.rstrip("/")
    local = root / "copies" / fingerprint(url=url)
    return CachePlace(local, Mirror(url, Store(local, limit=int(options.local_gb * 1e9))))


@dataclass(frozen=True)
class PrepareContext:
    """The device that encodes, the cache folder, and the processes that share the work.

    Attributes:
        dtype: dtype of the text encoders; the VAE runs in float32.
        root: the cache folder, shared by all runs; of a cache on object storage its local folder.
        mirror: the cache on object storage; None if it is in `root`.
        rank, world: this process and the number of processes that see the cache and prepare together. Each takes parts
            of the work and waits for the others by looking at files, so that no collective call can time out.
        run_id: names the notes through which the processes of this run work together.
        timeout: seconds without a new record from another process after which waiting ends in an error.
        progress: whether rank 0 shows progress bars.
        quiet: whether rank 0 prints nothing.
    """

    base: Base
    device: torch.device | str
    dtype: torch.dtype
    root: Path
    rank: int = 0
    world: int = 1
    run_id: str = ""
    timeout: float = TIMEOUT_SECONDS
    progress: bool = True
    quiet: bool = False
    mirror: Mirror | None = None

    @property
    def address(self) -> str:
        """Where the cache is, for messages."""
        return self.mirror.url if self.mirror else str(self.root)

    def open_shards(self, kind: str, fingerprint: str, about: Mapping[str, Any]) -> Shards:
        """The records of a kind that are made with the same options. `about` describes them to people. Raises
        UserError."""
        folder = open_folder(self.root, kind, fingerprint, about)
        mirror = self._below(f"{kind}/{fingerprint}")
        if mirror and mirror.read(ABOUT) is None:
            mirror.write(ABOUT, json.dumps(about, indent=1).encode())
        return Shards(folder, mirror)

    def check_room(self, need: int) -> None:
        """Raises UserError if `need` bytes do not fit on the disk of the cache."""
        if not self.mirror:
            check_room(self.root, need)

    def open_stamps(self) -> Stamps:
        """The digests of files that were read before."""
        return Stamps(self.root / STAMPS, self._below(STAMPS))

    def open_crew(self) -> Crew:
        """The processes that prepare together."""
        return Crew(open_notes(self.root, self.mirror, self.run_id), self.rank, self.world)

    def _below(self, name: str) -> Mirror | None:
        return self.mirror and replace(self.mirror, url=f"{self.mirror.url}/{name}")

    def log(self, line: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0 and not self.quiet:
            print(line, flush=True)

    def bar(self, items: Iterable[In], total: int, title: str) -> Iterable[In]:
        """The items, with a progress bar on rank 0."""
        return bar(items, total, title, is_shown=self.progress and self.rank == 0)


def open_notes(root: Path, mirror: Mirror | None, run_id: str) -> Notes:
    """The notes of a run in a cache."""
    return ObjectNotes(f"{mirror.url}/{NOTES}/{run_id}") if mirror else FolderNotes(root / NOTES / run_id)


def open_folder(root: Path, kind: str, fingerprint: str, about: Mapping[str, Any]) -> Path:
    """Creates the folder ROOT/KIND/FINGERPRINT if it is missing, and marks it as used now.

    `about` describes its records to people. Raises UserError if the folder cannot be created or written.
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
            f"{folder}: the folder cannot be created ({fault.strerror}). Name a folder that you can write to, "
            "here or in $T2I_ADAPTER_CACHE.",
            option="data.prepared_dir",
        ) from fault
    return folder


def check_room(root: Path, need: int, free: int | None = None) -> None:
    """Raises UserError if `need` bytes do not fit on the disk of `root`."""
    free = shutil.disk_usage(root).free if free is None else free
    if need and need + SPARE_BYTES > free:
        raise UserError(
            f"{root}: at least {show_bytes(need)} are needed for the cache and {show_bytes(SPARE_BYTES)} to spare, but "
            f"{show_bytes(free)} are free. Make room, name a folder on another disk, or cache nothing "
            f"({flag('data.cache')} none).",
            option="data.prepared_dir",
        )


def run_ahead(pool: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """map() in the pool, in order, with at most `ahead` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_batches(items: Iterable[In], size: int, key: Callable[[In], Any] = lambda _: None) -> Iterator[list[In]]:
    """Lists of up to `size` items that have one key. At most `size - 1` items of each key wait."""
    waiting: dict[Any, list[In]] = {}
    for item in items:
        batch = waiting.setdefault(key(item), [])
        batch.append(item)
        if len(batch) == size:
            yield waiting.pop(key(item))
    yield from waiting.values()


def bar(items: Iterable[In], total: int, title: str, *, is_shown: bool = True) -> Iterable[In]:
    """The items, with a progress bar."""
    return progress_bar(title, total, items=items, is_reported=is_shown)
