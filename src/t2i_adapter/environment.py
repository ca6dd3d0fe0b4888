"""Settings that libraries read once, when they are loaded: a command makes them before anything else. What the user has
set stays."""

import os
from collections.abc import MutableMapping

_DEFAULTS = {
    # Without torchvision, which nothing here needs, transformers would print a warning at each import.
    "TRANSFORMERS_VERBOSITY": "error",
    # How often an OpenMP thread of libgomp, torch's on Linux, looks for its next work before it sleeps. The library's
    # own number takes milliseconds; if another program has the core, all threads wait that long at each operation:
    # forward passes of a small model took 3 to 50 times as long on busy cores (benchmarks/busy_cores.py).
    "GOMP_SPINCOUNT": "1000",
}
_OVERRULES = {"GOMP_SPINCOUNT": "OMP_WAIT_POLICY"}
"""Variable -> another one by which the user may have decided the same."""


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the user has not set. Has no effect on a library that is loaded already."""
    for name, value in _DEFAULTS.items():
        if _OVERRULES.get(name, name) not in environment:
            environment.setdefault(name, value)
