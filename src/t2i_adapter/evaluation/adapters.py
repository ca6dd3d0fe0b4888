"""The adapters of one evaluation: short names for them, and the check that they can be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from t2i_adapter.config.tree import to_dict
from t2i_adapter.errors import UserError, flag
from t2i_adapter.evaluation.pairs import condition_spec
from t2i_adapter.evaluation.plan import ADAPTER, NO_ADAPTER, OTHER_CONDITION, Column
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.generation.pipeline import Models


def adapter_names(adapters: Sequence[str]) -> list[str]:
    """Returns a short name for each adapter's folder or hub id: the parts of its path by which it differs.

    A name has letters, digits and "._-" only, and all names differ.
    """
    parts = [
        [part for part in PurePath(adapter).parts if part not in ("/", ".", "~")] or ["adapter"] for adapter in adapters
    ]
    if len(adapters) > 1:
        while all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
            parts = [each[:-1] for each in parts]
        while all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
            parts = [each[1:] for each in parts]
    if len({each[-1] for each in parts}) == len(parts):
        parts = [each[-1:] for each in parts]
    names = [re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(each)) for each in parts]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


def check_comparable(
    adapters: Sequence[str], models: Sequence[Models], condition: str | None, resolution: int | None
) -> None:
    """Raises UserError, which names both adapters, unless all take the same conditions on the same base.

    condition, resolution: the options, which win over what the adapters record.
    """
    specs = [condition_spec(condition, adapter) for adapter in adapters]
    polarities = [model.metadata.condition.get("polarity") if model.metadata else None for model in models]
    for other in range(1, len(adapters)):
        names = f"{adapters[0]} and {adapters[other]}"
        first, second = models[0], models[other]
        if adapters[other] in adapters[:other]:
            raise UserError(f"{adapters[other]}: is given twice; name different adapters.", option="adapter")
        if first.channels != second.channels:
            raise UserError(
                f"{names} take conditions of {first.channels} and {second.channels} channels. Compare adapters of one "
                "condition.",
                option="adapter",
            )
        if specs[0] != specs[other]:
            shown = [spec or "the condition column" for spec in (specs[0], specs[other])]
            raise UserError(
                f"{names} were trained on other conditions: {shown[0]}, and {shown[1]}. Compare adapters of one "
                f"condition, or name it with {flag('condition')}.",
                option="adapter",
            )
        if specs[0] is None and None not in (polarities[0], polarities[other]) and polarities[0] != polarities[other]:
            raise UserError(
                f"{names} were trained on conditions of other polarity: {polarities[0]}, and {polarities[other]}.",
                option="adapter",
            )
        if to_dict(first.base.options) != to_dict(second.base.options):
            raise UserError(
                f"{names} were trained on other bases: {first.base.name}, and {second.base.name}. Name the base for "
                f"both with {flag('base')}.",
                option="adapter",
            )
        if resolution is None and first.resolution != second.resolution:
            raise UserError(
                f"{names} were trained at {first.resolution} and {second.resolution} pixels. Name the side of the "
                f"pictures with {flag('resolution')}.",
                option="adapter",
            )
        if first.max_tokens != second.max_tokens:
            raise UserError(
                f"{names} read {first.max_tokens} and {second.max_tokens} tokens of a prompt. Name one number with "
                f"{flag('max_tokens')}.",
                option="adapter",
            )


def adapter_column(kind: str, name: str) -> str:
    """Returns the column of one of several adapters: "adapter-NAME" or "other_condition-NAME"."""
    return f"{kind}-{name}"


def all_columns(names: Sequence[str], models: Sequence[Models], sampling: Sequence[SamplingOptions]) -> list[Column]:
    """Returns the columns to generate, NO_ADAPTER once. One adapter has the plain names of the columns."""
    columns = []
    for name, model, own in zip(names, models, sampling, strict=True):
        for kind in (ADAPTER, OTHER_CONDITION):
            column = kind if len(names) == 1 else adapter_column(kind, name)
            columns.append(Column(column, kind, own, model.adapter))
    return [*columns, Column(NO_ADAPTER, NO_ADAPTER, sampling[0])]
