"""The dataset layouts, and how a location's layout is recognised. A new layout is one entry of LAYOUTS and a module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name, is_url, local_path
from t2i_adapter.data.folder import METADATA
from t2i_adapter.data.look import ARCHIVES, MANIFESTS, Look, look_at, unpack_command
from t2i_adapter.data.rows import Rows
from t2i_adapter.errors import UserError, flag


@dataclass(frozen=True)
class Layout:
    """`opener`: "module:function", called with the data's location and the options. `what`: its name for people."""

    opener: str
    what: str

    def open(self, location: str, options: DataOptions) -> Rows:
        """Raises UserError."""
        module, _, name = self.opener.partition(":")
        function: Callable[[str, DataOptions], Rows] = getattr(import_module(module), name)
        return function(location, options)


LAYOUTS = {
    "folder": Layout("t2i_adapter.data.folder:open_rows", "an image folder"),
    "paired": Layout("t2i_adapter.data.paired:open_rows", "a folder of pictures"),
    "manifest": Layout("t2i_adapter.data.manifest:open_rows", "a manifest"),
    "tar": Layout("t2i_adapter.data.tar:open_rows", "tar shards"),
    "parquet": Layout("t2i_adapter.data.parquet:open_rows", "parquet shards"),
    "hub": Layout("t2i_adapter.data.huggingface:open_rows", "a dataset"),
    "emoji": Layout("t2i_adapter.data.generated:open_emoji", "an emoji package"),
    "shapes": Layout("t2i_adapter.data.generated:open_shapes", "generated shapes"),
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = {**dict.fromkeys(MANIFESTS, "manifest"), ".parquet": "parquet", ".tar": "tar", ".tgz": "emoji"}
_SAVED = ("dataset_dict.json", "state.json")
"""Files of a dataset that `save_to_disk` of `datasets` wrote."""


def open_layout(options: DataOptions) -> tuple[Rows, str]:
    """The rows of the dataset that the options name, and the name of its layout. Raises UserError."""
    location = options.location
    if not location:
        raise UserError("names no dataset: write a folder, a file, shards or a hub id.", option="data.location")
    kind = options.kind
    if kind == "auto":
        location, kind = detect(location, options)
    layout = LAYOUTS[kind]
    return layout.open(location, options), layout.what


def detect(location: str, options: DataOptions) -> tuple[str, str]:
    """The location of the data, which may be a file in the folder that was named, and the name of its layout.

    A local folder is recognised by its content, anything else by its name. Raises UserError.
    """
    path = local_path(location)
    if path.is_dir():
        return _of_folder(location, path, options)
    if options.streaming:
        return location, "hub"
    suffix = re.search(r"\.[A-Za-z0-9]+$", base_name(location).rstrip("}"))
    known = _SUFFIXES.get(suffix.group().lower()) if suffix else None
    if re.search(r"\.tar\.\w+$", base_name(location).lower()):
        return location, "tar"  # whose reader says how to unpack it
    if path.is_file() and base_name(location).lower().endswith(ARCHIVES):
        text = f"{location}: an archive, which is not read in place. Unpack it: {unpack_command(path)}"
        raise UserError(text, option="data.location")
    if known:
        return location, known
    if re.fullmatch(r"shapes(:.*)?", location):
        return location, "shapes"
    if path.is_file() or is_url(location):
        text = f"{location}: the layout is unknown, as the name does not end in one of {', '.join(_SUFFIXES)}."
        raise UserError(f"{text} Name it with {flag('data.kind')}.", option="data.location")
    if _HUB_ID.fullmatch(location) and not Path(location).parent.exists():
        return location, "hub"
    hint = f" A hub id needs {flag('data.kind')} hub." if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) else ""
    raise UserError(f"{location}: no such folder.{hint}", option="data.location", kind="missing")


def is_hub_dataset(options: DataOptions) -> bool:
    """Whether the options name a dataset of the hub, by what its location looks like; nothing is requested."""
    location = options.location or ""
    try:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) or local_path(location).exists():
            return False
        return (detect(location, options)[1] if options.kind == "auto" else options.kind) == "hub"
    except UserError:
        return False


def _of_folder(location: str, folder: Path, options: DataOptions) -> tuple[str, str]:
    def has(name: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in (name, f"*/{name}"))

    marks = {
        **dict.fromkeys(METADATA, "folder"),
        "images": "paired",
        "icons.json": "emoji",
        "*.[tT][aA][rR]": "tar",
        **dict.fromkeys((*_SAVED, "*.[pP][aA][rR][qQ][uU][eE][tT]", "*.arrow"), "hub"),
    }
    for mark, layout in marks.items():
        if has(mark):
            return location, layout
    found = look_at(folder)
    tables = [name for name in found.manifests if re.match(rf"{re.escape(options.split)}(?![A-Za-z])", name)]
    tables = tables or list(found.manifests)
    if len(tables) == 1 and not found.texts:
        return str(folder / tables[0]), "manifest"
    if found.pictures:
        return location, "paired"
    shards = {
        ending: layout for ending, layout in ((".tar", "tar"), (".parquet", "hub")) if ending in dict(found.other)
    }
    if shards:
        return location, next(iter(shards.values()))
    raise UserError(_not_understood(location, folder, found), option="data.location")


def _not_understood(location: str, folder: Path, found: Look) -> str:
    """What a folder without a known layout holds, and the layouts that would fit best."""
    if found.archives:
        first = folder / found.archives[0]
        return f"{location}: holds {found.describe()}. Archives are not read in place; unpack: {unpack_command(first)}"
    if len(found.manifests) > 1:
        names = ", ".join(found.manifests)
        return f"{location}: holds {found.describe()}: {names}. Name one of them with {flag('data.location')}."
    return (
        f"{location}: holds {found.describe()}, in no layout that training reads. The nearest: pictures with captions "
        "beside them (a.jpg, a.txt); a table in it (pairs.jsonl or pairs.csv) whose rows name pictures and captions; "
        "train/metadata.jsonl beside the pictures. docs/data.md shows each."
    )
