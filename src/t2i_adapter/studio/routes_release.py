"""Routes of the pages Compare and Release: what differs between runs; what is measured, exported and published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i_adapter.config.tree import licence_of
from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic
from t2i_adapter.runs.compare import differences, differing_options, names_of
from t2i_adapter.runs.compare_page import sentence
from t2i_adapter.runs.metrics import read_file, read_json
from t2i_adapter.runs.read import Run, read_run
from t2i_adapter.studio.faults import CHANGED, CONFLICT, NotFoundError
from t2i_adapter.studio.routes_jobs import start
from t2i_adapter.studio.server import Call, route

MOST_COMPARED = 6
EVALUATION = "evaluation"
"""In a run's folder: what `evaluate` writes for the page."""
SIZES = {"quick": 16, "usual": 64, "large": 256}
"""How much to measure -> pairs."""
TARGETS = ("diffusers", "comfyui", "a1111", "invoke", "civitai", "space")
MOST_CARD = 1 << 20


def compare(call: Call) -> dict[str, Any]:
    """Up to six runs: their rows, what differs between their options, and in control against the first."""
    names = [name for name in call.query.get("runs", "").split(",") if name]
    if len(names) > MOST_COMPARED:
        raise UserError(f"{len(names)} runs are named; at most {MOST_COMPARED} are compared.")
    folders = [call.studio.places.run_folder(name) for name in dict.fromkeys(names)]
    runs = [read_run(folder) for folder in folders]
    shown = names_of(runs)
    return {
        "runs": [
            {**call.studio.runs.row(call.studio.places.run_id(folder), folder), "shown": name, **_road(run)}
            for folder, run, name in zip(folders, runs, shown, strict=True)
        ],
        "options": differing_options(runs) if len(runs) > 1 else {},
        "sentences": list(_sentences(runs, shown)),
    }


def _road(run: Run) -> dict[str, Any]:
    """What a curve over samples or seconds needs."""
    batch = run.record.get("global_batch")
    return {"global_batch": batch if isinstance(batch, int) else None, "base": run.options.get("base.name")}


def _sentences(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    if not runs:
        return []
    pairs = zip(names[1:], runs[1:], strict=True)
    return [sentence(one, names[0], name) for name, run in pairs for one in differences(runs[0], run)]


# Release ------------------------------------------------------------------------------------------------------------


def release(call: Call) -> dict[str, Any]:
    """An adapter as it would be published: files with sizes, the card, what is missing."""
    from huggingface_hub import get_token

    from t2i_adapter.export.release import make_release

    folder = call.studio.places.run_folder(call.path["run"])
    run, relative = read_run(folder), call.studio.places.relative(folder)
    evaluation = _evaluation(folder)
    found: dict[str, Any] = {
        "id": call.path["run"],
        "name": run.name,
        "folder": relative,
        "state": run.state,
        "checkpoints": run.checkpoints,
        "is_finished": run.adapter is not None,
        "data": run.options.get("data.location"),
        "evaluation": evaluation,
        "is_logged_in": get_token() is not None,
        "card": read_file(folder / "README.md", MOST_CARD).decode("utf-8", "replace"),
        "files": [],
        "notes": [],
        "error": None,
    }
    if run.adapter is None:
        return found
    try:
        made = make_release(folder, folder.name, evaluation=folder / EVALUATION if evaluation else None)
    except UserError as fault:
        return {**found, "error": fault.message()}
    card = next((file.content for file in made.files if file.name == "README.md"), b"")
    text = card.decode() if isinstance(card, bytes) else ""
    return {
        **found,
        "files": [{"name": file.name, "size": file.size} for file in made.files],
        "notes": list(made.notes),
        "published_card": text,
        "checks": _checks(run, folder, text, evaluation),
    }


def _evaluation(folder: Path) -> dict[str, Any] | None:
    """What was measured for the page, in short."""
    place = folder / EVALUATION
    content = {} if place.is_symlink() else read_json(place / "evaluation.json")
    return {"folder": EVALUATION, "pairs": content.get("pairs") or content.get("num")} if content else None


def _checks(run: Run, folder: Path, card: str, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a good release has, and whether this one has it."""
    adapter = run.adapter or {}
    base, condition = adapter.get("base"), adapter.get("condition")
    has_pictures = any((folder / "images").glob("*"))
    has_licence = "\nlicense:" in card.partition("\n---")[0] or card.startswith("---\nlicense:")
    return [
        {"what": "a licence", "is_there": has_licence, "how": "Choose one when you publish, or add it to the card."},
        {"what": "numbers of an evaluation", "is_there": bool(evaluation), "how": "Measure it: the button is below."},
        {"what": "pictures", "is_there": has_pictures, "how": "A run with validation prompts and images draws some."},
        {"what": "the base", "is_there": isinstance(base, dict) and bool(base.get("name")), "how": "Unknown."},
        {
            "what": "how its conditions are made",
            "is_there": isinstance(condition, dict) and bool(condition.get("name") or condition.get("column")),
            "how": "The record names no annotator.",
        },
        {
            "what": "a recommended strength",
            "is_there": bool(adapter.get("sampling")),
            "how": "`t2i-adapter evaluate --sweep` finds one.",
        },
    ]


def write_card(call: Call) -> dict[str, Any]:
    """Stores the card, README.md. `was`: the text that the page showed."""
    folder = call.studio.places.run_folder(call.path["run"])
    text, was = call.text("text", most=MOST_CARD), call.text("was", "", most=MOST_CARD)
    file = folder / "README.md"
    if file.is_symlink():
        raise UserError("The card is a link, which is not followed.", kind=CONFLICT)
    if read_file(file, MOST_CARD).decode("utf-8", "replace") != was:
        raise UserError("The card was changed meanwhile; load the page again to see it.", kind=CHANGED)
    write_atomic(file, [text.encode()])
    return {}


def measure(call: Call) -> dict[str, Any]:
    """Starts `evaluate` on the run's own data, or on `data`."""
    folder, relative = _finished(call)
    data = call.text("data", "") or read_run(folder).options.get("data.location")
    size = call.text("size", "quick")
    if not isinstance(data, str) or size not in SIZES:
        raise UserError(f"data and size are needed; size is one of {', '.join(SIZES)}.", option="data")
    values = {"adapter": [relative], "data": data, "num": SIZES[size], "split": call.text("split", "test")}
    more = {"out": f"{relative}/{EVALUATION}", "overwrite": True}
    return start(call.studio, "evaluate", {**values, **more}).to_json()


def export(call: Call) -> dict[str, Any]:
    """Starts `export` to a program."""
    _, relative = _finished(call)
    target = call.text("to")
    if target not in TARGETS:
        raise UserError(f"{target[:40]}: allowed are {', '.join(TARGETS)}.", option="to")
    return start(call.studio, "export", {"folder": relative, "to": target}).to_json()


def push(call: Call) -> dict[str, Any]:
    """Starts `push`, or lists what it would send (`dry_run`). The token is that of `hf auth login`."""
    folder, relative = _finished(call)
    content = call.json()
    values: dict[str, Any] = {"folder": relative, "dry_run": content.get("dry_run") is not False}
    values["private"] = content.get("private") is not False
    for name in ("model_id", "license", "license_name", "license_link"):
        if text := call.text(name, "", most=200):
            values[name] = text
    licence_of(values.get("license"), values.get("license_name"), values.get("license_link"))
    if _evaluation(folder):
        values["evaluation"] = f"{relative}/{EVALUATION}"
    return start(call.studio, "push", values).to_json()


def _finished(call: Call) -> tuple[Path, str]:
    """(folder, its path from the root) of a run with a finished adapter. Raises UserError."""
    folder = call.studio.places.run_folder(call.path["run"])
    if read_run(folder).adapter is None:
        raise UserError("The run has no finished adapter yet; let it end, or resume it.", kind=CONFLICT)
    if folder.is_symlink():
        raise NotFoundError("a link is not followed")
    return folder, call.studio.places.relative(folder)


ROUTES = [
    route("GET", "/api/compare", compare),
    route("GET", "/api/release/{run}", release),
    route("PUT", "/api/release/{run}/card", write_card),
    route("POST", "/api/release/{run}/measure", measure, status=201),
    route("POST", "/api/release/{run}/export", export, status=201),
    route("POST", "/api/release/{run}/push", push, status=201),
]
