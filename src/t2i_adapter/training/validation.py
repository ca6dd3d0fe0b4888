"""Pictures while training: the same prompts, conditions and noise each time, so that only the adapter changes."""

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
from t2i_adapter.data import geometry, picture
from t2i_adapter.devices import release
from t2i_adapter.errors import UserError
from t2i_adapter.export.card import CardSample, strip
from t2i_adapter.generation.generate import TextStates, generate
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.base import Base
from t2i_adapter.training import tracking
from t2i_adapter.training.step import FrozenModel

FOLDER = "validation"


@dataclass(frozen=True)
class Row:
    """One prompt with its condition picture, cut as in training."""

    prompt: str
    condition: Image.Image


def read_rows(config: Config) -> list[Row]:
    """The validation prompts and pictures. Raises UserError for a file that cannot be read."""
    rows = []
    for prompt, file in config.validation.pairs():
        path = Path(file)
        if not path.is_file():
            raise UserError(f"--validation_image {file}: no such file.")
        decoded = picture.decode(picture.StoredPicture(f"--validation_image {file}", path.read_bytes()))
        resolution = config.data.resolution
        cut = geometry.cover((decoded.height, decoded.width), (resolution, resolution))
        rows.append(Row(prompt, geometry.apply(decoded, cut, "bilinear")))
    return rows


def find_judge(config: Config, made_by: str | None) -> Annotator | None:
    """What makes the drawn pictures' own conditions, or None where they are not measured.

    made_by: the annotator that makes the data's conditions, if one does. Raises UserError, also where the best
    checkpoint is to be kept and nothing tells which it is.
    """
    options = config.validation
    spec = options.judge or made_by
    if options.prompts and spec not in (None, "none"):
        return open_annotator(spec)
    if config.checkpoint.keep_best:
        lacking = "--validation.judge (a kind of condition)" if options.prompts else "--validation_prompt"
        raise UserError(f"--checkpoint.keep_best: nothing tells which checkpoint is the best: give {lacking}.")
    return None


class Validator:
    """Draws the rows with the adapter as it stands, keeps the pictures in the run's folder, shows them to trackers, and
    tells how well they follow their conditions."""

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
        """`text` holds the rows' prompts, in their order, each repeated for every picture of a row.

        `latest` holds what was drawn last.
        """
        self.config, self.base, self.frozen, self.rows, self.text = config, base, frozen, rows, text
        self.accelerator, self.seed, self.judge = accelerator, seed, judge
        self.sampling = SamplingOptions(steps=config.validation.steps, guidance=config.validation.guidance)
        self.folder = Path(config.output_dir) / FOLDER
        self.latest: list[CardSample] = []
        self._pipeline: Any = None

    def __call__(self, adapter: Any, step: int) -> float | None:
        """How well the pictures follow, 0 to 1, or None without a judge."""
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
        # The VAE waits beside the device until the next time; the UNet is the one that trains.
        pipeline.vae.to("cpu")
        release(self.accelerator.device)
        drawn = [pictures[i * count : (i + 1) * count] for i in range(len(self.rows))]
        self.latest = [CardSample(row.prompt, row.condition, some) for row, some in zip(self.rows, drawn, strict=True)]
        self._keep(step)
        named = {f"validation/{i}": (s.prompt, [s.condition, *s.pictures]) for i, s in enumerate(self.latest)}
        tracking.log_pictures(self.accelerator, named, step)
        return float(np.mean([self._control(s, p) for s in self.latest for p in s.pictures])) if self.judge else None

    def _control(self, sample: CardSample, drawn: Image.Image) -> float:
        """Agreement of a picture's own condition with the one it was drawn from: F1 of two-valued maps, of others one
        less the root of their mean squared difference."""
        assert self.judge is not None
        from t2i_adapter.evaluation.metrics import condition_agreement  # with cv2, 15 MB that other runs do without

        own = annotate(self.judge, drawn.convert("RGB")).convert(sample.condition.mode)
        found = condition_agreement(np.asarray(own), np.asarray(sample.condition), self.judge.facts.levels)
        return found["condition_f1"] if "condition_f1" in found else 1 - found["condition_error"]

    def _pipeline_with(self, adapter: Any) -> Any:
        """The pipeline, made once, with an adapter of its own in the present weights in the base's arithmetic."""
        device, dtype = self.accelerator.device, self.frozen.dtype
        if self._pipeline is None:
            # Not a copy of the one that trains, whose forward accelerate has wrapped to give float32.
            own = type(adapter).from_config(adapter.config).eval()
            self._pipeline = self.base.pipeline(own, device, dtype, unet=self.frozen.unet, with_text=False)
        self._pipeline.vae.to(device)
        self._pipeline.adapter.load_state_dict(adapter.state_dict())
        return self._pipeline

    def _keep(self, step: int) -> None:
        """One strip a row: condition, then the pictures. A full disk costs the strip, not the run."""
        folder = self.folder / f"step-{step:06d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for index, sample in enumerate(self.latest):
                strip(sample).save(folder / f"{index}.png")
        except OSError as fault:
            self.accelerator.print(f"The validation pictures of step {step} could not be kept ({fault}).")


def text_states(
    prompts: Sequence[str], records: dict[str, tuple[torch.Tensor, torch.Tensor]], *, zeros: bool, repeat: int
) -> TextStates:
    """States of each prompt `repeat` times over, from `records` caption -> (states (L,D), pooled (P,)).

    zeros: whether guidance steers away from zeros, as SDXL does, or from the empty caption.
    """
    chosen = [records[prompt] for prompt in prompts for _ in range(repeat)]
    states, pooled = torch.stack([c[0] for c in chosen]), torch.stack([c[1] for c in chosen])
    empty_states, empty_pooled = records[""]
    negative = torch.zeros_like(states) if zeros else empty_states.expand_as(states)
    negative_pooled = torch.zeros_like(pooled) if zeros else empty_pooled.expand_as(pooled)
    return TextStates(states, pooled, negative, negative_pooled)
