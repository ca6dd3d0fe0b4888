"""`python -m t2i_adapter.studio.painter FOLDER`: a process that generates pictures for the page Try, again and again.

It keeps the last adapter and its base loaded, so that a picture takes seconds. It reads requests from stdin, a line of
JSON with the name of a folder each, and writes what happens to stdout. The pictures are those of the verb `generate`,
to the bit: it runs the verb's own function.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.errors import UserError, plain_flag, redact
from t2i_adapter.files import parse_json, show_command, write_atomic
from t2i_adapter.progress import VARIABLE
from t2i_adapter.studio.child import STOPPED
from t2i_adapter.studio.files import CANCELLED, PROGRESS, REQUEST, RESULT
from t2i_adapter.studio.form import argv_of, options_of
from t2i_adapter.studio.process import let_in
from t2i_adapter.verbs.generate import GenerateOptions, Opener, run

if TYPE_CHECKING:
    from t2i_adapter.generation.pipeline import Models
    from t2i_adapter.models.family import AdapterPipeline


class _Cancelled(BaseException):
    """The request in work is to be given up."""


class Warm(Opener):
    """Keeps the adapters and the base of the last request."""

    def __init__(self) -> None:
        self._key: Any = None
        self._models: list[Models] = []
        self._pipeline: AdapterPipeline | None = None

    def models(self, options: GenerateOptions) -> list[Models]:
        key = _key(options)
        if key != self._key:
            self._key, self._models, self._pipeline = None, [], None  # frees the old one before the new one loads
            _say("phase", text="opening the adapter")
            self._models = super().models(options)
            self._key = key
        return self._models

    def pipeline(self, options: GenerateOptions, models: Sequence[Models]) -> AdapterPipeline:
        if self._pipeline is None:
            _say("phase", text="loading the base")
            self._pipeline = super().pipeline(options, models)
        _say("phase", text="generating")
        return self._pipeline


def _key(options: GenerateOptions) -> Any:
    """What the loaded models depend on: their options, and when the adapter's files were written."""
    names = ("adapter", "base", "base_config", "base_vae", "device", "precision", "lora", "quantize")
    files = [file for name in options.adapter for file in sorted(Path(name).glob("*.safetensors"))]
    return [getattr(options, name) for name in names], [(str(file), file.stat().st_mtime_ns) for file in files]


def main(state: Path) -> None:
    """Serves requests until stdin ends. state: the studio's folder."""
    global _answers, _current, _folder
    _answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to stderr, not among the answers
    signal.signal(signal.SIGINT, _cancel)
    let_in([signal.SIGINT])
    warm = Warm()
    for line in sys.stdin:
        name = parse_json(line)["id"]
        folder = state / "paint" / name
        os.environ[VARIABLE] = str(folder / PROGRESS)
        try:
            _current, _folder = name, folder
            result = _serve(folder, warm)
            _current = ""
        except _Cancelled:  # a moment before or after the work
            _current, result = "", {"state": "cancelled"}
        write_atomic(folder / RESULT, [json.dumps({**result, "ended": time.time()}).encode()])
        _answers.write(json.dumps({"id": name, "event": "end", **result}) + "\n")


_answers: Any = None
_current, _folder = "", Path()


def _say(event: str, **more: Any) -> None:
    _answers.write(json.dumps({"id": _current, "event": event, **more}) + "\n")


def _cancel(_: int, __: Any) -> None:
    if _current and (_folder / CANCELLED).exists():  # else the signal was for the request before
        raise _Cancelled


def _serve(folder: Path, warm: Warm) -> dict[str, Any]:
    """Does what a folder's request asks for; returns its result."""
    try:
        if (folder / CANCELLED).exists():
            return {"state": "cancelled"}
        request = parse_json((folder / REQUEST).read_bytes())
        if request["kind"] == "map":
            return _make_map(folder, request)
        return _paint(folder, request, warm)
    except _Cancelled:
        return {"state": "cancelled"}
    except UserError as fault:
        return {"state": "failed", "error": fault.message(plain_flag), "option": fault.option}
    except Exception as fault:  # of any kind, such as out of memory: the page shows it, and the next request is served
        return {"state": "failed", "error": redact(f"{type(fault).__name__}: {fault}"), "option": None}


def _paint(folder: Path, request: dict[str, Any], warm: Warm) -> dict[str, Any]:
    options = options_of("generate", request["values"], {"out": str(folder)})
    files = run(options, warm)
    columns = [heading for heading, _ in options.columns()]
    each = len(files) // len(columns)
    pictures = [{"name": file.stem, "column": columns[n // each]} for n, file in enumerate(files)]
    command = show_command("t2i-adapter", *argv_of("generate", options_of("generate", request["values"])))
    return {"state": "done", "pictures": pictures, "command": command}


def _make_map(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Makes the condition of a photo as the adapter's training made its conditions."""
    from t2i_adapter.generation.condition import find_annotator, make_condition, read_photo
    from t2i_adapter.models.adapter import load_adapter
    from t2i_adapter.models.record import read_metadata

    _say("phase", text="making the condition")
    adapter = request["adapter"]
    metadata = read_metadata(adapter)
    annotator = find_annotator(request.get("condition") or None, metadata, adapter)
    photo = read_photo(request["photo"])
    side = metadata.resolution if metadata else None
    size = (side, side) if side else (photo.height, photo.width)
    channels = int(load_adapter(adapter).config["in_channels"])
    make_condition(photo, size, channels, annotator).convert("RGB").save(folder / "map.png")
    return {"state": "done", "pictures": [{"name": "map", "column": ""}], "annotator": annotator.spec}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
