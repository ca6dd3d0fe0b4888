"""Models of the hub, by `transformers`: pinned to a commit, read from safetensors, loaded once a process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path

PINNED = {
    "depth-anything/Depth-Anything-V2-Small-hf": "5426e4f0f36572d16453bbda7a8389317b1bef99",
    "Intel/dpt-large": "bc15f29aa3a80d532f2ed650b5e16ac48d8958f9",
    "Intel/zoedepth-nyu-kitti": "f364d4c7936e91f465abba182208dd68142bf0ca",
    "nvidia/segformer-b0-finetuned-ade-512-512": "489d5cd81a0b59fab9b7ea758d3548ebe99677da",
    "facebook/sam-vit-base": "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
    "lllyasviel/Annotators": "982e7edaec38759d914a963c48c4726685de7d96",
    "yzd-v/DWPose": "1a7144101628d69ee7a3768d1ee3a094070dc388",
}
"""Hub id -> the commit that is meant where none is named."""
FOLDER_MARK = "sha256:"
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."
"""DPT's weights for a second input that its first fusion has not: checkpoints leave them out; nothing reads them."""
OPTIONAL = ("processor_config.json", "model*.index.json")
FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", *OPTIONAL)
"""What is downloaded of a model; the optional ones are there or not."""


def pin(options: Any, kind: str, files: str = "*.safetensors") -> None:
    """Sets `options.revision`, where it is empty, to what tells the weights of `options.model`: a known hub id's
    commit, or a folder's content. So maps that are kept belong to these weights, whatever the folder holds later.

    Args:
        options: a frozen dataclass with `model` and `revision`, in its own `__post_init__`.
        files: pattern of a folder's weight files.

    Raises UserError where that cannot be told, or a folder's content is not what `revision` says.
    """
    model, revision = str(options.model), str(options.revision)
    folder = user_path(model)
    found = _content(folder.resolve(), kind, files) if folder.is_dir() else PINNED.get(model, "")
    if not revision and not found:
        raise UserError(
            f"{kind}: model={model}: no such folder, and no hub id whose commit is known here: name one with "
            f"revision=COMMIT. Known are {', '.join(PINNED)}."
        )
    if folder.is_dir() and revision not in ("", found):
        raise UserError(f"{kind}: model={model}: holds {found}, and revision={revision} was asked for.")
    if not folder.is_dir() and revision.startswith(FOLDER_MARK):
        raise UserError(f"{kind}: model={model}: no such folder; needed is the one that holds {revision}.")
    object.__setattr__(options, "revision", revision or found)  # frozen for everyone after this


@cache
def _content(folder: Path, kind: str, files: str) -> str:
    """Digest of the configs and weights in a folder."""
    weights = [*folder.glob(files)]
    if not weights:
        raise UserError(f"{kind}: model={folder}: holds no weights ({files}).")
    digest = hashlib.sha256()
    for path in sorted({*folder.glob("*.json"), *weights}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return FOLDER_MARK + digest.hexdigest()[:32]


def locate(model: str, revision: str, kind: str, files: Iterable[str]) -> Path:
    """The folder of a model whose `revision` is set, downloaded if it is a hub id. Raises UserError.

    Args:
        files: names, or patterns of them, that are downloaded.
    """
    if revision.startswith(FOLDER_MARK):
        return user_path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": [*files]}
    if re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes: what is here need not be asked for
        with suppress(OSError, ValueError):
            here = Path(snapshot_download(model, local_files_only=True, **wanted))
            if all([*here.glob(needed)] for needed in files if needed not in OPTIONAL):
                return here
    try:
        return Path(snapshot_download(model, **wanted))
    except (OSError, ValueError, HfHubHTTPError) as fault:
        raise UserError(
            f"{kind}: model={model}, revision={revision}: the hub does not give it ({first_line(fault)}). "
            "A folder that holds it can be named as model."
        ) from fault


@cache
def open_model(auto: str, model: str, revision: str, kind: str) -> tuple[Any, Any]:
    """Image processor (of Pillow's kind: torchvision is not needed) and network in float32 on the CPU.

    Args:
        auto: transformers' class that knows the model, such as "AutoModelForDepthEstimation".

    Raises UserError where hub or folder has no such model.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = locate(model, revision, kind, FILES)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        network, report = getattr(transformers, auto).from_pretrained(
            folder, use_safetensors=True, dtype="float32", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{kind}: model={model}, revision={revision}: cannot be loaded ({first_line(fault)}). "
            "Needed are config.json, preprocessor_config.json and weights in safetensors."
        ) from fault
    if absent := sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED)):
        raise UserError(
            f"{kind}: model={model}: lacks {len(absent)} of its weights, {absent[0]} first: is it another kind?"
        )
    return processor, network.eval()
