"""All that decides a picture's record besides the picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from t2i_adapter.cache.records import IMAGE_VERSION, ImageRecord, fingerprint
from t2i_adapter.conditions.cut import CONDITION_FILTER, IMAGE_FILTER, LABEL_FILTER, Cut, cut, redraw
from t2i_adapter.conditions.mirror import Kind
from t2i_adapter.conditions.table import Annotator, open_annotator
from t2i_adapter.config import DataOptions
from t2i_adapter.sources.geometry import Framing
from t2i_adapter.types import Sample

DRAWN = "drawn each time"
"""What a record tells of its condition where it keeps the crop instead: kinds and options share it."""


@dataclass(frozen=True)
class Stage:
    """How pairs are cut and, where an annotator is named, given their condition."""

    framing: Framing
    in_channels: int
    kind: Kind = "map"
    annotator: Annotator | None = None
    background: str = "white"

    @classmethod
    def of(cls, options: DataOptions, in_channels: int, annotate: str | None) -> Stage:
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

    def cut(self, sample: Sample, view: int) -> Cut:
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
