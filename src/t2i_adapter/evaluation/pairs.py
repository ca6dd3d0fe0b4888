"""Held-out pairs as they are measured: cut to size as in training, each with the truth for its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.registry import Annotator, open_annotator
from t2i_adapter.data.pair import IMAGE_FILTER
from t2i_adapter.data.shapes import COLORS, Scene, visible_masks
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.color import srgb_to_lab
from t2i_adapter.evaluation.figure import figure_mask
from t2i_adapter.evaluation.metrics import NamedColor, Truth
from t2i_adapter.files import parse_json
from t2i_adapter.generation.condition import fit, fit_condition, make_condition
from t2i_adapter.types import Sample

SCENE = "scene"  # column of the row's Scene as JSON, which `make-data shapes` writes


@dataclass(frozen=True)
class Pair:
    """One held-out pair.

    Attributes:
        key: names the row.
        prompt: its first caption.
        condition: as the adapter takes it (L or RGB), cut to the size that is drawn.
        target: RGB, cut alike.
        truth: what a picture of it should show.
        truth_from: "scene" where the exact scene is known, "picture" where the mask is the target's own figure.
    """

    key: str
    prompt: str
    condition: Image.Image
    target: Image.Image
    truth: Truth
    truth_from: Literal["scene", "picture"]


def read_pairs(source: Source, resolution: int, channels: int) -> list[Pair]:
    """All pairs of a source at resolution x resolution pixels, for an adapter of so many condition channels.

    Raises UserError naming the row that is at fault.
    """
    annotator = open_annotator(source.annotate) if source.annotate else None
    return [make_pair(source[i], resolution, channels, annotator) for i in range(len(source))]


def make_pair(sample: Sample, resolution: int, channels: int, annotator: Annotator | None = None) -> Pair:
    """Cuts a sample to size, makes its condition where `annotator` is to, and finds its truth."""
    size = (resolution, resolution)
    if annotator is None and sample.condition is None:
        raise UserError(f"{sample.key}: there is no condition picture, and nothing to measure without one.")
    target = fit(sample.image, size, IMAGE_FILTER)
    scene = sample.meta.get(SCENE)
    truth = Truth(figure_mask(np.asarray(target))) if scene is None else _scene_truth(sample, target)
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
        raise UserError(f"{sample.key}: column {SCENE!r} describes a square picture; this one is {size}.")
    masks = visible_masks(scene, target.width)
    return Truth(
        np.asarray(masks.any(axis=0)), _object_colors(scene, masks), _ground_color(scene, masks, np.asarray(target))
    )


def _object_colors(scene: Scene, masks: np.ndarray) -> tuple[NamedColor, ...]:
    areas = masks.sum(axis=(1, 2))
    shares = areas / max(1, areas.sum())
    return tuple(
        NamedColor(COLORS[shape.color], float(share))
        for shape, share in zip(scene.shapes, shares, strict=True)
        if share > 0
    )


def _ground_color(scene: Scene, masks: np.ndarray, target: np.ndarray) -> NamedColor:
    """The background's main colour; its share is what the pattern's accent leaves of the ground."""
    ground = scene.background
    if ground.pattern == "plain":
        return NamedColor(COLORS[ground.color], 1.0)
    pixels = srgb_to_lab(target[~masks.any(axis=0)])
    colors: Sequence[Any] = [srgb_to_lab(np.asarray(COLORS[name], np.uint8)) for name in (ground.color, ground.accent)]
    main, accent = (np.linalg.norm(pixels - color, axis=-1) for color in colors)
    return NamedColor(COLORS[ground.color], float(np.mean(main <= accent)))
