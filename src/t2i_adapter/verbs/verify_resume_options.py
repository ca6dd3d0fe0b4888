"""Options of the verb `verify-resume`. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class VerifyOptions:
    """Two short runs with a run's options, one left alone and one stopped in the middle and resumed."""

    recipe: str | None = None
    """YAML file of a run's options, such as the options.yaml in a run's folder; flags win over it."""
    steps: int = 6
    """Updates of each run; the second one stops half-way."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"--steps {self.steps}: 2 or more, so that there is a place to stop at")
