"""The registry of condition kinds: it opens the annotator that a text such as "canny,low=50" names, and runs it.

An annotator is a plug-in (`Plugin`) with its options set; it makes the condition map of an image. `TABLE` names the
plug-ins of this package. Other packages add theirs by entry points of the group `t2i_adapter.annotators`. A user's own
class is named module:Class or file.py:Class.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, get_type_hints

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.config.read import allowed, describe, read_value
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import user_path

TABLE = {
    "canny": "t2i_adapter.annotators.edges:Canny",
    "lineart": "t2i_adapter.annotators.edges:Lineart",
    "sketch": "t2i_adapter.annotators.edges:Sketch",
    "scribble": "t2i_adapter.annotators.edges:Scribble",
    "lines": "t2i_adapter.annotators.edges:Lines",
    "palette": "t2i_adapter.annotators.colours:Palette",
    "grey": "t2i_adapter.annotators.colours:Grey",
    "tile": "t2i_adapter.annotators.colours:Tile",
    "blur": "t2i_adapter.annotators.colours:Blur",
    "mask": "t2i_adapter.annotators.segmentation:Mask",
    "normal": "t2i_adapter.annotators.depth:Normal",
    "softedge": "t2i_adapter.annotators.softedge:SoftEdge",
    "pose": "t2i_adapter.annotators.pose:Pose",
    "person": "t2i_adapter.annotators.segmentation:Person",
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
"""Kind -> "module:class". The module is imported when its kind is used."""

ENTRY_POINTS = "t2i_adapter.annotators"

Polarity = Literal["white on black", "black on white", "near is white", "none"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What holds for every map of a kind. Raises UserError for a value that is not allowed.

    Attributes:
        version: raise it when the same image and options give another map; cached maps are then made again.
        channels: 1 for a grey map (mode L), 3 for RGB.
        kind: what the colours mean, as in `DataOptions.condition_kind`; `mirror.exchange_sides` depends on it.
        polarity: what is bright; "none" if brightness has no such meaning.
        levels: 2 if every value is 0 or 255, else 256.
        licence: licence of code and weights.
        weights: where the weights come from, "hub: ..." if they are downloaded from there; "" without weights.
        needs: what `pip install` has to add, such as "sdxl-t2i-adapter[pose]"; "" if nothing.
    """

    version: int = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence: str = ""
    weights: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Facts).items():
            value = getattr(self, name)
            if not (value in get_args(kind) if get_args(kind) else isinstance(value, kind)):
                raise UserError(f"its facts have {name} = {value!r}; allowed is {describe(kind)}.")


class Plugin(Protocol):
    """A kind of condition map: a frozen dataclass whose fields are the options, `Canny(low=50)`.

    The options are int, float, bool and str, all with defaults. `__post_init__` checks them and raises UserError.
    The first paragraph of the docstring describes the map, the rest the options; `t2i-adapter conditions` prints both.

    If these options leave something to `rng`, the plug-in has a property `chance` that returns True. Training does not
    cache such maps; each draw of an image makes its own.
    """

    facts: Facts
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        """Returns the map of an RGB image, at the same size, aligned pixel by pixel.

        Every random choice comes from `rng`. It is None if the map must not be random, and for plug-ins without
        `chance`.
        """
        ...


@dataclass(frozen=True)
class Annotator:
    """An opened plug-in. It is pickled as its `spec`, so other processes can open a class of a user's file too.

    Attributes:
        spec: the text that names it, with its options.
        name: the part of `spec` before the options.
        fingerprint: hash of name, options and version, for a user's file also of its content. Equal fingerprints make
            equal maps.
    """

    spec: str
    name: str
    fingerprint: str
    plugin: Plugin

    @property
    def facts(self) -> Facts:
        return self.plugin.facts

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, as plain JSON types."""
        return asdict(self.plugin)

    @property
    def chance(self) -> bool:
        """Whether the maps are random."""
        return bool(getattr(self.plugin, "chance", False))

    def __reduce__(self) -> tuple[Any, ...]:
        return open_annotator, (self.spec,)

    def record(self) -> dict[str, Any]:
        """What the adapter's folder records about its conditions; `open_recorded` opens it again."""
        names = ("version", "channels", "kind", "polarity")
        return {"name": self.name, "options": self.options, **{name: getattr(self.facts, name) for name in names}}


def open_annotator(spec: str) -> Annotator:
    """Opens the annotator that `spec` names.

    Args:
        spec: NAME, `module:Class` or `file.py:Class`, with options after commas: "canny,low=50,high=150".

    Raises UserError if there is no such annotator or option, or if a value is not allowed.
    """
    name, *settings = (part.strip() for part in spec.split(","))
    with _named(name):
        place = _place(name)
        plugin = _set_options(_load(place), settings)
    known = {"name": _identity(name, place), "options": asdict(plugin), "version": plugin.facts.version}
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return Annotator(spec, name, fingerprint, plugin)


def open_recorded(record: Mapping[str, Any]) -> Annotator:
    """Opens the annotator that `Annotator.record` describes. Raises UserError if it is not installed or has changed.

    An adapter's folder may come from anyone, so only installed annotators are opened, and no code from a file.
    """
    name, options = record.get("name"), record.get("options", {})
    if name not in kinds() or not isinstance(options, dict):
        raise UserError(
            f"the adapter's record names {name!r} as the annotator of its conditions, and no installed annotator has "
            "that name. Code of a file is not run because a record names it. If you trust it, name it with "
            f"{flag('condition')}."
        )
    annotator = open_annotator(",".join((name, *(f"{key}={value}" for key, value in options.items()))))
    version = annotator.facts.version
    if version != record.get("version", version):
        raise UserError(
            f"{name}: version {record['version']} made the adapter's conditions, and version {version} is installed, "
            "whose maps differ. Make the condition with the release that has the other version."
        )
    return annotator


def find_plugin(name: str) -> type[Any]:
    """Returns the plug-in class of a kind. Raises UserError."""
    with _named(name):
        return _load(_place(name))


def kinds() -> tuple[str, ...]:
    """Names of all kinds: this package's in the order of `TABLE`, then those of entry points."""
    return tuple(dict.fromkeys((*TABLE, *sorted(entry.name for entry in entry_points(group=ENTRY_POINTS)))))


def annotate(annotator: Annotator, image: Image.Image, draw: str | None = None) -> Image.Image:
    """Returns the map of an RGB image: mode L or RGB, of the image's size.

    Args:
        draw: seeds the random choices of an annotator with `chance`; None makes none.

    Raises UserError if the plug-in cannot make the map, or if the map is not what its facts declare.
    """
    rng = None
    if annotator.chance and draw is not None:
        rng = np.random.default_rng(list(hashlib.sha256(draw.encode()).digest()))
    with _named(annotator.name):
        condition = annotator.plugin(image, rng)
        mode = "L" if annotator.facts.channels == 1 else "RGB"
        if (condition.mode, condition.size) != (mode, image.size):
            raise UserError(
                f"returned {condition.mode}, {condition.width}x{condition.height}, for an image of "
                f"{image.width}x{image.height}; needed is {mode} of the image's size. Correct the annotator."
            )
        counts = condition.histogram() if annotator.facts.levels == 2 else []
        if any(count for value, count in enumerate(counts) if value % 256 not in (0, 255)):
            raise UserError("returned greys, but its facts declare 2 levels, 0 and 255. Correct the annotator.")
    return condition


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the annotator's name in front of errors, so plug-ins need not repeat it."""
    try:
        yield
    except UserError as fault:
        raise fault.within(f"condition {name}") from fault


def _place(name: str) -> str:
    """Returns "module:class" for a name. A name with a colon is such a place already."""
    others = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    place = TABLE.get(name) or others.get(name, name)
    if ":" not in place:
        raise UserError(
            f"no such annotator; there are: {', '.join(kinds())}. Name your own as module:Class or file.py:Class."
        )
    return place


def _load(place: str) -> Any:
    """Returns the plug-in class at "module:class"."""
    module_name, _, class_name = place.rpartition(":")
    try:
        module = _run_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except FileNotFoundError:
        raise UserError(f"{module_name}: no such file.") from None
    except ImportError as fault:
        raise UserError(f"{module_name} cannot be imported: {fault}.") from fault
    plugin = getattr(module, class_name, None)
    if plugin is None:
        raise UserError(f"{module_name} has no class {class_name}.")
    if not is_dataclass(plugin) or not isinstance(getattr(plugin, "facts", None), Facts):
        raise UserError(f"{class_name} must be a dataclass with a line `facts = Facts(...)`.")
    return plugin


def _run_file(path: str) -> Any:
    found = importlib.util.spec_from_file_location(f"annotator_{Path(path).stem}", user_path(path))
    assert found is not None and found.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look up their annotations there
    found.loader.exec_module(module)
    return module


def _identity(name: str, place: str) -> str:
    """Returns the name, or for a file its class and the hash of its content: an edited file is another annotator, a
    moved file is not."""
    module_name, _, class_name = place.rpartition(":")
    if not module_name.endswith(".py"):
        return name
    return f"{class_name} {hashlib.sha256(user_path(module_name).read_bytes()).hexdigest()}"


def _set_options(plugin: Any, settings: list[str]) -> Any:
    """Makes the plug-in with `settings`, each "NAME=VALUE"."""
    hints = get_type_hints(plugin)
    types = {field.name: hints[field.name] for field in fields(plugin)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = (part.strip() for part in setting.partition("="))
        if name not in types:
            raise UserError(f"there is no option {name!r}; there are: {', '.join(types) or 'none'}.")
        try:
            values[name] = read_value(text, types[name])
        except ValueError:
            raise UserError(f"{name}={text}: {allowed(types[name], text)}.") from None
    return plugin(**values)
