"""Finds a base by its name: `nano` (in this package), a diffusers folder, one .safetensors file, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from t2i_adapter.config.tree import NANO, BaseOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path
from t2i_adapter.models import nano
from t2i_adapter.models.base import Base
from t2i_adapter.models.known import refuse_refiner
from t2i_adapter.models.single_file import SingleFileBase

_UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def open_base(options: BaseOptions) -> Base:
    """Finds the base, downloads it if it is a hub id, and checks that it is of a known family. Raises UserError."""
    name, path = options.name, user_path(options.name)
    refuse_refiner(name)
    if options.config and (name == NANO or not path.is_file()):
        raise UserError(
            f"{options.config}: only a base in a single file needs it, and {name} is not a file; omit it.",
            option="base.config",
        )
    if name == NANO:
        return Base(options, nano.path())
    if path.is_file():
        return SingleFileBase(options, path)
    return Base(options, path if path.is_dir() else _download(options))


def downloaded_commit(base: Base) -> str | None:
    """The commit of the hub's repository that a base was downloaded at; None for a base of this machine."""
    folder = base.folder
    is_download = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_download and not user_path(base.name).exists() else None


def native_size(name: str) -> int | None:
    """Side in pixels of the pictures that a base makes by default; None if it cannot be read here.

    Of a base on the hub only the UNet's config is downloaded.
    """
    try:
        if user_path(name).exists():
            return open_base(BaseOptions(name=name)).native_size
        config: Any = UNet2DConditionModel.load_config(name, subfolder="unet")
        return config["sample_size"] * 8
    except (OSError, ValueError, LookupError, UserError):
        return None


def _download(options: BaseOptions) -> Path:
    """Downloads the base from the hub, with safetensors weights only; returns its folder in the hub's cache.

    It downloads the parts that `model_index.json` names, of any family, without those that no run uses.
    """
    try:
        folder = StableDiffusionPipeline.download(
            options.name,
            revision=options.revision,
            variant=options.variant,
            cache_dir=options.cache_dir,
            use_safetensors=True,
            **dict.fromkeys(_UNUSED_PARTS),
        )
    except (OSError, ValueError) as fault:
        raise UserError(
            f"{options.name}: no such folder or file, and the hub has no such model ({first_line(fault)}). "
            f"Name a hub id, a diffusers folder, a single .safetensors file, or {NANO}.",
            option="base.name",
        ) from fault
    return Path(folder)
