"""Generates pictures of held-out pairs, with the adapter and two controls, and measures them.

`evaluate` takes a pipeline and pairs in memory and writes no files; `produce.py` generates into a folder of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.evaluation.measures import Measures
from t2i_adapter.evaluation.metrics import Estimate, bootstrap
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.evaluation.plan import (
    ADAPTER,
    GENERATED,
    NO_ADAPTER,
    OTHER_CONDITION,
    TARGET,
    Plan,
    derangement,
    picture_seed,
    picture_seeds,
    plain_columns,
    plan_batch,
)
from t2i_adapter.evaluation.progress import Progress
from t2i_adapter.evaluation.store import LazySequence
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

__all__ = [
    "ADAPTER",
    "GENERATED",
    "NO_ADAPTER",
    "OTHER_CONDITION",
    "TARGET",
    "Evaluation",
    "derangement",
    "evaluate",
    "measure_columns",
    "picture_seeds",
]


@dataclass(frozen=True)
class Evaluation:
    """Pictures and metrics of an evaluation; the columns are ADAPTER, OTHER_CONDITION, NO_ADAPTER and TARGET.

    Attributes:
        pairs: the N measured pairs.
        seeds: seed of the noise of each pair's first picture.
        others: for each pair, the index of the pair whose condition OTHER_CONDITION uses.
        pictures: column -> the first picture of each pair (without TARGET).
        values: metric -> column -> one value a pair, the mean over its K pictures; None if the pair's truth does not
            define the metric.
        estimates: metric -> column -> mean and interval over the pairs that have the metric.
        singles: metric -> column -> the K values of each pair, one a picture; a target has one picture.
        seed: decides the noise and the resamples of intervals.
    """

    pairs: Sequence[Pair]
    seeds: Sequence[int]
    others: Sequence[int]
    pictures: Mapping[str, Sequence[Image.Image]]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]
    estimates: Mapping[str, Mapping[str, Estimate]]
    singles: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]] = field(default_factory=dict)
    seed: int = 0

    @property
    def repeats(self) -> int:
        """Pictures of a pair in each column, K."""
        rows = [rows[0] for columns in self.singles.values() for rows in columns.values()]
        return max(map(len, rows), default=1)

    def to_json(self) -> dict[str, Any]:
        """Returns `num`, `metrics` (which has the same form in every evaluation) and `pairs`, as plain JSON types."""
        return {
            "num": len(self.pairs),
            **({"pictures": self.repeats} if self.repeats > 1 else {}),
            "metrics": {
                metric: {column: estimate.to_json() for column, estimate in columns.items()}
                for metric, columns in self.estimates.items()
            },
            "pairs": [self._pair_json(i) for i in range(len(self.pairs))],
        }

    def _pair_json(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        content = {
            "key": pair.key,
            "prompt": pair.prompt,
            "seed": self.seeds[index],
            "other_condition_key": self.pairs[self.others[index]].key,
            "truth": pair.truth_from,
            "metrics": {
                metric: {column: values[index] for column, values in columns.items()}
                for metric, columns in self.values.items()
            },
        }
        if self.repeats > 1:
            content["seeds"] = [picture_seed(self.seed, index, number) for number in range(self.repeats)]
            content["pictures"] = {
                metric: {column: list(rows[index]) for column, rows in columns.items()}
                for metric, columns in self.singles.items()
            }
        return content


def evaluate(
    pipeline: AdapterPipeline,
    pairs: Sequence[Pair],
    *,
    sampling: SamplingOptions,
    seed: int = 0,
    columns: Sequence[str] = GENERATED,
    judge: Annotator | None = None,
    measures: Measures | None = None,
    max_tokens: MaxTokens = CHUNK_TOKENS,
    pictures: int = 1,
) -> Evaluation:
    """Generates each pair `pictures` times for each column and measures every picture against its own pair's truth.

    Args:
        columns: columns to generate; TARGET is always measured.
        judge: makes the condition of every picture, which is compared with the pair's condition; None skips that.
        measures: measures the pictures instead of the judge alone: with a second judge, CLIP, or KID and FID.
        max_tokens: tokens of a prompt that are read.
    """
    size = (pairs[0].condition.height, pairs[0].condition.width)
    plan = Plan(
        prompts=[pair.prompt for pair in pairs],
        conditions=[pair.condition for pair in pairs],
        size=size,
        seed=seed,
        pictures=pictures,
        batch=plan_batch(size, sampling, len(pairs)),
        max_tokens=max_tokens,
    )
    made: dict[str, list[list[Image.Image]]] = {column: [[] for _ in pairs] for column in columns}
    plan.warn(pipeline)
    with Progress(len(pairs) * len(columns) * pictures, "generating") as progress:
        for block in plan.blocks():
            for column, images in plan.generate(pipeline, block, plain_columns(columns, sampling)):
                for index, image in zip(block.indices, images, strict=True):
                    made[column.name][index].append(image)
                progress.advance(len(images))
    return measure_columns(plan, pairs, made, measures or Measures([judge] if judge else [], pairs, seed=seed))


def measure_columns(
    plan: Plan,
    pairs: Sequence[Pair],
    pictures: Mapping[str, Sequence[Sequence[Image.Image]]],
    measures: Measures,
) -> Evaluation:
    """Measures the pictures of an evaluation. They are looked at one after another, so they may be read when needed.

    pictures: column -> the K pictures of each pair, without TARGET.
    """
    columns = (*pictures, TARGET)
    measured: dict[str, list[list[dict[str, float]]]] = {column: [] for column in columns}
    total = len(pairs) * (1 + sum(len(rows[0]) for rows in pictures.values()))
    with Progress(total, "measuring") as progress:
        for index, pair in enumerate(pairs):
            for column in columns:
                images = [pair.target] if column == TARGET else pictures[column][index]
                measured[column].append([measures.picture(image, pair) for image in images])
                progress.advance(len(images))
    metrics = dict.fromkeys(metric for rows in measured.values() for row in rows for values in row for metric in values)
    singles = {
        metric: {column: [[values.get(metric) for values in row] for row in rows] for column, rows in measured.items()}
        for metric in metrics
    }
    values = {
        metric: {name: [_mean(row) for row in rows] for name, rows in each.items()} for metric, each in singles.items()
    }
    estimates = {
        metric: {column: bootstrap(found, plan.seed) for column, row in rows.items() if (found := _existing(row))}
        for metric, rows in values.items()
    }
    targets = LazySequence(len(pairs), lambda index: [pairs[index].target])
    estimates |= measures.pooled({**pictures, TARGET: targets}, pairs)
    first = {column: LazySequence(len(rows), _first_of(rows)) for column, rows in pictures.items()}
    seeds = picture_seeds(len(pairs), plan.seed)
    return Evaluation(pairs, seeds, plan.others, first, values, estimates, singles, plan.seed)


def _first_of(rows: Sequence[Sequence[Image.Image]]) -> Callable[[int], Image.Image]:
    return lambda index: rows[index][0]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that exist; None if there are none."""
    found = _existing(values)
    return sum(found) / len(found) if found else None


def _existing(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
