"""Draw every pair three times and measure each picture: a function of a pipeline and pairs, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import StableDiffusionXLAdapterPipeline
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate
from t2i_adapter.evaluation.controls import DRAWN, NO_ADAPTER, OTHER_CONDITION, TARGET, derangement, picture_seeds
from t2i_adapter.evaluation.metrics import Estimate, bootstrap, condition_agreement, measure
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.generation.generate import encode_prompts, generate
from t2i_adapter.generation.options import SamplingOptions


@dataclass(frozen=True)
class Evaluation:
    """Pictures and numbers of an evaluation; columns are ADAPTER, OTHER_CONDITION, NO_ADAPTER and TARGET.

    Attributes:
        pairs: what was measured.
        seeds: each pair's noise.
        others: for each pair the index of the pair that lent it its condition in OTHER_CONDITION.
        pictures: column -> one picture a pair (without TARGET).
        values: metric -> column -> one value a pair.
        estimates: metric -> column -> mean and interval over the pairs that have the metric.
    """

    pairs: Sequence[Pair]
    seeds: Sequence[int]
    others: Sequence[int]
    pictures: Mapping[str, Sequence[Image.Image]]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]
    estimates: Mapping[str, Mapping[str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """`num`, `metrics` (the same form for every evaluation) and `pairs`, as plain JSON types."""
        return {
            "num": len(self.pairs),
            "metrics": {
                metric: {column: estimate.to_json() for column, estimate in columns.items()}
                for metric, columns in self.estimates.items()
            },
            "pairs": [self._pair_json(i) for i in range(len(self.pairs))],
        }

    def _pair_json(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {
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


def evaluate(
    pipeline: StableDiffusionXLAdapterPipeline,
    pairs: Sequence[Pair],
    *,
    sampling: SamplingOptions,
    seed: int = 0,
    columns: Sequence[str] = DRAWN,
    judge: Annotator | None = None,
) -> Evaluation:
    """Draws each pair once for each column and measures all pictures against the pair's own truth.

    `columns` leaves out controls that are not wanted; the target row costs no drawing and is always there. `judge`
    makes each picture's own condition, which is compared with the pair's.
    """
    seeds, others = picture_seeds(len(pairs), seed), derangement(len(pairs), seed)
    own = [pair.condition for pair in pairs]
    conditions = {NO_ADAPTER: None, OTHER_CONDITION: [own[other] for other in others]}
    texts = encode_prompts(pipeline, [pair.prompt for pair in pairs], guidance=sampling.guidance)
    size = (pairs[0].condition.height, pairs[0].condition.width)
    pictures = {
        column: generate(pipeline, texts, conditions.get(column, own), seeds, size=size, sampling=sampling)
        for column in columns
    }
    values = _measured({**pictures, TARGET: [pair.target for pair in pairs]}, pairs, judge)
    estimates = {
        metric: {column: bootstrap([v for v in row if v is not None], seed) for column, row in rows.items()}
        for metric, rows in values.items()
    }
    return Evaluation(pairs, seeds, others, pictures, values, estimates)


def _measured(
    pictures: Mapping[str, Sequence[Image.Image]], pairs: Sequence[Pair], judge: Annotator | None
) -> dict[str, dict[str, list[float | None]]]:
    """metric -> column -> one value a pair; None where the pair's truth does not tell (a colour that is not known)."""
    measured = {
        column: [_measure(image, pair, judge) for image, pair in zip(row, pairs, strict=True)]
        for column, row in pictures.items()
    }
    metrics = dict.fromkeys(metric for row in measured.values() for values in row for metric in values)
    return {
        metric: {column: [values.get(metric) for values in row] for column, row in measured.items()}
        for metric in metrics
    }


def _measure(image: Image.Image, pair: Pair, judge: Annotator | None) -> dict[str, float]:
    values = measure(np.asarray(image), pair.truth)
    if judge is None:
        return values
    own = annotate(judge, image.convert("RGB")).convert(pair.condition.mode)
    return values | condition_agreement(np.asarray(own), np.asarray(pair.condition), judge.facts.levels)
