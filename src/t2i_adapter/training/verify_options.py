"""Options of the verb `verify-resume`. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class VerifyOptions:
    """Two short runs of a recipe, one left alone and one stopped in the middle and resumed."""

    recipe: str
    """YAML file of a run's options, such as the options.yaml in a run's folder."""
    steps: int = 6
    """Updates of each run; the second one stops half-way."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"--steps {self.steps}: 2 or more, so that there is a place to stop at")
