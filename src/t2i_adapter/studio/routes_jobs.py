"""Routes of jobs, forms and drafts: what is started, and how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from t2i_adapter import __version__
from t2i_adapter.config.paths import CONDITIONS, PATHS
from t2i_adapter.errors import UserError
from t2i_adapter.files import show_command, write_atomic
from t2i_adapter.runs.metrics import read_json
from t2i_adapter.studio import form
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.device import read_device
from t2i_adapter.studio.faults import CHANGED, CONFLICT, NotFoundError
from t2i_adapter.studio.jobs import QUEUES
from t2i_adapter.studio.server import Call, Studio, route

_DRAFT = re.compile(r"[a-z0-9-]{1,40}")
MOST_DRAFT = 1 << 20
MOST_PROCESSES = 64


def state(call: Call) -> dict[str, Any]:
    """What every page needs first."""
    studio = call.studio
    return {
        "version": __version__,
        "root": studio.places.root.name,
        "runs": studio.places.relative(studio.places.runs),
        "role": call.role,
        "verbs": list(QUEUES),
        "device": read_device(studio.places.root),
        "event": studio.hub.number,
    }


def folders(call: Call) -> dict[str, Any]:
    """The picker: what lies in a folder. `at`: an id of an earlier answer; none for the root."""
    places = call.studio.places
    at = call.query.get("at", "")
    entries = list(places.children(at))
    return {
        "path": places.relative(places.listed(at)),
        "folders": [{"id": e.id, "name": e.name} for e in entries if e.is_folder],
        "files": [{"id": e.id, "name": e.name} for e in entries if not e.is_folder],
    }


def form_of(call: Call) -> dict[str, Any]:
    """The options of a verb with their help."""
    verb = call.path["verb"].replace("_", " ")
    if verb not in QUEUES:
        raise NotFoundError(f"{verb}: cannot be started here")
    options = form.schema(verb)
    for option in options:
        option["names"] = PATHS.get(option["path"])
        option["is_condition"] = option["path"] in CONDITIONS and not option["choices"]
    return {"verb": verb, "options": options}


def check(call: Call) -> dict[str, Any]:
    """Values or a recipe's text, read and checked as the command line would: errors, values, recipe, command."""
    content = call.json()
    verb = call.text("verb")
    if verb not in QUEUES:
        raise UserError(f"{verb}: cannot be started here")
    if isinstance(content.get("yaml"), str):
        try:
            options: Any = form.from_yaml(content["yaml"])
        except UserError as fault:
            return {"errors": [{"option": fault.option, "message": fault.message()}], "values": None}
        errors: list[Any] = []
    else:
        options, errors = form.read_options(verb, _values(content))
    if options is None:
        return {"errors": errors, "values": None}
    values = form.changed(options)
    try:
        form.check_shown(values)
        check_values(values, call.studio.places)
    except UserError as fault:
        errors = [{"option": fault.option, "message": fault.message()}]
    words = form.argv_of(verb, options)
    yaml = form.to_yaml(options) if verb in ("train", "prepare") else ""
    return {"errors": errors, "values": values, "yaml": yaml, "command": show_command("t2i-adapter", *words)}


def _values(content: dict[str, Any]) -> dict[str, Any]:
    values = content.get("values", {})
    if not isinstance(values, dict):
        raise UserError("values: an object of options is needed.")
    return values


def add_job(call: Call) -> dict[str, Any]:
    """Puts a verb into the queue."""
    content = call.json()
    return start(call.studio, call.text("verb"), _values(content), content.get("processes", 1)).to_json()


def start(
    studio: Studio, verb: str, values: dict[str, Any], processes: Any = 1, own: dict[str, Any] | None = None
) -> Any:
    """Checks a verb's values and puts it into the queue. own: values of the studio itself, which may name files in its
    own folder. Raises UserError."""
    if verb not in QUEUES:
        raise UserError(f"{verb}: cannot be started here; allowed are {', '.join(QUEUES)}")
    check_values(values, studio.places)
    options = form.options_of(verb, values, own)
    if type(processes) is not int or not 1 <= processes <= MOST_PROCESSES or (processes > 1 and verb != "train"):
        raise UserError(f"processes: 1 to {MOST_PROCESSES} for train, and 1 for other verbs.")
    run = ""
    if verb == "train":
        run = studio.places.relative(studio.places.confine(options.output_dir, "output_dir"))
        _check_free(studio, run, values)
    return studio.jobs.add(verb, form.argv_of(verb, options), run=run, processes=processes)


def _check_free(studio: Studio, run: str, values: dict[str, Any]) -> None:
    """Raises UserError if a run's folder has a run already, which `resume` would continue."""
    for folder in studio.places.run_folders().values():
        if studio.places.relative(folder) == run and values.get("checkpoint.resume") is None:
            raise UserError(
                f"{run}: has a run already; resume that run, or choose another folder",
                option="output_dir",
                kind=CONFLICT,
            )


def list_jobs(call: Call) -> list[dict[str, Any]]:
    return [job.to_json() for job in call.studio.jobs.all()]


def job_action(call: Call) -> dict[str, Any]:
    """pause, cancel, kill, up or down."""
    jobs, job, action = call.studio.jobs, call.path["job"], call.path["action"]
    actions = {
        "pause": jobs.pause,
        "cancel": jobs.cancel,
        "kill": jobs.kill,
        "up": lambda one: jobs.move(one, -1),
        "down": lambda one: jobs.move(one, 1),
    }
    if action not in actions:
        raise NotFoundError(f"{action[:40]!r}: a job can be {', '.join(actions)}")
    jobs.read(job)
    actions[action](job)
    return jobs.read(job).to_json()


def job_log(call: Call) -> dict[str, Any]:
    text, end = call.studio.jobs.log(call.path["job"], call.number("from", most=10**15))
    return {"text": text, "at": end}


# Drafts: what is typed into a form, kept at each change -------------------------------------------------------------


def read_draft(call: Call) -> dict[str, Any]:
    return {"content": read_json(_draft(call)).get("content"), "was": _version(_draft(call))}


def write_draft(call: Call) -> dict[str, Any]:
    """Keeps a form's content. `was`: the version that the page began from, so that two tabs do not overwrite each
    other without a word."""
    file, content = _draft(call), call.json()
    if len(call.body) > MOST_DRAFT:
        raise UserError("The draft is too long.")
    present = _version(file)
    if content.get("was") != present:
        raise UserError("This form was changed in another tab meanwhile; its present content is shown.", kind=CHANGED)
    call.studio.places.own_folder("drafts")
    write_atomic(file, [json.dumps({"content": content.get("content"), "version": (present or 0) + 1}).encode()])
    return {"was": _version(file)}


def _draft(call: Call) -> Path:
    name = call.path["name"]
    if not _DRAFT.fullmatch(name):
        raise NotFoundError("a draft's name has small letters, digits and dashes")
    return call.studio.places.state / "drafts" / f"{name}.json"


def _version(file: Path) -> int | None:
    found = read_json(file).get("version")
    return found if isinstance(found, int) else None


ROUTES = [
    route("GET", "/api/state", state),
    route("GET", "/api/folders", folders),
    route("GET", "/api/form/{verb}", form_of),
    route("POST", "/api/check", check),
    route("GET", "/api/jobs", list_jobs),
    route("POST", "/api/jobs", add_job, status=201),
    route("POST", "/api/jobs/{job}/{action}", job_action),
    route("GET", "/api/jobs/{job}/log", job_log),
    route("GET", "/api/drafts/{name}", read_draft),
    route("PUT", "/api/drafts/{name}", write_draft),
]
