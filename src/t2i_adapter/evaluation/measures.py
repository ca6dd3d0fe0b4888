"""Measures pictures: all metrics of one picture, and the metrics of all pictures together.

`Measures.picture` measures one picture of a pair: its objects and colours against the pair's truth, and its condition
against the pair's own, by the kind of the condition. `Measures.pooled` returns what needs all pictures. What cannot be
measured here is a line in `Measures.missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate
from t2i_adapter.annotators.segmentation import PALETTE
from t2i_adapter.annotators.skeleton import Skeleton
from t2i_adapter.errors import first_line
from t2i_adapter.evaluation.clip import clip_score
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
from t2i_adapter.evaluation.people import people_agreement
from t2i_adapter.evaluation.plan import TARGET
from t2i_adapter.evaluation.pooled import (
    LEAST_FOR_FID,
    LEAST_FOR_KID,
    frechet_distance,
    kernel_distance,
    mean_distance,
    mean_iou,
)

Features = Callable[[Sequence[Image.Image]], Any]
"""Returns the features of N pictures, torch (N,D)."""
EXTRA = "pip install 'sdxl-t2i-adapter[metrics]'"


class Measures:
    """Measures the pictures of an evaluation.

    Attributes:
        missing: one line for each metric that is not measured, with the reason; complete once all was measured.
    """

    def __init__(
        self,
        judges: Sequence[Annotator],
        pairs: Sequence[Pair],
        *,
        clip: str | None = None,
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            judges: the first makes the condition of every picture, which is compared with the pair's condition. The
                second makes a map of every picture and of the pair's target, and the two are compared. () has none.
            pairs: all pairs of the evaluation.
            clip: folder or hub id of a CLIP model for the CLIP score; None skips it.
            features: network of KID and FID, `pooled.inception_features`; None skips them.
            seed: decides the resamples of intervals.
        """
        self.judge = judges[0] if judges else None
        self.second = judges[1] if len(judges) > 1 else None
        self._clip, self._features, self._seed = clip, features, seed
        self._missing: dict[str, None] = {}
        self._family: Family = family(self.judge) if self.judge else "other"
        if self._family in ("labels", "palette", "normal") and pairs and pairs[0].condition.mode == "L":
            self._family = "other"  # an adapter of one channel takes such maps as grey, which has no such colours
        self._palette = self._find_palette(pairs)
        self._counts: dict[bytes, np.ndarray] = {}
        self._target_map: tuple[Pair, Image.Image] | None = None
        self._target_people: dict[str, list[Skeleton]] = {}

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
        if self._clip:
            values["clip_score"] = clip_score(self._clip, image, pair.prompt)
        return values

    def pooled(
        self, pictures: Mapping[str, Sequence[Sequence[Image.Image]]], pairs: Sequence[Pair]
    ) -> dict[str, dict[str, Estimate]]:
        """Returns metric -> column -> mean and interval, for the metrics of all pictures.

        Args:
            pictures: column -> the pair's k pictures, for each pair. A column of targets has one picture a pair.
        """
        found: dict[str, dict[str, Estimate]] = {}
        if self._palette is not None:
            found["condition_miou"] = {column: self._mean_iou(rows, pairs) for column, rows in pictures.items()}
        several = {column: rows for column, rows in pictures.items() if min(map(len, rows)) > 1}
        if several:
            found["diversity"] = {
                column: bootstrap([mean_distance(row) for row in rows], self._seed) for column, rows in several.items()
            }
        if self._features:
            try:
                found |= self._distances(self._features, pictures, pairs)
            except ImportError as fault:
                line = f"kid, fid: not measured: need torchmetrics and torch-fidelity ({first_line(fault)})."
                self._missing[line] = None
        return found

    def _by_condition(self, judge: Annotator, image: Image.Image, pair: Pair) -> dict[str, float]:
        own = annotate(judge, image).convert(pair.condition.mode)
        got, wanted = np.asarray(own), np.asarray(pair.condition)
        values = compare(self._family, got, wanted, judge.facts.levels)
        if self._family == "edges":
            values |= self._try("ms_ssim", lambda: ms_ssim(got, wanted))
        if self._family == "pose":
            values |= self._by_joints(judge.plugin, image, pair)
        if self._palette is not None:
            counts = self._count(got, wanted, self._palette)
            self._counts[_digest(image, pair)] = counts
            if self._family == "labels":
                values["label_accuracy"] = float(counts[0].sum() / counts[2].sum())
        return values

    def _by_joints(self, plugin: Any, image: Image.Image, pair: Pair) -> dict[str, float]:
        """plugin: `skeletons(image)` returns the people, as the kinds of this package do."""
        if not hasattr(plugin, "skeletons"):
            self._missing["pose_oks, pose_pck: not measured: the annotator has no method skeletons(image)."] = None
            return {}
        if pair.key not in self._target_people:
            self._target_people[pair.key] = plugin.skeletons(pair.target)
        return people_agreement(plugin.skeletons(image), self._target_people[pair.key])

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

    def _distances(
        self, features: Features, pictures: Mapping[str, Sequence[Sequence[Image.Image]]], pairs: Sequence[Pair]
    ) -> dict[str, dict[str, Estimate]]:
        """Returns KID and FID of every column but the targets' own, against the targets."""
        generated = {column: rows for column, rows in pictures.items() if column != TARGET}
        least = {"kid": LEAST_FOR_KID, "fid": LEAST_FOR_FID}
        for metric, number in least.items():
            if len(pairs) < number:
                self._missing[f"{metric}: not measured: needs {number} pairs or more, got {len(pairs)}."] = None
        if not generated or len(pairs) < LEAST_FOR_KID:
            return {}
        wanted = features([pair.target for pair in pairs])
        groups = {column: [features(group) for group in zip(*rows, strict=True)] for column, rows in generated.items()}
        found = {"kid": {column: kernel_distance(group, wanted) for column, group in groups.items()}}
        if len(pairs) >= LEAST_FOR_FID:
            found["fid"] = {column: frechet_distance(group, wanted) for column, group in groups.items()}
        return found

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
