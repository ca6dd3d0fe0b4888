"""The dataset layouts, and how a location's layout is recognised. A new layout is one entry of LAYOUTS and a module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.addresses import base_name, is_url, local_path
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
    "paired": Layout("t2i_adapter.data.paired:open_rows", "paired folders"),
    "manifest": Layout("t2i_adapter.data.manifest:open_rows", "a manifest"),
    "tar": Layout("t2i_adapter.data.tar:open_rows", "tar shards"),
    "parquet": Layout("t2i_adapter.data.parquet:open_rows", "parquet shards"),
    "hub": Layout("t2i_adapter.data.huggingface:open_rows", "a dataset"),
    "emoji": Layout("t2i_adapter.data.generated:open_emoji", "an emoji package"),
    "shapes": Layout("t2i_adapter.data.generated:open_shapes", "generated shapes"),
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = {".jsonl": "manifest", ".csv": "manifest", ".tar": "tar", ".parquet": "parquet", ".tgz": "emoji"}


def located(location: str, options: DataOptions) -> DataOptions:
    """The options with `location` as their dataset, for verbs that have one option for it.

    It is a hub id if the options say so, or if it has the form ORG/NAME and there is no local folder ORG.
    """
    is_hub = options.kind == "hub" or options.streaming
    if is_hub or (_HUB_ID.fullmatch(location) and not Path(location).parent.exists()):
        return replace(options, dataset_name=location)
    return replace(options, train_data_dir=location)


def open_layout(options: DataOptions) -> tuple[Rows, str]:
    """The rows of the dataset that the options name, and the name of its layout. Raises UserError."""
    if bool(options.train_data_dir) == bool(options.dataset_name):
        got = "both are set" if options.dataset_name else "neither is set"
        names = f"{flag('data.dataset_name')} or {flag('data.train_data_dir')}"
        raise UserError(f"{names} names the data; {got}. Set one of them.")
    location = options.train_data_dir or options.dataset_name or ""
    layout = LAYOUTS[detect(location, options) if options.kind == "auto" else options.kind]
    return layout.open(location, options), layout.what


def detect(location: str, options: DataOptions) -> str:
    """The name of a location's layout: by its content if it is a local folder, else by its name. Raises UserError."""
    path = local_path(location)
    if path.is_dir():
        return _of_folder(path)
    suffix = re.search(r"\.[A-Za-z0-9]+$", base_name(location).rstrip("}"))
    known = _SUFFIXES.get(suffix.group().lower()) if suffix else None
    if known and (options.train_data_dir or path.is_file() or is_url(location)):
        return known
    if options.dataset_name:
        return "hub"
    if re.fullmatch(r"shapes(:.*)?", location):
        return "shapes"
    if path.is_file() or is_url(location):
        text = f"{location}: the layout is unknown, as the name does not end in one of {', '.join(_SUFFIXES)}."
        raise UserError(f"{text} Name it with {flag('data.kind')}.", option="data.train_data_dir")
    raise UserError(f"{location}: no such folder.", option="data.train_data_dir", kind="missing")


def _of_folder(folder: Path) -> str:
    def has(name: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in (name, f"*/{name}"))

    # Last the layouts of the `datasets` library: parquet, csv, arrow, saved datasets
    marks = {"metadata.jsonl": "folder", "images": "paired", "icons.json": "emoji", "*.tar": "tar"}
    return next((layout for mark, layout in marks.items() if has(mark)), "hub")
