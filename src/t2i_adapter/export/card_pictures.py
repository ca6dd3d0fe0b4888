"""The pictures of a model card: each on its own, for the hub's gallery, and joined to strips."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PICTURES = "images"
"""Folder of the card's pictures."""
SHEET = "sheet.png"
PICTURE_NAME = re.compile(
    r"sample_\d\d(_condition|_target|_\d\d)?\.png|pair_\d\d_(condition|adapter|no_adapter|target)\.png|sheet\.png"
)
"""Names of the pictures that are uploaded. sample: of the run's validation; pair, sheet: of an evaluation."""
_STRIP_SIDE = 512
"""Most pixels a side of a strip's cells; larger pictures make the card slow to open."""
_SINGLE_SIDE = 1024
"""Most pixels a side of a single picture."""


@dataclass(frozen=True)
class CardSample:
    """Pictures of one prompt and condition. target: the true picture, if there is one."""

    prompt: str
    condition: Image.Image
    pictures: Sequence[Image.Image]
    target: Image.Image | None = None


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery: its prompt, and its path in the repository."""

    prompt: str
    path: str


def strip(sample: CardSample, largest: int | None = None) -> Image.Image:
    """Returns the condition, the pictures and the target side by side, each scaled down to `largest` pixels a side at
    most."""
    cells = [picture.convert("RGB") for picture in (sample.condition, *sample.pictures)]
    if sample.target is not None:
        cells.append(sample.target.convert("RGB"))
    for cell in cells:
        cell.thumbnail((largest or cell.width, largest or cell.height), Image.Resampling.LANCZOS)
    row = Image.new("RGB", (sum(cell.width for cell in cells), max(cell.height for cell in cells)), "white")
    left = 0
    for cell in cells:
        row.paste(cell, (left, 0))
        left += cell.width
    return row


def save_samples(folder: Path, samples: Sequence[CardSample]) -> list[Shown]:
    """Writes images/sample_NN.png (the strip), sample_NN_condition.png, sample_NN_00.png, ... and sample_NN_target.png
    in place of earlier ones. Returns the pictures of the gallery, the generated ones.
    """
    place = folder / PICTURES
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("sample_*.png"):
        if PICTURE_NAME.fullmatch(old.name):
            old.unlink()
    shown = []
    for number, sample in enumerate(samples[:100]):
        stem = f"sample_{number:02d}"
        strip(sample, _STRIP_SIDE).save(place / f"{stem}.png")
        singles = {f"{stem}_condition.png": sample.condition}
        singles |= {f"{stem}_{index:02d}.png": picture for index, picture in enumerate(sample.pictures[:100])}
        if sample.target is not None:
            singles[f"{stem}_target.png"] = sample.target
        for name, content in encode_singles(singles).items():
            (place / name).write_bytes(content)
        shown += [Shown(sample.prompt, f"{PICTURES}/{stem}_{i:02d}.png") for i in range(len(sample.pictures[:100]))]
    return shown


def encode_singles(pictures: Mapping[str, Image.Image], largest: int | None = _SINGLE_SIDE) -> dict[str, bytes]:
    """Returns name -> PNG file of each picture, scaled down to `largest` pixels a side at most. The files hold no text
    and no metadata."""
    files = {}
    for name, picture in pictures.items():
        copy = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        copy.thumbnail((largest or copy.width, largest or copy.height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        clean = Image.new(copy.mode, copy.size)
        clean.paste(copy)
        clean.save(buffer, "PNG")
        files[name] = buffer.getvalue()
    return files
