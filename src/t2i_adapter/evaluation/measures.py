"""Measures pictures: all metrics of one picture, and the metrics of all pictures together.

`Measures.picture` measures one picture of a pair: its objects and colours against the pair's truth, and its condition
against the pair's own, by the kind of the condition. `Measures.pooled` returns what needs all pictures. What cannot be
measured here is a line in `Measures.missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate
from t2i_adapter.annotators.segmentation import PALETTE
from t2i_adapter.evaluation.kinds import (
    Family,
    class_counts,
    compare,
    family,
    ms_ssim,
    nearest_class,
    own_palette,
)
from t2i_adapter.evaluation.metrics import (
    Estimate,
    bootstrap,
    condition_agreement,
    is_drawn,
    measure,
    picture_excess,
)
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.evaluation.pooled import mean_distance, mean_iou

EXTRA = "pip install 'sdxl-t2i-adapter[metrics]'"


class Measures:
    """Measures the pictures of an evaluation.

    Attributes:
        missing: one line for each metric that is not measured, with the reason; complete once all was measured.
    """

    def __init__(self, judges: Sequence[Annotator], pairs: Sequence[Pair], *, seed: int = 0) -> None:
        """
        Args:
            judges: the first makes the condition of every picture, which is compared with the pair's condition. The
                second makes a map of every picture and of the pair's target, and compares the two.
            pairs: all pairs of the evaluation.
            seed: decides the resamples of intervals.
        """
        self.judge = judges[0] if judges else None
        self.second = judges[1] if len(judges) > 1 else None
        self._seed = seed
        self._missing: dict[str, None] = {}
        self._family: Family = family(self.judge) if self.judge else "other"
        self._palette = self._find_palette(pairs)
        self._counts: dict[bytes, np.ndarray] = {}
        self._target_map: tuple[Pair, Image.Image] | None = None

    @property
    def missing(self) -> list[str]:
        return list(self._missing)

    def picture(self, image: Image.Image, pair: Pair) -> dict[str, float]:
        """Returns all metrics of one picture of a pair, without those that are not defined for it."""
        image = image.convert("RGB")
        values = measure(np.asarray(image), pair.truth)
        values |= picture_excess(np.asarray(image), np.asarray(pair.target))
        if self.judge:
            values |= self._by_condition(self.judge, image, pair)
        if self.second:
            values |= self._by_second(self.second, image, pair)
        return values

    def pooled(
        self, pictures: Mapping[str, Sequence[Sequence[Image.Image]]], pairs: Sequence[Pair]
    ) -> dict[str, dict[str, Estimate]]:
        """Returns metric -> column -> mean and interval, for the metrics of all pictures.

        Args:
            pictures: column -> the pair's k pictures, for each pair. A column of targets has one picture a pair.
        """
        found: dict[str, dict[str, Estimate]] = {}

        def measure_columns(metric: str, measure_column: Callable[[Sequence[Sequence[Image.Image]]], Estimate]) -> None:
            found[metric] = {column: measure_column(rows) for column, rows in pictures.items()}

        if self._palette is not None:
            measure_columns("condition_miou", lambda rows: self._mean_iou(rows, pairs))
        several = {column: rows for column, rows in pictures.items() if min(map(len, rows)) > 1}
        if several:
            found["diversity"] = {
                column: bootstrap([mean_distance(row) for row in rows], self._seed) for column, rows in several.items()
            }
        return found

    def _by_condition(self, judge: Annotator, image: Image.Image, pair: Pair) -> dict[str, float]:
        own = annotate(judge, image).convert(pair.condition.mode)
        got, wanted = np.asarray(own), np.asarray(pair.condition)
        values = compare(self._family, got, wanted, judge.facts.levels)
        if self._family == "edges":
            values |= self._try("ms_ssim", lambda: ms_ssim(got, wanted))
        if self._palette is not None:
            counts = self._count(got, wanted, self._palette)
            self._counts[_digest(image, pair)] = counts
            if self._family == "labels":
                values["label_accuracy"] = float(counts[0].sum() / counts[2].sum())
        return values

    def _by_second(self, second: Annotator, image: Image.Image, pair: Pair) -> dict[str, float]:
        if self._target_map is None or self._target_map[0] is not pair:
            self._target_map = pair, annotate(second, pair.target)
        got, wanted = np.asarray(annotate(second, image)), np.asarray(self._target_map[1])
        return {f"second_{key}": v for key, v in condition_agreement(got, wanted, second.facts.levels).items()}

    def _find_palette(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """Returns the classes' colours (C,3); None if the conditions have no classes."""
        if self._family == "regions":
            return np.asarray([(0, 0, 0), (255, 255, 255)], np.uint8)
        if self._family != "labels" or self.judge is None:
            return None
        return PALETTE if self.judge.name == "segmentation" else own_palette([pair.condition for pair in pairs])

    def _count(self, got: np.ndarray, wanted: np.ndarray, palette: np.ndarray) -> np.ndarray:
        if self._family == "regions":
            return class_counts(is_drawn(got).astype(int), is_drawn(wanted).astype(int), len(palette))
        return class_counts(nearest_class(got, palette), nearest_class(wanted, palette), len(palette))

    def _mean_iou(self, rows: Sequence[Sequence[Image.Image]], pairs: Sequence[Pair]) -> Estimate:
        counts = []
        for row, pair in zip(rows, pairs, strict=True):
            for image in row:
                if _digest(image, pair) not in self._counts:
                    self.picture(image, pair)
            counts.append(sum(self._counts[_digest(image, pair)] for image in row))
        return mean_iou(np.stack(counts), self._seed)

    def _try(self, metric: str, measure_it: Callable[[], float | None]) -> dict[str, float]:
        """Returns the metric with its value; {} and a line in `missing` if it cannot be measured."""
        try:
            value = measure_it()
        except ImportError:
            self._missing[f"{metric}: not measured: needs torchmetrics ({EXTRA})."] = None
            return {}
        if value is None:
            self._missing[f"{metric}: not measured: the pictures are too small for it."] = None
            return {}
        return {metric: value}


def _digest(image: Image.Image, pair: Pair) -> bytes:
    return blake2b(image.convert("RGB").tobytes() + pair.key.encode(), digest_size=16).digest()
