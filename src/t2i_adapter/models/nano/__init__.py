"""The embedded base: SDXL's topology in small, with weights. Its model card is README.md in this folder."""

from __future__ import annotations

import pathlib


def path() -> pathlib.Path:
    """The folder that `StableDiffusionXLPipeline.from_pretrained` takes."""
    return pathlib.Path(__file__).resolve().parent
