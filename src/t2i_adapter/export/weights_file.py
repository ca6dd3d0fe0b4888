"""Reads the tensors of one file of weights: safetensors, or a .pth file, which `torch_file` reads without unpickling.

The official files of SD 1.5 exist as .pth files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.export.torch_file import TorchFileError, read_torch_file

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
_NESTED = ("adapter", "state_dict", "model")
"""Keys under which some trainers store the weights, beside others of their own."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file by name, as they are stored, and a safetensors file's metadata (else none).

    Raises UserError if the file is missing, damaged, of another format, or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in PICKLED:
        raise UserError(f"{path}: allowed are files that end in .safetensors, {', '.join(PICKLED)}.")
    tensors = _tensors(_read_pickled(path))
    if not tensors:
        raise UserError(f"{path}: it holds no tensors by name, so it is no file of weights.")
    return tensors, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as fault:
        raise UserError(f"{path}: damaged safetensors file ({first_line(fault)}).") from fault


def _read_pickled(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except (TorchFileError, OSError) as fault:
        raise UserError(
            f"{path}: it is damaged, or holds more than tensors ({first_line(fault)[:160]}). Only tensors are read, "
            "because other objects can run code. Ask its author for a .safetensors file."
        ) from fault


def _tensors(content: Any) -> dict[str, Tensor]:
    """Returns the named tensors of a .pth file's content; looks into the containers of `_NESTED` too."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            return _tensors(content[key])
    return {name: item for name, item in content.items() if isinstance(name, str) and isinstance(item, Tensor)}
