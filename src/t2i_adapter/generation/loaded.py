"""Adapters with their base in memory, to generate pictures from a program: the Python API's `load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_adapter.data.pair import IMAGE_FILTER
from t2i_adapter.errors import UserError, flag
from t2i_adapter.generation.condition import find_annotator, fit, fit_condition, make_condition, read_photo
from t2i_adapter.generation.condition import read_condition as read_file
from t2i_adapter.generation.generate import generate
from t2i_adapter.generation.options import RequestedSampling
from t2i_adapter.generation.pipeline import Models, open_several
from t2i_adapter.generation.redraw import DEFAULT_STRENGTH, InitImage, Redraw
from t2i_adapter.generation.schedulers import make_scheduler
from t2i_adapter.generation.several import EACH, SeveralAdapters
from t2i_adapter.models.adapter import check_resolution
from t2i_adapter.models.distilled import base_advice
from t2i_adapter.models.family import AdapterPipeline
from t2i_adapter.models.lora_file import Lora
from t2i_adapter.models.quantize import Format
from t2i_adapter.types import Photo

Picture = Image.Image | str | Path
"""A picture, or its file."""
Condition = Picture | Photo
SAMPLING = {one.name for one in fields(RequestedSampling)}
"""Options that `LoadedAdapters.generate` takes beside its own."""


@dataclass(frozen=True)
class LoadedAdapters:
    """One adapter, or several that act together, with their base on its device.

    Attributes:
        options: what they were loaded with.
        models: the adapters, their records and their common base.
        pipeline: diffusers' own; a program may use it directly.
    """

    options: SeveralAdapters
    models: Sequence[Models]
    pipeline: AdapterPipeline

    @classmethod
    def load(
        cls,
        options: SeveralAdapters,
        *,
        loras: Sequence[str] = (),
        quantized: Format | str = "none",
        scheduler: str | None = None,
    ) -> LoadedAdapters:
        """Loads adapters and base. Arguments as of the flags --lora, --quantize and --scheduler. Raises UserError."""
        models = open_several(options)
        named: Any = quantized
        made = make_scheduler(scheduler, dict(models[0].base.scheduler().config), 1) if scheduler else None
        pipeline = models[0].pipeline(
            models[1:], loras=[Lora.parse(text) for text in loras], quantized=named, scheduler=made
        )
        return cls(options, models, pipeline)

    def generate(
        self,
        prompts: Sequence[str],
        conditions: Sequence[Sequence[Condition]] | None,
        seeds: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        negative: str | None = None,
        inits: Sequence[Picture] = (),
        masks: Sequence[Picture] = (),
        strength: float | None = None,
        progress: bool = False,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Generates N pictures, one for each prompt.

        Args:
            prompts: N prompts.
            conditions: for each prompt one condition an adapter; None generates with the base alone.
            seeds: N seeds.
            size: (height, width) in pixels; None takes the first adapter's training resolution, else the first
                condition's size.
            negative: what the pictures should not show.
            inits: N pictures to begin from, or none.
            masks: for each of them what is generated anew, white, or none.
            strength: share of the steps that are made from `inits`; None is 0.6, or 1 with masks.
            progress: show a bar.
            sampling: `steps`, `guidance`, `scale` and the other options of `generate`; a sequence gives each adapter
                its own.

        Raises UserError.
        """
        if unknown := next((name for name in sampling if name not in SAMPLING), None):
            raise UserError(f"{unknown}: no such option; allowed are {', '.join(sorted(SAMPLING))}.")
        settled = self._settle(sampling)
        height, width = size or self._size(conditions)
        for model in self.models:
            check_resolution(height, height, model.adapter_config, "height")
            check_resolution(width, width, model.adapter_config, "width")
        return generate(
            self.pipeline,
            prompts,
            None if conditions is None else [self._conditions(row, (height, width)) for row in conditions],
            seeds,
            size=(height, width),
            sampling=settled[0],
            strengths=[one.strength for one in settled],
            redraw=_redraw(inits, masks, strength, (height, width)) if inits else None,
            negative=negative,
            max_tokens=self.models[0].max_tokens,
            progress="generating" if progress else None,
        )

    def _settle(self, sampling: dict[str, Any]) -> list[Any]:
        """Gives every option of sampling a value, for each adapter."""
        values = {name: _each(value) if name in EACH else value for name, value in sampling.items()}
        base = self.models[0].base
        advice = base_advice(base.unet_config, base.scheduler_config)
        return replace(self.options, **values).settle_all([model.recommended for model in self.models], advice)

    def _size(self, conditions: Sequence[Sequence[Condition]] | None) -> tuple[int, int]:
        if side := self.models[0].resolution:
            return side, side
        if not conditions:
            raise UserError("is needed: neither the adapter's record nor a condition says it.", option="size")
        first = conditions[0][0]
        picture = _read(first.picture, is_photo=True) if isinstance(first, Photo) else _read(first)
        return picture.height, picture.width

    def _conditions(self, row: Sequence[Condition], size: tuple[int, int]) -> list[Image.Image]:
        """Returns the conditions of one picture, one an adapter."""
        if len(row) != len(self.models):
            raise UserError(
                f"{len(row)} conditions for {len(self.models)} adapters; give one for each, in their order."
            )
        found = []
        for condition, model, name in zip(row, self.models, self.options.adapter, strict=True):
            if isinstance(condition, Photo):
                annotator = find_annotator(None, model.metadata, name)
                photo = _read(condition.picture, is_photo=True)
                found.append(make_condition(photo, size, model.channels, annotator))
            else:
                found.append(fit_condition(_read(condition), size, model.channels))
        return found


def _each(value: Any) -> tuple[Any, ...]:
    """The values of an option that each adapter has its own value of."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _read(picture: Picture, *, is_photo: bool = False) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    return read_photo(str(picture)) if is_photo else read_file(str(picture))


def _redraw(
    inits: Sequence[Picture], masks: Sequence[Picture], strength: float | None, size: tuple[int, int]
) -> Redraw:
    if masks and len(masks) != len(inits):
        raise UserError(f"{len(masks)} masks for {len(inits)} pictures; give one for each.", option="mask")
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(
            f"{strength}: allowed is a share from 0 to 1, and needs {flag('init_image')}", option="strength"
        )
    found = [
        InitImage(
            fit(_read(picture, is_photo=True), size, IMAGE_FILTER),
            fit_condition(_read(masks[number]), size, 1) if masks else None,
        )
        for number, picture in enumerate(inits)
    ]
    return Redraw(found, (1.0 if masks else DEFAULT_STRENGTH) if strength is None else strength)
