"""Preprocessing of one pair: both pictures cropped by one map, and the condition made or converted.

With the bytes of the pictures, the options of a `PairTransform` determine a cached record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind, exchange_sides
from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.geometry import Framing, Resample, apply
from t2i_adapter.errors import UserError
from t2i_adapter.files import fingerprint
from t2i_adapter.types import Geometry, ImageRecord, Sample

IMAGE_FILTER: Resample = "bicubic"
LABEL_FILTER: Resample = "nearest"
CONDITION_FILTER: Resample = "bilinear"


@dataclass(frozen=True)
class CroppedPair:
    """A pair ready for the encoder: image (3,H,W) u8 and condition (C,H,W) u8 of one view of a sample.

    The condition is read-only; a grey one in three channels is one in memory. Where it is left to chance the image
    stands in its place, for `redraw`.
    """

    key: str
    digest: str
    view: int
    image: np.ndarray
    condition: np.ndarray
    geometry: Geometry


def cut(
    sample: Sample,
    framing: Framing,
    view: int,
    in_channels: int,
    kind: Kind = "map",
    annotator: Annotator | None = None,
) -> CroppedPair:
    """View `view` of a sample, cut as `framing` says.

    Args:
        view: in range(framing.count).
        in_channels: of the condition, 1 (grey) or 3.
        kind: what the condition's colours mean (`DataOptions.condition_kind`).
        annotator: makes the condition from the cut image; None takes the sample's own condition picture.

    Raises UserError naming the sample where it has no condition picture and needs one.
    """
    assert in_channels in (1, 3)
    size = sample.image.height, sample.image.width
    geometry = framing.plan(size, sample.digest, view)
    image = apply(sample.image, geometry, IMAGE_FILTER)
    pixels = channels_first(image)
    if annotator is None:
        condition = _as_condition(_cut_condition(sample, geometry, in_channels, kind), in_channels)
    elif annotator.chance:
        condition = pixels
    else:
        condition = _as_condition(annotate(annotator, image), in_channels)
    return CroppedPair(sample.key, sample.digest, view, pixels, condition, geometry)


def redraw(pixels: np.ndarray, in_channels: int, annotator: Annotator, draw: str) -> np.ndarray:
    """The condition (C,H,W) u8, read-only, of a cut image (3,H,W) u8, by an annotator with chance: what is drawn is a
    function of `draw`."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _as_condition(annotate(annotator, image, draw), in_channels)


def _as_condition(picture: Image.Image, in_channels: int) -> np.ndarray:
    values = channels_first(picture.convert("L") if in_channels == 1 else picture)
    return np.broadcast_to(values, (in_channels, picture.height, picture.width))


def channels_first(picture: Image.Image) -> np.ndarray:
    """(H,W) or (H,W,C) u8 -> (C,H,W) u8, contiguous.

    Not a transposed view: torch would take it for channels_last, whose GroupNorm on the CPU forms the variance as
    E[x^2] - E[x]^2 and is off by 1e-3 where a picture is flat.
    """
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _cut_condition(sample: Sample, geometry: Geometry, in_channels: int, kind: Kind) -> Image.Image:
    condition = sample.condition
    if condition is None:
        raise UserError(
            f"{sample.key}: has no condition picture, and one is needed to train. "
            "Add it, or name an annotator that makes it from the image with --data.condition."
        )
    if geometry.flipped:
        condition = exchange_sides(condition, kind)  # before resampling, while colours are whole
    if in_channels == 1:
        condition = condition.convert("L")
    return apply(condition, geometry, LABEL_FILTER if kind == "labels" else CONDITION_FILTER)


DRAWN = "drawn each time"
"""What a record tells of its condition where it keeps the crop instead: kinds and options share it."""


@dataclass(frozen=True)
class PairTransform:
    """How pairs are cut and, where an annotator is named, given their condition."""

    framing: Framing
    in_channels: int
    kind: Kind = "map"
    annotator: Annotator | None = None
    background: str = "white"

    @classmethod
    def of(cls, options: DataOptions, in_channels: int, annotate: str | None) -> PairTransform:
        """`annotate` names the annotator that makes the conditions, None where the source has them. Raises UserError
        where there is no such annotator."""
        assert options.resolution % 8 == 0 and in_channels in (1, 3)
        annotator = open_annotator(annotate) if annotate else None
        return cls(Framing.of(options), in_channels, options.condition_kind, annotator, options.background)

    def about(self) -> dict[str, Any]:
        """The stage for people, and for `fingerprint`: no more than what a record depends on.

        Views have records of their own, so their number does not matter; and of centred crops view 1 is the mirrored
        one, whether it is asked for or not.
        """
        framing = replace(self.framing, views=1, flip=self.framing.flip and self.framing.crop == "random")
        told = {**asdict(framing), "background": self.background}
        if self._drawn is not None:
            return {**told, "condition": DRAWN}
        condition = self.annotator.spec if self.annotator else f"picture, {self.kind}"
        return {**told, "condition": condition, "in_channels": self.in_channels}

    def fingerprint(self, vae_fingerprint: str) -> str:
        filters = IMAGE_FILTER, LABEL_FILTER if self.kind == "labels" else CONDITION_FILTER
        condition = self.annotator.fingerprint if self.annotator else self.kind
        return fingerprint(
            **{**self.about(), "condition": condition if self._drawn is None else DRAWN},
            vae=vae_fingerprint,
            filters=",".join(filters),
            version=IMAGE_VERSION,
        )

    def cut(self, sample: Sample, view: int) -> CroppedPair:
        """Raises UserError naming the row."""
        return cut(sample, self.framing, view, self.in_channels, self.kind, self.annotator)

    def drawn(self, record: ImageRecord, draw: str) -> ImageRecord:
        """The record of one draw: its condition made of the crop that stands in its place where chance has a part in
        it, else as it is."""
        if self._drawn is None:
            return record
        return replace(record, condition=redraw(record.condition, self.in_channels, self._drawn, draw))

    @property
    def _drawn(self) -> Annotator | None:
        """What makes each draw's condition anew; None where a picture has but one."""
        return self.annotator if self.annotator and self.annotator.chance else None


IMAGE_VERSION = 2
