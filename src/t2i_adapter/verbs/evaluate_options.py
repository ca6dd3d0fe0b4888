"""Options of measuring an adapter. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i_adapter.generation.options import ModelOptions, SamplingOptions, check


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions, SamplingOptions):
    """Measure how well pictures follow their conditions, against held-out pairs and two controls."""

    data: str
    """Pairs that the adapter was not trained on: image folder or hub id, as training reads them."""
    split: str = "test"
    """Split of the data."""
    num: int = 64
    """Pairs; which ones is drawn by the seed. Each is drawn three times."""
    resolution: int | None = None
    """Side of the pictures in pixels. None: as the adapter was trained."""
    steps: int = 20
    """Denoising steps (Euler ancestral)."""
    seed: int = 0
    """Decides the pairs, the noise of each, and which other condition each gets."""
    image_column: str = "image"
    """Column of the target picture."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the condition picture."""
    caption_column: str = "text"
    """Column of the caption; of a list of captions the first is the prompt."""
    condition: str | None = None
    """Make the pairs' conditions from their images, with a kind of `t2i-adapter conditions`, options after commas. None
    does as the adapter's training did: by the kind that its t2i_adapter.json names, or from the column; `none` takes
    the column."""
    judge: str | None = None
    """Make the condition of every picture that is drawn, too, with this kind, and compare it with the one that the
    picture was drawn from. None takes what made the pairs' conditions, if they were made; `none` leaves it out."""
    out: str = "evaluation"
    """Folder for evaluation.json, report.html and sheet.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("num", self.num >= 2, self.num, "2 or more: each pair needs another one's condition as control")
        check("seed", 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")
