"""The embedded base `nano`: a small SDXL with weights, for runs without a download. README.md here is its card."""

from __future__ import annotations

import pathlib


def path() -> pathlib.Path:
    """Returns the folder that `StableDiffusionXLPipeline.from_pretrained` loads."""
    return pathlib.Path(__file__).resolve().parent
