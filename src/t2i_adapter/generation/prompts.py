"""Reads a file of prompts for `generate`: one prompt a line, or a table with pictures and seeds beside them.

Importing this module loads no torch.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import parse_json, user_path

OPTION = "prompt_file"
MAX_SEED = 2**63 - 1
OTHERS = ("init_image", "mask", "controlnet_image")
"""Options and columns of pictures that are no adapter's."""
NO_PICTURE = "none"
"""Stands in a list of several adapters' pictures for one that the other list has."""


@dataclass(frozen=True)
class Picture:
    """What an adapter's condition is made of: a condition picture's file or, if `is_photo`, a photo's."""

    file: str
    is_photo: bool = False

    @property
    def option(self) -> str:
        """The option that names such pictures."""
        return "photo" if self.is_photo else "image"


@dataclass(frozen=True)
class Request:
    """A prompt, and what its row sets besides; None where the options decide.

    Attributes:
        place: names the row in messages.
        pictures: one for each adapter.
        init_image, mask, controlnet_image: files of the picture to begin from, of its mask, and for the ControlNet.
        seed: of the first of the prompt's pictures.
    """

    prompt: str
    place: str = ""
    pictures: tuple[Picture | None, ...] = (None,)
    init_image: str | None = None
    mask: str | None = None
    controlnet_image: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class GivenFiles:
    """Picture files by the options that name them; each list is empty if its option is not set.

    Attributes:
        adapters: their number. With one, `image` and `photo` belong to the prompts; with several, to the adapters.
    """

    image: tuple[str, ...] = ()
    photo: tuple[str, ...] = ()
    init_image: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    controlnet_image: tuple[str, ...] = ()
    adapters: int = 1


def columns(adapters: int) -> tuple[str, ...]:
    """Returns the names of a table's columns."""
    others = [f"{name}_{number}" for number in range(2, adapters + 1) for name in ("image", "photo")]
    return ("prompt", "image", "photo", *others, *OTHERS, "seed")


def read_prompts(file: str, adapters: int = 1) -> list[Request]:
    """Reads the prompts of a file, one or more.

    A .jsonl file has an object a line and a .csv file a header line, with `prompt` and, if wanted, the other `columns`;
    pictures are relative to the file's folder. Any other file has one prompt a line; empty lines are skipped. Raises
    UserError that names the line.
    """
    path = user_path(file)
    text = _read_text(path, file)
    kind = path.suffix.lower()
    rows = {".jsonl": _json_rows, ".csv": _csv_rows}.get(kind, _plain_rows)(text, file)
    requests = [_request(row, place, path.parent, adapters) for place, row in rows]
    if not requests:
        raise UserError(f"{file}: holds no prompt; write one a line.", option=OPTION)
    return requests


def _read_text(path: Path, file: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as fault:
        raise UserError(f"{file}: cannot be read ({fault.strerror}).", option=OPTION) from fault
    except UnicodeDecodeError as fault:
        line = fault.object[: fault.start].count(b"\n") + 1
        raise UserError(
            f"{file}: line {line} is not UTF-8 (byte {fault.object[fault.start]:#04x}); save the file as UTF-8.",
            option=OPTION,
        ) from fault


def _plain_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", {"prompt": line.strip()}


def _json_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as fault:
            raise UserError(f"{place}: not JSON ({fault}).", option=OPTION) from fault
        if not isinstance(row, dict):
            raise UserError(f'{place}: must be an object, such as {{"prompt": "a red circle"}}.', option=OPTION)
        yield place, row


def _csv_rows(text: str, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{place}: has more cells than the header; quote a cell with commas.", option=OPTION)
            yield place, {name: cell for name, cell in row.items() if cell}
    except csv.Error as fault:
        raise UserError(f"{file}, line {reader.line_num + 1}: not CSV ({fault}).", option=OPTION) from fault


def _request(row: Mapping[str, Any], place: str, folder: Path, adapters: int) -> Request:
    """Checks a row. Raises UserError."""
    known = columns(adapters)
    if unknown := next((name for name in row if name not in known), None):
        raise UserError(f"{place}: unknown column {unknown!r}; allowed are {', '.join(known)}.", option=OPTION)
    for name in known[:-1]:
        if name in row and not isinstance(row[name], str):
            raise UserError(f"{place}: {name} is {row[name]!r}; it must be text.", option=OPTION)
    if "prompt" not in row:
        raise UserError(f'{place}: has no prompt; add one ("" is allowed in .jsonl).', option=OPTION)
    if not is_unicode(row["prompt"]):
        raise UserError(
            f"{place}: prompt {row['prompt']!r} holds half of a surrogate pair; write it anew.", option=OPTION
        )

    def file(name: str) -> str | None:
        return str(folder / user_path(row[name])) if row.get(name) else None

    pictures: list[Picture | None] = []
    for ending in ("", *(f"_{number}" for number in range(2, adapters + 1))):
        image, photo = file(f"image{ending}"), file(f"photo{ending}")
        if image and photo:
            raise UserError(f"{place}: sets both image{ending} and photo{ending}; keep one of them.", option=OPTION)
        pictures.append(Picture(image or photo or "", photo is not None) if image or photo else None)
    others = {name: file(name) for name in OTHERS}
    return Request(row["prompt"], place, tuple(pictures), **others, seed=_seed(row.get("seed"), place))


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write the text: not if it holds a lone surrogate, as Python reads bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seed(value: Any, place: str) -> int | None:
    """Checks a seed, a number or the text of one. Raises UserError."""
    if value is None:
        return None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    is_text = isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value.strip()) is not None
    if not (is_number or is_text) or not 0 <= int(value) <= MAX_SEED:
        raise UserError(f"{place}: seed is {value!r}; allowed is 0 to 2^63 - 1.", option=OPTION)
    return int(value)


def match_files(requests: list[Request], files: GivenFiles) -> list[Request]:
    """Gives every request its pictures: its row's own, or else those of the options.

    A single request is repeated for every picture, and a single picture is used for every request. Raises UserError if
    the numbers do not match or a picture is missing.
    """
    lists: dict[str, tuple[str, ...]] = {name: getattr(files, name) for name in OTHERS}
    if files.adapters == 1:
        lists["photo" if files.photo else "image"] = files.photo or files.image
    else:
        common = _adapter_pictures(files)
        requests = [
            replace(one, pictures=tuple(own or other for own, other in zip(one.pictures, common, strict=True)))
            for one in (replace(request, pictures=_padded(request, files.adapters)) for request in requests)
        ]
    used = {name: some for name, some in lists.items() if some and any(_lacks(request, name) for request in requests)}
    count = max([len(requests), *map(len, used.values())])
    for name, some in used.items():
        if {len(requests), len(some)} - {1, count}:
            source = flag(OPTION if requests[0].place else "prompt")
            raise UserError(
                f"{source} has {len(requests)} entries and {flag(name)} {len(some)}: "
                "set as many of one as of the other, or a single one of either."
            )
    matched = requests * count if len(requests) == 1 else requests
    for name, some in used.items():
        matched = [
            _with_file(request, name, some[index % len(some)]) if _lacks(request, name) else request
            for index, request in enumerate(matched)
        ]
    for request in matched:
        if None in request.pictures:
            raise _missing_picture(request, files.adapters)
    return matched


def _lacks(request: Request, name: str) -> bool:
    return (request.pictures[0] if name in ("image", "photo") else getattr(request, name)) is None


def _with_file(request: Request, name: str, file: str) -> Request:
    if name in ("image", "photo"):
        return replace(request, pictures=(Picture(file, name == "photo"),))
    return replace(request, **{name: file})


def _padded(request: Request, adapters: int) -> tuple[Picture | None, ...]:
    return (*request.pictures, *[None] * (adapters - len(request.pictures)))


def _adapter_pictures(files: GivenFiles) -> list[Picture | None]:
    """Returns the options' picture for each of several adapters. Raises UserError."""
    pictures: list[Picture | None] = [None] * files.adapters
    for name, some in (("image", files.image), ("photo", files.photo)):
        if len(some) not in (0, 1, files.adapters):
            raise UserError(
                f"{len(some)} pictures for {files.adapters} adapters: with several adapters set one picture for each, "
                f"in their order, or a single one for all. Pictures for several prompts belong into {flag(OPTION)}.",
                option=name,
            )
        for number in range(files.adapters if some else 0):
            file = some[number % len(some)]
            if file == NO_PICTURE:
                continue
            if pictures[number]:
                raise UserError(
                    f"{file}: {flag('image')} has a picture for adapter {number + 1}, too; write {NO_PICTURE} in its "
                    "place in one of the two lists.",
                    option=name,
                )
            pictures[number] = Picture(file, name == "photo")
    return pictures


def _missing_picture(request: Request, adapters: int) -> UserError:
    number = request.pictures.index(None) + 1
    ending = f"_{number}" if number > 1 else ""
    which = f" for adapter {number}" if adapters > 1 else ""
    options = f"{flag('image')} or {flag('photo')}"
    if request.place:
        return UserError(
            f"{request.place}: names no picture{which}; add a column image{ending} or photo{ending}, or set {options}.",
            option=OPTION,
        )
    return UserError(f"there is no picture{which}; set {options}.")
