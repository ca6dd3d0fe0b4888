"""Finds pictures that an adapter made, to show them in what is exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import parse_json
from t2i_adapter.generation.condition import read_condition
from t2i_adapter.generation.png_text import KEYWORD

MOST = 8
"""Pictures that are exported at most."""
_LONGEST = 20_000  # letters of a text
_GENERATED = re.compile(r"\d{5}\.png")
_STRIP = re.compile(r"sample_\d\d\.png")


@dataclass(frozen=True)
class Sample:
    """A picture that the adapter made.

    Attributes:
        condition: the condition picture, if it is known.
        prompt: the prompt, if it is known.
        parameters: the text of its PNG about how it was made; "" if it has none.
    """

    picture: Image.Image
    condition: Image.Image | None = None
    prompt: str | None = None
    parameters: str = ""


def read_samples(adapter: Path, pictures: str | None, prompts: Mapping[str, str]) -> list[Sample]:
    """Returns up to `MOST` samples: those in `pictures`, a folder that `generate` wrote, else the run's own.

    prompts: path of a picture in the adapter's folder -> its prompt, as far as known.

    Raises UserError if the named folder holds none.
    """
    if pictures is None:
        strips = sorted(path for path in (adapter / "images").glob("*.png") if _STRIP.fullmatch(path.name))
        return [sample for path in strips[:MOST] if (sample := _of_run(path, prompts))]
    folder = Path(pictures)
    files = sorted(path for path in folder.glob("*.png") if _GENERATED.fullmatch(path.name))
    if not files:
        raise UserError(
            f"{pictures}: no pictures found; allowed is a folder that `generate` wrote, with 00000.png and so on.",
            option="pictures",
        )
    return [_from_generate(path) for path in files[:MOST]]


def _from_generate(path: Path) -> Sample:
    """Reads a picture of `generate`, with its record and its condition if they lie beside it."""
    try:
        options: dict[str, Any] = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))["options"]
        prompt, images = options["prompt"][0], options["image"]
    except (OSError, ValueError, LookupError, TypeError):
        prompt, images = None, ()
    made = path.with_name(f"{path.stem}_condition.png")
    condition = made if made.is_file() else next((Path(name) for name in images if Path(name).is_file()), None)
    place = flag("pictures")
    return Sample(
        read_condition(str(path), place),
        read_condition(str(condition), place) if condition else None,
        prompt if isinstance(prompt, str) else None,
        _parameters(path),
    )


def _parameters(path: Path) -> str:
    """Returns the text of a PNG about how it was made; "" if it has none that can be read."""
    try:
        with Image.open(path) as opened:
            return str(opened.info.get(KEYWORD, ""))[:_LONGEST]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # ValueError: too much text, by Pillow
        return ""


def _of_run(path: Path, prompts: Mapping[str, str]) -> Sample | None:
    """Returns the sample whose strip is `path`: of its single pictures if they lie beside the strip, else cut from it.
    None if the strip's cells are not square."""
    picture, condition = (path.with_name(f"{path.stem}_{part}.png") for part in ("00", "condition"))
    if picture.is_file() and condition.is_file():
        first, second = (read_condition(str(file), flag("folder")) for file in (picture, condition))
        return Sample(first, second, prompts.get(f"{path.parent.name}/{picture.name}"))
    strip = read_condition(str(path), flag("folder"))
    side = strip.height
    if strip.width < 2 * side or strip.width % side:
        return None
    return Sample(strip.crop((side, 0, 2 * side, side)), strip.crop((0, 0, side, side)))
