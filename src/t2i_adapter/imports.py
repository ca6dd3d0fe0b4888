"""Imports a heavy module when a verb needs it."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import Any


def resolve(reference: str) -> Any:
    """What "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(_imported(module), name)


def _imported(name: str) -> ModuleType:
    """The module. What an import makes stays for good: to look for garbage meanwhile takes a fifth of its time, and
    later sweeps, this process' and its loader's, need not look at it again."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        module = importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()
    return module
