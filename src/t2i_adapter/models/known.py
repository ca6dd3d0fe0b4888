"""Well-known bases by their hub ids: the sizes that a plan needs, so that it downloads nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import try_to_load_from_cache

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, user_path
from t2i_adapter.models.base import Base
from t2i_adapter.models.family import find_family

_SCHEDULE = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""The noise schedule of Stable Diffusion 1 and 2 and of SDXL."""


@cache
def _facts() -> dict[str, Any]:
    return parse_json(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def known_names() -> tuple[str, ...]:
    """Hub ids of the bases whose sizes are known."""
    return tuple(_facts()["names"])


class KnownBase(Base):
    """A base of which only the sizes are there: everything works that needs neither weights nor vocabularies."""

    def __init__(self, options: BaseOptions) -> None:
        """options: `name` is one of `known_names`."""
        facts = _facts()["families"][_facts()["names"][options.name]]
        self.options, self.name = options, options.name
        self.unet_config, self.vae_config = dict(facts["unet"]), dict(facts["vae"])
        self.scheduler_config = {**_SCHEDULE, "prediction_type": facts["prediction_type"]}
        self.family = find_family(self.unet_config, self.name)

    def _load(self, kind: Any, part: str, device: Any, dtype: Any) -> NoReturn:
        raise UserError(f"{self.name}: its {part} is not on this machine.", option="base.name")


def known_base(options: BaseOptions) -> KnownBase | None:
    """The sizes of a base that is known by its name and is not on this machine; None for any other base."""
    name = options.name
    if name not in _facts()["names"] or user_path(name).exists() or _is_downloaded(options):
        return None
    return KnownBase(options)


def _is_downloaded(options: BaseOptions) -> bool:
    """Whether the hub library's cache has the files that a plan reads."""
    files = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    place: Any = {"cache_dir": options.cache_dir, "revision": options.revision}
    return all(isinstance(try_to_load_from_cache(options.name, file, **place), str) for file in files)


def refuse_refiner(name: str) -> None:
    """Raises UserError for SDXL's refiner, which needs no download to be recognised."""
    if name in _facts()["refiners"]:
        raise UserError(
            f"{name} is SDXL's refiner, whose UNet no T2I-Adapter fits; use the base, {known_names()[0]}.",
            option="base.name",
        )
