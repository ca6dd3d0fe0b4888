"""The verb `prepare`: fills the cache for a training run, and stops. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import replace

from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config, part_of
from t2i_adapter.errors import UserError, flag
from t2i_adapter.imports import preload


def run(config: Config, *, dry_run: bool = False) -> None:
    """Encodes what a run with these options would look up in the cache. Raises UserError.

    With `data.on_missing fail` it encodes nothing and raises UserError if a record is missing.

    dry_run: prints the options and the dataset, and returns.
    """
    preload("t2i_adapter.training.setup")
    from t2i_adapter.cache.parts import rows_of
    from t2i_adapter.training.accelerator import make_accelerator
    from t2i_adapter.training.setup import open_inputs

    if config.data.cache == "none":
        raise UserError("none: without a cache there is nothing to prepare; omit it.", option="data.cache")
    if config.data.max_train_samples is not None and config.train.seed is None:
        raise UserError(
            f"selects rows by the seed: set {flag('train.seed')} to that of the training run.",
            option="data.max_train_samples",
        )
    if config.data.part and config.data.on_missing == "fail":
        raise UserError("fail: looks for the records of all parts; omit it.", option="data.on_missing")
    if config.data.on_missing == "fail" or (config.data.part and part_of(config.data.part).number > 1):
        # The pairs that a run measures are few: the run makes them itself, or the first part does.
        config = replace(config, validation=replace(config.validation, budget=0))
    inputs = open_inputs(config, make_accelerator(config), config.train.seed or 0)
    inputs.accelerator.print(inputs.source.describe(), flush=True)
    if dry_run:
        inputs.accelerator.print(f"Options\n{recipe.dump(config)}")
        return
    if config.data.part and not len(rows_of(inputs.source.shards, part_of(config.data.part))):
        inputs.accelerator.print(f"part {config.data.part} has no pair: there are more parts than pairs.")
        return
    inputs.prepare_data()
