"""Pictures of held-out pairs over the steps of a run, as small WebP files that are made once and cached."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from t2i_adapter.files import parse_json
from t2i_adapter.reports.html import to_webp, webp_image
from t2i_adapter.runs.metrics import read_file, text_of

FOLDER = "control"
"""In a run's folder: pairs.json, pictures of the pairs, and a folder step-000100 of each step with generated ones."""
PAIRS = "pairs.json"
SMALL = "small"
"""In `FOLDER`: the cached small pictures; they may be deleted at any time."""
STEP = "step-"
SIDE = 256
"""Most pixels of a side of a picture on a page."""
MOST_STEPS = 24
MOST_PAIRS = 8
MOST_PIXELS = 32 << 20
"""A larger picture is not shown."""
FIXED = {"condition": "condition", "target": "target", "no_adapter": "without adapter"}
"""Pictures of a pair that do not change with the steps: the end of the file's name -> what it shows."""


@dataclass(frozen=True)
class Pair:
    """A held-out pair. index: its number in the files' names."""

    index: int
    key: str
    prompt: str


@dataclass(frozen=True)
class Small:
    """A picture as a WebP file. size: (width, height) in pixels."""

    file: bytes
    size: tuple[int, int]

    def element(self, alt: str, more: str = "") -> str:
        """An <img> element; more: further attributes."""
        return webp_image(self.file, self.size, alt, more)


class Pictures:
    """The pictures of one run."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def pairs(self) -> list[Pair]:
        """The first `MOST_PAIRS` pairs that have pictures."""
        try:
            listed = [] if self.folder.is_symlink() else parse_json(read_file(self.folder / PAIRS))
        except ValueError:
            return []
        rows = listed[:MOST_PAIRS] if isinstance(listed, list) else []
        return [
            Pair(index, text_of(row.get("key")), text_of(row.get("prompt")))
            for index, row in enumerate(rows)
            if isinstance(row, dict)
        ]

    def steps(self) -> list[int]:
        """The steps that have pictures."""
        return [] if self.folder.is_symlink() else sorted(_steps(self.folder))

    def fixed(self, pair: Pair, kind: str) -> Small | None:
        """A picture of `FIXED`."""
        return self._small(self.folder / f"{pair.index}-{kind}.png", f"{pair.index}-{kind}.webp")

    def at(self, pair: Pair, step: int) -> Small | None:
        """The picture that was generated at a step."""
        folder = self.folder / f"{STEP}{step:06d}"
        return self._small(folder / f"{pair.index}.png", f"{step:06d}-{pair.index}.webp")

    def _small(self, source: Path, name: str) -> Small | None:
        """The small form of a PNG file, from the cache unless the file is newer; None if it cannot be read."""
        from PIL import Image

        cached = self.folder / SMALL / name
        try:
            status = source.stat(follow_symlinks=False)
            is_linked = self.folder.is_symlink() or source.parent.is_symlink()
            if is_linked or not stat.S_ISREG(status.st_mode):
                return None
            if cached.is_file() and cached.stat().st_mtime >= status.st_mtime and (found := _read(cached)):
                return found
            with Image.open(source, formats=["PNG"]) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    return None
                made = Small(*to_webp(picture, largest=SIDE))
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            return None
        _write(cached, made.file)
        return made


def chosen(steps: Sequence[int], most: int = MOST_STEPS) -> list[int]:
    """At most `most` steps: the first, the last, and every n-th between them.

    n is a power of two, so that a page with more steps needs no picture that an earlier page did not have.
    """
    stride = 1
    while len(range(0, len(steps), stride)) > most - 1:
        stride *= 2
    return sorted({*steps[::stride], *steps[-1:]})


def _steps(folder: Path) -> Iterator[int]:
    try:
        names = [path.name for path in folder.iterdir()]
    except (OSError, ValueError):
        return
    for name in names:
        digits = name.removeprefix(STEP)
        if digits != name and digits.isascii() and digits.isdecimal() and len(digits) < 16:
            yield int(digits)


def _read(file: Path) -> Small | None:
    """A cached picture; None if it is not whole, because a writer was killed or has not ended."""
    from PIL import Image

    data = read_file(file)
    if int.from_bytes(data[4:8], "little") + 8 != len(data):  # the length in a WebP file's head
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
            return Small(data, picture.size) if max(picture.size) <= SIDE else None
    except (OSError, ValueError, SyntaxError):
        return None


def _write(file: Path, data: bytes) -> None:
    """Caches a small picture, but not through a link. It is not flushed to the disk: a damaged one is made again."""
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        if not file.parent.is_symlink():
            place = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            with os.fdopen(place, "wb") as opened:
                opened.write(data)
