"""Routes of the page Try: adapters, uploads, maps of photos, pictures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.responses import Response

from t2i_adapter.errors import UserError
from t2i_adapter.models import record
from t2i_adapter.runs.metrics import read_json
from t2i_adapter.runs.pictures import FOLDER as CONTROL
from t2i_adapter.runs.read import Run, read_run
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.faults import CONFLICT, NotFoundError
from t2i_adapter.studio.form import options_of
from t2i_adapter.studio.paints import upload_file
from t2i_adapter.studio.pictures import store_upload
from t2i_adapter.studio.server import Call, Studio, route

_STEP = re.compile(r"[0-9]{1,12}")
MOST_COLOURS, MOST_LOOKED_AT = 24, 8
SAMPLING = (
    *("prompt", "negative", "seed", "num", "steps", "guidance", "scale", "condition_start", "condition_factor"),
    *("control_guidance", "scheduler", "width", "height", "grid", "strength"),
)
"""Options of `generate` that the page sets; files and adapters are named by ids."""


def list_adapters(call: Call) -> list[dict[str, Any]]:
    """Every run that has an adapter or a checkpoint."""
    found = []
    for run, folder in call.studio.places.run_folders().items():
        content = read_run(folder)
        if content.adapter is not None or content.checkpoints:
            found.append(_adapter(call.studio, run, folder, content))
    return sorted(found, key=lambda adapter: adapter["started"] or 0, reverse=True)


def one_adapter(call: Call) -> dict[str, Any]:
    folder = call.studio.places.run_folder(call.path["run"])
    content = read_run(folder)
    found = _adapter(call.studio, call.path["run"], folder, content)
    prompts = content.options.get("validation.prompts") or []
    return {**found, "prompts": prompts, "palette": palette(folder / CONTROL)}


def palette(folder: Path) -> list[str]:
    """The colours that most of the run's own condition pictures have, as #rrggbb, the most frequent first."""
    from PIL import Image

    counts: Counter[tuple[int, ...]] = Counter()
    files = [] if folder.is_symlink() else sorted(folder.glob("*-condition.png"))
    for file in [file for file in files if not file.is_symlink()][:MOST_LOOKED_AT]:
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                small = picture.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        counts.update({colour: count for count, colour in small.getcolors(4096) or () if isinstance(colour, tuple)})
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour, _ in counts.most_common(MOST_COLOURS)]


def _adapter(studio: Studio, run: str, folder: Path, content: Run) -> dict[str, Any]:
    known = content.adapter or _newest_record(folder, content)
    condition = known.get("condition") if isinstance(known.get("condition"), dict) else {}
    base = known.get("base")
    return {
        "id": run,
        "name": content.name,
        "folder": studio.places.relative(folder),
        "state": content.state,
        "started": content.started,
        "is_finished": content.adapter is not None,
        "checkpoints": content.checkpoints,
        "best": content.best[0] if content.best else None,
        "condition": condition,
        "resolution": known.get("resolution"),
        "base": base.get("name") if isinstance(base, dict) else None,
        "sampling": known.get("sampling") or {},
    }


def _newest_record(folder: Path, content: Run) -> dict[str, Any]:
    """The record of the newest checkpoint, of a run that is not finished."""
    if not content.checkpoints:
        return {}
    try:
        return read_json(adapter_folder(folder, str(content.checkpoints[-1])) / record.FILE_NAME)
    except NotFoundError:
        return {}


def adapter_folder(folder: Path, step: str) -> Path:
    """The folder of a run's adapter, or of one of its checkpoints' by its step. Raises NotFoundError."""
    if not step:
        return folder
    found = folder / f"checkpoint-{step}"
    if not _STEP.fullmatch(step) or found.is_symlink() or not found.is_dir():
        raise NotFoundError(f"there is no checkpoint of step {step[:20]}")
    inner = found / "t2iadapter"
    return inner if inner.is_dir() and not inner.is_symlink() else found


def upload(call: Call) -> dict[str, Any]:
    """A picture as the body."""
    name, width, height = store_upload(call.studio.places, call.body)
    return {"id": name, "width": width, "height": height}


def read_upload(call: Call) -> Response:
    file = upload_file(call.studio.places, call.path["upload"])
    return Response(file.read_bytes(), media_type="image/png")


def make_map(call: Call) -> dict[str, Any]:
    """Asks for the condition of an uploaded photo, as the adapter's training made its own."""
    folder = _chosen(call)
    photo = upload_file(call.studio.places, call.text("upload"))
    kind = call.text("condition", "")
    if kind:
        check_values({"condition": kind}, call.studio.places)
    content = {"adapter": call.studio.places.relative(folder), "photo": str(photo), "condition": kind}
    return {"id": _ask(call, "map", content)}


def paint(call: Call) -> dict[str, Any]:
    """Asks for pictures. The body has options of `generate` under `values`, and an upload under `condition`."""
    places, content = call.studio.places, call.json()
    given = content.get("values", {})
    if not isinstance(given, dict) or set(given) - set(SAMPLING):
        raise UserError(f"values: an object of some of {', '.join(SAMPLING)} is needed.")
    values = dict(given)
    values["adapter"] = [places.relative(_chosen(call))]
    if not call.text("condition"):
        raise UserError("Draw a condition, or send one.", option="image")
    values["image"] = [places.relative(upload_file(places, call.text("condition")))]
    options_of("generate", values)
    check_values({name: values[name] for name in given}, places)
    return {
        "id": _ask(call, "paint", {"values": values, "run": call.text("adapter"), "upload": call.text("condition")})
    }


def _chosen(call: Call) -> Path:
    """The folder of the adapter that the body names."""
    folder = call.studio.places.run_folder(call.text("adapter"))
    step = call.json().get("checkpoint")
    return adapter_folder(folder, "" if step is None else str(step))


def _ask(call: Call, kind: str, content: dict[str, Any]) -> str:
    """Refuses while a run has the card."""
    jobs = [job for job in call.studio.jobs.all() if job.state == "running" and job.queue == "device"]
    busy = [job.run or job.verb for job in jobs]
    busy += [row["folder"] for row in call.studio.runs.all() if row["state"] == "running"]
    if busy:
        raise UserError(f"The card is at work for {busy[0]}. Pause it, or wait.", kind=CONFLICT)
    return call.studio.paints.add(kind, content)


def list_paints(call: Call) -> list[dict[str, Any]]:
    return call.studio.paints.all()


def one_paint(call: Call) -> dict[str, Any]:
    return call.studio.paints.read(call.path["paint"])


def paint_picture(call: Call) -> Response:
    found = call.studio.paints.picture(call.path["paint"], call.path["picture"])
    return Response(found, media_type="image/png", headers={"cache-control": "private, max-age=3600"})


def cancel_paint(call: Call) -> dict[str, Any]:
    call.studio.paints.cancel(call.path["paint"])
    return call.studio.paints.read(call.path["paint"])


ROUTES = [
    route("GET", "/api/adapters", list_adapters),
    route("GET", "/api/adapters/{run}", one_adapter),
    route("PUT", "/api/uploads", upload, status=201),
    route("GET", "/api/uploads/{upload}", read_upload),
    route("POST", "/api/maps", make_map, status=202),
    route("GET", "/api/paint", list_paints),
    route("POST", "/api/paint", paint, status=202),
    route("GET", "/api/paint/{paint}", one_paint),
    route("GET", "/api/paint/{paint}/{picture}.png", paint_picture),
    route("POST", "/api/paint/{paint}/cancel", cancel_paint),
]
