"""What the processes of a run must see alike before they train together: the checkpoint, the options, the pairs.

Machines without a common disk see different folders. If one of them resumed and another began anew, or if they had
other rows or options, their gradients would be averaged without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from t2i_adapter.config.tree import Config, flat, to_dict
from t2i_adapter.data.source import Source
from t2i_adapter.errors import flag
from t2i_adapter.models.base import Base
from t2i_adapter.training.checkpoint import STATE
from t2i_adapter.training.data_record import DataRecord
from t2i_adapter.training.peers import Peers

OWN_OPTIONS = (
    *(
        "output_dir",
        "data.location",
        "base.cache_dir",
        "data.cache_dir",
        "data.prepared_dir",
        "data.local_gb",
        "data.part",
        "data.num_workers",
        "train.cpu_threads",
    ),
    *("train.max_time", "train.stop_code", "train.stop_signals", "tracking", "hub", "checkpoint"),
)
"""Options, or groups of them, that may differ between the processes of a run: places, and what the main process alone
does. A limit of time that one process reaches stops all."""
MOST_KEYS = 64
"""Rows whose names are compared before anything is encoded, evenly spread."""


def agree_on_checkpoint(peers: Peers, output_dir: Path, find: Callable[[], Path | None]) -> Path | None:
    """Calls `find` on every process, and returns the checkpoint that it finds, the same on all of them.

    Raises UserError on every process if one of them finds another one, or none, or raises UserError itself.
    """
    found = peers.together(find)
    # state.json holds the digests of a checkpoint's other files.
    digest = hashlib.sha256((found / STATE).read_bytes()).hexdigest() if found else ""
    if len(set(peers.gather(digest))) > 1:
        peers.compare(
            {"checkpoints": f"{found.name if found else 'none'} in {output_dir} ({digest[:12] or 'new run'})"},
            f"Name {flag('output_dir')} on a disk that all machines share, or copy the run's folder of process 0 to "
            "each of them.",
            option="checkpoint.resume",
        )
    return found


def agree_on_inputs(peers: Peers, config: Config, base: Base, source: Source, precision: str, held_out: str) -> None:
    """Raises UserError on every process unless all have the same options, base, arithmetic and rows.

    precision: as accelerate names it. held_out: which pairs are measured, in words.
    """
    if peers.world == 1:
        return
    options = {name: str(value) for name, value in flat(to_dict(config)).items() if not _is_own(name)}
    peers.compare(options, "Start every process with the same options.")
    peers.compare({"base": _digest([json.dumps(base.unet_config, sort_keys=True, default=str)])}, _COPY.format("base"))
    peers.compare(
        {"arithmetic": precision},
        "Start every process on the same kind of device, with the same configuration of accelerate.",
        option="train.mixed_precision",
    )
    rows = np.unique(np.linspace(0, len(source) - 1, min(MOST_KEYS, len(source)), dtype=np.int64))
    keys = _digest(source.key(int(row)) for row in rows) if not source.captions_are_remote else "not read"
    peers.compare(
        {"pairs": f"{len(source)} pairs, names {keys}, measured: {held_out}"},
        _COPY.format("dataset"),
        option="data.location",
    )


def agree_on_data(peers: Peers, numbers: np.ndarray, record: DataRecord) -> None:
    """Raises UserError on every process unless all train on the same pairs, by what their checkpoints would hold.

    numbers: (N,) rows of the source that are used. Dates of files are not compared: copies have dates of their own.
    """
    if peers.world == 1:
        return
    found = {"usable rows": f"{len(numbers)} ({_digest([numbers.tobytes()])})"}
    for name, column in (("pictures", record.pictures), ("captions", record.captions)):
        if column is not None and column.kind != "stamps":
            found[name] = _digest([column.hashes.tobytes()])
    peers.compare(found, _COPY.format("dataset"), option="data.location")


_COPY = "Every machine needs an equal copy of the {}: copy it again, or name it on a disk that all of them share."


def _is_own(option: str) -> bool:
    return option in OWN_OPTIONS or option.partition(".")[0] in OWN_OPTIONS


def _digest(parts: Iterable[str | bytes]) -> str:
    """12 digits that stand for the parts in their order."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:12]
