"""Validation while training: generates pictures from fixed prompts, conditions and noise, and scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator
from t2i_adapter.config.tree import Config
from t2i_adapter.data.pair import CONDITION_FILTER
from t2i_adapter.devices import release
from t2i_adapter.errors import UserError, flag
from t2i_adapter.export.card import CardSample, strip
from t2i_adapter.generation.condition import fit, read_condition
from t2i_adapter.generation.generate import TextStates, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.base import Base
from t2i_adapter.training import tracking
from t2i_adapter.training.step import FrozenModel

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
    """The annotator that makes the condition of a generated picture, to compare it with the row's own; None for no
    score.

    made_by: the annotator of the dataset's conditions, if there is one. Raises UserError, also if `keep_best` is set
    and there is no score.
    """
    options = config.validation
    spec = options.judge or made_by
    if options.prompts and spec not in (None, "none"):
        return open_annotator(spec)
    if config.checkpoint.keep_best:
        missing = f"{flag('validation.judge')} (a condition kind)" if options.prompts else flag("validation.prompts")
        raise UserError(f"needs a score of each checkpoint: set {missing}.", option="checkpoint.keep_best")
    return None


class Validator:
    """Generates pictures of the rows with the present adapter, saves and logs them, and returns their score."""

    def __init__(
        self,
        config: Config,
        base: Base,
        frozen: FrozenModel,
        rows: Sequence[Row],
        text: TextStates,
        accelerator: Accelerator,
        seed: int,
        judge: Annotator | None,
    ) -> None:
        """text: states of the rows' prompts, in their order, each repeated for every picture of a row. judge: as
        `find_judge` returns it. `latest` holds the last pictures.
        """
        self.config, self.base, self.frozen, self.rows, self.text = config, base, frozen, rows, text
        self.accelerator, self.seed, self.judge = accelerator, seed, judge
        self.sampling = SamplingOptions(steps=config.validation.steps, guidance=config.validation.guidance)
        self.folder = Path(config.output_dir) / FOLDER
        self.latest: list[CardSample] = []
        self._pipeline: Any = None

    def __call__(self, adapter: Any, step: int) -> float | None:
        """Score of the pictures, 0 to 1, higher is better; None without a judge."""
        count, side = self.config.validation.num_images, self.config.data.resolution
        pipeline = self._pipeline_with(adapter)
        pictures = generate(
            pipeline,
            self.text,
            [row.condition for row in self.rows for _ in range(count)],
            [self.seed + index for _ in self.rows for index in range(count)],
            size=(side, side),
            sampling=self.sampling,
        )
        # The VAE leaves the device until the next validation; the UNet stays, since training uses it.
        pipeline.vae.to("cpu")
        release(self.accelerator.device)
        by_row = [pictures[i * count : (i + 1) * count] for i in range(len(self.rows))]
        self.latest = [CardSample(row.prompt, row.condition, some) for row, some in zip(self.rows, by_row, strict=True)]
        self._save(step)
        named = {f"validation/{i}": (s.prompt, [s.condition, *s.pictures]) for i, s in enumerate(self.latest)}
        tracking.log_pictures(self.accelerator, named, step)
        return float(np.mean([self._agreement(s, p) for s in self.latest for p in s.pictures])) if self.judge else None

    def _agreement(self, sample: CardSample, picture: Image.Image) -> float:
        """Agreement of a picture's own condition with the row's: F1 for binary maps, 1 - RMSE for others."""
        assert self.judge is not None
        from t2i_adapter.evaluation.metrics import condition_agreement  # imports cv2, 15 MB that most runs do not need

        own = annotate(self.judge, picture.convert("RGB")).convert(sample.condition.mode)
        found = condition_agreement(np.asarray(own), np.asarray(sample.condition), self.judge.facts.levels)
        return found["condition_f1"] if "condition_f1" in found else 1 - found["condition_error"]

    def _pipeline_with(self, adapter: Any) -> Any:
        """The pipeline, built once, with an adapter of its own in the base's dtype and with the present weights."""
        device, dtype = self.accelerator.device, self.frozen.dtype
        if self._pipeline is None:
            # Not a deepcopy: accelerate has wrapped the trained adapter's forward, which returns float32.
            own = type(adapter).from_config(adapter.config).eval()
            self._pipeline = self.base.pipeline(own, device, dtype, unet=self.frozen.unet, with_text=False)
        self._pipeline.vae.to(device)
        self._pipeline.adapter.load_state_dict(adapter.state_dict())
        return self._pipeline

    def _save(self, step: int) -> None:
        """Writes one strip a row: condition, then the pictures. A full disk costs the strip, not the run."""
        folder = self.folder / f"step-{step:06d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for index, sample in enumerate(self.latest):
                strip(sample).save(folder / f"{index}.png")
        except OSError as fault:
            self.accelerator.print(f"The validation pictures of step {step} could not be saved ({fault}).")


def text_states(
    prompts: Sequence[str], records: dict[str, tuple[torch.Tensor, torch.Tensor]], *, zeros: bool, repeat: int
) -> TextStates:
    """States of each prompt, repeated `repeat` times. records: caption -> (states (L,D), pooled (P,)).

    zeros: the unconditional states of guidance are zeros, as in SDXL; otherwise those of the empty caption.
    """
    chosen = [records[prompt] for prompt in prompts for _ in range(repeat)]
    states, pooled = torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])
    empty_states, empty_pooled = records[""]
    negative = torch.zeros_like(states) if zeros else empty_states.expand_as(states)
    negative_pooled = torch.zeros_like(pooled) if zeros else empty_pooled.expand_as(pooled)
    return TextStates(states, pooled, negative, negative_pooled)
