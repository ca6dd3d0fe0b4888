"""The verb `conditions`: it lists the condition kinds, or writes a sheet with their maps of one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import show_path
from t2i_adapter.verbs.annotate import check_picture_file

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 110
"""Characters of a printed line."""
SCENE = (0, 0, 512)
"""Seed, index and side in pixels of the default picture."""
COLUMNS = 4


@dataclass(frozen=True)
class ConditionsOptions:
    """List every kind of condition map: its content, its options, its weights and licence."""

    sheet: Path | None = None
    """Picture file to write: the maps of one photo."""
    photo: Path | None = None
    """The photo for --sheet; None takes a scene of `make-data shapes`."""
    kinds: tuple[str, ...] = ()
    """Kinds on the sheet, options after commas; by default all that download no weights from the hub."""

    def __post_init__(self) -> None:
        for name in ("photo", "kinds"):
            if getattr(self, name) and self.sheet is None:
                raise UserError(f"needs {flag('sheet')} FILE, which is not set", option=name)


def run(options: ConditionsOptions) -> None:
    """Prints the kinds, or writes the sheet."""
    from t2i_adapter.annotators.registry import kinds
    from t2i_adapter.generation.condition import read_photo

    if options.sheet is None:
        print("\n".join(describe_kind(name) for name in kinds()))
        return
    check_picture_file(options.sheet, "sheet")
    photo = read_photo(str(options.photo)) if options.photo else scene()
    make_kinds_sheet(photo, options.kinds or local_kinds()).save(options.sheet)
    print(show_path(options.sheet))


def describe_kind(name: str) -> str:
    """Returns a kind's map, options and facts as a few lines of text."""
    from t2i_adapter.annotators.registry import find_plugin

    lines = (line for part in _describe(find_plugin(name)) for line in _wrap(part))
    return "\n".join([name, *(textwrap.indent(line, "  ") for line in lines)])


def _describe(plugin: Any) -> Iterator[str]:
    facts = plugin.facts
    what, *meaning = (" ".join(part.split()) for part in (plugin.__doc__ or "").split("\n\n"))
    yield what
    options = " ".join(f"{field.name}={_shown(field.default)}" for field in fields(plugin))
    yield " ".join(["options:", f"{options}." if options else "none", *meaning])
    channels = "1 channel" if facts.channels == 1 else "3 channels"
    polarity = "" if facts.polarity == "none" else f", {facts.polarity}"
    values = "0 and 255" if facts.levels == 2 else "0 to 255"
    yield f"map: {channels}{polarity}, values {values}, condition_kind {facts.kind}"
    needs = f"needs: pip install '{facts.needs}'; " if facts.needs else ""
    yield f"weights: {facts.weights or 'none'}; {needs}licence: {facts.licence or 'unknown'}"


def make_kinds_sheet(photo: Image.Image, names: tuple[str, ...]) -> Image.Image:
    """Returns the photo and its maps with their names. Prints and skips kinds that cannot be made here."""
    from t2i_adapter.annotators.registry import annotate, open_annotator
    from t2i_adapter.reports.sheet import SheetRow, make_sheet

    rows = [SheetRow([photo], "the picture")]
    for name in names:
        try:
            rows.append(SheetRow([annotate(open_annotator(name), photo)], name))
        except UserError as fault:
            print(f"skipped: {fault}")
    return make_sheet([""], rows, blocks=COLUMNS)


def local_kinds() -> tuple[str, ...]:
    """Returns the kinds that download nothing from the hub."""
    from t2i_adapter.annotators.registry import find_plugin, kinds

    return tuple(name for name in kinds() if not find_plugin(name).facts.weights.startswith("hub"))


def scene() -> Image.Image:
    from t2i_adapter.data.shapes import render, sample_scene

    seed, number, side = SCENE
    return render(sample_scene(seed, number), side)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _shown(value: Any) -> str:
    """Returns a default as it is written after a kind's name."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
