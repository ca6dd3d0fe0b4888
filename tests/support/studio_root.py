"""A folder for a studio with a run of each state, an adapter and a dataset, written in seconds."""

from __future__ import annotations

from pathlib import Path

from support.run_folders import advice, entries_of, gain_entry, log_entry, write_pictures, write_run
from support.tiny import write_adapter, write_circles

NAMES = ("learned", "failed", "killed", "running")
"""The runs. The one called running runs if a process holds its lock (`t2i_adapter.runs.lock`)."""


def write_root(root: Path) -> Path:
    """Writes data/circles and runs/NAME of each of `NAMES`; returns the folder."""
    write_circles(root / "data" / "circles", num=60, split="train")
    runs = root / "runs"
    entries = [*entries_of(800), advice(200, "read", "The condition is read since step 200.")]
    entries.append({"step": 300, "warning": "row 7: its picture is damaged, so the row is skipped"})
    ended = {"outcome": "finished", "ended": 1.7e9 + 3600, "steps": 800}
    write_run(runs / "learned", entries, steps=800, record=ended, checkpoints=(400, 800))
    write_pictures(runs / "learned", (0, 200, 400, 800), side=64)
    write_adapter(runs / "learned", Path("nano"))
    failed = {"outcome": "failed", "ended": 1.7e9 + 60, "reason": "loss is NaN at step 30; lower optim.lr"}
    write_run(runs / "failed", [log_entry(10), log_entry(20)], record=failed, checkpoints=(20,))
    write_run(runs / "killed", entries_of(300), record={"outcome": "running"}, checkpoints=(300,))
    write_run(runs / "running", [*entries_of(400), gain_entry(410, 0.2)], record={"outcome": "running"})
    return root
