"""Settings that libraries read once, when they are loaded: a command makes them before anything else. What the user has
set stays."""

import os
import sys
from collections.abc import MutableMapping

_DEFAULTS = {
    # Without torchvision, which nothing here needs, transformers would print a warning at each import.
    "TRANSFORMERS_VERBOSITY": "error",
    # How often an OpenMP thread of libgomp, torch's on Linux, looks for its next work before it sleeps. The library's
    # own number takes milliseconds; if another program has the core, all threads wait that long at each operation:
    # forward passes of a small model took 3 to 50 times as long on busy cores (benchmarks/busy_cores.py).
    "GOMP_SPINCOUNT": "1000",
}
if sys.platform == "linux":
    # CUDA's allocator then grows a segment where it would otherwise take a new one of another size: a long run with
    # pictures of several sizes does not fragment its memory. torch reads this name from 2.9 on.
    _DEFAULTS["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
_OVERRULES = {
    "GOMP_SPINCOUNT": ("OMP_WAIT_POLICY",),
    "PYTORCH_ALLOC_CONF": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
}
"""Variable -> others by which the user may have decided the same."""


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the user has not set. Has no effect on a library that is loaded already."""
    for name, value in _DEFAULTS.items():
        if not any(other in environment for other in _OVERRULES.get(name, ())):
            environment.setdefault(name, value)
