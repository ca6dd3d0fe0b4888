"""Samples scenes and their captions; (seed, index) determines both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .pixels import visible_masks
from .scene import COLORS, KINDS, PATTERNS, SPACED, Background, Scene, Shape

_RADIUS = (0.12, 0.33)  # of the side: a smaller shape has only a few latent pixels, of larger ones two do not fit
_SMALL, _LARGE = 0.18, 0.27  # radii below and above which a caption may say small or large
_MIN_COLOR_DISTANCE = 90.0  # in RGB; about the least distance at which neighbours look different
_MIN_VISIBLE = 0.45  # share of its area; a shape that is hidden more cannot be recognised
_TRIES = 30
_COUNT_SHARES = (0.62, 0.26, 0.12)  # of scenes with 1, 2, 3 shapes
_PLAIN_SHARE = 0.55
MAX_TURN = {"circle": 0, "ring": 0, "square": 18, "triangle": 25, "star": 36, "heart": 25, "diamond": 15, "cross": 20}
"""Kind -> largest rotation in degrees at which it can be recognised."""
_ACCENT_WORDS = {"striped": "stripes", "dotted": "dots", "floral": "flowers"}
_RGB = np.asarray(list(COLORS.values()), np.float32)  # (colours,3)
_NAMES = list(COLORS)


def sample_scene(
    seed: int, index: int, *, max_shapes: int = 3, patterns: tuple[str, ...] = PATTERNS, kinds: tuple[str, ...] = KINDS
) -> Scene:
    """The scene with number `index` of `seed`, equal on every call and machine."""
    rng = np.random.default_rng([seed, index])
    background, named_accent = _sample_background(rng, patterns)
    shapes = _sample_shapes(rng, background, max_shapes, kinds)
    return Scene(shapes, background, _caption(rng, shapes, background, named_accent))


def default_accent(color: str) -> str:
    """The accent that captions do not name: white, or black on a light colour."""
    red, green, blue = COLORS[color]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def _sample_background(rng: np.random.Generator, patterns: Sequence[str]) -> tuple[Background, bool]:
    """A background, and whether its caption names the accent."""
    color = _NAMES[rng.integers(len(_NAMES))]
    others = [p for p in patterns if p != "plain"]
    plain = not others or ("plain" in patterns and rng.random() < _PLAIN_SHARE)
    pattern = "plain" if plain else others[rng.integers(len(others))]
    named_accent = not plain and rng.random() < 0.5
    accent = _pick_color(rng, [color]) if named_accent else default_accent(color)
    return Background(pattern, color, accent), named_accent


def _pick_color(rng: np.random.Generator, apart_from: Sequence[str]) -> str:
    """A colour that looks different from each of `apart_from`."""
    taken = np.asarray([COLORS[c] for c in apart_from], np.float32)
    nearest = np.linalg.norm(_RGB[:, None] - taken, axis=-1).min(axis=1)
    allowed = np.flatnonzero(nearest >= _MIN_COLOR_DISTANCE)
    return _NAMES[int(rng.choice(allowed))]


def _sample_shapes(
    rng: np.random.Generator, background: Background, max_shapes: int, kinds: Sequence[str]
) -> tuple[Shape, ...]:
    shares = np.asarray(_COUNT_SHARES[:max_shapes])
    count = 1 + rng.choice(len(shares), p=shares / shares.sum())
    taken = [background.color] if background.pattern == "plain" else [background.color, background.accent]
    colors: list[str] = []
    for _ in range(count):
        colors.append(_pick_color(rng, taken + colors))
    names = [kinds[int(rng.integers(len(kinds)))] for _ in range(count)]
    shapes: tuple[Shape, ...] = ()
    for _ in range(_TRIES):
        shapes = tuple(_place(rng, kind, color, count) for kind, color in zip(names, colors, strict=True))
        if _all_visible(shapes, background):
            return shapes
    return shapes[-1:]


def _place(rng: np.random.Generator, kind: str, color: str, count: int) -> Shape:
    """One shape at a random place, wholly inside the picture; with several shapes it is a little smaller."""
    low, high = _RADIUS
    radius = rng.uniform(low, high if count == 1 else 0.26)
    x, y = rng.uniform(radius, 1 - radius, size=2)
    turn = MAX_TURN[kind]
    return Shape(
        kind,
        color,
        (round(float(x), 4), round(float(y), 4)),
        round(float(radius), 4),
        float(round(rng.uniform(-turn, turn), 1)),
    )


def _all_visible(shapes: tuple[Shape, ...], background: Background) -> bool:
    """Whether enough of each shape is visible to recognise it."""
    if len(shapes) == 1:
        return True
    size = 32  # pixels; enough to compare areas
    seen = visible_masks(Scene(shapes, background, ""), size).sum(axis=(1, 2))
    whole = [visible_masks(Scene((shape,), background, ""), size).sum() for shape in shapes]
    return bool(np.all(seen >= _MIN_VISIBLE * np.asarray(whole)))


def _caption(rng: np.random.Generator, shapes: Sequence[Shape], background: Background, named_accent: bool) -> str:
    joined = rng.random() < 0.3
    ground = f"{_color_words(background.color, joined)} {_pattern_word(rng, background.pattern)}background"
    accent = ""
    if named_accent:
        accent = f" with {_color_words(background.accent, joined)} {_ACCENT_WORDS[background.pattern]}"
    nouns = [_noun(rng, shape, joined) for shape in shapes]
    if len(shapes) == 1:
        return _single_caption(rng, shapes[0], nouns[0], ground, accent)
    return _group_caption(rng, nouns, ground, accent)


def _color_words(color: str, joined: bool) -> str:
    return color if joined else SPACED[color]


def _pattern_word(rng: np.random.Generator, pattern: str) -> str:
    if pattern == "plain":
        return "plain " if rng.random() < 0.15 else ""
    return f"{pattern} "


def _noun(rng: np.random.Generator, shape: Shape, joined: bool) -> str:
    """ "red circle", sometimes "large red circle"."""
    size = "small " if shape.radius < _SMALL else "large " if shape.radius > _LARGE else ""
    return f"{size if rng.random() < 0.25 else ''}{_color_words(shape.color, joined)} {shape.kind}"


def _single_caption(rng: np.random.Generator, shape: Shape, noun: str, ground: str, accent: str) -> str:
    if rng.random() < 0.5:  # fill50k's own form
        return f"{noun} with {ground}{accent}"
    place = f" {_place_words(shape)}" if rng.random() < 0.3 else ""
    forms = (
        f"{_a(noun)}{place} on {_a(ground)}{accent}",
        f"{_a(noun)}{place} in front of {_a(ground)}{accent}",
        f"{_a(ground)}{accent} and {_a(noun)}{place}",
        f"a picture of {_a(noun)}{place}, {ground}{accent}",
        f"{noun}{place}, {ground}{accent}",
        f"{_a(noun)}{place} over {_a(ground)}{accent}",
    )
    return forms[rng.integers(len(forms))]


def _group_caption(rng: np.random.Generator, nouns: Sequence[str], ground: str, accent: str) -> str:
    """Names shapes front to back ("in front of") or back to front ("behind"). `nouns` are back to front."""
    if rng.random() < 0.65:
        row = " in front of ".join(_a(noun) for noun in reversed(nouns))
    else:
        row = " behind ".join(_a(noun) for noun in nouns)
    forms = (f"{row} on {_a(ground)}{accent}", f"{row} with {ground}{accent}", f"{row}, {ground}{accent}")
    return forms[rng.integers(len(forms))]


def _place_words(shape: Shape) -> str:
    x, y = shape.center
    column = "left" if x < 0.4 else "right" if x > 0.6 else ""
    row = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    if not column and not row:
        return "in the middle"
    return f"at the {' '.join(word for word in (row, column) if word)}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
