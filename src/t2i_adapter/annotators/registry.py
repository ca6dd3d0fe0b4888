"""Annotators: plug-ins that make a condition from its image. A new one is a file and a row here.

What a plug-in is, see `Plugin`. One that is not of this package is named by its place, or by an entry point of the
group `t2i_adapter.annotators`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

TABLE = {
    "canny": "t2i_adapter.annotators.canny:Canny",
    "lineart": "t2i_adapter.annotators.lineart:Lineart",
    "sketch": "t2i_adapter.annotators.sketch:Sketch",
    "scribble": "t2i_adapter.annotators.scribble:Scribble",
    "lines": "t2i_adapter.annotators.lines:Lines",
    "palette": "t2i_adapter.annotators.palette:Palette",
    "grey": "t2i_adapter.annotators.grey:Grey",
    "tile": "t2i_adapter.annotators.tile:Tile",
    "blur": "t2i_adapter.annotators.blur:Blur",
    "mask": "t2i_adapter.annotators.mask:Mask",
    "normal": "t2i_adapter.annotators.normal:Normal",
    "softedge": "t2i_adapter.annotators.softedge:SoftEdge",
    "pose": "t2i_adapter.annotators.mediapipe.pose:Pose",
    "person": "t2i_adapter.annotators.mediapipe.person:Person",
    "dwpose": "t2i_adapter.annotators.dwpose:DwPose",
    "depth": "t2i_adapter.annotators.depth:Depth",
    "segmentation": "t2i_adapter.annotators.segmentation:Segmentation",
    "sam": "t2i_adapter.annotators.segmentation:Sam",
    "pidinet": "t2i_adapter.annotators.detectors:PiDiNet",
    "teed": "t2i_adapter.annotators.detectors:Teed",
    "lineart-net": "t2i_adapter.annotators.detectors:LineartNet",
    "mlsd": "t2i_adapter.annotators.detectors:Mlsd",
    "normal-bae": "t2i_adapter.annotators.detectors:NormalBae",
}
"""Name -> "module:class"; a module is imported when its annotator is asked for."""

ENTRY_POINTS = "t2i_adapter.annotators"

Polarity = Literal["white on black", "black on white", "near is white", "none"]
"""What is bright; `none` where brightness has no such meaning."""

DECLARED: dict[str, tuple[Any, ...]] = {
    "version": (),
    "channels": (1, 3),
    "kind": get_args(Kind),
    "polarity": get_args(Polarity),
    "levels": (2, 256),
}
"""What every plug-in says of itself, and what is allowed; () is any whole number."""


class Plugin(Protocol):
    """A class that is called with its options gives an annotator: `Canny(Canny.Options(low=50))`.

    Attributes:
        Options: a frozen dataclass of int, float, bool and str fields, all with defaults; it checks its own values and
            raises UserError.
        version: raised when the same image and options give another picture, so that older records are not reused.
        channels: 1 where it gives a grey picture (mode L), 3 for RGB.
        kind: what its colours mean, as `DataOptions.condition_kind`.
        polarity: what is bright.
        levels: 2 where every value is 0 or 255 whatever the options, else 256.
        chance: whether these options leave something to `rng`; may be left out, and is then False. Maps of such a kind
            are not kept while training: each draw of a picture makes its own.
        licence: of code and weights.
        weights: where its weights come from, "hub: ..." where they are fetched; "" where it has none.
        needs: what `pip install` adds for it, "sdxl-t2i-adapter[pose]"; "" where nothing.

    The class's docstring begins with a line that tells people what it draws.
    """

    Options: type[Any]
    version: int
    channels: Literal[1, 3]
    kind: Kind
    polarity: Polarity
    levels: Literal[2, 256]
    licence: str
    weights: str
    needs: str

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        """The condition of an RGB image, at the same size, pixel on pixel. Whatever is drawn by chance comes from
        `rng`; None asks for none, and is all that a plug-in without `chance` gets."""
        ...


@dataclass(frozen=True)
class Annotator:
    """A plug-in with its options set. It goes to other processes by its specification, so a class from a user's file
    does too.

    Attributes:
        spec: what the user named it by, options and all.
        name: the specification's first part.
        options: every option with its value, plain JSON types.
        fingerprint: of name, options and version (and of the file's content, where it is a file of the user's): other
            conditions, another fingerprint.
        version, channels, kind, polarity, levels, chance: as in `Plugin`.
    """

    spec: str
    name: str
    options: dict[str, Any]
    fingerprint: str
    version: int
    channels: Literal[1, 3]
    kind: Kind
    polarity: Polarity
    levels: Literal[2, 256]
    chance: bool
    make: Callable[[Image.Image, np.random.Generator | None], Image.Image]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_annotator, (self.spec,)

    def record(self) -> dict[str, Any]:
        """What an adapter's folder tells of how its conditions were made; `open_recorded` opens it again."""
        told = ("name", "options", "version", "channels", "kind", "polarity")
        return {name: getattr(self, name) for name in told}


def open_annotator(spec: str) -> Annotator:
    """The annotator that `--data.condition` names.

    Args:
        spec: NAME, `module:Class` or `file.py:Class`, with options after commas: "canny,low=50,high=150".

    Raises UserError where there is no such annotator or option, or a value is not allowed.
    """
    name, *settings = (part.strip() for part in spec.split(","))
    place = _place(name)
    plugin = _load(place, spec)
    options = _options(plugin.Options, settings, spec)
    made = plugin(options)
    _check_declared(made, spec)
    known = {"name": _identity(name, place), "options": asdict(options), "version": made.version}
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    declared = {key: getattr(made, key) for key in DECLARED}
    chance = bool(getattr(made, "chance", False))
    return Annotator(spec, name, known["options"], fingerprint, make=made, chance=chance, **declared)


def open_recorded(record: Mapping[str, Any]) -> Annotator:
    """The annotator that `Annotator.record` told of. Raises UserError where it is no longer there, or has changed.

    An adapter's folder may come from anywhere, so it can name what is installed here and no other code.
    """
    name, options = record.get("name"), record.get("options", {})
    if name not in kinds() or not isinstance(options, dict):
        raise UserError(
            f"the adapter's record says that {name!r} made its conditions, which is no installed annotator, and code "
            "that a file names is not run. If you trust it, name it yourself with --condition."
        )
    annotator = open_annotator(",".join((name, *(f"{key}={value}" for key, value in options.items()))))
    if annotator.version != record.get("version", annotator.version):
        raise UserError(
            f"{annotator.name}: the adapter's conditions were made by its version {record['version']}, and here is "
            f"version {annotator.version}, which draws others. Make the condition with the package of that time."
        )
    return annotator


def find_plugin(name: str) -> Any:
    """The class of a kind. Raises UserError."""
    return _load(_place(name), name)


def kinds() -> tuple[str, ...]:
    """Names of all annotators: this package's in the table's order, then those of entry points."""
    return tuple(dict.fromkeys((*TABLE, *sorted(entry.name for entry in entry_points(group=ENTRY_POINTS)))))


def annotate(annotator: Annotator, image: Image.Image, draw: str | None = None) -> Image.Image:
    """The condition of an RGB image, mode L or RGB, of its size.

    Args:
        draw: what the annotator's chance, where it has any, is a function of; None leaves none to it.

    Raises UserError where a plug-in gives another size or mode.
    """
    rng = None
    if annotator.chance and draw is not None:
        rng = np.random.default_rng(list(hashlib.sha256(draw.encode()).digest()))
    condition = annotator.make(image, rng)
    mode = "L" if annotator.channels == 1 else "RGB"
    if (condition.mode, condition.size) != (mode, image.size):
        raise UserError(
            f"condition {annotator.spec}: gave {condition.mode}, {condition.width}x{condition.height}, for an "
            f"image of {image.width}x{image.height}; needed is {mode} of the image's size: mend the annotator."
        )
    if annotator.levels == 2 and any(n for value, n in enumerate(condition.histogram()) if value % 256 not in (0, 255)):
        raise UserError(
            f"condition {annotator.spec}: gave greys, and it declares 2 levels, 0 and 255: mend the annotator."
        )
    return condition


def _check_declared(made: Any, spec: str) -> None:
    for name, allowed in DECLARED.items():
        value = getattr(made, name, None)
        if value not in allowed if allowed else not isinstance(value, int):
            needed = f"one of {', '.join(map(repr, allowed))}" if allowed else "a whole number"
            raise UserError(f"condition {spec}: its class says {name} = {value!r}; needed is {needed}.")


def _place(name: str) -> str:
    """ "module:class" of a name; what has a colon is a place already."""
    if name in TABLE:
        return TABLE[name]
    others = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    place = others.get(name, name)
    if ":" not in place:
        raise UserError(
            f"condition {name}: no such annotator; there are: {', '.join(kinds())}. "
            "One of your own is named module:Class or file.py:Class."
        )
    return place


def _load(place: str, spec: str) -> Any:
    module_name, _, class_name = place.rpartition(":")
    try:
        module = _run_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        return getattr(module, class_name)
    except FileNotFoundError:
        raise UserError(f"condition {spec}: {module_name}: no such file.") from None
    except ImportError as fault:
        raise UserError(f"condition {spec}: {module_name} cannot be imported: {fault}.") from fault
    except AttributeError:
        raise UserError(f"condition {spec}: {module_name} has no class {class_name}.") from None


def _run_file(path: str) -> Any:
    found = importlib.util.spec_from_file_location(f"annotator_{Path(path).stem}", user_path(path))
    assert found is not None and found.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _identity(name: str, place: str) -> str:
    """The name, and for a file its class and content: an edited file is another annotator, a moved one is not."""
    module_name, _, class_name = place.rpartition(":")
    if not module_name.endswith(".py"):
        return name
    return f"{class_name} {hashlib.sha256(user_path(module_name).read_bytes()).hexdigest()}"


def _options(kind: type[Any], settings: list[str], spec: str) -> Any:
    types = {field.name: type(field.default) for field in fields(kind)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = (part.strip() for part in setting.partition("="))
        if name not in types:
            allowed = ", ".join(types) or "none"
            raise UserError(f"condition {spec}: there is no option {name!r}; there are: {allowed}.")
        values[name] = _value(text, types[name], f"condition {spec}: {name}")
    return kind(**values)


def _value(text: str, kind: type[Any], what: str) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        needed = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"{what} is {text!r}; needed is {needed}.") from None
