"""What the processes of a run must agree on before they train together: the checkpoint that they resume from.

Machines without a common disk see different folders. If one of them resumed and another began anew, their gradients
would be averaged without a word.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object

from t2i_adapter.errors import UserError, flag
from t2i_adapter.training.checkpoint import STATE


class _View(NamedTuple):
    """What one process sees. digest: of the checkpoint's state.json, which holds the digests of its other files; "" if
    there is no checkpoint. fault: the error instead."""

    machine: str
    folder: str
    name: str
    digest: str
    fault: str


def agree_on_checkpoint(accelerator: Accelerator, output_dir: Path, find: Callable[[], Path | None]) -> Path | None:
    """Calls `find` on every process, and returns the checkpoint that it finds, the same on all of them.

    Raises UserError on every process if one of them finds another one, or none, or raises UserError itself.
    """
    if accelerator.num_processes == 1:
        return find()
    found, error = None, None
    try:
        found = find()
    except UserError as fault:
        error = fault
    digest = hashlib.sha256((found / STATE).read_bytes()).hexdigest() if found else ""
    own = _View(platform.node(), str(output_dir), found.name if found else "none", digest, str(error or ""))
    views = [_View(*view) for view in gather_object([tuple(own)])]
    if error:
        raise error
    failed = next((rank for rank, view in enumerate(views) if view.fault), None)
    if failed is not None:
        raise UserError(f"process {failed} fails: {views[failed].fault}")
    other = next((rank for rank, view in enumerate(views) if view.digest != views[0].digest), None)
    if other is not None:
        raise UserError(
            "the processes see different checkpoints: "
            + ", ".join(f"process {rank} on {_place(views[rank])}" for rank in (0, other))
            + f". Name {flag('output_dir')} on a disk that all machines share, or copy the run's folder of process 0 "
            "to each of them.",
            option="checkpoint.resume",
        )
    return found


def _place(view: _View) -> str:
    return f"{view.machine} {view.name} in {view.folder}"
