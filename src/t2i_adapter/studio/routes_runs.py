"""Routes of runs: the list, one run, its numbers and pictures; pause, resume, extend."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.responses import Response

from t2i_adapter.errors import UserError
from t2i_adapter.runs.metrics import read_file
from t2i_adapter.runs.read import OPTIONS, read_run
from t2i_adapter.studio import form
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.faults import CONFLICT, NotFoundError
from t2i_adapter.studio.guard import REPORT_CSP
from t2i_adapter.studio.run_views import report_of
from t2i_adapter.studio.server import Call, route

MOST_COMPARED = 6
MOST_STEPS = 10**9


def list_runs(call: Call) -> list[dict[str, Any]]:
    return call.studio.runs.all()


def one_run(call: Call) -> dict[str, Any]:
    whole = call.studio.runs.whole(call.path["run"])
    return {**whole, "job": _job_of(call, whole["folder"])}


def _job_of(call: Call, folder: str) -> dict[str, Any] | None:
    """The newest job that wrote a run's folder."""
    mine = [job for job in call.studio.jobs.all() if job.run == folder]
    return max(mine, key=lambda job: job.created).to_json() if mine else None


def metrics(call: Call) -> dict[str, Any]:
    return call.studio.runs.metrics(call.path["run"])


def picture(call: Call) -> Response:
    """A small picture, decoded and encoded again here."""
    found = call.studio.runs.picture(call.path["run"], call.path["step"], call.path["name"])
    if found is None:
        raise NotFoundError("there is no such picture")
    return Response(found, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})


def report(call: Call) -> Response:
    """The page that the run wrote, in a sandbox."""
    found = report_of(call.studio.places.run_folder(call.path["run"]))
    if not found:
        raise NotFoundError("this run has no page yet")
    return Response(found, media_type="text/html; charset=utf-8", headers={"content-security-policy": REPORT_CSP})


def pause(call: Call) -> dict[str, Any]:
    """Asks a run to save and end. One that a terminal started gets the same signal."""
    folder = call.studio.places.run_folder(call.path["run"])
    relative = call.studio.places.relative(folder)
    running = [job for job in call.studio.jobs.all() if job.run == relative and job.state == "running"]
    if running:
        call.studio.jobs.pause(running[0].id)
    else:
        call.studio.jobs.pause_outside(folder)
    return {"asked": "pause"}


def resume(call: Call) -> dict[str, Any]:
    """Continues a run from its newest checkpoint, with its own options; `max_steps` extends it."""
    studio, run = call.studio, call.path["run"]
    folder = studio.places.run_folder(run)
    found, relative = read_run(folder), studio.places.relative(folder)
    if found.state == "running":
        raise UserError("The run is running already.", kind=CONFLICT)
    _check_options(call, folder)
    names = {"recipe": f"{relative}/{OPTIONS}", "output_dir": relative}
    words = ["train", *_flags(names), "--checkpoint.resume", "auto"]
    steps = call.json().get("max_steps")
    if steps is not None:
        if type(steps) is not int or not found.step < steps <= MOST_STEPS:
            raise UserError(
                f"{steps}: the run has made {found.step:,} updates; name a larger number", option="train.max_steps"
            )
        words += ["--train.max_steps", str(steps)]
    if call.json().get("allow_changed") is True:
        words.append("--checkpoint.allow_changed")
    return studio.jobs.add("train", words, run=relative).to_json()


def _flags(values: dict[str, str]) -> Iterator[str]:
    """Words that set options; a value that begins with a dash stands in its flag's word."""
    for name, value in values.items():
        yield from [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _check_options(call: Call, folder: Path) -> None:
    """Raises UserError unless the options that a run wrote are such as may be started here: a run that came from
    somebody else may name any file."""
    text = read_file(folder / OPTIONS).decode("utf-8", "replace")
    if not text:
        raise UserError("The run has no options.yaml, so it cannot be resumed here.", kind=CONFLICT)
    try:
        values = form.changed(form.from_yaml(text))
        own = ("output_dir", *(path for path in values if path.startswith("checkpoint.")))
        check_values({path: value for path, value in values.items() if path not in own}, call.studio.places)
    except UserError as fault:
        raise UserError(f"{fault.message()} It can be resumed in a terminal only.", kind=CONFLICT) from None


def trash(call: Call) -> dict[str, Any]:
    """Moves a run's folder to the studio's trash. `name`: the run's name, typed, against a slip of the finger."""
    places = call.studio.places
    folder = places.run_folder(call.path["run"])
    found = read_run(folder)
    if call.text("name") != found.name:
        raise UserError(f"Type the run's name, {found.name}, to move it to the trash.")
    if folder.resolve() == places.root:
        raise UserError("This run's folder is the studio's own; it cannot be moved here.", kind=CONFLICT)
    relative = places.relative(folder)
    is_used = any(job.run == relative and job.state in ("queued", "running") for job in call.studio.jobs.all())
    if found.state == "running" or is_used:
        raise UserError("The run is running or waits in the queue; pause or cancel it first.", kind=CONFLICT)
    trashed = places.own_folder("trash")
    target, number = trashed / folder.name, 1
    while target.exists():
        number += 1
        target = trashed / f"{folder.name}-{number}"
    shutil.move(folder, target)
    places.forget_runs()
    return {"trash": str(target.relative_to(places.root))}


ROUTES = [
    route("GET", "/api/runs", list_runs),
    route("GET", "/api/runs/{run}", one_run),
    route("GET", "/api/runs/{run}/metrics", metrics),
    route("GET", "/api/runs/{run}/pictures/{step}/{name}", picture),
    route("GET", "/api/runs/{run}/report", report),
    route("POST", "/api/runs/{run}/pause", pause),
    route("POST", "/api/runs/{run}/resume", resume),
    route("POST", "/api/runs/{run}/trash", trash),
]
