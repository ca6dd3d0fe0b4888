"""Validation while training: generates pictures from fixed prompts, conditions and noise, and scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator
from t2i_adapter.config.tree import Config
from t2i_adapter.data.pair import CONDITION_FILTER
from t2i_adapter.errors import UserError, flag
from t2i_adapter.export.card_pictures import CardSample, strip
from t2i_adapter.generation.condition import fit, read_condition
from t2i_adapter.generation.generate import TextStates
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.training import tracking
from t2i_adapter.training.pictures import Pictures

FOLDER = "validation"
"""In a run's folder: the pictures of each validation."""


@dataclass(frozen=True)
class Row:
    """A prompt with its condition picture, cropped as in training."""

    prompt: str
    condition: Image.Image


def read_rows(config: Config) -> list[Row]:
    """The validation prompts and pictures. Raises UserError for a file that cannot be read."""
    size = config.data.resolution, config.data.resolution
    return [
        Row(prompt, fit(read_condition(file, flag("validation.images")), size, CONDITION_FILTER))
        for prompt, file in config.validation.pairs()
    ]


def find_judge(config: Config, made_by: str | None) -> Annotator | None:
    """The annotator that makes the condition of a generated picture, to compare it with the pair's own; None for no
    score.

    made_by: the annotator of the dataset's conditions, if there is one. Raises UserError if it cannot be opened.
    """
    spec = config.validation.judge or made_by
    return None if spec in (None, "none") else open_annotator(spec)


def check_best(config: Config, *, has_score: bool) -> None:
    """Raises UserError if `keep_best` is set and nothing says which checkpoint is the best."""
    if config.checkpoint.keep_best and not has_score:
        raise UserError(
            f"needs a measure of each checkpoint: set {flag('validation.budget')} above 0 (and train long enough for a "
            f"look), or {flag('validation.prompts')} with {flag('validation.judge')} (a condition kind).",
            option="checkpoint.keep_best",
        )


class Validator:
    """Generates pictures of the rows with the present adapter, saves and logs them, and returns their score."""

    def __init__(
        self,
        config: Config,
        pictures: Pictures,
        rows: Sequence[Row],
        text: TextStates,
        accelerator: Accelerator,
        seed: int,
        judge: Annotator | None,
    ) -> None:
        """text: states of the rows' prompts, in their order, each repeated for every picture of a row. judge: as
        `find_judge` returns it. `latest` holds the last pictures.
        """
        self.config, self.pictures, self.rows, self.text = config, pictures, rows, text
        self.accelerator, self.seed, self.judge = accelerator, seed, judge
        self.sampling = SamplingOptions(steps=config.validation.steps, guidance=config.validation.guidance)
        self.folder = Path(config.output_dir) / FOLDER
        self.latest: list[CardSample] = []

    def __call__(self, adapter: Any, step: int) -> float | None:
        """Score of the pictures, 0 to 1, higher is better; None without a judge."""
        count, side = self.config.validation.num_images, self.config.data.resolution
        pictures = self.pictures.generate(
            adapter,
            self.text,
            [row.condition for row in self.rows for _ in range(count)],
            [self.seed + index for _ in self.rows for index in range(count)],
            side=side,
            sampling=self.sampling,
        )
        by_row = [pictures[i * count : (i + 1) * count] for i in range(len(self.rows))]
        self.latest = [CardSample(row.prompt, row.condition, some) for row, some in zip(self.rows, by_row, strict=True)]
        self._save(step)
        named = {f"validation/{i}": (s.prompt, [s.condition, *s.pictures]) for i, s in enumerate(self.latest)}
        tracking.log_pictures(self.accelerator, named, step)
        if self.judge is None:
            return None
        return float(np.mean([agreement(self.judge, s.condition, p) for s in self.latest for p in s.pictures]))

    def _save(self, step: int) -> None:
        """Writes one strip a row: condition, then the pictures. A full disk costs the strip, not the run."""
        folder = self.folder / f"step-{step:06d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for index, sample in enumerate(self.latest):
                strip(sample).save(folder / f"{index}.png")
        except OSError as fault:
            self.accelerator.print(f"The validation pictures of step {step} could not be saved ({fault}).")


def agreement(judge: Annotator, condition: Image.Image, picture: Image.Image) -> float:
    """Agreement of a picture's own condition, made by `judge`, with the one it should follow, 0 to 1, higher is better:
    F1 for maps of two levels, 1 - RMSE for others."""
    from t2i_adapter.evaluation.metrics import condition_agreement  # imports cv2, 15 MB that most runs do not need

    own = annotate(judge, picture.convert("RGB")).convert(condition.mode)
    found = condition_agreement(np.asarray(own), np.asarray(condition), judge.facts.levels)
    return found["condition_f1"] if "condition_f1" in found else 1 - found["condition_error"]
