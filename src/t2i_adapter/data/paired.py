"""A folder of pictures: captions in text files beside them, conditions in a folder with the same names.

It also reads how other trainers lay out their data: subfolders, folders of repeats (10_cats), img/ beside control/.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import file_stamp
from t2i_adapter.data.folder import no_split
from t2i_adapter.data.look import ARCHIVES, MANIFESTS, TEXTS, plural, walk
from t2i_adapter.data.names import is_picture, same_form, split_ending
from t2i_adapter.data.picture import StoredPicture, read_file
from t2i_adapter.data.rows import Row, Rows, read_caption
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import user_path, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("images", "image", "imgs", "img", "pictures", "targets", "target")
"""Names, in any case, of a folder that holds the pictures if there is one."""
CONDITIONS = (
    *("conditions", "condition", "conds", "cond", "condition_images", "condition_image", "conditionings"),
    *("conditioning", "conditioning_images", "conditioning_image", "controls", "control", "control1"),
    *("control_images", "control_image", "hints", "hint"),
)
"""Names, in any case, of a folder that holds the conditions."""
SPLITS = ("train", "test", "validation", "valid", "val")
_REPEATS = re.compile(r"\d+_.+")
_UNREAD = (
    ".jxl",
    ".psd",
    ".svg",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
    ".exr",
    ".hdr",
    ".tga",
    ".npy",
    ".mp4",
)
"""Endings of pictures, as people know them, that are not read; they are counted."""
_NONE = -1


def open_rows(location: str, options: DataOptions) -> PairedRows:
    """Raises UserError if the folder has no pictures, no captions or no conditions, or two pictures of one name."""
    if not user_path(location).is_dir():
        raise UserError(f"{location}: no such folder.", option="data.location", kind="missing")
    folder, others = split_folder(user_path(location), options.split)
    found = _folders_of(folder)
    if options.conditioning_dir:
        conditions = _named_folder(options.conditioning_dir, user_path(location), folder)
        found.conditions = [conditions]
    elif len(found.conditions) > 1 and not options.condition:
        names = ", ".join(f"{path.name}/" for path in found.conditions)
        raise UserError(
            f"{folder}: has several folders of conditions ({names}); name one.", option="data.conditioning_dir"
        )
    return PairedRows(folder, found, (*others, *found.conditions), options)


def split_folder(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder of a split's pictures, and folders below it that belong to other splits.

    It is `folder`/split; or `folder` itself if that has the split's name, or for `train` if there is no such folder.
    Raises UserError.
    """
    if (folder / split).is_dir():
        return folder / split, []
    others = [folder / name for name in SPLITS if (folder / name).is_dir()]
    if split in (folder.name, "train"):
        if any(is_picture(name) for _, files in walk(folder, tuple(others)) for name in files):
            return folder, others
        if not others:
            raise UserError(f"{folder}: there are no pictures in it.", option="data.location")
    raise no_split(folder, split, [path.name for path in others] or ["train"])


class _Folders:
    """Folders of pictures and conditions directly in a folder; `pictures` is the folder itself if none has the name."""

    def __init__(self, pictures: Path, conditions: list[Path]) -> None:
        self.pictures, self.conditions = pictures, conditions


def _folders_of(folder: Path) -> _Folders:
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    pictures = next((below[name] for name in IMAGES if name in below), folder)
    conditions = [below[name] for name in CONDITIONS if name in below]
    if pictures.name.lower() in ("target", "targets") and "source" in below and not conditions:
        conditions = [below["source"]]  # ControlNet's own names
    return _Folders(pictures, conditions)


def _named_folder(named: str, *folders: Path) -> Path:
    """The folder that data.conditioning_dir names, from the current folder or from one of the dataset's. Raises
    UserError."""
    for path in (user_path(named), *(folder / named for folder in folders)):
        if path.is_dir():
            return path
    text = f"{named}: no such folder, neither here nor in {folders[0]}."
    raise UserError(text, option="data.conditioning_dir", kind="missing")


class PairedRows(Rows):
    """Every picture of a folder and its subfolders, sorted by path.

    A caption or condition belongs to the picture with its path and name, up to the ending; letters in either Unicode
    form are equal. Names are held as arrow arrays, which take less memory than a million Python strings.
    """

    def __init__(self, folder: Path, found: _Folders, skip: tuple[Path, ...], options: DataOptions) -> None:
        """`skip`: folders whose pictures are not rows. Raises UserError."""
        self.place, self.annotate = str(folder), options.condition
        self._folder, self._pictures = folder, found.pictures
        self._conditions = found.conditions[0] if found.conditions and not self.annotate else None
        self._mode = options.captions
        loops: list[str] = []
        files = [
            f"{inner}/{name}" if inner else name for inner, names in walk(found.pictures, skip, loops) for name in names
        ]
        pictures = sorted(name for name in files if is_picture(name))
        _check_names(pictures, found.pictures)
        stems = _stems(pictures)
        self._names = _array(pictures)
        self.shards = (len(pictures),)
        if not pictures:
            raise UserError(f"{found.pictures}: there are no pictures in it.", option="data.location")
        _check_one_stem(pictures, stems, found.pictures)
        self._texts, lone = self._find_texts(files, stems)
        self._doubled: frozenset[int] = frozenset()
        self._condition_names, self._condition_of, unpaired = self._find_conditions(stems)
        self.notes = tuple(_notes(folder, found, skip, files, loops, unpaired, lone))

    def key(self, index: int) -> str:
        return f"{self._folder.name}/{self._name(index)}"

    def where(self, index: int) -> str:
        return str(self._image(index))

    def file_name(self, index: int) -> str:
        return self._name(index).rpartition("/")[2]

    def caption_cell(self, index: int) -> str:
        text = self._text(index)
        return str(text) if text else self.where(index)

    def row(self, index: int) -> Row:
        image, where = self._image(index), self.where(index)
        condition = None
        if not self.annotate:
            path = self._condition(index)
            condition = StoredPicture(str(path), read_file(path, where))
        return Row(StoredPicture(where, read_file(image, where)), condition, self.captions(index), {})

    def captions(self, index: int) -> Any:
        if self._mode in ("none", "filename"):
            return None
        path = self._text(index)
        if path is None:
            endings = " or ".join(self._endings())
            text = (
                f"{self.where(index)}: has no caption: no file of its name ends in {endings} (an empty one is allowed)."
            )
            raise UserError(text, kind="caption")
        return read_caption(path)

    def write_captions(self, index: int, captions: tuple[str, ...]) -> None:
        if self._mode in ("none", "filename") or len(captions) != 1:
            text = f"{self.where(index)}: has one caption, in a file of its own; {len(captions)} cannot be stored."
            if self._mode in ("none", "filename"):
                how = f"{flag('data.captions')} {self._mode}"
                text = f"{self.where(index)}: captions are not read from files here ({how})."
            raise UserError(text, kind="read_only")
        path = self._text(index) or self._image(index).with_suffix(self._endings()[0])
        try:
            write_atomic(path, [captions[0].encode(), b"\n"])
        except OSError as fault:
            raise UserError(f"{path}: cannot be written ({fault.strerror}).", kind="read_only") from fault

    def local_files(self, index: int) -> list[str]:
        text = self._text(index)
        return [*super().local_files(index), *([str(text.absolute())] if text else [])]

    def caption_files(self, index: int) -> list[str]:
        text = self._text(index)
        return [str(text.absolute())] if text else []

    def stamp(self, index: int) -> str | None:
        try:
            paths = [self._image(index)] if self.annotate else [self._image(index), self._condition(index)]
            return "\n".join(file_stamp(str(path.absolute()), path.stat()) for path in paths)
        except (OSError, UserError):
            return None  # reading the row raises the error

    def _name(self, index: int) -> str:
        return self._names[index].as_py()

    def _image(self, index: int) -> Path:
        return self._pictures / self._name(index)

    def _condition(self, index: int) -> Path:
        assert self._conditions is not None
        number = int(self._condition_of[index])
        if number == _NONE:
            wanted = self._conditions / split_ending(self._name(index))[0]
            text = f"{self.where(index)}: has no condition: there is no {wanted} with a picture's ending, such as .png."
            raise UserError(text, kind="missing")
        found = [self._condition_names[number].as_py()]
        if number in self._doubled:
            stem = same_form(split_ending(found[0])[0])
            found = [name for name in self._condition_names.to_pylist() if same_form(split_ending(name)[0]) == stem]
            text = f"{self.where(index)}: has several conditions: {', '.join(found)} in {self._conditions}. Keep one."
            raise UserError(text, kind="unreadable")
        return self._conditions / found[0]

    def _text(self, index: int) -> Path | None:
        for numbers, names in self._texts:
            if (number := int(numbers[index])) != _NONE:
                return self._pictures / names[number].as_py()
        return None

    def _endings(self) -> tuple[str, ...]:
        return (self._mode,) if self._mode.startswith(".") else TEXTS

    def _find_texts(self, files: list[str], stems: pa.Array) -> tuple[list[tuple[np.ndarray, pa.Array]], int]:
        """For each ending of captions: each picture's text by number, and the texts' names. And how many texts have no
        picture."""
        if self._mode in ("none", "filename"):
            return [], 0
        found, lone = [], 0
        for ending in self._endings():
            names = [name for name in files if name.lower().endswith(ending.lower())]
            whole = _array([same_form(name[: -len(ending)]) for name in names])
            numbers = _numbers(stems, whole)
            lone += len(names) - len(np.unique(numbers[numbers != _NONE]))
            if (numbers != _NONE).any():
                found.append((numbers, _array(names)))
        if not found:
            endings = " or ".join(self._endings())
            raise UserError(
                f"{self._mode}: no picture in {self._pictures} has a caption: none has a file of its name in {endings} "
                f"beside it. Write {flag('data.captions')} none to train without captions, or {flag('data.captions')} "
                "filename to make them from the pictures' names.",
                option="data.captions",
                kind="caption",
            )
        return found, lone

    def _find_conditions(self, stems: pa.Array) -> tuple[pa.Array, np.ndarray, int]:
        """Names of the conditions, each picture's condition by number, and how many conditions have no picture."""
        if self.annotate:
            return _array([]), np.empty(0, np.int64), 0
        if self._conditions is None:
            others = [path.name for path in sorted(self._folder.iterdir()) if path.is_dir() and path != self._pictures]
            named = f" ({', '.join(others[:3])}?)" if others and self._pictures != self._folder else ""
            raise UserError(
                f"{self._folder}: there are no condition pictures. Make them from the pictures with "
                f"{flag('data.condition')} canny (`t2i-adapter conditions` lists the kinds), put them into a folder "
                "control/ there under the pictures' names, or name their folder with "
                f"{flag('data.conditioning_dir')}{named}.",
                kind="no condition",
            )
        walked = walk(self._conditions)
        names = sorted(
            f"{inner}/{name}" if inner else name for inner, files in walked for name in files if is_picture(name)
        )
        _check_names(names, self._conditions)
        whole = _stems(names)
        numbers = _numbers(stems, whole)
        self._doubled = _doubled(whole)
        if (numbers == _NONE).all():
            example = f", such as {names[0]}," if names else ""
            raise UserError(
                f"{self._conditions}: none of its {plural(len(names), 'picture')}{example} has the path and name of a "
                f"picture in {self._pictures}, such as {self._name(0)}. Rename them; their endings may differ.",
                kind="missing",
            )
        used = len(np.unique(numbers[numbers != _NONE]))
        return _array(names), numbers, len(whole.unique()) - used


def _notes(
    folder: Path, found: _Folders, skip: tuple[Path, ...], files: list[str], loops: list[str], unpaired: int, lone: int
) -> Iterable[str]:
    """Lines about what lies in the folder and is not read, or not as other trainers read it."""
    repeats = sorted({part for name in files for part in name.split("/")[:-1] if _REPEATS.fullmatch(part)})
    if repeats:
        names = ", ".join(repeats[:3])
        yield f"folders of repeats ({names}) are read as plain folders: an epoch has each picture once"
    if unpaired:
        yield f"{plural(unpaired, 'condition')} in {found.conditions[0]} without a picture of the same name: not used"
    if lone:
        yield f"{plural(lone, 'caption file')} without a picture of the same name: not used"
    endings = (split_ending(name)[1] for name in files)
    unread = Counter(ending for ending in endings if ending in _UNREAD)
    if unread:
        counts = ", ".join(f"{count} {ending}" for ending, count in unread.most_common())
        yield f"files in formats that are not read are skipped: {counts}"
    idle = [name for name in files if name.lower().endswith((*ARCHIVES, *MANIFESTS))]
    if idle:
        names = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        yield f"tables and archives in a folder of pictures are not read: {names}"
    for loop in loops:
        yield f"{found.pictures / loop}: a link to a folder that contains it is not followed"
    if found.pictures != folder:
        outside = walk(folder, (*skip, found.pictures))
        count = sum(is_picture(name) for _, names in outside for name in names)
        if count:
            yield f"{plural(count, 'picture')} outside of {found.pictures.name}/: not used"


def _check_names(names: list[str], folder: Path) -> None:
    """Raises UserError if a name is not UTF-8: such a name cannot be written into lists and reports."""
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            raise UserError(f"{folder}/{shown}: the file's name is not UTF-8; rename it.", kind="unreadable")


def _check_one_stem(names: list[str], stems: pa.Array, folder: Path) -> None:
    """Raises UserError if two pictures have the same name up to the ending: they would share caption and condition."""
    if len(stems.unique()) == len(stems):
        return
    seen: dict[str, str] = {}
    for name, stem in zip(names, stems.to_pylist(), strict=True):
        other = seen.setdefault(stem, name)
        if other != name:
            text = (
                f"{folder}: {other} and {name} have the same stem; a caption or condition belongs to one. Rename one."
            )
            raise UserError(text)


def _doubled(stems: pa.Array) -> frozenset[int]:
    """Places of the stems that occur again later."""
    if len(stems.unique()) == len(stems):
        return frozenset()
    first: dict[str, int] = {}
    again = [stem for number, stem in enumerate(stems.to_pylist()) if first.setdefault(stem, number) != number]
    return frozenset(first[stem] for stem in again)


def _numbers(stems: pa.Array, others: pa.Array) -> np.ndarray:
    """(N,) int64: for each stem its place in `others`, or -1."""
    import pyarrow.compute as pc

    found = pc.call_function("index_in", [stems], pc.SetLookupOptions(others))
    return found.fill_null(_NONE).to_numpy(zero_copy_only=False).astype(np.int64)


def _stems(names: list[str]) -> pa.Array:
    return _array([same_form(split_ending(name)[0]) for name in names])


def _array(names: list[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(names, pa.large_string())
