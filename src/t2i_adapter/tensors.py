"""A safetensors file, written so that the threads beside it go on.

The library's own writer copies every tensor and holds the interpreter while it does; this one hands the tensors' own
memory to the system in pieces, and takes the checksum of what it hands over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_PIECE = 1 << 24  # bytes
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes CPU tensors to `path` and flushes it to the disk; returns the sha256 (hex) of what it should hold.

    Raises OSError.
    """
    # Wide types first, as the library lays them out: every tensor then begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for content in (len(text).to_bytes(8, "little") + text, *(_bytes(tensors[name]) for name in names)):
            view = memoryview(content)
            while view:
                written = file.write(view[:_PIECE])
                digest.update(view[:written])
                view = view[written:]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's memory, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
