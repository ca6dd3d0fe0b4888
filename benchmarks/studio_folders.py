"""Folders for benchmarks/studio.py: runs, ended jobs, large datasets."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from PIL import Image
from run_page import write_log

from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config

ORIGINALS, SIDE = 64, 128
"""Different pictures of the large datasets, and their side in pixels: the other rows are further names of them."""


def write_run(folder: Path, updates: int) -> None:
    """A run's log and record, and all its options, as the trainer writes them."""
    write_log(folder, updates)
    config = Config()
    changed = replace(config, train=replace(config.train, max_steps=updates, seed=1), output_dir=str(folder))
    (folder / "options.yaml").write_text(recipe.dump(changed))


def write_jobs(root: Path, count: int) -> None:
    """Folders of ended jobs, as the queue keeps them."""
    for number in range(count):
        folder = root / ".studio" / "jobs" / f"20261129-120000-{number:06x}"
        folder.mkdir(parents=True)
        job = {"verb": "plan", "argv": ["plan", "--data", "data"], "run": "", "created": 1.0, "processes": 1}
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "process.json").write_text(json.dumps({"pid": 1, "started": "never"}))
        (folder / "exit.json").write_text(json.dumps({"code": 0, "ended": 2.0}))
        (folder / "log").write_text("done\n" * 20)
        (folder / "progress").write_text(json.dumps({"phase": "planning", "done": 1, "total": 1}) + "\n")


def write_originals(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for number in range(ORIGINALS):
        file = folder / f"{number}.jpg"
        Image.new("RGB", (SIDE, SIDE), (4 * number % 256, 80, 160)).save(file, quality=60)
        files.append(file)
    return files


def caption(number: int) -> str:
    """The captions of 1 row in `ORIGINALS` have the word that is searched for."""
    return f"a house by a lake, {'with a boat' if number % ORIGINALS == 7 else 'in the morning'}, number {number}"


def write_table(root: Path, rows: int) -> None:
    """A table whose rows name `ORIGINALS` files."""
    write_originals(root / "table" / "pictures")
    with (root / "table" / "metadata.jsonl").open("w") as file:
        for number in range(rows):
            row = {"file_name": f"pictures/{number % ORIGINALS}.jpg", "text": caption(number)}
            file.write(json.dumps(row) + "\n")


def write_folder(root: Path, rows: int) -> None:
    """A folder of pictures with captions beside them. The files are further names of `ORIGINALS` ones, to save time."""
    originals, folder = write_originals(root / "originals"), root / "folder"
    folder.mkdir()
    for number, file in enumerate(originals):
        file.with_suffix(".txt").write_text(caption(number))
    for number in range(rows):
        picture = originals[number % ORIGINALS]
        os.link(picture, folder / f"{number:06d}.jpg")
        os.link(picture.with_suffix(".txt"), folder / f"{number:06d}.txt")
