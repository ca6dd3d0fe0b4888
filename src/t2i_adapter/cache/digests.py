"""Finds the digest of each row's pictures, the key of its records: from stamps, by reading, or from another process."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

import numpy as np

from t2i_adapter.cache.context import PrepareContext, run_ahead
from t2i_adapter.cache.crew import Crew
from t2i_adapter.cache.stamps import Stamps
from t2i_adapter.data.bad_rows import BadRow, BadRows
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError

CHUNK = 4096
"""Rows whose stamps are looked up at once, at most."""
SAVE_SECONDS = 30.0
"""Seconds between saves of the stamps: a killed run reads at most this much again."""
_MARK_BYTES = 16


def read_digests(
    pool: Executor, source: Source, context: PrepareContext, bad: BadRows, crew: Crew
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) of the good rows, ascending, and their digests (N,32) uint8.

    Only rows whose files are new or have changed are read, each by one process of the crew. Raises UserError with up to
    ten bad rows.
    """
    reader = _Reader(pool, source, context.open_stamps(), bad, crew)
    with reader.saving():
        for place in context.bar(crew.order(len(reader.chunks)), len(reader.chunks), "reading"):
            reader.find(place)
        crew.complete("digests", reader.unknown, int, reader.read, context.timeout, context.address)
    bad.exchange()
    bad.settle()
    if not bad.found:
        return np.arange(len(source), dtype=np.int32), reader.digests
    good = ~np.isin(np.arange(len(source)), list(bad.found))
    return np.flatnonzero(good).astype(np.int32), reader.digests[good]


class _Reader:
    """Reads rows by chunks of consecutive numbers.

    Attributes:
        chunks: the rows of each chunk.
        digests: (N,32) uint8 of all rows, zeros for rows that are unknown or bad.
    """

    def __init__(self, pool: Executor, source: Source, stamps: Stamps, bad: BadRows, crew: Crew) -> None:
        self._pool, self._source, self._stamps, self._bad, self._crew = pool, source, stamps, bad, crew
        total = len(source)
        size = CHUNK if crew.world == 1 else max(1, min(CHUNK, total // crew.units))
        self.chunks = [range(start, min(start + size, total)) for start in range(0, total, size)]
        self.digests = np.zeros((total, 32), np.uint8)
        self._others = set[int]()  # chunks that other processes read

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Saves the stamps at the end, and meanwhile from time to time."""
        self._saved = time.monotonic()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # rows whose stamps are not saved are read again
                self._stamps.save()

    def find(self, place: int) -> None:
        """Sets the digests of a chunk, unless another process reads it now."""
        chunk = self.chunks[place]
        digests, known = self._stamps.digests([self._source.stamp(number) for number in chunk])
        if self._bad.skips and known.all():
            known &= [_has_captions(self._source, number, self._bad) for number in chunk]
        if known.all():
            self._set(place, digests)
        elif self._crew.take("digests", place):
            self.read([place])
        else:
            self._others.add(place)

    def read(self, places: Iterable[int]) -> None:
        """Reads chunks, and hands their digests to the other processes."""
        for place in places:
            digests = _read_chunk(self._pool, self._source, self.chunks[place], self._stamps, self._bad)
            self._set(place, digests)
            if self._crew.notes:
                self._crew.notes.write(f"digests.{place}", self._mark(place) + digests.tobytes())
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self._stamps.save()
                self._saved = time.monotonic()

    def unknown(self) -> list[int]:
        """The chunks that other processes have not read yet. The digests of the others are set."""
        self._bad.exchange()
        for place in sorted(self._others):
            note = self._crew.notes.read(f"digests.{place}") if self._crew.notes else None
            if note is None:
                continue
            if note[:_MARK_BYTES] == self._mark(place):
                self._set(place, np.frombuffer(note, np.uint8, offset=_MARK_BYTES).reshape(-1, 32))
            else:  # that machine has other data
                chunk = self.chunks[place]
                self._set(place, _read_chunk(self._pool, self._source, chunk, self._stamps, self._bad))
        return sorted(self._others)

    def _set(self, place: int, digests: np.ndarray) -> None:
        chunk = self.chunks[place]
        self.digests[chunk.start : chunk.stop] = digests
        self._others.discard(place)

    def _mark(self, place: int) -> bytes:
        """Differs if the chunk has other rows: the dataset's size, and the names of its first and last row."""
        chunk = self.chunks[place]
        text = "\0".join([str(len(self._source)), self._source.key(chunk[0]), self._source.key(chunk[-1])])
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=_MARK_BYTES).digest()


def _read_chunk(pool: Executor, source: Source, chunk: range, stamps: Stamps, bad: BadRows) -> np.ndarray:
    """Digests (n,32) of the rows of a chunk, zeros for bad rows."""
    names = [source.stamp(number) for number in chunk]
    digests, known = stamps.digests(names)
    if bad.skips:
        known &= [_has_captions(source, number, bad) for number in chunk]
    unread = [place for place in np.flatnonzero(~known) if chunk[place] not in bad.found]
    answers = run_ahead(pool, lambda number: _digest(source, number), (chunk[place] for place in unread), 256)
    good = []
    for place, answer in zip(unread, answers, strict=True):
        if isinstance(answer, BadRow):
            bad.add(answer)
        else:
            digests[place] = np.frombuffer(answer, np.uint8)
            good.append(place)
    stamps.add([names[place] for place in good], digests[good])
    return digests


def _has_captions(source: Source, number: int, bad: BadRows) -> bool:
    """Captions can change while the pictures stay, so a row with a known digest may have become bad."""
    try:
        return bool(source.identify(number, "").captions)
    except UserError as fault:
        bad.add(BadRow.of(source, number, fault))
        return False


def _digest(source: Source, number: int) -> bytes | BadRow:
    try:
        return bytes.fromhex(source.identify(number).digest)
    except UserError as fault:
        return BadRow.of(source, number, fault)
