"""Turns a decoded pair into a training crop: both pictures cropped by one map, the condition made or converted.

The bytes of the pictures and the options of a `PairTransform` determine a record of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind, exchange_sides
from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.geometry import Framing, Resample, apply
from t2i_adapter.data.joined import Part
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import fingerprint
from t2i_adapter.types import Geometry, ImageRecord, Sample

IMAGE_FILTER: Resample = "bicubic"
LABEL_FILTER: Resample = "nearest"
CONDITION_FILTER: Resample = "bilinear"
IMAGE_VERSION = 3
"""Raise it if the numbers of an image record or their layout change: then older records are not used any more."""
PER_DRAW = "drawn each time"
"""Stands for the condition in `about` and `fingerprint` if the record holds the crop instead: all random annotators
share these records."""


@dataclass(frozen=True)
class CroppedPair:
    """One view of a sample, ready for the encoder: image (3,H,W) u8 and condition (C,H,W) u8.

    The condition is read-only; the three channels of a grey one share memory. If the annotator is random, the image
    stands in its place, and `PairTransform.random_condition` makes the condition. Several conditions are stacked along
    C.
    """

    key: str
    digest: str
    view: int
    image: np.ndarray
    condition: np.ndarray
    geometry: Geometry


@dataclass(frozen=True)
class PairTransform:
    """Crops pairs and makes their conditions.

    Attributes:
        in_channels: of the condition, 1 (grey) or 3.
        kind: what the condition's colours mean (`DataOptions.condition_kind`).
        annotator: makes the condition from the cropped image; None takes the sample's own condition picture.
        background: colour behind transparent pixels. The source has used it already; records depend on it.
        others: one transform for each of the sample's further conditions (`Sample.others`).
    """

    framing: Framing
    in_channels: int
    kind: Kind = "map"
    annotator: Annotator | None = None
    background: str = "white"
    others: tuple[PairTransform, ...] = ()

    def __post_init__(self) -> None:
        assert self.in_channels in (1, 3)

    @classmethod
    def of(
        cls, options: DataOptions, in_channels: int, annotate: str | None, parts: Sequence[Part] = ()
    ) -> PairTransform:
        """`annotate` names the annotator that makes the conditions; None if the source has them. `parts`, if there are
        several conditions, say this of each. Raises UserError if there is no such annotator."""
        if parts:
            first, *others = (cls.of(part.options(options), part.channels, part.annotate) for part in parts)
            return replace(first, others=tuple(others))
        assert options.resolution % 8 == 0
        annotator = open_annotator(annotate) if annotate else None
        return cls(Framing.of(options), in_channels, options.condition_kind, annotator, options.background)

    def crop(self, sample: Sample, view: int) -> CroppedPair:
        """View `view` of a sample, in range(framing.count). Raises UserError if its condition picture is missing."""
        geometry = self.framing.plan((sample.image.height, sample.image.width), sample.digest, view)
        image = apply(sample.image, geometry, IMAGE_FILTER)
        pixels = _channels_first(image)
        pictures = (sample.condition, *sample.others)
        conditions = [
            one._make_condition(picture, sample.key, image, pixels, geometry)
            for one, picture in zip((self, *self.others), pictures, strict=True)
        ]
        return CroppedPair(sample.key, sample.digest, view, pixels, _stacked(conditions), geometry)

    def random_condition(self, record: ImageRecord, draw: str) -> ImageRecord:
        """The record of one draw. A random annotator makes the condition from the crop that the record holds in its
        place, as a function of `draw`; otherwise the record is returned unchanged."""
        parts = (self, *self.others)
        if all(part._random is None for part in parts):
            return record
        ends = np.cumsum([part._stored_channels for part in parts])
        stored = np.split(record.condition, ends[:-1])
        conditions = [part._of_draw(planes, draw) for part, planes in zip(parts, stored, strict=True)]
        return replace(record, condition=_stacked(conditions))

    def about(self) -> dict[str, Any]:
        """The options that a record depends on, for people and for `fingerprint`.

        Views have records of their own, so their number does not matter. View 1 of a centred crop is the mirrored one,
        so `flip` does not matter there.
        """
        framing = replace(self.framing, views=1, flip=self.framing.flip and self.framing.crop == "random")
        options = {**asdict(framing), "background": self.background, **self._about_condition()}
        if self.others:
            about = (other._about_condition() for other in self.others)
            options["others"] = " + ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in about)
        return options

    def fingerprint(self, vae_fingerprint: str) -> str:
        """Names the folder of records that this transform and this VAE make."""
        filters = IMAGE_FILTER, LABEL_FILTER if self.kind == "labels" else CONDITION_FILTER
        condition = self.annotator.fingerprint if self.annotator else self.kind
        others = {"others": [other.fingerprint("") for other in self.others]} if self.others else {}
        return fingerprint(
            **{**self.about(), "condition": condition if self._random is None else PER_DRAW, **others},
            vae=vae_fingerprint,
            filters=",".join(filters),
            version=IMAGE_VERSION,
        )

    def _about_condition(self) -> dict[str, Any]:
        if self._random is not None:
            return {"condition": PER_DRAW}
        condition = self.annotator.spec if self.annotator else f"picture, {self.kind}"
        return {"condition": condition, "in_channels": self.in_channels}

    @property
    def _stored_channels(self) -> int:
        """Channels that a record holds for the condition: those of the crop if each draw makes the condition."""
        return self.in_channels if self._random is None else 3

    def _of_draw(self, planes: np.ndarray, draw: str) -> np.ndarray:
        """The condition (C,H,W) of one draw, from the planes that the record holds for it."""
        if self._random is None:
            return planes
        image = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
        return self._to_condition(annotate(self._random, image, draw))

    @property
    def _random(self) -> Annotator | None:
        """The annotator if it is random: then each draw gets a condition of its own."""
        return self.annotator if self.annotator and self.annotator.chance else None

    def _make_condition(
        self, picture: Image.Image | None, key: str, image: Image.Image, pixels: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """The condition (C,H,W) of a crop, from the sample's condition `picture` or from the crop itself (`image`, and
        as `pixels`), which also stands for a random condition."""
        if self.annotator is None:
            return self._to_condition(self._crop_condition(picture, key, geometry))
        return pixels if self.annotator.chance else self._to_condition(annotate(self.annotator, image))

    def _crop_condition(self, condition: Image.Image | None, key: str, geometry: Geometry) -> Image.Image:
        if condition is None:
            raise UserError(
                f"{key}: has no condition picture, and training needs one. Add it, or name an annotator that "
                f"makes it from the image with {flag('data.condition')}.",
                kind="missing",
            )
        if geometry.flipped:
            condition = exchange_sides(condition, self.kind)  # before resampling mixes the colours
        if self.in_channels == 1:
            condition = condition.convert("L")
        return apply(condition, geometry, LABEL_FILTER if self.kind == "labels" else CONDITION_FILTER)

    def _to_condition(self, picture: Image.Image) -> np.ndarray:
        """(C,H,W) u8, read-only; C is `in_channels`."""
        values = _channels_first(picture.convert("L") if self.in_channels == 1 else picture)
        return np.broadcast_to(values, (self.in_channels, picture.height, picture.width))


def _stacked(conditions: Sequence[np.ndarray]) -> np.ndarray:
    """Conditions (C_i,H,W) along the channels, read-only. A single one is returned unchanged."""
    if len(conditions) == 1:
        return conditions[0]
    whole = np.concatenate(conditions)
    whole.flags.writeable = False
    return whole


def _channels_first(picture: Image.Image) -> np.ndarray:
    """(H,W) or (H,W,C) u8 -> (C,H,W) u8, contiguous.

    A transposed view would be channels_last for torch. Its GroupNorm on the CPU then computes the variance as
    E[x^2] - E[x]^2, which is off by 1e-3 on flat pictures.
    """
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))
