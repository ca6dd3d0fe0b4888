"""The verbs `make-data shapes` and `make-data emoji`: they write image folders of pairs, whole or not at all.

Importing this module is light: the generators are imported when they are called.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from t2i_adapter.errors import UserError, require
from t2i_adapter.files import show_command, show_path

Kind = Literal["circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring"]
MADE = ".made.json"  # the options, beside train/ and test/; hidden, so that `datasets` does not read it


@dataclass(frozen=True)
class ShapesOptions:
    """Render scenes of shapes, each with its exact condition map."""

    out: Path
    """Folder to write; must be new or empty."""
    num: int = 2000
    """Pairs to train on, in train/."""
    num_test: int = 64
    """Held-out pairs, in test/; they are never among those of train/."""
    size: int = 128
    """Side of the pictures in pixels."""
    seed: int = 0
    """Equal seeds make equal scenes."""
    condition: Literal["outline", "canny", "depth", "segmentation", "palette"] = "outline"
    """Map of the scene that becomes the condition picture."""
    max_shapes: int = 3
    """Largest number of shapes in a scene; the smallest is one."""
    kinds: tuple[Kind, ...] = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
    """Kinds of shapes."""
    patterns: tuple[Literal["plain", "striped", "dotted", "floral"], ...] = ("plain", "striped", "dotted", "floral")
    """Patterns of backgrounds."""

    def __post_init__(self) -> None:
        require("max_shapes", 1 <= self.max_shapes <= 3, self.max_shapes, "allowed is 1 to 3")
        require("kinds", len(self.kinds) > 0, "none", "name at least one")
        require("patterns", len(self.patterns) > 0, "none", "name at least one")
        require("num", self.num >= 1, self.num, "allowed is 1 or more")
        require("num_test", self.num_test >= 0, self.num_test, "allowed is 0 or more")
        require("size", 16 <= self.size <= 4096, self.size, "allowed is 16 to 4096 pixels")
        require("seed", self.seed >= 0, self.seed, "allowed is 0 or more")


@dataclass(frozen=True)
class EmojiOptions:
    """Render Fluent Emoji (MIT), a fixed tenth of the names held out, with outlines found by OpenCV.

    The icons come from the npm package @iconify-json/fluent-emoji-flat; rendering needs the extra `[emoji]`.
    """

    out: Path
    """Folder to write; must be new or empty."""
    package: Path
    """The package: the .tgz of `npm pack @iconify-json/fluent-emoji-flat`, its folder, or its icons.json."""
    num: int | None = None
    """Pairs to train on, in train/, spread evenly over the names; None is all."""
    num_test: int | None = None
    """Held-out pairs, in test/, spread likewise; None is all."""
    size: int = 128
    """Side of the pictures in pixels."""
    condition: Literal["outline", "canny"] = "outline"
    """Method that makes the condition picture from the emoji."""

    def __post_init__(self) -> None:
        for name, num in (("num", self.num), ("num_test", self.num_test)):
            require(name, num is None or num >= 1, num, "allowed is 1 or more")
        require("size", 16 <= self.size <= 4096, self.size, "allowed is 16 to 4096 pixels")


def make_shapes(options: ShapesOptions) -> None:
    """The verb `make-data shapes`."""
    from t2i_adapter.data.shapes import write_dataset

    def write(folder: Path, split: str) -> Path:
        return write_dataset(
            folder,
            num=options.num if split == "train" else options.num_test,
            split=split,
            seed=options.seed,
            size=options.size,
            condition=options.condition,
            max_shapes=options.max_shapes,
            kinds=options.kinds,
            patterns=options.patterns,
        )

    _make(options.out, asdict(options), ("train", "test") if options.num_test else ("train",), write)


def make_emoji(options: EmojiOptions) -> None:
    """The verb `make-data emoji`."""
    from t2i_adapter.data.emoji import write_dataset

    def write(folder: Path, split: str) -> Path:
        return write_dataset(
            folder,
            package=options.package,
            num=options.num if split == "train" else options.num_test,
            split=split,
            size=options.size,
            condition=options.condition,
        )

    _make(options.out, asdict(options), ("train", "test"), write)


def _make(out: Path, options: dict[str, Any], splits: tuple[str, ...], write: Callable[[Path, str], Path]) -> None:
    """Writes every split to a temporary folder beside `out`, then renames it: `out` is whole or untouched.

    Raises UserError.
    """
    out = out.resolve()
    made = {name: str(value) for name, value in options.items() if name != "out"}
    if _is_made(out, made):
        print(f"{out} already holds this dataset; nothing to do")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
        building.mkdir()  # not mkdtemp, which ignores the umask
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror} ({error.filename}).", option="out") from None
    try:
        for split in splits:
            _write_split(out, building, split, write)
        (building / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        building.replace(out)  # an empty folder may stand there
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"wrote {show_path(out)}; train on it with: {show_command('t2i-adapter', 'train', '--data', out)}")


def _write_split(out: Path, building: Path, split: str, write: Callable[[Path, str], Path]) -> None:
    print(f"writing {out / split} ...", flush=True)
    start = time.monotonic()
    table = write(building, split) / "metadata.jsonl"
    rows = sum(1 for _ in table.open(encoding="utf-8"))
    print(f"  {rows:,} pairs in {time.monotonic() - start:.1f} s", flush=True)


def _is_made(out: Path, made: dict[str, str]) -> bool:
    """Whether `out` holds exactly this dataset already. Raises UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder that is new or empty.", option="out")
    marker = out / MADE
    if not marker.is_file():
        raise UserError(f"{out}: is not empty; name a folder that is new or empty.", option="out")
    try:
        there = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = {}
    if there == made:
        return True
    other = [f"{name} {there.get(name)}" for name, value in made.items() if there.get(name) != value]
    text = f"{out}: holds another dataset (made with {', '.join(other)}); name another folder."
    raise UserError(text, option="out")
