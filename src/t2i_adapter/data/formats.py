"""Every kind of data there is, and how it is told which one a name means: a new kind is a row here and a module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.remote import base_name, is_url, local_path
from t2i_adapter.data.rows import Rows
from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A kind of data: `opener` is "module:function", called with the data's location and the options."""

    opener: str
    what: str

    def open(self, location: str, options: DataOptions) -> Rows:
        """Raises UserError for what the person can mend."""
        module, _, name = self.opener.partition(":")
        function: Callable[[str, DataOptions], Rows] = getattr(import_module(module), name)
        return function(location, options)


KINDS = {
    "folder": Kind("t2i_adapter.data.folder:open_rows", "an image folder"),
    "paired": Kind("t2i_adapter.data.paired:open_rows", "paired folders"),
    "manifest": Kind("t2i_adapter.data.manifest:open_rows", "a manifest"),
    "tar": Kind("t2i_adapter.data.tar:open_rows", "tar shards"),
    "parquet": Kind("t2i_adapter.data.parquet:open_rows", "parquet shards"),
    "hub": Kind("t2i_adapter.data.huggingface:open_rows", "a data set"),
    "emoji": Kind("t2i_adapter.data.generated:open_emoji", "an emoji package"),
    "shapes": Kind("t2i_adapter.data.generated:open_shapes", "shapes that are drawn when needed"),
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = {".jsonl": "manifest", ".csv": "manifest", ".tar": "tar", ".parquet": "parquet", ".tgz": "emoji"}


def located(location: str, options: DataOptions) -> DataOptions:
    """The options with their data named, for verbs that take one word for it: a hub id where the options say so, or
    ORG/NAME where no folder ORG is here."""
    told = options.kind == "hub" or options.streaming
    if told or (_HUB_ID.fullmatch(location) and not Path(location).parent.exists()):
        return replace(options, dataset_name=location)
    return replace(options, train_data_dir=location)


def open_kind(options: DataOptions) -> tuple[Rows, str]:
    """The rows of the data that the options name, and in words what it was taken for. Raises UserError."""
    if bool(options.train_data_dir) == bool(options.dataset_name):
        given = "both are given" if options.dataset_name else "neither is given"
        raise UserError(f"--dataset_name or --train_data_dir names the data; {given}: give one of them.")
    location = options.train_data_dir or options.dataset_name or ""
    kind = KINDS[detect(location, options) if options.kind == "auto" else options.kind]
    return kind.open(location, options), kind.what


def detect(location: str, options: DataOptions) -> str:
    """The kind that a location's name and content tell: what is there goes before what it is called."""
    path = local_path(location)
    if path.is_dir():
        return _of_folder(path, options)
    suffix = re.search(r"\.[A-Za-z0-9]+$", base_name(location).rstrip("}"))
    known = _SUFFIXES.get(suffix.group().lower()) if suffix else None
    if known and (options.train_data_dir or path.is_file() or is_url(location)):
        return known
    if options.dataset_name:
        return "hub"
    if re.fullmatch(r"shapes(:.*)?", location):
        return "shapes"
    if path.is_file() or is_url(location):
        ends = ", ".join(_SUFFIXES)
        raise UserError(f"--train_data_dir {location}: its name does not tell its kind ({ends}); give --data.kind.")
    raise UserError(f"--train_data_dir {location}: no such folder.")


def _of_folder(folder: Path, options: DataOptions) -> str:
    def has(name: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in (name, f"*/{name}"))

    # Last what the `datasets` library reads: parquet, csv, arrow, saved data sets
    marks = {"metadata.jsonl": "folder", "images": "paired", "icons.json": "emoji", "*.tar": "tar"}
    return next((kind for mark, kind in marks.items() if has(mark)), "hub")
