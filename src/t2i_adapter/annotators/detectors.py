"""Detectors of the package `controlnet_aux`, whose maps many adapters and ControlNets were trained on.

Their networks are its own; which weights, at which size and how a map lies on its image is settled here. The weight
files are torch's (.pth), of which only tensors are read, never code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.pretrained import locate, pin
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import exactly, optional
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path

ANNOTATORS = "lllyasviel/Annotators"
STEP = 64
"""Sides of what a detector sees are multiples of this; its own scaling then leaves the picture as it is."""
EXTRA = "controlnet-aux"
NEEDS = f"sdxl-t2i-adapter[{EXTRA}]"


def _check(options: Any, kind: str, files: str) -> None:
    if options.resolution < STEP:
        raise UserError(f"{kind}: resolution={options.resolution}; needed is {STEP} or more.")
    pin(options, kind, files)


class PiDiNet:
    """Soft edges by PiDiNet, crisper than HED's."""

    @dataclass(frozen=True)
    class Options:
        """`resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder
        of table5_pidinet.pth, and its commit; empty takes the one known here."""

        resolution: int = 512
        model: str = ANNOTATORS
        revision: str = ""

        def __post_init__(self) -> None:
            _check(self, "pidinet", "table5_pidinet.pth")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "research only (PiDiNet)"
    weights = f"hub: {ANNOTATORS}"
    needs = NEEDS

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return _detect("pidinet", "PidiNetDetector", {"filename": "table5_pidinet.pth"}, self._options, image, "L")


class Teed:
    """Soft edges by TEED, thin and fast."""

    @dataclass(frozen=True)
    class Options:
        """`resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder
        of 5_model.pth, and its commit or branch."""

        resolution: int = 512
        model: str = "fal-ai/teed"
        revision: str = "main"

        def __post_init__(self) -> None:
            if self.revision == "main" and user_path(self.model).is_dir():
                object.__setattr__(self, "revision", "")  # a folder has no branches
            _check(self, "teed", "5_model.pth")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "MIT (TEED)"
    weights = "hub: fal-ai/teed"
    needs = NEEDS

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return _detect("teed", "TEEDdetector", {"filename": "5_model.pth"}, self._options, image, "L")


class LineartNet:
    """Line drawings by the informative drawings network, as SDXL's lineart adapter was trained on."""

    @dataclass(frozen=True)
    class Options:
        """`coarse`: rougher lines. `resolution`: the shorter side is scaled down to this for the network. `model`,
        `revision`: hub id or folder of sk_model.pth and sk_model2.pth, and its commit; empty takes the one known
        here."""

        coarse: bool = False
        resolution: int = 512
        model: str = ANNOTATORS
        revision: str = ""

        def __post_init__(self) -> None:
            _check(self, "lineart-net", "sk_model*.pth")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "MIT (informative drawings)"
    weights = f"hub: {ANNOTATORS}"
    needs = NEEDS

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        files = {"filename": "sk_model.pth", "coarse_filename": "sk_model2.pth"}
        return _detect("lineart-net", "LineartDetector", files, self._options, image, "L", coarse=self._options.coarse)


class Mlsd:
    """Straight lines by M-LSD, for rooms and buildings."""

    @dataclass(frozen=True)
    class Options:
        """`score`, `distance`: lines are drawn that the network trusts this much and that are longer than this.
        `resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder of
        mlsd_large_512_fp32.pth, and its commit; empty takes the one known here."""

        score: float = 0.1
        distance: float = 0.1
        resolution: int = 512
        model: str = ANNOTATORS
        revision: str = ""

        def __post_init__(self) -> None:
            _check(self, "mlsd", "mlsd_large_512_fp32.pth")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (M-LSD)"
    weights = f"hub: {ANNOTATORS}"
    needs = NEEDS

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        files = {"filename": "mlsd_large_512_fp32.pth"}
        limits = {"thr_v": options.score, "thr_d": options.distance}
        return _detect("mlsd", "MLSDdetector", files, options, image, "L", **limits)


class NormalBae:
    """Which way each surface faces, by the network of Bae et al."""

    @dataclass(frozen=True)
    class Options:
        """`resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder
        of scannet.pt, and its commit; empty takes the one known here."""

        resolution: int = 512
        model: str = ANNOTATORS
        revision: str = ""

        def __post_init__(self) -> None:
            _check(self, "normal-bae", "scannet.pt")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "normal"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "MIT (surface normal uncertainty)"
    weights = f"hub: {ANNOTATORS}"
    needs = NEEDS

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        return _detect("normal-bae", "NormalBaeDetector", {"filename": "scannet.pt"}, self._options, image, "RGB")


def _detect(
    kind: str, name: str, files: dict[str, str], options: Any, image: Image.Image, mode: str, **settings: Any
) -> Image.Image:
    """The map of a detector, of the image's size, in `mode`."""
    detector = _open(kind, name, tuple(files.items()), options.model, options.revision)
    scale = min(1.0, options.resolution / min(image.size))
    width, height = (max(STEP, round(side * scale / STEP) * STEP) for side in image.size)
    seen = image.resize((width, height), Image.Resampling.BICUBIC)
    if name != "TEEDdetector":  # which gives its map at the size of what it is given, always
        settings["image_resolution"] = min(width, height)
    with exactly():
        found = detector(seen, detect_resolution=min(width, height), output_type="pil", **settings)
    return found.convert(mode).resize(image.size, Image.Resampling.BILINEAR)


@cache
def _open(kind: str, name: str, files: tuple[tuple[str, str], ...], model: str, revision: str) -> Any:
    """A detector with its weights, loaded once a process. Raises UserError where package or weights are missing."""
    package = optional("controlnet_aux", kind, EXTRA)
    folder = locate(model, revision, kind, dict(files).values())
    try:
        with _tensors_only():
            return getattr(package, name).from_pretrained(str(folder), **dict(files))
    except Exception as fault:  # what a broken weight file raises is as manifold as what can be in one
        names = ", ".join(dict(files).values())
        raise UserError(f"{kind}: model={model}: {names} cannot be loaded ({first_line(fault)}).") from fault


@contextmanager
def _tensors_only() -> Iterator[None]:
    """torch.load refuses whatever is not a tensor, also where the caller asks for more."""
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
