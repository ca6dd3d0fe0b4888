"""The folder of an evaluation's pictures. Each picture is written when it is generated and appears whole.

    pictures/settings.json                 what the pictures depend on
    pictures/condition/00000.png           the pairs' conditions, by the pair's number
    pictures/COLUMN/00000-0.png            the pictures of a column, by the pair's number and the picture's number
    pictures/target/00000.png              targets of typical pairs, which `report.py` adds

An evaluation with the same settings takes the pictures that are there; one with other settings refuses the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from PIL import Image, PngImagePlugin

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import atomic_path, parse_json, sweep, write_atomic

FOLDER = "pictures"
"""In the folder of an evaluation: the folder of its pictures."""
SETTINGS = "settings.json"
COLUMNS = "columns"
"""Key of the settings that belong to one column each."""
_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last bytes of a whole PNG file."""
_TEXT = "t2i_adapter"
"""Key of a PNG file's text that holds the digest of the settings."""
CONDITION = "condition"
"""Folder of the pairs' conditions."""

T = TypeVar("T")


class PictureStore:
    """Reads and writes the pictures of one evaluation below `folder`."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], columns: Mapping[str, Any], options: Collection[str] = ()
    ) -> None:
        """
        Args:
            settings: what all pictures depend on, plain JSON types.
            columns: column -> what the pictures of this column alone depend on, plain JSON types.
            options: names of the settings that are options; errors name their flags.
        """
        self.folder, self._options = folder, options
        self._columns = parse_json(json.dumps(columns))
        self._settings = parse_json(json.dumps(settings))  # tuples are lists, as in the file
        common = _digest(self._settings)
        self._digests = {column: _digest([common, own]) for column, own in self._columns.items()}
        self._digests[CONDITION] = common

    def check(self) -> None:
        """Raises UserError that names the differences if the folder holds pictures of other settings."""
        found = self._read()
        if found is None:
            return
        columns = found.pop(COLUMNS, {})
        lines = [*_differences(found, self._settings, self._options)]
        for column, own in self._columns.items():
            if column in columns:
                lines += _differences(columns[column], own, self._options)
        changed = list(dict.fromkeys(lines))
        if changed:
            raise UserError(
                f"{self.folder} holds pictures of other settings: {'; '.join(changed[:5])}"
                f"{f'; and {len(changed) - 5} more' if len(changed) > 5 else ''}. Name another folder with "
                f"{flag('out')}, or replace these pictures with {flag('overwrite')}.",
                kind="other_settings",
            )

    def prepare(self, *, overwrite: bool) -> None:
        """Makes the folder ready for `save`. overwrite: removes the pictures that are there."""
        found = self._read() if not overwrite else None
        if overwrite:
            for column in {CONDITION, *self._columns, *(self._read() or {}).get(COLUMNS, {})}:
                shutil.rmtree(self.folder / column, ignore_errors=True)
        for column in (CONDITION, *self._columns):
            (self.folder / column).mkdir(parents=True, exist_ok=True)
            sweep(self.folder / column, "*.tmp")
        content = {**self._settings, COLUMNS: {**(found or {}).get(COLUMNS, {}), **self._columns}}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomic(self.folder / SETTINGS, [text.encode()])

    def has(self, column: str, name: str) -> bool:
        """Whether the picture is there, whole and made with these settings."""
        try:
            with self._path(column, name).open("rb") as file:
                file.seek(-len(_END), os.SEEK_END)
                if file.read() != _END:
                    return False
                with Image.open(file) as picture:
                    return getattr(picture, "text", {}).get(_TEXT) == self._digests[column]
        except (OSError, ValueError, SyntaxError):
            return False

    def load(self, column: str, name: str) -> Image.Image:
        """Raises UserError if the picture is missing or damaged."""
        path = self._path(column, name)
        try:
            with Image.open(path) as picture:
                picture.load()
                return picture.copy()
        except (OSError, ValueError, SyntaxError) as fault:
            text = f"{path}: the picture cannot be read ({fault}). Start the same command again, which generates it."
            raise UserError(text) from fault

    def save(self, column: str, name: str, picture: Image.Image) -> None:
        """Writes the picture; it appears whole."""
        info = PngImagePlugin.PngInfo()
        info.add_text(_TEXT, self._digests[column])
        with atomic_path(self._path(column, name)) as temporary:
            picture.save(temporary, "PNG", pnginfo=info)

    def load_condition(self, index: int) -> Image.Image | None:
        """Returns the condition of a pair; None if it is not stored."""
        return self.load(CONDITION, condition_name(index)) if self.has(CONDITION, condition_name(index)) else None

    def save_condition(self, index: int, condition: Image.Image) -> None:
        self.save(CONDITION, condition_name(index), condition)

    def _path(self, column: str, name: str) -> Path:
        return self.folder / column / f"{name}.png"

    def _read(self) -> dict[str, Any] | None:
        """Returns the settings of the folder's pictures; None if it has none."""
        try:
            content = parse_json((self.folder / SETTINGS).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as fault:
            text = f"{self.folder / SETTINGS}: cannot be read ({fault}); replace the pictures with {flag('overwrite')}."
            raise UserError(text) from fault
        return content if isinstance(content, dict) else {}


class LazySequence(Sequence[T]):
    """`count` items; each is made by `read` whenever it is asked for, and not held."""

    def __init__(self, count: int, read: Callable[[int], T]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._read(index % self._count)


def condition_name(index: int) -> str:
    return f"{index:05d}"


def picture_name(index: int, number: int) -> str:
    """Name of picture `number` of pair `index`, both from 0."""
    return f"{index:05d}-{number}"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], options: Collection[str], prefix: str = ""
) -> Iterator[str]:
    """Yields a text for each value that differs; the names of nested values are joined by dots."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, options, f"{prefix}{name}.")
        else:
            shown = flag(name) if not prefix and name in options else prefix + name
            yield f"{shown} {_show(old)}, now {_show(new)}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:16]}..."
