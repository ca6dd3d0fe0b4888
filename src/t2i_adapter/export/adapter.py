"""The adapter's folder: plain diffusers files in two precisions, and the record of what it was trained on."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file

from t2i_adapter.errors import UserError
from t2i_adapter.files import move_atomic
from t2i_adapter.models.record import CONFIG, FILE_NAME, SCHEMA, WEIGHTS, WEIGHTS_FP16, Metadata

_ASIDE = ".saving-"


def save_adapter(
    adapter: T2IAdapter, folder: str | Path, *, metadata: Mapping[str, Any] | Metadata, fp16: bool = True
) -> None:
    """Writes the adapter so that `T2IAdapter.from_pretrained(folder)` and `(folder, variant="fp16")` load it.

    Everything is written beside its place first and then moved there file by file, so a folder that held an adapter
    holds a whole file of each name at any time. Parameters keep their values; the adapter is not changed.

    Args:
        metadata: contents of t2i_adapter.json (`Metadata.to_dict`; "schema" may be left out).
        fp16: write the half precision variant too.

    Raises:
        UserError: if the folder cannot be written, or the metadata is malformed.
    """
    record = metadata if isinstance(metadata, Metadata) else Metadata.from_dict({"schema": SCHEMA, **metadata})
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for killed in target.glob(f"{_ASIDE}*"):  # a folder has one writer
            shutil.rmtree(killed, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=target) as temporary:
            names = _write(adapter, Path(temporary), record, fp16)
            for name in names:
                move_atomic(Path(temporary) / name, target / name)
    except (OSError, SafetensorError) as fault:
        raise UserError(
            f"{target}: the adapter cannot be written ({fault}); what was there before is whole. "
            "Make room, or name another folder."
        ) from fault


def _write(adapter: T2IAdapter, folder: Path, metadata: Metadata, fp16: bool) -> list[str]:
    """All files into `folder`; returns their names in the order in which they are moved, the record last."""
    _save_weights(adapter, folder / WEIGHTS, torch.float32)
    if fp16:
        _save_weights(adapter, folder / WEIGHTS_FP16, torch.float16)
    config = json.loads(adapter.to_json_string())
    config.pop("_name_or_path", None)  # where it was loaded from concerns this machine only
    _save_json(config, folder / CONFIG)
    _save_json(metadata.to_dict(), folder / FILE_NAME)
    return [WEIGHTS, *([WEIGHTS_FP16] if fp16 else []), CONFIG, FILE_NAME]


def _save_weights(adapter: T2IAdapter, path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _save_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
