"""Reads held-out pairs for an evaluation: cropped as in training, each with the truth that pictures are measured by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, overload

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
HELD_BYTES = 256 * 2**20
"""Bytes of decoded pictures that `StoredPairs` holds."""


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


class StoredPairs(Sequence[Pair]):
    """The pairs of a source, read when they are used. Those used last are held, within HELD_BYTES.

    Captions and content hashes are read at once. Raises UserError that names the bad row.

    Attributes:
        prompts: the first caption of each row.
        digest: sha256 (hex) over keys, prompts and stored bytes of all rows.
    """

    def __init__(self, source: Source, resolution: int, channels: int) -> None:
        self._source, self._size, self._channels = source, resolution, channels
        self._annotator = open_annotator(source.annotate) if source.annotate else None
        self._store: ConditionStore | None = None
        whole, self.prompts = hashlib.sha256(), list[str]()
        self._keys = [source.key(index) for index in range(len(source))]
        for index, key in enumerate(self._keys):
            identity = source.identify(index)
            self.prompts.append(identity.captions[0])
            whole.update("\0".join([key, identity.captions[0], identity.digest, ""]).encode("utf-8", "surrogatepass"))
        self.digest = whole.hexdigest()
        held = max(4, HELD_BYTES // (resolution**2 * (3 + channels + 1)))
        self._read = lru_cache(maxsize=held)(self._read_pair)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...

    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _LaterPair(self, index % len(self))

    def keep_conditions(self, store: ConditionStore) -> None:
        """Makes each condition once, and reads it from `store` after that."""
        self._store = store

    def condition(self, index: int) -> Image.Image:
        """Returns the condition of a pair, from the store if it is there."""
        if self._store is not None and (stored := self._store.load_condition(index)) is not None:
            return stored
        return self._read(index).condition

    def check(self, indices: Iterable[int]) -> Iterator[None]:
        """Reads those pairs whose conditions are not stored, one a step. Raises UserError that names the bad row."""
        for index in indices:
            if self._store is None or self._store.load_condition(index) is None:
                self._read(index)
            yield

    def _read_pair(self, index: int) -> Pair:
        sample = self._source[index]
        stored = self._store.load_condition(index) if self._store is not None else None
        pair = make_pair(sample, self._size, self._channels, self._annotator, condition=stored)
        if self._store is not None and stored is None:
            self._store.save_condition(index, pair.condition)
        return pair


class ConditionStore(Protocol):
    """Where `StoredPairs` keeps conditions, by the pair's number."""

    def load_condition(self, index: int) -> Image.Image | None: ...

    def save_condition(self, index: int, condition: Image.Image) -> None: ...


class _LaterPair(Pair):
    """A pair of `StoredPairs`; everything but key and prompt is read when it is asked for."""

    def __init__(self, pairs: StoredPairs, index: int) -> None:
        own = {"_pairs": pairs, "_index": index, "key": pairs._keys[index], "prompt": pairs.prompts[index]}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in ("condition", "target", "truth", "truth_from"):
            raise AttributeError(name)
        return getattr(self._pairs._read(self._index), name)


def make_pair(
    sample: Sample,
    resolution: int,
    channels: int,
    annotator: Annotator | None = None,
    *,
    condition: Image.Image | None = None,
) -> Pair:
    """Crops a sample and finds its truth.

    The annotator makes the condition; None takes the sample's own. condition: it, if it was made before.
    """
    size = (resolution, resolution)
    if condition is None and annotator is None and sample.condition is None:
        raise UserError(
            f"{sample.key}: has no condition picture. Add one, or use {flag('condition')} to make it from the image."
        )
    target = fit(sample.image, size, IMAGE_FILTER)
    scene = sample.meta.get(SCENE)
    truth = Truth(foreground_mask(np.asarray(target))) if scene is None else _scene_truth(sample, target)
    if condition is None and annotator is not None:
        condition = make_condition(sample.image, size, channels, annotator)
    elif condition is None:
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
