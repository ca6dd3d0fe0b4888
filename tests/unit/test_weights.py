"""A network is refused if a weight is missing or has another shape: no weight becomes random in silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.models.adapter import build_adapter, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base

Spoil = Callable[[dict[str, Tensor], str], None]


def remove(weights: dict[str, Tensor], name: str) -> None:
    del weights[name]


def shorten(weights: dict[str, Tensor], name: str) -> None:
    weights[name] = weights[name][:1].clone()


def spoil(folder: Path, how: Spoil) -> str:
    """Changes one weight in the folder's file; returns its name."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = min(name for name, tensor in weights.items() if len(tensor) > 1)
    how(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    return name


def load(base: Base, part: str) -> None:
    getattr(base, "text_encoder" if part.startswith("text") else part)("cpu", torch.float32)


@pytest.mark.parametrize("how", [remove, shorten])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_base_with_a_bad_weight_is_refused(tiny_base: Path, tmp_path: Path, part: str, how: Spoil) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    name = spoil(folder / part, how)
    with pytest.raises(UserError, match=f"no complete safetensors weights for {part} ") as refused:
        load(open_base(BaseOptions(name=str(folder))), part)
    if how is remove:
        assert f"(1 weights are missing, such as {name})" in str(refused.value)


@pytest.mark.parametrize("how", [remove, shorten])
def test_a_vae_with_a_bad_weight_is_refused(tiny_base: Path, tmp_path: Path, how: Spoil) -> None:
    vae = shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    name = spoil(vae, how)
    with pytest.raises(UserError, match=rf"--base\.vae .*no VAE found .*{name}"):
        open_base(BaseOptions(name=str(tiny_base), vae=str(vae))).vae("cpu", torch.float32)


@pytest.mark.parametrize("how", [remove, shorten])
def test_an_adapter_with_a_bad_weight_is_refused(tiny_base: Path, tmp_path: Path, how: Spoil) -> None:
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    save_adapter(network, tmp_path / "adapter", metadata={"base": {"name": str(tiny_base)}}, fp16=False)
    name = spoil(tmp_path / "adapter", how)
    with pytest.raises(UserError, match=f"no adapter found .*{name}"):
        load_adapter(str(tmp_path / "adapter"))


def test_both_names_of_a_text_encoders_weights_are_read(tiny_base: Path, tmp_path: Path) -> None:
    """Bases written by transformers before 5.6 have the prefix `text_model.`, newer ones do not."""
    prefixed, plain = (shutil.copytree(tiny_base, tmp_path / name) for name in ("prefixed", "plain"))
    (file,) = (tiny_base / "text_encoder").glob("*.safetensors")
    weights = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(weights, plain / "text_encoder" / file.name, metadata={"format": "pt"})
    weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, prefixed / "text_encoder" / file.name, metadata={"format": "pt"})
    first, second = (
        open_base(BaseOptions(name=str(folder))).text_encoder("cpu", torch.float32).encode(["red circle"])
        for folder in (prefixed, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
