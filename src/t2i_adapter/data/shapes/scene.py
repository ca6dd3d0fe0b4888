"""The data of a scene: shapes from back to front, a background and a caption; its JSON form; the CSS colours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from PIL import ImageColor

KINDS = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
PATTERNS = ("plain", "striped", "dotted", "floral")

# The CSS colour names, spelled as in fill50k's captions.
_SPACED_NAMES = """
alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue, blue violet, brown,
burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, corn silk, crimson, cyan, dark blue, dark cyan,
dark golden rod, dark gray, dark green, dark grey, dark khaki, dark magenta, dark olive green, dark orange, dark orchid,
dark red, dark salmon, dark sea green, dark slate blue, dark slate gray, dark slate grey, dark turquoise, dark violet,
deep pink, deep sky blue, dim gray, dim grey, dodger blue, fire brick, floral white, forest green, fuchsia, gainsboro,
ghost white, gold, golden rod, gray, green, green yellow, grey, honey dew, hot pink, indian red, indigo, ivory, khaki,
lavender, lavender blush, lawn green, lemon chiffon, light blue, light coral, light cyan, light golden rod yellow,
light gray, light green, light grey, light pink, light salmon, light sea green, light sky blue, light slate gray,
light slate grey, light steel blue, light yellow, lime, lime green, linen, magenta, maroon, medium aquamarine,
medium blue, medium orchid, medium purple, medium sea green, medium slate blue, medium spring green, medium turquoise,
medium violet red, midnight blue, mint cream, misty rose, moccasin, navajo white, navy, old lace, olive, olive drab,
orange, orange red, orchid, pale golden rod, pale green, pale turquoise, pale violet red, papaya whip, peach puff, peru,
pink, plum, powder blue, purple, rebecca purple, red, rosy brown, royal blue, saddle brown, salmon, sandy brown,
sea green, sea shell, sienna, silver, sky blue, slate blue, slate gray, slate grey, snow, spring green, steel blue, tan,
teal, thistle, tomato, turquoise, violet, wheat, white, white smoke, yellow, yellow green
"""
SPACED = {name.replace(" ", ""): name for name in " ".join(_SPACED_NAMES.split()).split(", ")}
"""Joined name -> spaced name: "palegoldenrod" -> "pale golden rod"."""
COLORS: dict[str, tuple[int, int, int]] = {}
"""Joined name -> (r, g, b), 0 to 255."""
for _name in SPACED:
    _red, _green, _blue, *_ = ImageColor.getrgb(_name)
    COLORS[_name] = (_red, _green, _blue)


@dataclass(frozen=True)
class Shape:
    """One flat shape. `center` (x, y) and `radius` are in units of the picture's side; `angle` is in degrees.

    Raises ValueError for values that are not allowed.
    """

    kind: str
    color: str
    center: tuple[float, float]
    radius: float
    angle: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("kind of shape", self.kind, KINDS)
        _check_choice("colour of the shape", self.color, COLORS)
        if len(self.center) != 2:
            raise ValueError(f"the centre of a shape is (x, y), got {self.center!r}")
        if not self.radius > 0:
            raise ValueError(f"the radius of a shape must be above 0, got {self.radius!r}")


@dataclass(frozen=True)
class Background:
    """A flat colour, or a pattern of `accent` on it. A plain background does not show its accent. Raises ValueError."""

    pattern: str
    color: str
    accent: str

    def __post_init__(self) -> None:
        _check_choice("pattern", self.pattern, PATTERNS)
        _check_choice("colour of the background", self.color, COLORS)
        _check_choice("accent of the background", self.accent, COLORS)


@dataclass(frozen=True)
class Scene:
    """Shapes from back to front on a background, and the caption."""

    shapes: tuple[Shape, ...]
    background: Background
    caption: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back to an equal scene."""
        fields = asdict(self)
        fields["shapes"] = [{**shape, "center": list(shape["center"])} for shape in fields["shapes"]]
        return fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """The scene of a mapping that `to_dict` returned. Raises ValueError if a field is missing or not allowed."""
        shapes, background = _take(data, "scene", "shapes", list), _take(data, "scene", "background", dict)
        return cls(
            shapes=tuple(_shape_from_dict(shape, f"shape {i}") for i, shape in enumerate(shapes)),
            background=Background(*(_take(background, "background", k, str) for k in ("pattern", "color", "accent"))),
            caption=_take(data, "scene", "caption", str),
        )


def _shape_from_dict(data: Any, where: str) -> Shape:
    center = _take(data, where, "center", list)
    if len(center) != 2 or not all(_is_number(c) for c in center):
        raise ValueError(f"{where}: center must be two numbers, got {center!r}")
    return Shape(
        kind=_take(data, where, "kind", str),
        color=_take(data, where, "color", str),
        center=(float(center[0]), float(center[1])),
        radius=float(_take(data, where, "radius", (int, float))),
        angle=float(_take(data, where, "angle", (int, float))),
    )


def _take(data: Any, where: str, key: str, kind: type | tuple[type, ...]) -> Any:
    """data[key]. Raises ValueError if it is missing or has another type."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a mapping was expected, got {type(data).__name__}")
    if key not in data:
        raise ValueError(f"{where}: {key!r} is missing, there are {sorted(data)}")
    if not isinstance(data[key], kind) or isinstance(data[key], bool):
        raise ValueError(f"{where}: {key!r} is of the wrong type, got {data[key]!r}")
    return data[key]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choice(what: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        shown = ", ".join(list(allowed)[:10]) + (", ..." if len(allowed) > 10 else "")
        raise ValueError(f"unknown {what}: {value!r}; allowed: {shown}")
