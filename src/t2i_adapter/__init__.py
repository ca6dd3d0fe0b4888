"""Train T2I-Adapters for Stable Diffusion XL.

`from t2i_adapter import train, make_config` and the other names of `t2i_adapter.api` work, and load torch only when
they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from t2i_adapter.api import (
        Config,
        Event,
        Run,
        StopTraining,
        UserError,
        generate,
        load,
        make_condition,
        make_config,
        train,
    )
    from t2i_adapter.types import Photo

__all__ = [
    "Config",
    "Event",
    "Photo",
    "Run",
    "StopTraining",
    "UserError",
    "generate",
    "load",
    "make_condition",
    "make_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads the API with its first name, so that a command that does not use it starts without it."""
    if name in __all__:
        from t2i_adapter import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
