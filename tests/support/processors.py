"""Skips tests of annotators whose models transformers cannot load in this environment."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest

loads_processors = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 22) and find_spec("torchvision") is None,
    reason="image processors of transformers before 5.22 need torchvision",
)
