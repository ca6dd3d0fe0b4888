"""Writes an adapter's folder: config.json and weights as diffusers reads them, and t2i_adapter.json.

Checkpoints and finished runs both write an adapter through `write_adapter_files`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.files import move_atomic
from t2i_adapter.models.record import CONFIG, FILE_NAME, SCHEMA, WEIGHTS, WEIGHTS_FP16, Metadata
from t2i_adapter.tensors import write_tensors

_TEMPORARY = ".saving-"
"""Prefix of the folder in which the files are written before they are moved to their names."""


def adapter_config(adapter: T2IAdapter) -> str:
    """Returns the text of the adapter's config.json, without the path that the adapter was loaded from."""
    config = json.loads(adapter.to_json_string())
    config.pop("_name_or_path", None)
    return _json(config)


def write_adapter_files(
    folder: Path, config: str, weights: Mapping[str, Tensor], *, fp16: bool = False
) -> dict[str, str]:
    """Writes an adapter that `T2IAdapter.from_pretrained` loads into an existing folder, and flushes its weights.

    Args:
        config: text of config.json (`adapter_config`).
        weights: the adapter's state dict on the CPU, float32.
        fp16: write the fp16 variant too.

    Returns the sha256 (hex) of each file's intended content, by file name. Raises OSError.
    """
    (folder / CONFIG).write_text(config, encoding="utf-8")
    digests = {CONFIG: hashlib.sha256(config.encode()).hexdigest()}
    digests[WEIGHTS] = write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    if fp16:
        half = {name: tensor.half() for name, tensor in weights.items()}
        digests[WEIGHTS_FP16] = write_tensors(folder / WEIGHTS_FP16, half, {"format": "pt"})
    return digests


def save_adapter(
    adapter: T2IAdapter, folder: str | Path, *, metadata: Mapping[str, Any] | Metadata | None, fp16: bool = True
) -> None:
    """Saves the adapter so that `T2IAdapter.from_pretrained(folder)` and `(folder, variant="fp16")` load it.

    The files are written to a temporary folder and then renamed one by one, the record last. A folder that already
    holds an adapter therefore holds a complete file of each name at any time. The adapter is not changed.

    Args:
        metadata: contents of t2i_adapter.json (`Metadata.to_dict`; "schema" is optional). None writes no such file.
        fp16: write the fp16 variant too.

    Raises:
        UserError: if the folder cannot be written, or the metadata is malformed.
    """
    record = Metadata.from_dict({"schema": SCHEMA, **metadata}) if isinstance(metadata, Mapping) else metadata
    weights = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in adapter.state_dict().items()}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for leftover in target.glob(f"{_TEMPORARY}*"):  # of a killed process: a folder has one writer
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=target) as name:
            temporary = Path(name)
            write_adapter_files(temporary, adapter_config(adapter), weights, fp16=fp16)
            files = [WEIGHTS, *([WEIGHTS_FP16] if fp16 else []), CONFIG]
            if record:
                (temporary / FILE_NAME).write_text(_json(record.to_dict()), encoding="utf-8")
                files.append(FILE_NAME)
            for file in files:
                move_atomic(temporary / file, target / file)
    except OSError as fault:
        raise UserError(
            f"{target}: the adapter cannot be written ({fault}); the files that were there are unchanged. "
            "Free some disk space, or name another folder."
        ) from fault


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
