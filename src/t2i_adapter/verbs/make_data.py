"""The verbs `make-data shapes` and `make-data emoji`: image folders of pairs, whole or not at all.

Importing this module loads no torch, and the generators only when they are called.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from t2i_adapter.errors import UserError

Kind = Literal["circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring"]
MADE = ".made.json"  # written beside train/ and test/; a hidden file, so that `datasets` does not read it


@dataclass(frozen=True)
class ShapesOptions:
    """Draw scenes of shapes, endless by seed, each with its exact condition map."""

    out: Path
    """Folder to write; must be new or empty."""
    num: int = 2000
    """Pairs to train on, in train/."""
    num_test: int = 64
    """Held-out pairs, in test/; never among those of train/, however many those are."""
    size: int = 128
    """Side of the pictures in pixels."""
    seed: int = 0
    """Same seed, same scenes."""
    condition: Literal["outline", "canny", "depth", "segmentation", "palette"] = "outline"
    """Which map of the scene is the condition picture."""
    max_shapes: int = 3
    """Shapes in a scene, at most; at least one."""
    kinds: tuple[Kind, ...] = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
    """Which shapes there are."""
    patterns: tuple[Literal["plain", "striped", "dotted", "floral"], ...] = ("plain", "striped", "dotted", "floral")
    """Which backgrounds there are."""

    def __post_init__(self) -> None:
        _require(1 <= self.max_shapes <= 3, f"--max_shapes {self.max_shapes}: allowed is 1 to 3")
        _require(len(self.kinds) > 0, "--kinds: name at least one")
        _require(len(self.patterns) > 0, "--patterns: name at least one")
        _require(self.num >= 1, f"--num {self.num}: allowed is 1 or more")
        _require(self.num_test >= 0, f"--num_test {self.num_test}: allowed is 0 or more")
        _require(16 <= self.size <= 4096, f"--size {self.size}: allowed is 16 to 4096 pixels")
        _require(self.seed >= 0, f"--seed {self.seed}: allowed is 0 or more")


@dataclass(frozen=True)
class EmojiOptions:
    """Render Fluent Emoji (MIT), a fixed tenth of the names held out, with outlines found by OpenCV.

    The pictures come from the npm package @iconify-json/fluent-emoji-flat; drawing needs the extra `[emoji]`.
    """

    out: Path
    """Folder to write; must be new or empty."""
    package: Path
    """The package: the .tgz of `npm pack @iconify-json/fluent-emoji-flat`, its folder, or its icons.json."""
    num: int | None = None
    """Pairs to train on, in train/, spread evenly over the names; None takes all."""
    num_test: int | None = None
    """Held-out pairs, in test/, likewise."""
    size: int = 128
    """Side of the pictures in pixels."""
    condition: Literal["outline", "canny"] = "outline"
    """How the condition picture is made from the emoji."""

    def __post_init__(self) -> None:
        for name, num in (("num", self.num), ("num_test", self.num_test)):
            _require(num is None or num >= 1, f"--{name} {num}: allowed is 1 or more")
        _require(16 <= self.size <= 4096, f"--size {self.size}: allowed is 16 to 4096 pixels")


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
    """Write every split beside `out` first and then move it there, so that `out` is whole or untouched."""
    out = out.resolve()
    made = {name: str(value) for name, value in options.items() if name != "out"}
    if _is_made(out, made):
        print(f"{out} already holds this data set; nothing to do")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror} ({error.filename})") from None
    try:
        building.chmod(0o755)
        for split in splits:
            _write_split(out, building, split, write)
        (building / MADE).write_text(json.dumps(made, indent=1) + "\n")
        building.replace(out)  # an empty folder may stand there
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"wrote {out}; train on it with: t2i-adapter train --data.train_data_dir {out}")


def _write_split(out: Path, building: Path, split: str, write: Callable[[Path, str], Path]) -> None:
    print(f"writing {out / split} ...", flush=True)
    start = time.monotonic()
    table = write(building, split) / "metadata.jsonl"
    rows = sum(1 for _ in table.open(encoding="utf-8"))
    print(f"  {rows:,} pairs in {time.monotonic() - start:.1f} s", flush=True)


def _is_made(out: Path, made: dict[str, str]) -> bool:
    """Whether `out` holds just this already. Raises UserError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder that is new or empty")
    marker = out / MADE
    if not marker.is_file():
        raise UserError(f"--out {out}: is not empty; name a folder that is new or empty")
    try:
        there = json.loads(marker.read_text())
    except (OSError, ValueError):
        there = {}
    if there == made:
        return True
    other = [f"{name} {there.get(name)}" for name, value in made.items() if there.get(name) != value]
    raise UserError(f"--out {out}: holds another data set (made with {', '.join(other)}); name another folder")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
