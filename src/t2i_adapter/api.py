"""The Python API: what `from t2i_adapter import ...` gives. Importing this module loads no torch.

Everything here is what the command line does, called from a program: the same options, files and numbers. All errors
that the user can fix are `UserError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_origin

from t2i_adapter.config import recipe as recipes
from t2i_adapter.config.read import allowed, item_kinds, nearest, option_types, read_value, with_values, without_none
from t2i_adapter.config.tree import Config
from t2i_adapter.environment import set_defaults
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.training.events import Callback, Event, StopTraining

__all__ = ["Config", "Event", "Run", "StopTraining", "UserError", "make_config", "train"]

set_defaults()


@dataclass(frozen=True)
class Run:
    """A training that has ended.

    Attributes:
        folder: the run's, with the adapter at its top if it is finished.
        is_finished: False if a callback, a signal or a limit ended it early; its checkpoint resumes it.
        reason: why it ended early, or "".
    """

    folder: Path
    is_finished: bool
    reason: str = ""


def make_config(values: Mapping[str, Any] | None = None, *, recipe: str | Path | None = None) -> Config:
    """Returns the options of a run: the defaults, with those of a recipe, with `values` over them.

    Args:
        values: option by its path, as in `t2i-adapter train --help`: {"data.location": "pairs", "optim.lr": 1e-4}.
        recipe: a YAML file, as for `train --recipe`.

    Raises UserError for an unknown option or a value that is not allowed.
    """
    config, kinds = recipes.load(recipe, Config()) if recipe else Config(), option_types(Config)
    for path in values or {}:
        if path not in kinds:
            known = nearest(path, list(kinds))
            raise UserError(f"{path}: no such option" + (f"; did you mean {known[0]!r}?" if known else ""))
    return with_values(config, {path: _checked(path, value, kinds[path]) for path, value in (values or {}).items()})


def train(config: Config, *, callbacks: Sequence[Callback] = ()) -> Run:
    """Trains an adapter in this process, as `t2i-adapter train` does.

    callbacks: each is called with an `Event` when the run logs something. One that raises `StopTraining` ends the run
    after it is saved; with another exception the run fails, as it would by an error of its own. With
    `checkpoint.resume` "auto" the same call goes on where the run stood.

    Signals stop the run only if this is called in the main thread. Raises UserError as early as an error can be found.
    """
    from t2i_adapter.verbs.train import run

    config = replace(config, output_dir=str(Path(config.output_dir).expanduser()))
    try:
        run(config, summary=False, callbacks=callbacks)
    except Stopped as stop:
        return Run(Path(config.output_dir), False, str(stop))
    return Run(Path(config.output_dir), True)


def _checked(path: str, value: Any, kind: Any) -> Any:
    """The value as a flag or a recipe would give it. Raises UserError if it is not of the option's type."""
    inner = without_none(kind)
    try:
        if value is None and inner is not kind:
            return None
        if get_origin(inner) is tuple:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(value)
            each = zip(value, item_kinds(inner, len(value)), strict=True)
            return tuple(read_value(str(item), item_kind) for item, item_kind in each)
        return read_value(str(value), inner)
    except ValueError:
        raise UserError(f"{value!r}: {allowed(kind, str(value))}", option=path) from None
