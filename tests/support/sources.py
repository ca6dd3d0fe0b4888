"""Opens a dataset as training does, and returns the message of what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError


def open_at(place: object, **options: Any) -> Source:
    return open_source(DataOptions(location=str(place), **options), seed=0)


def fault_of(place: object, index: int = 0, **options: Any) -> str:
    """The one line of the error from opening a dataset or reading the row at `index`."""
    with pytest.raises(UserError) as fault:
        open_at(place, **options)[index]
    assert "\n" not in str(fault.value)
    return str(fault.value)
