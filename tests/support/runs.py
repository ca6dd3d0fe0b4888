"""Short training runs on the tiny base: their options, their command line, and what they log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i_adapter.config.tree import Config


def tiny_config(base: object, data: object, out: object, changes: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Options of a run at 64 px: batch 2, seed 5, no loader process, no tracker, every update logged.

    changes: option by path, such as {"train.max_steps": 6}, beside these or instead of them.
    """
    from t2i_adapter.config.read import with_values
    from t2i_adapter.config.tree import Config

    values = {
        "base.name": str(base),
        "data.location": str(data),
        "data.resolution": 64,
        "data.num_workers": 0,
        "train.batch_size": 2,
        "train.seed": 5,
        "tracking.report_to": "none",
        "tracking.log_every": 1,
        "output_dir": str(out),
    }
    return with_values(Config(), {**values, **changes})


def train_words(base: object, data: object, out: object, *more: object) -> list[str]:
    """The words of `t2i-adapter train` for one update of 2 samples at 64 px.

    more: further words; a flag that they repeat counts instead of the one here.
    """
    words = {
        "--base.name": base,
        "--data": data,
        "--data.resolution": 64,
        "--data.num_workers": 0,
        "--train.batch_size": 2,
        "--train.max_steps": 1,
        "--train.seed": 0,
        "--tracking.report_to": "none",
        "--output_dir": out,
    }
    return ["train", *(f"{name}={value}" for name, value in words.items()), *map(str, more)]


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in a run's folder."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path | str) -> list[float]:
    """The logged losses of a run."""
    return [row["loss"] for row in read_metrics(run) if "loss" in row]
