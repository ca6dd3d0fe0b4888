"""Options of making condition maps. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class AnnotateOptions:
    """Make the condition map of a picture, or of every picture of a data set."""

    kind: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="KIND")]
    """What to draw: a kind of `t2i-adapter conditions`, with its options after commas (canny,low=50,high=150), or one
    of your own, module:Class or file.py:Class."""
    photo: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[PHOTO]")] = None
    """A picture file. This or --data."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The map's file (.png), or with --data the image folder to write or to go on with."""
    data: str | None = None
    """A data set, as training reads it: folder, manifest, shards or hub id."""
    split: str = "train"
    """Split of the data."""
    layout: Literal["auto", "folder", "paired", "manifest", "tar", "parquet", "hub", "emoji", "shapes"] = "auto"
    """How the data is laid out; `auto` tells by its name and content."""
    image_column: str = "image"
    """Column of the picture that the map is made of."""
    caption_column: str = "text"
    """Column of the caption, which goes along."""
    workers: int | None = None
    """Processes that draw; None takes one a core, 0 draws in this one. The maps are the same for any number."""

    def __post_init__(self) -> None:
        both = self.photo is not None and self.data is not None
        if both or (self.photo is None and self.data is None):
            raise UserError(f"{'PHOTO and --data are both' if both else 'neither PHOTO nor --data is'} given: give one")
        if self.out is None:
            raise UserError(f"--out: required, and not given; {'the file' if self.photo else 'the folder'} to write")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers {self.workers}: 0 or more")


@dataclass(frozen=True)
class ConditionsOptions:
    """List every kind of condition map: what it draws, its options, its weights and licence."""

    sheet: Path | None = None
    """Picture file to write: all kinds drawn from one photo."""
    photo: Path | None = None
    """The photo for --sheet; None takes a scene of `make-data shapes`."""
    kinds: tuple[str, ...] = ()
    """Which to draw on the sheet, options after commas; none given are all that fetch no weights from the hub."""

    def __post_init__(self) -> None:
        for flag in ("photo", "kinds"):
            if getattr(self, flag) and self.sheet is None:
                raise UserError(f"--{flag}: is for --sheet FILE, which is not given")
