"""Routes of the page New run: recipes, and the plan of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import t2i_adapter
from t2i_adapter.cards import CARDS
from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, write_atomic
from t2i_adapter.runs.metrics import read_file
from t2i_adapter.studio import form
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.faults import CHANGED, CONFLICT
from t2i_adapter.studio.routes_jobs import start
from t2i_adapter.studio.server import Call, Studio, route

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}")
MOST_BYTES = 256 << 10
OWN = Path(t2i_adapter.__file__).parents[2] / "recipes"
"""The recipes of a checkout of this project; an installed package has none."""


def list_recipes(call: Call) -> list[dict[str, Any]]:
    """Recipes in the root's folder `recipes`, then those that come with the project, each with its comment."""
    found = {}
    for folder, is_own in ((call.studio.places.root / "recipes", True), (OWN, False)):
        for file in [] if folder.is_symlink() else sorted(folder.glob("*.yaml")):
            name = file.stem.lower()
            if _NAME.fullmatch(name) and name not in found and (recipe := _recipe(file, is_own)):
                found[name] = recipe
    return list(found.values())


def _recipe(file: Path, is_own: bool) -> dict[str, Any] | None:
    text = read_file(file, MOST_BYTES).decode("utf-8", "replace")
    try:
        options = form.from_yaml(text)
    except UserError as fault:
        return {"id": file.stem.lower(), "about": str(fault), "values": None, "is_own": is_own}
    about = " ".join(_comment(text))
    return {"id": file.stem.lower(), "about": about, "values": form.changed(options), "yaml": text, "is_own": is_own}


def _comment(text: str) -> Iterator[str]:
    """The sentences at the top of a recipe, without its command."""
    for line in text.splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#"):
            return
        if not words.startswith(("t2i-adapter", "make ")):
            yield words


def save_recipe(call: Call) -> dict[str, Any]:
    """Writes a recipe into the root's folder `recipes`. `was`: its text that the page knows, "" for a new one."""
    name, text, was = call.path["recipe"], call.text("yaml", most=MOST_BYTES), call.text("was", "", most=MOST_BYTES)
    if not _NAME.fullmatch(name):
        raise UserError("A recipe's name has small letters, digits, dashes and underscores.")
    options = form.from_yaml(text)
    values = form.changed(options)
    form.check_shown(values)
    check_values(values, call.studio.places)
    file = call.studio.places.confine(f"recipes/{name}.yaml", "recipe")
    present = read_file(file, MOST_BYTES).decode("utf-8", "replace")
    if present and present != was:
        raise UserError(f"{name}: there is another recipe of this name; choose another one.", kind=CHANGED)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, [text.encode()])
    return {"id": name}


def plan(call: Call) -> dict[str, Any]:
    """Starts the verb `plan` for a run's values. A plan that waits or runs is cancelled: it is of older values."""
    studio, values = call.studio, call.json().get("values")
    if not isinstance(values, dict):
        raise UserError("values: an object of options is needed.")
    _end_older(studio)
    card = call.text("card", "")
    more = {name: value for name, value in values.items() if not name.startswith("checkpoint.")}
    more |= {"card": card} if card else {}
    return start(studio, "plan", {**more, "probe": False}, own={"json": True}).to_json()


def read_plan(call: Call) -> dict[str, Any]:
    """What a plan that has ended printed: the JSON of `plan --json`."""
    job = call.studio.jobs.read(call.path["job"])
    if job.verb != "plan" or job.state != "done":
        raise UserError("This plan has not ended.", kind=CONFLICT)
    text, _ = call.studio.jobs.log(job.id, 0)
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line == "{"), len(lines))
    try:
        found = parse_json("\n".join(lines[first:]))
    except ValueError:
        raise UserError("The plan cannot be read; its log is among the jobs.") from None
    return {"plan": found}


def list_cards(_: Call) -> list[str]:
    """The names of the cards that a plan knows."""
    return list(CARDS)


def _end_older(studio: Studio) -> None:
    for job in studio.jobs.all():
        if job.verb == "plan" and job.state in ("queued", "running"):
            studio.jobs.cancel(job.id)


ROUTES = [
    route("GET", "/api/recipes", list_recipes),
    route("PUT", "/api/recipes/{recipe}", save_recipe),
    route("GET", "/api/cards", list_cards),
    route("POST", "/api/plan", plan, status=201),
    route("GET", "/api/plan/{job}", read_plan),
]
