"""Generates pictures of held-out pairs, with the adapter and two controls, and measures them.

`evaluate` takes a pipeline and pairs in memory and writes no files; `report.py` writes its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import StableDiffusionXLAdapterPipeline
from PIL import Image

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.evaluation.measures import TARGET, Measures
from t2i_adapter.evaluation.metrics import Estimate, bootstrap
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.generation.generate import encode_prompts, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

ADAPTER = "adapter"
OTHER_CONDITION = "other_condition"
"""Control: the adapter with the condition of another pair."""
NO_ADAPTER = "no_adapter"
"""Control: the prompt alone."""
GENERATED = (ADAPTER, OTHER_CONDITION, NO_ADAPTER)
"""Columns of an evaluation that are generated, in this order."""


@dataclass(frozen=True)
class Evaluation:
    """Pictures and metrics of an evaluation; the columns are ADAPTER, OTHER_CONDITION, NO_ADAPTER and TARGET.

    Attributes:
        pairs: the measured pairs.
        seeds: seed of each pair's noise.
        others: for each pair, the index of the pair whose condition OTHER_CONDITION uses.
        pictures: column -> one picture a pair (without TARGET).
        values: metric -> column -> one value a pair; None if the pair's truth does not define the metric.
        estimates: metric -> column -> mean and interval over the pairs that have the metric.
    """

    pairs: Sequence[Pair]
    seeds: Sequence[int]
    others: Sequence[int]
    pictures: Mapping[str, Sequence[Image.Image]]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]
    estimates: Mapping[str, Mapping[str, Estimate]]

    def to_json(self) -> dict[str, Any]:
        """Returns `num`, `metrics` (which has the same form in every evaluation) and `pairs`, as plain JSON types."""
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
    columns: Sequence[str] = GENERATED,
    judge: Annotator | None = None,
    measures: Measures | None = None,
    max_tokens: MaxTokens = CHUNK_TOKENS,
) -> Evaluation:
    """Generates each pair once for each column and measures every picture against its own pair's truth.

    Args:
        columns: columns to generate; TARGET is always measured.
        judge: makes the condition of every picture, which is compared with the pair's condition; None skips that.
        measures: measures the pictures instead of the judge alone: with a second judge, CLIP, or KID and FID.
        max_tokens: tokens of a prompt that are read.
    """
    seeds, others = picture_seeds(len(pairs), seed), derangement(len(pairs), seed)
    own = [pair.condition for pair in pairs]
    conditions = {NO_ADAPTER: None, OTHER_CONDITION: [own[other] for other in others]}
    prompts = [pair.prompt for pair in pairs]
    texts = encode_prompts(pipeline, prompts, guidance=sampling.guidance, max_tokens=max_tokens)
    size = (pairs[0].condition.height, pairs[0].condition.width)
    pictures = {
        column: generate(
            pipeline, texts, conditions.get(column, own), seeds, size=size, sampling=sampling, progress=column
        )
        for column in columns
    }
    measures, measured = measures or Measures([judge] if judge else [], pairs, seed=seed), dict(pictures)
    measured[TARGET] = [pair.target for pair in pairs]
    values = _measure_columns(measured, pairs, measures)
    estimates = {
        metric: {column: bootstrap([v for v in row if v is not None], seed) for column, row in rows.items()}
        for metric, rows in values.items()
    }
    estimates |= measures.pooled({column: [[image] for image in row] for column, row in measured.items()}, pairs)
    return Evaluation(pairs, seeds, others, pictures, values, estimates)


def derangement(count: int, seed: int) -> list[int]:
    """Returns, for each of `count` pairs, the index of another pair. Each index occurs once (one random cycle)."""
    assert count >= 2, "a single pair has no other pair"
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return other.tolist()


def picture_seeds(count: int, seed: int) -> list[int]:
    """Returns a seed for each pair; all columns of a pair start from the same noise."""
    return [int(s.generate_state(1, np.uint64)[0]) >> 1 for s in np.random.SeedSequence(seed).spawn(count)]


def _measure_columns(
    pictures: Mapping[str, Sequence[Image.Image]], pairs: Sequence[Pair], measures: Measures
) -> dict[str, dict[str, list[float | None]]]:
    """Returns metric -> column -> one value a pair, as in `Evaluation.values`."""
    measured = {
        column: [measures.picture(image, pair) for image, pair in zip(row, pairs, strict=True)]
        for column, row in pictures.items()
    }
    metrics = dict.fromkeys(metric for row in measured.values() for values in row for metric in values)
    return {
        metric: {column: [values.get(metric) for values in row] for column, row in measured.items()}
        for metric in metrics
    }
