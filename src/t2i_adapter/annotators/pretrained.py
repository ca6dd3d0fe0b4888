"""Pretrained models of the hub or of a folder: their content is pinned, downloaded, and loaded by `transformers`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import sha256, user_path

PINNED = {
    "depth-anything/Depth-Anything-V2-Small-hf": "5426e4f0f36572d16453bbda7a8389317b1bef99",
    "Intel/dpt-large": "bc15f29aa3a80d532f2ed650b5e16ac48d8958f9",
    "Intel/zoedepth-nyu-kitti": "f364d4c7936e91f465abba182208dd68142bf0ca",
    "nvidia/segformer-b0-finetuned-ade-512-512": "489d5cd81a0b59fab9b7ea758d3548ebe99677da",
    "facebook/sam-vit-base": "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
    "lllyasviel/Annotators": "982e7edaec38759d914a963c48c4726685de7d96",
    "yzd-v/DWPose": "1a7144101628d69ee7a3768d1ee3a094070dc388",
}
"""Hub id -> commit that is used if the user names none."""
FOLDER_MARK = "sha256:"
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."
"""Prefix of DPT weights that checkpoints omit: they belong to a second input, and the first fusion has one input."""
OPTIONAL = ("processor_config.json", "model*.index.json")
FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", *OPTIONAL)
"""Files of a model that are downloaded. A model need not have the optional ones."""


def pin(options: Any, files: str = "*.safetensors") -> None:
    """Sets `options.revision`, if it is empty, to the known commit of a hub id, or to the digest of a folder's content.
    Cached maps then belong to these weights, also if the folder changes later.

    Args:
        options: a frozen dataclass with `model` and `revision`, in its own `__post_init__`.
        files: pattern of a folder's weight files.

    Raises UserError if the commit is unknown, or if a folder's digest differs from `revision`.
    """
    model, revision = str(options.model), str(options.revision)
    folder = user_path(model)
    found = _content(folder.resolve(), files) if folder.is_dir() else PINNED.get(model, "")
    if not revision and not found:
        raise UserError(
            f"model={model}: no such folder, and the commit of this hub id is unknown: name it with revision=COMMIT. "
            f"Known are {', '.join(PINNED)}."
        )
    if folder.is_dir() and revision not in ("", found):
        raise UserError(f"model={model}: the folder's content is {found}, and revision={revision} is another.")
    if not folder.is_dir() and revision.startswith(FOLDER_MARK):
        raise UserError(f"model={model}: no such folder; needed is the folder whose content is {revision}.")
    object.__setattr__(options, "revision", revision or found)


@cache
def _content(folder: Path, files: str) -> str:
    """Returns the digest of a folder's configs and weights."""
    weights = [*folder.glob(files)]
    if not weights:
        raise UserError(f"model={folder}: the folder has no weights ({files}).")
    digest = hashlib.sha256()
    for path in sorted({*folder.glob("*.json"), *weights}):
        digest.update(path.name.encode() + b"\0" + bytes.fromhex(sha256(path)))
    return FOLDER_MARK + digest.hexdigest()[:32]


def locate(model: str, revision: str, files: Iterable[str]) -> Path:
    """Returns the folder of a model whose `revision` is set; downloads a hub id. Raises UserError.

    Args:
        files: names or patterns of the files to download.
    """
    if revision.startswith(FOLDER_MARK):
        return user_path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": [*files]}
    if re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes: use the local copy without a request
        with suppress(OSError, ValueError):
            local = Path(snapshot_download(model, local_files_only=True, **wanted))
            if all([*local.glob(needed)] for needed in files if needed not in OPTIONAL):
                return local
    try:
        return Path(snapshot_download(model, **wanted))
    except (OSError, ValueError, HfHubHTTPError) as fault:
        raise UserError(
            f"model={model}, revision={revision}: cannot be downloaded ({first_line(fault)}). "
            "A folder with its files can be named as model."
        ) from fault


@cache
def open_model(auto: str, model: str, revision: str) -> tuple[Any, Any]:
    """Returns the image processor (its Pillow version) and the network, float32, on the CPU.

    transformers before 5.22 loads both versions of an image processor only if torchvision is installed.

    Args:
        auto: class of `transformers` that loads the model, such as "AutoModelForDepthEstimation".

    Raises UserError if the model cannot be loaded.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = locate(model, revision, FILES)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        network, report = getattr(transformers, auto).from_pretrained(
            folder, use_safetensors=True, dtype="float32", trust_remote_code=False, output_loading_info=True
        )
    except ImportError as fault:
        raise UserError(
            f"model={model}: transformers {transformers.__version__} needs a package for it that is not installed "
            f"({first_line(fault).partition('. ')[0]}). Install that package; transformers 5.22 and newer need no "
            "torchvision."
        ) from fault
    except (OSError, ValueError) as fault:
        raise UserError(
            f"model={model}, revision={revision}: cannot be loaded ({first_line(fault)}). "
            "Needed are config.json, preprocessor_config.json and weights in safetensors."
        ) from fault
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED)):
        raise UserError(
            f"model={model}: {len(missing)} weights are missing, first {missing[0]}: is it another type of model?"
        )
    return processor, network.eval()
