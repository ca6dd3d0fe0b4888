"""How annotators run networks: on one CPU thread, without gradients, by packages that may be missing."""

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
from t2i_adapter.errors import UserError, first_line


def optional(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional package. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        raise UserError(f"needs the package of {module} ({fault}): pip install 'sdxl-t2i-adapter[{extra}]'.") from None


@contextmanager
def deterministic() -> Iterator[None]:
    """Runs torch without gradients and on one thread, where sums have one order: a map then does not depend on the
    number of cores. Preparing runs several processes, so the other cores are not idle."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def tensors_only() -> Iterator[None]:
    """Makes torch.load refuse everything but tensors, even if the caller passes weights_only=False."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@cache
def open_tflite(name: str) -> Any:
    """Returns an interpreter of one of `weights.FILES`, loaded once a process. Raises UserError if the package or the
    file is missing."""
    litert, path = optional("ai_edge_litert.interpreter", "pose"), find(name)
    with _silent_stderr():
        interpreter = litert.Interpreter(model_path=str(path), num_threads=1)
        interpreter.allocate_tensors()
    return interpreter


@cache
def open_onnx(path: Path, extra: str) -> Any:
    """Returns a session of the network in an .onnx file, on one CPU thread, loaded once a process. Raises UserError if
    the package is missing or the file cannot be read."""
    onnxruntime = optional("onnxruntime", extra)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # sums then have one order
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # onnxruntime's exceptions have no common base class
        raise UserError(f"{path}: cannot be loaded ({first_line(fault)}).") from fault


def run_onnx(session: Any, values: np.ndarray) -> list[np.ndarray]:
    """Returns the outputs, in their order, for one input (C,H,W) float32; all without a batch axis."""
    name = session.get_inputs()[0].name
    return [output[0] for output in session.run(None, {name: np.ascontiguousarray(values[None], np.float32)})]


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discards what native code writes to stderr: LiteRT prints a banner there. Exceptions are not affected."""
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
    """Returns output name -> values for one input (H,W,C) float32; both without a batch axis."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values[None].astype(np.float32))
    interpreter.invoke()
    return {out["name"]: interpreter.get_tensor(out["index"])[0] for out in interpreter.get_output_details()}


def shrink(image: Image.Image, resolution: int) -> Image.Image:
    """Scales the image down to a shorter side of `resolution` pixels. 0 and smaller images return it unchanged."""
    shorter = min(image.size)
    if not 0 < resolution < shorter:
        return image
    width, height = (max(1, round(side * resolution / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
