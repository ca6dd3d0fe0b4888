"""The adapter's folder: plain diffusers files in two precisions, and the record of what it was trained on."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from safetensors import SafetensorError

from t2i_adapter.errors import UserError
from t2i_adapter.models.metadata import FILE_NAME, SCHEMA, Metadata

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_FP16 = "diffusion_pytorch_model.fp16.safetensors"


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
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
            names = _write(adapter, Path(temporary), record, fp16)
            for name in names:
                _move(Path(temporary) / name, target / name)
    except (OSError, SafetensorError) as fault:
        raise UserError(
            f"{target}: the adapter cannot be written ({fault}); what was there before is whole. "
            "Make room, or name another folder."
        ) from fault


def _write(adapter: T2IAdapter, folder: Path, metadata: Metadata, fp16: bool) -> list[str]:
    """All files into `folder`; returns their names in the order in which they are moved, the record last."""
    _copy(adapter, torch.float32).save_pretrained(folder)
    names = [WEIGHTS, CONFIG, FILE_NAME]
    if fp16:
        _copy(adapter, torch.float16).save_pretrained(folder, variant="fp16")
        names.insert(1, WEIGHTS_FP16)
    text = json.dumps(metadata.to_dict(), indent=2, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
    return names


def _copy(adapter: T2IAdapter, dtype: torch.dtype) -> T2IAdapter:
    """On the CPU in `dtype`, without the path it was loaded from, which diffusers would write into the config."""
    duplicate: Any = copy.deepcopy(adapter)
    duplicate.register_to_config(_name_or_path="")
    return duplicate.to("cpu", dtype)


def _move(source: Path, target: Path) -> None:
    """Replaces `target` once `source` is on the disk."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)
