"""Logs scalars and pictures to trackers and to metrics.jsonl. A tracker that fails never stops a run."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import math
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL.Image import Image
from tqdm import tqdm

from t2i_adapter.config.tree import Config, flat, to_dict
from t2i_adapter.errors import UserError, flag, redact
from t2i_adapter.files import parse_json, show_command, write_atomic

logger = logging.getLogger(__name__)
WANDB_RUN = "wandb.json"
"""In a run's folder: {"id"} of the wandb run that it is logged to."""


def trackers_named(report_to: str) -> list[str] | None:
    """The trackers' names for accelerate, None for `none`. Raises UserError for one that is unknown or missing."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names in ([], ["none"]):
        return None
    known, installed = {str(kind) for kind in LoggerType}, {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise UserError(f"{name}: no such tracker; allowed are none, {allowed}.", option="tracking.report_to")
        if name not in installed | {"all"}:
            raise UserError(
                f"{name}: it is not installed. pip install {name}, or use {flag('tracking.report_to')} none.",
                option="tracking.report_to",
            )
    return names


def start(accelerator: Accelerator, config: Config, *, is_resumed: bool) -> None:
    """Opens the trackers on the main process, with the run's options without secrets."""
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    _warn_once.cache_clear()
    folder = Path(config.output_dir) / config.tracking.logging_dir
    places: dict[str, dict[str, Any]] = {}
    options = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flat(to_dict(config)).items()
    }

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sys.argv[:] = [redact(word) for word in sys.argv]  # trackers record the command line
        if any(str(getattr(kind, "name", kind)).lower() == "wandb" for kind in accelerator.log_with):
            places["wandb"] = _wandb_options(folder, Path(config.output_dir) / WANDB_RUN, is_resumed)
        accelerator.init_trackers(config.tracking.project, options, places)

    _guarded(begin, "start")


def _wandb_options(folder: Path, file: Path, is_resumed: bool) -> dict[str, Any]:
    """Arguments of `wandb.init`. A resumed run continues its wandb run, whose id is in `file`. Without an API key wandb
    would wait for one at a prompt, so it logs offline."""
    run_id = parse_json(file.read_bytes())["id"] if is_resumed and file.is_file() else secrets.token_hex(4)
    write_atomic(file, [json.dumps({"id": run_id}).encode()])
    options = {"dir": str(folder), "id": run_id, "resume": "allow"}  # the default of dir is the current folder
    if _wandb_has_key():
        return options
    tqdm.write(
        "wandb: no API key was found (WANDB_API_KEY, or `wandb login`), so this run is logged offline. "
        f"To upload it later: {show_command('wandb', 'sync', folder / 'wandb')}/offline-run-*-{run_id}"
    )
    return {**options, "mode": "offline"}


def _wandb_has_key() -> bool:
    """Whether wandb needs not ask for an API key: it has one, or it is set not to go online."""
    settings = importlib.import_module("wandb").setup().settings
    if settings.mode not in (None, "online") or settings.api_key:
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(settings.base_url).hostname or "") is not None


def log(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Sends scalars to every tracker."""
    for tracker in accelerator.trackers:
        _guarded(partial(tracker.log, dict(values), step=step), "log to")


def log_pictures(accelerator: Accelerator, rows: Mapping[str, tuple[str, Sequence[Image]]], step: int) -> None:
    """Sends pictures to every tracker that can store them. rows: tag -> (caption, pictures of one size)."""
    for tracker in accelerator.trackers:
        send = PICTURES.get(tracker.name)
        if send is None:
            logger.warning("pictures are not sent to %s; they are in the output folder.", tracker.name)
            continue
        for tag, (caption, pictures) in rows.items():
            _guarded(lambda t=tracker, s=send, a=(tag, caption, pictures): s(t, *a, step), "send pictures to")


def finish(accelerator: Accelerator) -> None:
    """Closes the trackers."""
    for tracker in accelerator.trackers:
        _guarded(tracker.finish, "close")


def _to_tensorboard(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
    # The tag names the row, not the prompt, so two rows with one prompt stay apart.
    tracker.log_images({tag: np.stack([np.asarray(p.convert("RGB")) for p in pictures])}, step=step, dataformats="NHWC")
    tracker.writer.add_text(tag, caption, step)


def _to_media(module: str) -> Callable[[Any, str, str, Sequence[Image], int], None]:
    """A sender for trackers that log pictures as `module.Image(picture, caption=...)`."""

    def send(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
        kind = importlib.import_module(module).Image
        tracker.log({tag: [kind(picture, caption=caption) for picture in pictures]}, step=step)

    return send


def _to_comet(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
    for index, picture in enumerate(pictures):
        tracker.tracker.log_image(picture, name=f"{tag}/{index}", step=step, metadata={"prompt": caption})


def _to_mlflow(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
    mlflow = importlib.import_module("mlflow")
    for index, picture in enumerate(pictures):
        mlflow.log_image(picture, artifact_file=f"{tag}/step-{step:06d}-{index}.png")


def _to_dvclive(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
    for index, picture in enumerate(pictures):
        tracker.live.log_image(f"{tag}/step-{step:06d}-{index}.png", picture)


def _to_log_images(tracker: Any, tag: str, caption: str, pictures: Sequence[Image], step: int) -> None:
    tracker.log_images({f"{tag}/{i}": np.asarray(p.convert("RGB")) for i, p in enumerate(pictures)}, step=step)


PICTURES: dict[str, Callable[[Any, str, str, Sequence[Image], int], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_media("wandb"),
    "trackio": _to_media("trackio"),
    "swanlab": _to_media("swanlab"),
    "comet_ml": _to_comet,
    "mlflow": _to_mlflow,
    "dvclive": _to_dvclive,
    "aim": _to_log_images,
    "clearml": _to_log_images,
}


def append_metrics(path: Path, values: Mapping[str, Any], step: int) -> None:
    """Appends one JSON line. A full disk costs the line, not the run."""
    line = (json.dumps({"step": step, **values}) + "\n").encode()
    try:
        place = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with os.fdopen(place, "ab", buffering=0) as file:
            whole = os.fstat(place).st_size
            if file.write(line) != len(line):
                os.ftruncate(place, whole)  # half a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as fault:
        logger.warning("%s: step %d could not be logged (%s); training goes on.", path, step, fault)


def truncate_metrics(path: Path, step: int) -> None:
    """Removes the entries after `step`, which a resumed run writes again, and lines that a kill cut off."""
    if path.is_file():
        kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
        write_atomic(path, [line + b"\n" for line in kept])


def _step_of(line: bytes) -> float:
    """The step of a log entry; inf for a malformed line."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _guarded(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except Exception as fault:  # of any kind: a run is worth more than its curve
        _warn_once(what, type(fault).__name__, " ".join(redact(str(fault)).split()))


@lru_cache(maxsize=100)
def _warn_once(what: str, kind: str, fault: str) -> None:
    """Logs each warning once, though a tracker may fail at each log entry."""
    logger.warning("Could not %s a tracker (%s: %s); training goes on.", what, kind, fault)
