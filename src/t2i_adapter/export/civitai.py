"""Writes a zip for CivitAI: the file, pictures with their parameters, a description, and what its form asks for."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from t2i_adapter.export.layouts import XL, Network
from t2i_adapter.export.modelspec import Description, describe, plain, usage
from t2i_adapter.export.samples import Sample
from t2i_adapter.files import atomic_path
from t2i_adapter.generation.png_text import png_info

TYPE = "Controlnet"
"""CivitAI's type of model; its list has none for T2I-Adapters."""


def write_civitai(
    target: Path, file: Path, network: Network, description: Description, samples: Sequence[Sample], precision: str
) -> None:
    """Writes the zip `target`. file: the adapter's single file. Raises OSError."""
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.write(file, file.name)
        for number, sample in enumerate(samples):
            info = png_info(sample.parameters) if sample.parameters else None
            _add_picture(archive, f"pictures/{number:02d}.png", sample.picture, info)
            if sample.condition:
                _add_picture(archive, f"pictures/{number:02d}_condition.png", sample.condition, None)
        archive.writestr("description.md", describe_markdown(file.name, network, description))
        archive.writestr("metadata.json", json.dumps(form(file.name, network, description, precision), indent=2) + "\n")


def form(file: str, network: Network, description: Description, precision: str) -> dict[str, object]:
    """Returns the values of the fields of CivitAI's form."""
    return {
        "name": description.title,
        "type": TYPE,
        "baseModel": "SDXL 1.0" if network.adapter_type == XL else "SD 1.5",
        "tags": [tag for tag in ("t2i-adapter", "controlnet", description.condition) if tag],
        "trainedWords": [],
        "license": description.license,
        "files": [{"name": file, "type": "Model", "metadata": {"format": "SafeTensor", "fp": precision}}],
    }


def describe_markdown(file: str, network: Network, description: Description) -> str:
    """Returns the description of the model's page, in Markdown."""
    return (
        "\n\n".join(
            [
                f"# {plain(description.title)}",
                describe(description, network),
                usage(description, network),
                "## Where the file goes",
                f"- ComfyUI: put `{file}` into `models/controlnet`; load it with *Load ControlNet Model* and connect "
                "*Apply ControlNet*.\n"
                f"- A1111 and Forge with the ControlNet extension: put it into `models/ControlNet`; choose "
                "preprocessor *none* for a condition picture that is ready.",
            ]
        )
        + "\n"
    )


def _add_picture(archive: zipfile.ZipFile, name: str, picture: Image.Image, info: PngInfo | None) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info)
    archive.writestr(name, file.getvalue())
