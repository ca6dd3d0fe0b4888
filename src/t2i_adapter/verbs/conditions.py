"""The verb `conditions`: what kinds there are, and a sheet of all of them drawn from one picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.annotators.registry import annotate, find_plugin, kinds, open_annotator
from t2i_adapter.data.shapes import render, sample_scene
from t2i_adapter.errors import UserError
from t2i_adapter.generation.condition import read_condition
from t2i_adapter.reports.sheet import SheetRow, make_sheet
from t2i_adapter.verbs.annotate import check_picture_file
from t2i_adapter.verbs.annotate_options import ConditionsOptions

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "conditions.json"
"""Measured speeds, where the package is used in its repository."""
WIDTH = 110  # of the printed lines
SCENE = (0, 0, 512)  # seed, number and side of the sheet's own picture
COLUMNS = 4


def run(options: ConditionsOptions) -> None:
    """Prints the kinds; draws the sheet where one is wanted."""
    if options.sheet is None:
        print("\n".join(describe(name) for name in kinds()))
        return
    check_picture_file(options.sheet, "--sheet")
    photo = read_condition(str(options.photo), "--photo") if options.photo else scene()
    make_kinds_sheet(photo, options.kinds or local_kinds()).save(options.sheet)
    print(options.sheet)


def describe(name: str) -> str:
    """A kind, what it draws, and what it takes, as a few lines for people."""
    plugin = find_plugin(name)
    what = " ".join((plugin.__doc__ or "").split("\n\n")[0].split())
    return "\n".join(
        [name, *(textwrap.indent(line, "  ") for part in (what, *_facts(name, plugin)) for line in _wrap(part))]
    )


def _facts(name: str, plugin: Any) -> Iterator[str]:
    options = " ".join(f"{field.name}={_shown(field.default)}" for field in fields(plugin.Options))
    yield f"options: {options}. {' '.join(plugin.Options.__doc__.split())}" if options else "options: none"
    channels = "1 channel" if plugin.channels == 1 else "3 channels"
    bright = "" if plugin.polarity == "none" else f", {plugin.polarity}"
    values = "0 and 255" if plugin.levels == 2 else "0 to 255"
    yield f"gives: {channels}{bright}, values {values}, mirrored as {plugin.kind}"
    needs = getattr(plugin, "needs", "")
    yield "; ".join(
        [
            f"weights: {getattr(plugin, 'weights', '') or 'none'}",
            *([f"needs: pip install '{needs}'"] if needs else []),
            f"licence: {getattr(plugin, 'licence', '') or 'not told'}",
            *([f"takes: {_seconds(name):.2g} s a picture of 1024 x 1024, one core"] if name in _speeds() else []),
        ]
    )


def make_kinds_sheet(photo: Image.Image, names: tuple[str, ...]) -> Image.Image:
    """The photo and its maps with their names. What cannot be drawn here is told and left out."""
    rows = [SheetRow([photo], "the picture")]
    for name in names:
        try:
            rows.append(SheetRow([annotate(open_annotator(name), photo)], name))
        except UserError as fault:
            print(f"left out: {name}: {fault}")
    return make_sheet([""], rows, blocks=COLUMNS)


def local_kinds() -> tuple[str, ...]:
    """Kinds that fetch nothing from the hub."""
    return tuple(name for name in kinds() if not getattr(find_plugin(name), "weights", "").startswith("hub"))


def scene() -> Image.Image:
    seed, number, side = SCENE
    return render(sample_scene(seed, number), side)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _shown(value: Any) -> str:
    """A default as it is written after a kind's name."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


@cache
def _speeds() -> dict[str, Any]:
    return json.loads(BENCHMARK.read_text())["kinds"] if BENCHMARK.is_file() else {}


def _seconds(name: str) -> float:
    return _speeds()[name]["seconds"]
