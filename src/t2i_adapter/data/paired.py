"""Paired folders: `images/` and `conditions/` with files of the same stem, captions in `.txt` beside the image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import file_stamp
from t2i_adapter.data.folder import find_split
from t2i_adapter.data.picture import StoredPicture, read_file
from t2i_adapter.data.rows import Row, Rows
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import user_path

IMAGES, CONDITIONS = "images", "conditions"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def open_rows(location: str, options: DataOptions) -> PairedRows:
    """Raises UserError if the folder has no images, or two of one stem."""
    images = find_split(user_path(location), options.split, IMAGES)
    if images is None:
        text = f"{location}: there is no folder {IMAGES}/, which paired folders have (docs/data.md)."
        raise UserError(text, option="data.train_data_dir")
    return PairedRows(images.parent, options.condition)


class PairedRows(Rows):
    """Every picture below images/, sorted by name. Its caption is the whole text of its .txt."""

    def __init__(self, folder: Path, annotate: str | None) -> None:
        """Raises UserError if pictures, or the folder of conditions, are missing."""
        self.place, self.annotate = str(folder), annotate
        self._folder = folder
        self._names = list_pictures(folder / IMAGES)
        self.shards = (len(self._names),)
        if not self._names:
            raise UserError(f"{folder / IMAGES}: there are no pictures ({', '.join(SUFFIXES)}).")
        if not annotate and not (folder / CONDITIONS).is_dir():
            raise UserError(
                f"{folder}: there is no folder {CONDITIONS}/. Add it, or name an annotator that makes conditions from "
                f"the images with {flag('data.condition')}."
            )

    def key(self, index: int) -> str:
        return f"{self._folder.name}/{self._name(index)}"

    def where(self, index: int) -> str:
        return str(self._image(index))

    def caption_cell(self, index: int) -> str:
        return str(self._image(index).with_suffix(".txt"))

    def row(self, index: int) -> Row:
        image, where = self._image(index), self.where(index)
        condition = None
        if not self.annotate:
            path = self._condition(index)
            condition = StoredPicture(str(path), read_file(path, where))
        return Row(StoredPicture(where, read_file(image, where)), condition, self.captions(index), {})

    def captions(self, index: int) -> Any:
        path = self._image(index).with_suffix(".txt")
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            text = f"{self.where(index)}: has no caption: {path} is missing (an empty file is allowed)."
            raise UserError(text, kind="caption") from None
        except UnicodeDecodeError as fault:
            text = f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})."
            raise UserError(text, kind="caption") from fault
        except OSError as fault:
            raise UserError(f"{path}: cannot be read: {fault.strerror}.", kind="caption") from fault

    def stamp(self, index: int) -> str | None:
        try:
            paths = [self._image(index)] if self.annotate else [self._image(index), self._condition(index)]
            return "\n".join(file_stamp(str(path.absolute()), path.stat()) for path in paths)
        except (OSError, UserError):
            return None  # reading the row raises the error

    def _name(self, index: int) -> str:
        return self._names[index].as_py()

    def _image(self, index: int) -> Path:
        return self._folder / IMAGES / self._name(index)

    def _condition(self, index: int) -> Path:
        stem = (self._folder / CONDITIONS / self._name(index)).with_suffix("")
        found = [path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).exists()]
        if len(found) == 1:
            return found[0]
        where = self.where(index)
        if found:
            text = f"{where}: has several conditions: {', '.join(map(str, found))}. Keep one."
            raise UserError(text, kind="unreadable")
        text = f"{where}: has no condition: there is no {stem} with {', '.join(SUFFIXES)}."
        raise UserError(text, kind="missing")


def list_pictures(folder: Path) -> Any:
    """Names of all pictures below a folder, relative to it and sorted: an arrow array, which takes less memory than
    a million Python strings.

    Raises UserError if two have the same stem: they would share caption and condition.
    """
    import pyarrow as pa

    names = []
    for top, _, files in os.walk(folder, followlinks=True):
        inner = os.path.relpath(top, folder)
        names += [os.path.normpath(f"{inner}/{name}") for name in files if name.lower().endswith(SUFFIXES)]
    names.sort()
    stems = pa.array([os.path.splitext(name)[0] for name in names], pa.string())  # noqa: PTH122 - a million of them
    if len(stems.unique()) < len(stems):
        first, second = _of_one_stem(names)
        raise UserError(f"{folder}: {first} and {second} have the same stem; a caption belongs to one. Rename one.")
    return pa.array(names, pa.string())


def _of_one_stem(names: list[str]) -> tuple[str, str]:
    seen: dict[Path, str] = {}
    for name in names:
        other = seen.setdefault(Path(name).with_suffix(""), name)
        if other != name:
            return other, name
    raise AssertionError("the caller found two names of one stem")
