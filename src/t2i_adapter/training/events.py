"""What a run reports to the Python program that started it. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["train", "gain", "score", "advice", "validation", "warning"]
_KEYS: tuple[tuple[str, Kind], ...] = (
    ("gain", "gain"),
    ("score", "score"),
    ("advice", "advice"),
    ("warning", "warning"),
    ("control", "validation"),
)
"""Key of an entry -> the kind of its event; other entries are of kind "train"."""


@dataclass(frozen=True)
class Event:
    """An entry of a run's log, at the time when it is written into metrics.jsonl.

    Attributes:
        step: updates made so far.
        steps: updates of the whole run.
        values: the entry. Of kind "train": loss, lr, samples_per_s and grad_norm since the last such entry, and more
            (docs/training.md).
        folder: the run's.
    """

    step: int
    steps: int
    values: Mapping[str, Any]
    folder: Path

    @property
    def kind(self) -> Kind:
        """Numbers of the training, a look at the control (`gain`, `score`, `advice`), the score of a validation, or a
        warning."""
        kinds: list[Kind] = [kind for key, kind in _KEYS if key in self.values]
        return kinds[0] if kinds else "train"


Callback = Callable[[Event], None]
"""Called on the main process. A warning about a checkpoint that cannot be written comes from another thread."""


class StopTraining(BaseException):
    """Raised by a callback: the run saves a checkpoint after this update, and ends. It can be resumed.

    It is not an Exception, so that code which keeps a callback alive through failures does not swallow it.
    """
