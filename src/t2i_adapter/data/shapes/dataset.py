"""Writes scenes as a `datasets` image folder, the dataset of `make-data shapes`."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import UserError
from .pixels import CONDITIONS, condition, render
from .sample import sample_scene
from .scene import KINDS, PATTERNS, Scene

SPLITS = ("train", "test")
TEST_START = 2**31
"""Index of the first test scene; training scenes have lower ones."""


def split_start(split: str) -> int:
    """The index of a split's first scene. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}.")
    return TEST_START if split == "test" else 0


def kinds_caption(scene: Scene) -> str:
    """A caption that names the shapes without colours and places, which a model then takes from the condition."""
    return " and ".join(f"a {shape.kind}" for shape in scene.shapes)


def write_dataset(
    out: Path,
    *,
    num: int,
    split: str = "train",
    seed: int = 0,
    size: int = 128,
    condition: str = "outline",
    max_shapes: int = 3,
    kinds: tuple[str, ...] = KINDS,
    patterns: tuple[str, ...] = PATTERNS,
    overwrite: bool = False,
) -> Path:
    """Writes `num` scenes to out/split: NNNNN.png, NNNNN_cond.png and metadata.jsonl. Returns that folder.

    Each row of metadata.jsonl has file_name, conditioning_image_file_name, text, shapes (a caption without colours and
    places) and scene, the JSON of `Scene.to_dict` as one string: `Scene.from_dict(json.loads(...))` reads it.
    Raises UserError.
    """
    if condition not in CONDITIONS:
        raise UserError(f"unknown condition {condition!r}; allowed: {', '.join(CONDITIONS)}.")
    start, folder = split_start(split), out / split
    if (folder / "metadata.jsonl").exists() and not overwrite:
        raise UserError(f"{folder} already holds a dataset; name another folder, or allow overwriting.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num):
        scene = sample_scene(seed, start + i, max_shapes=max_shapes, kinds=kinds, patterns=patterns)
        rows.append(_write_sample(folder, i, scene, size, condition))
    # The table is written last: a folder that has one is complete.
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _write_sample(folder: Path, number: int, scene: Scene, size: int, kind: str) -> dict[str, str]:
    name, condition_name = f"{number:05d}.png", f"{number:05d}_cond.png"
    render(scene, size).save(folder / name)
    condition(scene, size, kind).save(folder / condition_name)
    return {
        "file_name": name,
        "conditioning_image_file_name": condition_name,
        "text": scene.caption,
        "shapes": kinds_caption(scene),
        "scene": json.dumps(scene.to_dict()),
    }
