"""Several adapters trained together (`adapter.compose`): loads them, finds their conditions, names their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from diffusers import T2IAdapter

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import open_recorded
from t2i_adapter.batches.choices import WEIGHT_RANGE
from t2i_adapter.config.tree import COLUMN, FOLDER, Config
from t2i_adapter.data import shapes
from t2i_adapter.data.joined import Part
from t2i_adapter.errors import UserError, flag
from t2i_adapter.models.adapter import check_fits, load_adapter
from t2i_adapter.models.joint import JointAdapter, adapters_in
from t2i_adapter.models.record import FILE_NAME, Metadata, read_metadata

_NAME_LETTERS = 40
"""Longest name of an adapter in the name of its folder."""


def check_options(config: Config) -> None:
    """Raises UserError for options that do not work with several adapters, or only with several."""
    names, conditions = config.adapter.compose, config.data.conditions
    if not names:
        if conditions:
            text = f"{' '.join(conditions)}: is for {flag('adapter.compose')}; use {flag('data.condition')}."
            raise UserError(text, option="data.conditions")
        return
    if conditions and len(conditions) != len(names):
        text = f"{' '.join(conditions)}: {len(conditions)} conditions for {len(names)} adapters; name one for each."
        raise UserError(text, option="data.conditions")
    single = config.data.condition or config.data.conditioning_dir
    if single:
        option = "data.condition" if config.data.condition else "data.conditioning_dir"
        text = f"{single}: is one condition for {len(names)} adapters; name all with {flag('data.conditions')}."
        raise UserError(text, option=option)
    if config.validation.prompts:
        text = (
            f"shows one condition, and {len(names)} adapters take as many; omit it. The run measures on held-out pairs "
            f"what the sum of the adapters gains ({flag('validation.budget')})."
        )
        raise UserError(text, option="validation.prompts")
    if config.validation.judge not in (None, "none"):
        text = f"{config.validation.judge}: judges one condition, and {len(names)} are trained; omit it."
        raise UserError(text, option="validation.judge")
    if config.hub.push:
        text = f"{len(names)} adapters are trained; push each from its folder with `t2i-adapter push` after the run."
        raise UserError(text, option="hub.push")


def load_adapters(config: Config, unet_config: Mapping[str, Any]) -> JointAdapter:
    """The adapters of `adapter.compose` as one network, float32. Raises UserError if one does not fit the base."""
    adapters = []
    for name in config.adapter.compose:
        adapter = load_adapter(name, cache_dir=config.base.cache_dir)
        check_fits(adapter.config, unet_config, name)
        adapters.append(adapter)
        _check_channels(adapters[-1], name)
    return JointAdapter(adapters)


def _check_channels(adapter: T2IAdapter, name: str) -> None:
    """Raises UserError unless the adapter, called `name`, takes grey or RGB pictures."""
    channels = adapter.config["in_channels"]
    if channels not in (1, 3):
        text = f"{name}: takes pictures of {channels} channels; allowed are 1 and 3."
        raise UserError(text, option="adapter.compose")


def find_parts(config: Config, network: Any) -> tuple[Part, ...]:
    """Where the condition of each adapter comes from; () if one adapter is trained. Raises UserError."""
    names = config.adapter.compose
    if not names:
        return ()
    channels = [adapter.config["in_channels"] for adapter in adapters_in(network)]
    origins = config.data.conditions or (None,) * len(names)
    parts = [_find_part(*each, config) for each in zip(names, origins, channels, strict=True)]
    if len({part.origin for part in parts}) < len(parts):
        listed = " ".join(part.origin for part in parts)
        raise UserError(
            f"{listed}: two adapters would take the same condition; name another for each: an annotator, {COLUMN}NAME "
            f"or {FOLDER}DIR.",
            option="data.conditions",
        )
    return tuple(parts)


def _find_part(name: str, origin: str | None, channels: int, config: Config) -> Part:
    record = read_metadata(name)
    condition = record.condition if record else {}
    kind = condition.get("kind")
    known: Any = kind if kind in get_args(Kind) else config.data.condition_kind
    return Part(origin or _recorded_origin(name, condition), channels, known)


def _recorded_origin(name: str, condition: Mapping[str, Any]) -> str:
    """The condition of an adapter's training, by its record. Only installed annotators are opened: the record may come
    from anyone."""
    if isinstance(condition.get("column"), str):
        return COLUMN + condition["column"]
    if condition.get("name") in shapes.CONDITIONS and "options" not in condition:
        return condition["name"]  # a map that the dataset `shapes` draws itself
    if condition.get("name"):
        return open_recorded(condition).spec
    raise UserError(
        f"is needed: {name} has no {FILE_NAME} that says how its condition is made. Name one condition for each "
        f"adapter: an annotator, {COLUMN}NAME or {FOLDER}DIR.",
        option="data.conditions",
    )


def adapter_folders(config: Config) -> list[Path]:
    """The folders of a run's finished adapters: the run's own, or one in it for each of several."""
    output = Path(config.output_dir)
    names = config.adapter.compose
    return [output / f"adapter-{number}-{_short(name)}" for number, name in enumerate(names)] or [output]


def _short(name: str) -> str:
    """The last part of an adapter's folder or hub id, as it can stand in a folder's name."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).resolve().name if Path(name).exists() else Path(name).name)
    own = re.sub(r"^(adapter-\d+-)+", "", last)  # of an earlier joint training
    return own.strip("-.")[:_NAME_LETTERS] or "adapter"


def joint_record(names: Sequence[str], number: int) -> dict[str, Any]:
    """What the record of adapter `number` says about the others, for `Metadata.training`.

    composed_from: the adapter that it was before. composed_with: the others. composed_weights: the range of the weights
    in the training; 1 is recommended.
    """
    return {
        "composed_from": names[number],
        "composed_with": [name for other, name in enumerate(names) if other != number],
        "composed_weights": list(WEIGHT_RANGE),
    }


def is_written(config: Config, step: int) -> bool:
    """Whether the run's adapters were written after that step."""
    records: list[Metadata | None] = []
    for folder in adapter_folders(config):
        try:
            records.append(read_metadata(folder))
        except UserError:  # the end of this run replaces it
            records.append(None)
    return all(record is not None and record.steps == step for record in records)
