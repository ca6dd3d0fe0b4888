"""Metadata in the header of a safetensors file, after the ModelSpec standard 1.0.0, for programs that list models.

ModelSpec has no architecture for T2I-Adapters. Ours follows its pattern BASE/KIND: a LoRA is
`stable-diffusion-xl-v1-base/lora`, an adapter `stable-diffusion-xl-v1-base/t2i-adapter`. `preprocessor` is the key that
other trainers write for control models. The key `t2i_adapter.record` holds the adapter's record without local paths,
which `import` reads.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from PIL import Image
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.export.layouts import XL, Network
from t2i_adapter.export.programs import size_multiple
from t2i_adapter.files import parse_json
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.record import Metadata
from t2i_adapter.tensors import file_order, tensor_bytes

RECORD = "t2i_adapter.record"
"""Key of the adapter's record."""
ARCHITECTURES = {True: "stable-diffusion-xl-v1-base/t2i-adapter", False: "stable-diffusion-v1/t2i-adapter"}
"""Whether it is for SDXL -> architecture."""
IMPLEMENTATIONS = {"original": "https://github.com/TencentARC/T2I-Adapter", "diffusers": "diffusers"}
"""Layout -> the code whose names the weights have."""
_THUMBNAIL = 256  # pixels a side at most
_QUALITY = 85
_MARKS = re.compile(r"[^\w ,.;:=()+/%@-]")


@dataclass(frozen=True)
class Description:
    """What people want to know about an adapter.

    Attributes:
        title: its name.
        condition: kind of its conditions, such as "canny"; "" if unknown.
        record: its record, if it has one, without local paths.
        sampling: options that the record recommends, else the plain ones.
        license, author: None if unknown.
        thumbnail: a picture that it made, if there is one.
    """

    title: str
    condition: str
    record: Metadata | None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    license: str | None = None
    author: str | None = None
    thumbnail: Image.Image | None = None


def metadata(weights: Mapping[str, Tensor], network: Network, description: Description, layout: str) -> dict[str, str]:
    """Returns the metadata of a file with these weights.

    weights: as they are written, with their names and dtype. layout: "original" or "diffusers".
    """
    record = description.record
    resolution = record.resolution if record else None
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURES[network.adapter_type == XL],
        "implementation": IMPLEMENTATIONS[layout],
        "title": description.title,
        "description": describe(description, network),
        "author": description.author,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hash_sha256": hash_tensors(weights),
        "license": description.license,
        "resolution": f"{resolution}x{resolution}" if resolution else None,
        "usage_hint": usage(description, network),
        "tags": ", ".join(filter(None, ("t2i-adapter", description.condition))),
        "preprocessor": preprocessor(record) or None,
        "thumbnail": _data_uri(description.thumbnail) if description.thumbnail else None,
    }
    found = {"format": "pt"} | {f"modelspec.{key}": value for key, value in values.items() if value}
    if record:
        found[RECORD] = json.dumps(record.to_dict(), ensure_ascii=False)
    return found


def hash_tensors(weights: Mapping[str, Tensor]) -> str:
    """Returns 0x and the sha256 of a safetensors file's bytes after its header. They do not depend on the metadata."""
    digest = hashlib.sha256()
    for name in file_order(weights):
        digest.update(tensor_bytes(weights[name]))
    return f"0x{digest.hexdigest()}"


def read_record(found: Mapping[str, str], where: str) -> Metadata | None:
    """Returns the record in a file's metadata; None if it has none. Raises UserError if it is malformed."""
    if RECORD not in found:
        return None
    try:
        content = parse_json(found[RECORD])
    except ValueError as fault:
        raise UserError(f"{where}: its {RECORD} cannot be read as JSON: {fault}.") from fault
    return Metadata.from_dict(content, f"{where}, {RECORD}")


def preprocessor(record: Metadata | None) -> str:
    """Returns how conditions are made of photos, as the condition kind with its options: "canny,low=100,high=200"."""
    condition: Mapping[str, Any] = record.condition if record else {}
    name, options = condition.get("name"), condition.get("options")
    if not isinstance(name, str):
        return ""
    settings = options.items() if isinstance(options, Mapping) else ()
    return plain(",".join([name, *(f"{key}={value}" for key, value in settings)]))


def plain(text: str) -> str:
    """Returns text of a record as one line without the marks of Markdown and HTML; a record may come from anyone."""
    return _MARKS.sub("", " ".join(text.split()))[:200]


def describe(description: Description, network: Network) -> str:
    """Returns two sentences about what the adapter is."""
    family = "Stable Diffusion XL" if network.adapter_type == XL else "Stable Diffusion 1.5"
    base = f", trained on {plain(description.record.base['name'])}" if description.record else ""
    kind = f" by {description.condition} pictures" if description.condition else ""
    return f"A T2I-Adapter that controls {family}{kind}{base}. Load it as a ControlNet model."


def usage(description: Description, network: Network) -> str:
    """Returns how to use the adapter: its condition, strength and sizes."""
    record = description.record
    condition = record.condition if record else {}
    made = preprocessor(record)
    polarity = plain(str(condition.get("polarity") or ""))
    picture = "grey picture" if network.in_channels == 1 else "picture"
    sentences = [
        f"Condition: a {picture}{f' made by {made}' if made else ''}"
        f"{f' ({polarity})' if polarity and polarity != 'none' else ''}.",
        f"Strength {description.sampling.scale:g}, end {description.sampling.condition_factor:g} of the steps.",
        f"Sides in multiples of {size_multiple(network)} pixels.",
    ]
    return " ".join(sentences)


def _data_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
