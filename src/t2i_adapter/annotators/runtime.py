"""How annotators with weights run: one thread, no gradients, packages that may be missing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from t2i_adapter.annotators.weights import find
from t2i_adapter.errors import UserError


def optional(module: str, kind: str, extra: str) -> ModuleType:
    """A module of an optional package. Raises UserError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        raise UserError(
            f"{kind}: needs the package of {module} ({fault}): pip install 'sdxl-t2i-adapter[{extra}]'."
        ) from None


@contextmanager
def exactly() -> Iterator[None]:
    """torch without gradients and on one thread, on which sums have one order: a map is a function of its image, not of
    how many cores there are. Preparing runs several processes, so the cores are not idle."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


@cache
def open_tflite(name: str, kind: str) -> Any:
    """An interpreter of one of `weights.FILES`, loaded once a process. Raises UserError where package or file is
    missing."""
    litert, path = optional("ai_edge_litert.interpreter", kind, "pose"), find(name)
    with _silently():
        interpreter = litert.Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    return interpreter


@cache
def open_onnx(path: Path, kind: str, extra: str) -> Any:
    """A session of a network in an .onnx file, on one thread of the CPU, loaded once a process. Raises UserError where
    the package is missing or the file cannot be read."""
    onnxruntime = optional("onnxruntime", kind, extra)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums have one order then
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # what a broken file raises is as manifold as what can be in one
        reason = str(fault).strip().partition("\n")[0]
        raise UserError(f"{kind}: {path}: cannot be loaded ({reason}).") from fault


def run_onnx(session: Any, values: np.ndarray) -> list[np.ndarray]:
    """The outputs, in their order, for one input of (C,H,W) float32; all without the axis of the batch."""
    name = session.get_inputs()[0].name
    return [output[0] for output in session.run(None, {name: np.ascontiguousarray(values[None], np.float32)})]


@contextmanager
def _silently() -> Iterator[None]:
    """Without what native code writes to stderr: LiteRT greets there, past any logger. Faults are raised as ever."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def run_tflite(interpreter: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    """Output name -> its values, for one input of (H,W,C) float32; both without the axis of the batch."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values[None].astype(np.float32))
    interpreter.invoke()
    return {out["name"]: interpreter.get_tensor(out["index"])[0] for out in interpreter.get_output_details()}


def shrunk(image: Image.Image, resolution: int) -> Image.Image:
    """The image with its shorter side scaled down to `resolution` pixels; 0, and a smaller image, leave it as it is."""
    shorter = min(image.size)
    if not 0 < resolution < shorter:
        return image
    width, height = (max(1, round(side * resolution / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
