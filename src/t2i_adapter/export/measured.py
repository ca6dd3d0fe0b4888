"""Reads the folder that `evaluate` wrote, for a model card: its numbers, typical pairs and picture sheet.

The folder may come from anyone: all of it is checked. What is published of it names no file, no caption and no folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.data.picture import StoredPicture, decode, read_file
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import parse_json
from t2i_adapter.models.record import without_paths

FILE_NAME = "evaluation.json"
ADAPTER, NO_ADAPTER, TARGET = "adapter", "no_adapter", "target"
FLOORS = {"other_condition": "another pair's condition", NO_ADAPTER: "no adapter"}
"""Columns of an evaluation that an adapter has to beat, and their names."""
COLUMNS = {ADAPTER: "with the adapter", **{column: f"floor: {name}" for column, name in FLOORS.items()}}
COLUMNS[TARGET] = "ceiling: the true picture"
QUALITY = ("clip_score", "kid", "fid", "diversity", "clipped", "saturation")
"""Metrics of the pictures' quality; the others say how well the condition is followed."""
_PLACES = ("best", "upper quartile", "median", "lower quartile", "worst")
_LARGEST_NUM = 10**7


@dataclass(frozen=True)
class Pair:
    """A pair of the evaluation. place: its rank in words. pictures: column or "condition" -> picture."""

    place: str
    prompt: str
    pictures: Mapping[str, Image.Image]


@dataclass(frozen=True)
class Measured:
    """An evaluation of one adapter.

    Attributes:
        content: evaluation.json as it is published: without keys and prompts of pairs, and without local paths.
        pairs: typical pairs, from the best to the worst; () if their pictures are missing.
        sheet: the picture sheet.
    """

    content: Mapping[str, Any]
    pairs: Sequence[Pair]
    sheet: Image.Image

    @property
    def digest(self) -> str | None:
        """sha256 of the weights that were measured (`pipeline.weights_digest`), if it is recorded."""
        found = self.content.get("settings", {}).get("adapter_sha256")
        return found if isinstance(found, str) else None


def read_evaluation(folder: str | Path) -> Measured:
    """Reads an evaluation's folder. Raises UserError if a file is missing or malformed, or for several adapters."""
    source = Path(folder)
    try:
        content = parse_json((source / FILE_NAME).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("adapters"), dict):
            names = ", ".join(str(name) for name in content["adapters"])
            raise UserError(
                f"{source} compares several adapters ({names}); name the folder adapter-NAME in it.",
                option="evaluation",
            )
        public = _publish(content)
        pairs = _typical_pairs(source, content)
        sheet = decode(StoredPicture(str(source / "sheet.png"), read_file(source / "sheet.png", flag("evaluation"))))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as fault:
        raise UserError(f"{source}: not a folder of `evaluate` ({fault!r}).", option="evaluation") from fault
    return Measured(public, pairs, sheet)


def pair_values(content: Mapping[str, Any], metric: str, column: str = ADAPTER) -> list[float]:
    """Returns the pairs' values of a metric, in the order of the pairs; pairs without a value are skipped."""
    found = [pair["metrics"].get(metric, {}).get(column) for pair in content.get("pairs", [])]
    return [float(value) for value in found if value is not None]


def headline(content: Mapping[str, Any]) -> str | None:
    """Returns the metric that answers whether the adapter controls; None if it was not measured."""
    from t2i_adapter.evaluation.headline import headline_key

    key = headline_key(content["metrics"])
    return key if ADAPTER in content["metrics"].get(key, {}) else None


def _publish(content: Any) -> dict[str, Any]:
    """Returns the content that is published. Raises ValueError, TypeError or LookupError if it is malformed."""
    num = content["num"]
    if type(num) is not int or not 1 <= num <= _LARGEST_NUM:
        raise ValueError(f"num is {str(num)[:40]}")
    public: dict[str, Any] = {"num": num}
    if type(content.get("pictures")) is int:
        public["pictures"] = content["pictures"]
    public["metrics"] = {
        str(metric): {str(column): _estimate(value) for column, value in columns.items()}
        for metric, columns in content["metrics"].items()
    }
    if not public["metrics"]:
        raise ValueError("metrics is empty")
    public["pairs"] = [_pair(pair) for pair in content.get("pairs", [])]
    if isinstance(content.get("differences"), dict):
        public["differences"] = without_paths(content["differences"])
    settings = dict(content.get("settings", {}))
    for name in ("adapter", "out"):
        if isinstance(settings.get(name), str):
            settings[name] = Path(settings[name]).name
    public["settings"] = without_paths(settings)
    return public


def _estimate(value: Mapping[str, Any]) -> dict[str, Any]:
    low, high = value["ci95"]
    numbers = [float(value["mean"]), float(low), float(high)]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} are not finite")
    return {"mean": numbers[0], "ci95": numbers[1:]}


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a pair, without its key and its prompt."""
    metrics = {
        str(metric): {str(column): None if value is None else float(value) for column, value in columns.items()}
        for metric, columns in pair["metrics"].items()
    }
    return {**{name: pair[name] for name in ("seed", "truth") if name in pair}, "metrics": metrics}


def _typical_pairs(source: Path, content: Mapping[str, Any]) -> list[Pair]:
    """Returns the pairs at five evenly spaced ranks whose pictures are there."""
    from t2i_adapter.evaluation.headline import METRICS
    from t2i_adapter.evaluation.store import CONDITION, FOLDER, condition_name, picture_name

    key, place = headline(content), source / FOLDER
    if key is None:
        return []
    sign = -1 if METRICS[key].higher_is_better else 1
    values = {
        index: float(value)
        for index, pair in enumerate(content.get("pairs", []))
        if (value := pair["metrics"].get(key, {}).get(ADAPTER)) is not None
    }
    ranks = sorted(values, key=lambda index: sign * values[index])
    count, found = min(len(_PLACES), len(ranks)), []
    for number in range(count):
        rank = round(number * (len(ranks) - 1) / max(1, count - 1))
        index = ranks[rank]
        files = {
            "condition": place / CONDITION / f"{condition_name(index)}.png",
            ADAPTER: place / ADAPTER / f"{picture_name(index, 0)}.png",
            NO_ADAPTER: place / NO_ADAPTER / f"{picture_name(index, 0)}.png",
            TARGET: place / TARGET / f"{condition_name(index)}.png",
        }
        pictures = {
            name: decode(StoredPicture(str(file), read_file(file, flag("evaluation"))))
            for name, file in files.items()
            if file.is_file() and not file.is_symlink()
        }
        if {"condition", ADAPTER} <= pictures.keys():
            name = f"{_PLACES[number]}, " if count == len(_PLACES) else ""
            rank_words = f"{name}rank {rank + 1} of {len(ranks)}: {METRICS[key].show(values[index])}"
            found.append(Pair(rank_words, str(content["pairs"][index].get("prompt", "")), pictures))
    return found
