"""The verb `prepare`: fills the cache for a training run, and stops. Importing this module loads no torch."""

from __future__ import annotations

from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, flag
from t2i_adapter.imports import preload


def run(config: Config, *, dry_run: bool = False) -> None:
    """Encodes what a run with these options would look up in the cache. Raises UserError.

    dry_run: prints the options and the dataset, and returns.
    """
    preload("t2i_adapter.training.setup")
    from t2i_adapter.training.setup import make_accelerator, open_inputs

    if config.data.cache == "none":
        raise UserError("none: without a cache there is nothing to prepare; omit it.", option="data.cache")
    if config.data.max_train_samples is not None and config.train.seed is None:
        raise UserError(
            f"selects rows by the seed: set {flag('train.seed')} to that of the training run.",
            option="data.max_train_samples",
        )
    inputs = open_inputs(config, make_accelerator(config), config.train.seed or 0)
    inputs.accelerator.print(inputs.source.describe(), flush=True)
    if dry_run:
        inputs.accelerator.print(f"Options\n{recipe.dump(config)}")
        return
    inputs.prepare_data()
