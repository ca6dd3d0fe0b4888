"""Finds a base by its name: the embedded one, a diffusers folder, one .safetensors file, or a hub id."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from t2i_adapter.config.tree import NANO, BaseOptions
from t2i_adapter.errors import UserError, first_line
from t2i_adapter.files import user_path
from t2i_adapter.models.base import Base, FolderBase
from t2i_adapter.models.single_file import FileBase


def open_base(options: BaseOptions) -> Base:
    """Finds the base, downloading it if it is a hub id, and checks that it is an SDXL. Raises UserError."""
    name = options.name
    path = user_path(name)
    if options.config and (name == NANO or not path.is_file()):
        raise UserError(
            f"--base.config {options.config}: is for a base in a single file, and {name} is none; leave it out."
        )
    if name == NANO:
        from t2i_adapter.models import nano

        return FolderBase(options, nano.path())
    if path.is_file():
        return FileBase(options, path)
    return FolderBase(options, path if path.is_dir() else _download(options))


def _download(options: BaseOptions) -> Path:
    """The hub's snapshot folder of the base, with safetensors weights only."""
    try:
        folder = StableDiffusionXLPipeline.download(
            options.name,
            revision=options.revision,
            variant=options.variant,
            cache_dir=options.cache_dir,
            use_safetensors=True,
        )
    except (OSError, ValueError) as fault:
        raise UserError(
            f"--pretrained_model_name_or_path {options.name}: no such folder or file, and the hub gives no such model "
            f"({first_line(fault)}). Name a hub id, a diffusers folder, a single .safetensors file, or {NANO}."
        ) from fault
    return Path(folder)
