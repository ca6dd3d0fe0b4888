"""Reads held-out pairs for an evaluation: cropped as in training, each with the truth that pictures are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, open_annotator, open_recorded
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.pair import IMAGE_FILTER
from t2i_adapter.data.shapes import COLORS, Scene, visible_masks
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError, flag
from t2i_adapter.evaluation.color import srgb_to_lab
from t2i_adapter.evaluation.foreground import foreground_mask
from t2i_adapter.evaluation.metrics import NamedColor, Truth
from t2i_adapter.files import parse_json
from t2i_adapter.generation.condition import fit, fit_condition, make_condition
from t2i_adapter.models.record import read_metadata
from t2i_adapter.types import Sample

SCENE = "scene"
"""Column with a row's Scene as JSON, which `make-data shapes` writes."""


@dataclass(frozen=True)
class Pair:
    """One held-out pair.

    Attributes:
        key: names the row.
        prompt: the row's first caption.
        condition: L or RGB, as the adapter takes it, cropped to the size of the pictures.
        target: the true picture, RGB, cropped to the same size.
        truth: what a picture of this pair should show.
        truth_from: "scene" if the row holds the exact scene; "picture" if the mask is the target's own foreground.
    """

    key: str
    prompt: str
    condition: Image.Image
    target: Image.Image
    truth: Truth
    truth_from: Literal["scene", "picture"]


def open_pairs(options: DataOptions, count: int, seed: int, *, times: int = 1) -> Source:
    """Opens `times * count` pairs of a split, chosen by the seed. Raises UserError if the split has fewer."""
    source = open_source(options, seed)
    if len(source) < times * count:
        need = f"{count} needs {times * count} pairs, and" if times > 1 else f"{count}:"
        raise UserError(
            f"{need} {options.location} has {len(source)} pairs in its split {options.split}; "
            f"use {flag('num')} {len(source) // times} or less.",
            option="num",
        )
    return source


def condition_spec(named: str | None, adapter: str) -> str | None:
    """Returns the spec of the annotator that makes the pairs' conditions; None if they come from their column.

    named: a spec, "none" for the column, or None for what the record of the adapter's training names.
    """
    if named:
        return None if named == "none" else named
    metadata = read_metadata(adapter)
    if metadata is None or "options" not in metadata.condition:
        return None
    return open_recorded(metadata.condition).spec


def read_pairs(source: Source, resolution: int, channels: int) -> list[Pair]:
    """Returns all pairs of a source at resolution x resolution pixels, their conditions with `channels` channels.

    Raises UserError that names the bad row.
    """
    annotator = open_annotator(source.annotate) if source.annotate else None
    return [make_pair(source[i], resolution, channels, annotator) for i in range(len(source))]


def make_pair(sample: Sample, resolution: int, channels: int, annotator: Annotator | None = None) -> Pair:
    """Crops a sample and finds its truth. The annotator makes the condition; None takes the sample's own."""
    size = (resolution, resolution)
    if annotator is None and sample.condition is None:
        raise UserError(
            f"{sample.key}: has no condition picture. Add one, or use {flag('condition')} to make it from the image."
        )
    target = fit(sample.image, size, IMAGE_FILTER)
    scene = sample.meta.get(SCENE)
    truth = Truth(foreground_mask(np.asarray(target))) if scene is None else _scene_truth(sample, target)
    if annotator is not None:
        condition = make_condition(sample.image, size, channels, annotator)
    else:
        assert sample.condition is not None
        condition = fit_condition(sample.condition, size, channels)
    return Pair(sample.key, sample.captions[0], condition, target, truth, "picture" if scene is None else "scene")


def _scene_truth(sample: Sample, target: Image.Image) -> Truth:
    try:
        scene = Scene.from_dict(parse_json(sample.meta[SCENE]))
    except (TypeError, ValueError) as fault:
        raise UserError(f"{sample.key}: column {SCENE!r} does not hold the JSON of a scene: {fault}.") from fault
    if sample.image.width != sample.image.height:
        size = f"{sample.image.width}x{sample.image.height}"
        raise UserError(f"{sample.key}: column {SCENE!r} describes a square picture, and the image is {size}.")
    masks = visible_masks(scene, target.width)
    return Truth(
        np.asarray(masks.any(axis=0)), _object_colors(scene, masks), _background_color(scene, masks, np.asarray(target))
    )


def _object_colors(scene: Scene, masks: np.ndarray) -> tuple[NamedColor, ...]:
    """masks: (K,H,W) bool, the visible pixels of each shape."""
    areas = masks.sum(axis=(1, 2))
    shares = areas / max(1, areas.sum())
    return tuple(
        NamedColor(COLORS[shape.color], float(share))
        for shape, share in zip(scene.shapes, shares, strict=True)
        if share > 0
    )


def _background_color(scene: Scene, masks: np.ndarray, target: np.ndarray) -> NamedColor:
    """Returns the background's main colour; a pattern's accent colour takes the rest of its share."""
    background = scene.background
    if background.pattern == "plain":
        return NamedColor(COLORS[background.color], 1.0)
    pixels = srgb_to_lab(target[~masks.any(axis=0)])
    colors: Sequence[Any] = [
        srgb_to_lab(np.asarray(COLORS[name], np.uint8)) for name in (background.color, background.accent)
    ]
    main, accent = (np.linalg.norm(pixels - color, axis=-1) for color in colors)
    return NamedColor(COLORS[background.color], float(np.mean(main <= accent)))
