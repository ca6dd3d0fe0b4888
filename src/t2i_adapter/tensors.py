"""Writes safetensors files without blocking other threads; every such file of the package is written here.

The safetensors library's own writer copies every tensor and holds the GIL meanwhile. `write_tensors` passes the
tensors' own memory to the operating system in chunks, and computes the checksum of the same bytes. If all tensors have
one dtype, the file equals the library's byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 1 << 24  # bytes
_DTYPES = {
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
    """Writes CPU tensors to `path` and flushes them to the disk; returns the sha256 (hex) of the intended bytes.

    Raises OSError.
    """
    names = file_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for content in (len(text).to_bytes(8, "little") + text, *(tensor_bytes(tensors[name]) for name in names)):
            view = memoryview(content)
            while view:
                written = file.write(view[:_CHUNK])
                digest.update(view[:written])
                view = view[written:]
        os.fsync(file.fileno())
    return digest.hexdigest()


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names in the order in which `write_tensors` writes the tensors.

    Largest element size first, as in the library: every tensor then begins at a multiple of its element size.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns a CPU tensor's memory; copies only if the tensor is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
