"""Routes of the page Data: datasets, rows, pictures, captions, findings, the list of rows to skip."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from t2i_adapter.errors import UserError
from t2i_adapter.studio.confine import check_values
from t2i_adapter.studio.datasets import OPTIONS, SIDES
from t2i_adapter.studio.faults import NotFoundError
from t2i_adapter.studio.form import options_of
from t2i_adapter.studio.routes_jobs import start
from t2i_adapter.studio.server import Call, route

MOST_ROWS = 200
MOST_KEYS = 100_000


def list_data(call: Call) -> list[dict[str, Any]]:
    return call.studio.datasets.all()


def add_data(call: Call) -> dict[str, Any]:
    """Registers a dataset by options of data, without `data.` in front. Raises UserError."""
    values = call.json().get("values")
    if not isinstance(values, dict) or set(values) - set(OPTIONS):
        raise UserError(f"values: an object of some of {', '.join(OPTIONS)} is needed.")
    values = {f"data.{name}": value for name, value in values.items() if value not in (None, "")}
    if not values.get("data.location"):
        raise UserError("Choose a folder, or write where the dataset is.", option="data.location")
    check_values(values, call.studio.places)
    options_of("train", values)
    name = call.studio.datasets.add({path.removeprefix("data."): value for path, value in values.items()})
    return {"id": name}


def one_data(call: Call) -> dict[str, Any]:
    """What the dataset holds, and what the doctor found in it."""
    datasets, name = call.studio.datasets, call.path["data"]
    source = datasets.source(name)
    report = datasets.report(name)
    findings = [{**one, "rows": len(one["rows"])} for one in report.get("findings", ())]
    return {
        "id": name,
        "values": datasets.values(name),
        "count": len(source),
        "described": source.describe().splitlines(),
        "annotate": source.annotate,
        "skipped": len(datasets.skipped(name)),
        "skip_file": call.studio.places.relative(datasets.skip_file(name)),
        "report": {**report, "findings": findings} if report else None,
    }


def remove_data(call: Call) -> dict[str, Any]:
    call.studio.datasets.remove(call.path["data"])
    return {}


def rows(call: Call) -> dict[str, Any]:
    count = call.number("n", 50, most=MOST_ROWS)
    start_ = call.number("from", 0)
    find, finding = call.query.get("find", "")[:200], call.query.get("finding", "")[:60]
    return call.studio.datasets.rows(call.path["data"], start_, count, find, finding)


def picture(call: Call) -> Response:
    what, side = call.path["what"], call.number("side", SIDES[0], most=SIDES[-1])
    if what not in ("image", "condition"):
        raise NotFoundError("a row has an image and a condition")
    if side not in SIDES:
        raise UserError(f"side: allowed are {', '.join(map(str, SIDES))}.")
    data = call.studio.datasets.picture(call.path["data"], _row(call), what, side)
    return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=60"})


def _row(call: Call) -> int:
    text = call.path["row"]
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise NotFoundError("a row is a number from 0")
    return int(text)


def write_captions(call: Call) -> dict[str, Any]:
    """Stores captions of a row; `was`: those that the page showed."""
    content = call.json()
    captions, was = _texts(content, "captions"), _texts(content, "was")
    return call.studio.datasets.write_captions(call.path["data"], _row(call), captions, was)


def _texts(content: dict[str, Any], name: str) -> list[str]:
    found = content.get(name)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{name}: a list of texts is needed.")
    if any("\0" in one or len(one.encode("utf-8", "replace")) > 10_000 for one in found):
        raise UserError(f"{name}: a caption has at most 10,000 bytes and no zero byte.")
    return found


def skip(call: Call) -> dict[str, Any]:
    """Puts rows on the list of those to skip, or takes them out."""
    content = call.json()
    keys = content.get("keys")
    if not isinstance(keys, list) or len(keys) > MOST_KEYS or not all(_is_key(key) for key in keys):
        raise UserError("keys: a list of rows' keys is needed.")
    call.studio.datasets.values(call.path["data"])
    return {"skipped": call.studio.datasets.skip(call.path["data"], keys, content.get("on") is not False)}


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and len(key) < 4096 and "\0" not in key and key.splitlines() == [key]


def doctor(call: Call) -> dict[str, Any]:
    """Starts the doctor on a dataset; its findings appear when it ends."""
    datasets, name = call.studio.datasets, call.path["data"]
    values = {f"data.{option}": value for option, value in datasets.values(name).items()}
    more = {"measure": 0, "json": call.studio.places.relative(datasets.report_file(name))}
    return start(call.studio, "doctor", values, own=more).to_json()


ROUTES = [
    route("GET", "/api/data", list_data),
    route("POST", "/api/data", add_data, status=201),
    route("GET", "/api/data/{data}", one_data),
    route("POST", "/api/data/{data}/remove", remove_data),
    route("GET", "/api/data/{data}/rows", rows),
    route("GET", "/api/data/{data}/rows/{row}/{what}", picture),
    route("PUT", "/api/data/{data}/rows/{row}/captions", write_captions),
    route("PUT", "/api/data/{data}/skip", skip),
    route("POST", "/api/data/{data}/doctor", doctor, status=201),
]
