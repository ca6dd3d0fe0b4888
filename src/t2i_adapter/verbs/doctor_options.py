"""Options of looking a data set over. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from t2i_adapter.config.tree import BaseOptions, DataOptions
from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class DoctorOptions:
    """Read a whole data set once and tell what is wrong with it. Exit code 1 where there are errors."""

    location: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """The data, as training takes it: a folder, manifest, shards or hub id."""
    data: DataOptions = field(default_factory=DataOptions)
    """How it is read and cut, as training would."""
    base: BaseOptions = field(default_factory=BaseOptions)
    """Whose tokenizer counts captions, and whose encoders are timed."""
    in_channels: Literal[1, 3] = 3
    """Channels of the condition that the adapter would have; decides what the cache takes."""
    measure: int = 4
    """Pictures and captions that are encoded with the base to tell time and memory; 0 leaves both unmeasured."""
    workers: int | None = None
    """Processes that read; None takes one a core, 0 reads in this one."""
    json: Path | None = None
    """File for everything that was found, as JSON."""
    html: Path | None = None
    """File for a page with the worst rows and a random sample; it needs no network."""
    skip_list: Path | None = None
    """File for the keys of rows better left out, one a line, as --data.skip takes it."""
    seed: int = 0
    """Chooses the rows where --data.max_train_samples is set, and the page's random sample."""

    def __post_init__(self) -> None:
        _require(self.measure >= 0, f"--measure {self.measure}: 0 or more")
        _require(self.workers is None or self.workers >= 0, f"--workers {self.workers}: 0 or more")
        _require(self.seed >= 0, f"--seed {self.seed}: 0 or more")
        given = self.data.train_data_dir or self.data.dataset_name
        _require(not given, f"--data.train_data_dir or --data.dataset_name {given}: DATA names the data already")
        for flag in ("json", "html", "skip_list"):
            file = getattr(self, flag)
            _require(file is None or file.parent.is_dir(), f"--{flag} {file}: there is no such folder; make it first")
            _require(file is None or not file.is_dir(), f"--{flag} {file}: is a folder; name a file")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
