"""Options of the verbs `cache ls`, `cache verify` and `cache rm`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class CacheOptions:
    """Where the cache is."""

    prepared_dir: str | None = None
    """Folder of prepared pictures and captions; None is $T2I_ADAPTER_CACHE, or ~/.cache/t2i_adapter/prepared."""


@dataclass(frozen=True)
class RemoveOptions:
    """What to remove: folders by their fingerprints, those not used for long, or all."""

    fingerprints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Fingerprints as `cache ls` shows them; their first letters do."""
    unused_days: float | None = None
    """Remove what no run has used for so many days."""
    all: bool = False
    """Remove everything; needs --yes."""
    yes: bool = False
    """Do not ask back: yes, everything."""
    prepared_dir: str | None = None
    """Folder of prepared pictures and captions; None is $T2I_ADAPTER_CACHE, or ~/.cache/t2i_adapter/prepared."""
