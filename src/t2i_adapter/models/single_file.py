"""A base in one .safetensors file, as SDXL and most of its descendants are given away."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import sha256, user_path
from t2i_adapter.models.base import PARTS, TEXT_PARTS, FolderBase, digest_of_folders, freeze, vae_digest

diffusers_logging.disable_progress_bar()  # one for each part, and there is one part at a time

CONFIG_FILES = ["model_index.json", *(f"{part}/*.{end}" for part in PARTS for end in ("json", "txt"))]
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("conditioner.embedders.0.transformer.",),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
_SCHEDULES = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
_GIVE_CONFIG = "Give --base.config: a diffusers folder or hub id of the model that the file was made from"


class FileBase(FolderBase):
    """Weights in a file in the layout of SDXL's original release; configs and tokenizers in a diffusers folder.

    Each part is read from the file by itself, so that no other is in memory with it.
    """

    def __init__(self, options: BaseOptions, path: Path) -> None:
        self.path = path
        keys = _keys(path, with_vae=options.vae is None)
        super().__init__(options, _folder_of_configs(options, path))
        self._check_schedule(keys)

    @cached_property
    def text_fingerprint(self) -> str:
        return self._fingerprint(TEXT_PARTS)

    @cached_property
    def vae_fingerprint(self) -> str:
        return vae_digest(self.options) or self._fingerprint(("vae",))

    @cached_property
    def _file_digest(self) -> str:
        return sha256(self.path)

    def _fingerprint(self, parts: Iterable[str]) -> str:
        """Of the parts' configs and of the whole file, for its header alone does not tell the weights."""
        configs = digest_of_folders([self.folder / part for part in parts], None, weights=False)
        return hashlib.sha256(f"{self._file_digest}\n{configs}".encode()).hexdigest()

    def _load(self, kind: Any, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        others = {other: None for other in PARTS if other != part}
        try:
            pipeline = StableDiffusionXLPipeline.from_single_file(
                str(self.path), config=str(self.folder), local_files_only=True, **others
            )
        except NotImplementedError as fault:  # of a weight that stayed without a value
            raise self._unlike_config(part, "the file lacks some of its weights") from fault
        except (OSError, ValueError, LookupError, AttributeError, SingleFileComponentError) as fault:
            raise self._unlike_config(part, first_line(fault)) from fault
        model = getattr(pipeline, part)
        if not isinstance(model, kind):
            raise self._unlike_config(part, f"model_index.json beside it names {type(model).__name__}")
        absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if absent:
            raise self._unlike_config(part, f"the file lacks {len(absent)} of its weights, such as {absent[0]}")
        return freeze(torch.nn.Module.to(model, dtype=dtype), device)

    def _unlike_config(self, part: str, reason: str) -> UserError:
        config = self.folder / part / "config.json"
        return UserError(f"{self.path}: its {part} is not what {config} describes ({reason}). {_GIVE_CONFIG}.")

    def _check_schedule(self, keys: set[str]) -> None:
        """Files of other schedules than SDXL's own have a key that says so; diffusers does not read it."""
        schedule = self.scheduler().config
        for key, (setting, value) in _SCHEDULES.items():
            if key in keys and schedule[setting] != value:
                raise UserError(
                    f"{self.path} has the key {key}: it was trained with {setting} {value}, but "
                    f"{self.folder / 'scheduler' / 'scheduler_config.json'} says {schedule[setting]}. "
                    f"{_GIVE_CONFIG}, whose scheduler says so."
                )


def _keys(path: Path, *, with_vae: bool) -> set[str]:
    """Names of the file's tensors, from its header alone. Raises UserError if they are not a whole SDXL's."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a single-file base must be .safetensors; pickled weights (.ckpt, .bin) are not read.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path} is no whole safetensors file ({first_line(fault)}). Fetch it again.") from fault
    wanted = [prefixes for part, prefixes in _PREFIXES.items() if with_vae or part != "vae"]
    missing = [prefixes[0] for prefixes in wanted if not any(key.startswith(prefixes) for key in keys)]
    if missing:
        raise UserError(
            f"{path} is not an SDXL base in the layout of the original release: it has no weights "
            f"{', '.join(f'{prefix}*' for prefix in missing)}. Name a whole checkpoint, or a diffusers folder."
        )
    return keys


def _folder_of_configs(options: BaseOptions, path: Path) -> Path:
    """A diffusers folder, whether or not it has weights too: a local one, or the hub's files but for its weights."""
    named = options.config or _model_told_by_keys(path)
    folder = user_path(named)
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                named, revision=options.revision, cache_dir=options.cache_dir, allow_patterns=CONFIG_FILES
            )
        )
    except (OSError, ValueError) as fault:
        whence = f"--base.config {named}" if options.config else f"{path} takes its configs from {named}"
        raise UserError(
            f"{whence}: no such folder, and the hub does not give it ({first_line(fault)}). {_GIVE_CONFIG}."
        ) from fault


def _model_told_by_keys(path: Path) -> str:
    return fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
