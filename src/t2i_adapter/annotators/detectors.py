"""Detectors of the package `controlnet_aux`, which made the training maps of many adapters and ControlNets.

The networks are in that package. This file chooses their weights, their input size and how the map is scaled back. The
weight files are torch's (.pth); only tensors are read from them, never code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from t2i_adapter.annotators.pretrained import locate, pin
from t2i_adapter.annotators.registry import Facts
from t2i_adapter.annotators.runtime import deterministic, optional, tensors_only
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path

ANNOTATORS = "lllyasviel/Annotators"
STEP = 64
"""The sides of a detector's input are multiples of this, so that its own scaling leaves the input unchanged."""
EXTRA = "controlnet-aux"
EDGES = Facts(polarity="white on black", weights=f"hub: {ANNOTATORS}", needs=f"sdxl-t2i-adapter[{EXTRA}]")


class _Detector:
    """What the kinds below share: their options are checked, the model's content is pinned, the detector runs.

    Attributes:
        detector: class of `controlnet_aux`.
        pattern: name of its weight file, or pattern of several.
        files: argument of its `from_pretrained` -> weight file, if there are several.
    """

    facts: ClassVar[Facts]
    detector: ClassVar[str]
    pattern: ClassVar[str]
    files: ClassVar[dict[str, str]] = {}
    resolution: int
    model: str
    revision: str

    def __post_init__(self) -> None:
        if self.resolution < STEP:
            raise UserError(f"resolution={self.resolution}; allowed is {STEP} or more.")
        pin(self, self.pattern)

    def arguments(self) -> dict[str, Any]:
        """More arguments of the detector's call."""
        return {}

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        files = self.files or {"filename": self.pattern}
        detector = _open(self.detector, tuple(files.items()), self.model, self.revision)
        scale = min(1.0, self.resolution / min(image.size))
        width, height = (max(STEP, round(side * scale / STEP) * STEP) for side in image.size)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        arguments = self.arguments()
        if self.detector != "TEEDdetector":  # TEED's map always has the size of its input
            arguments["image_resolution"] = min(width, height)
        with deterministic():
            found = detector(scaled, detect_resolution=min(width, height), output_type="pil", **arguments)
        mode = "L" if self.facts.channels == 1 else "RGB"
        return found.convert(mode).resize(image.size, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class PiDiNet(_Detector):
    """Soft edges by PiDiNet, crisper than HED's.

    `resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder of
    table5_pidinet.pth, and its commit; if empty, the commit that this package knows.
    """

    facts = replace(EDGES, licence="research only (PiDiNet)")
    detector, pattern = "PidiNetDetector", "table5_pidinet.pth"
    resolution: int = 512
    model: str = ANNOTATORS
    revision: str = ""


@dataclass(frozen=True)
class Teed(_Detector):
    """Soft edges by TEED, thin and fast.

    `resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder of
    5_model.pth, and its commit or branch.
    """

    facts = replace(EDGES, licence="MIT (TEED)", weights="hub: fal-ai/teed")
    detector, pattern = "TEEDdetector", "5_model.pth"
    resolution: int = 512
    model: str = "fal-ai/teed"
    revision: str = "main"

    def __post_init__(self) -> None:
        if self.revision == "main" and user_path(self.model).is_dir():
            object.__setattr__(self, "revision", "")  # a folder has no branches
        super().__post_init__()


@dataclass(frozen=True)
class LineartNet(_Detector):
    """Line drawings by the informative drawings network, as SDXL's lineart adapter was trained on.

    `coarse`: rougher lines. `resolution`: the shorter side is scaled down to this for the network. `model`, `revision`:
    hub id or folder of sk_model.pth and sk_model2.pth, and its commit; if empty, the commit that this package knows.
    """

    facts = replace(EDGES, licence="MIT (informative drawings)")
    detector, pattern = "LineartDetector", "sk_model*.pth"
    files: ClassVar = {"filename": "sk_model.pth", "coarse_filename": "sk_model2.pth"}
    coarse: bool = False
    resolution: int = 512
    model: str = ANNOTATORS
    revision: str = ""

    def arguments(self) -> dict[str, Any]:
        return {"coarse": self.coarse}


@dataclass(frozen=True)
class Mlsd(_Detector):
    """Straight lines by M-LSD, for rooms and buildings.

    `score`, `distance`: least score and least length of the lines that are drawn. `resolution`: the shorter side is
    scaled down to this for the network. `model`, `revision`: hub id or folder of mlsd_large_512_fp32.pth, and its
    commit; if empty, the commit that this package knows.
    """

    facts = replace(EDGES, licence="Apache-2.0 (M-LSD)")
    detector, pattern = "MLSDdetector", "mlsd_large_512_fp32.pth"
    score: float = 0.1
    distance: float = 0.1
    resolution: int = 512
    model: str = ANNOTATORS
    revision: str = ""

    def arguments(self) -> dict[str, Any]:
        return {"thr_v": self.score, "thr_d": self.distance}


@dataclass(frozen=True)
class NormalBae(_Detector):
    """Which way each surface faces, by the network of Bae et al.

    `resolution`: the shorter side is scaled down to this for the network. `model`, `revision`: hub id or folder of
    scannet.pt, and its commit; if empty, the commit that this package knows.
    """

    facts = replace(EDGES, channels=3, kind="normal", polarity="none", licence="MIT (surface normal uncertainty)")
    detector, pattern = "NormalBaeDetector", "scannet.pt"
    resolution: int = 512
    model: str = ANNOTATORS
    revision: str = ""


@cache
def _open(name: str, files: tuple[tuple[str, str], ...], model: str, revision: str) -> Any:
    """Loads a detector and its weights, once a process. Raises UserError if the package or the weights are missing."""
    package = optional("controlnet_aux", EXTRA)
    folder = locate(model, revision, dict(files).values())
    try:
        with tensors_only():
            return getattr(package, name).from_pretrained(str(folder), **dict(files))
    except Exception as fault:  # a broken weight file can raise anything
        names = ", ".join(dict(files).values())
        raise UserError(f"model={model}: {names} cannot be loaded ({first_line(fault)}).") from fault
