"""The UNet's operations recorded and replayed without the interpreter, for threads that would wait for their turn.

The same operations on the same numbers: results are the same to the bit, so a run may begin to replay at any step.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from t2i_adapter.config import Config
from t2i_adapter.models.base import first_line

RECORD_AT = 16
"""Uses of a shape before it is recorded. Recording takes as long as a few dozen replays save (0.25 s against 8 ms,
`nano` on 2 cores), so a shape that is seldom met is not worth it, and a run's first step is not kept waiting."""
MOST = 16
"""Shapes that are recorded; each takes some megabytes."""


def is_recordable(config: Config) -> bool:
    """Whether the UNet is made of plain operations, on a CPU: not compiled, no activations forgotten, no narrow layers,
    and no profile that looks into its modules."""
    train = config.train
    plain = not (train.gradient_checkpointing or train.xformers or train.profile) and config.base.quantize == "none"
    return plain and train.compile == "off"


class Recorded:
    """Stands for the UNet in training: each shape of its inputs is recorded once it has come often enough.

    What cannot be recorded, or does not replay to the bit, runs as it is from then on, and `say` gets one line.
    """

    def __init__(self, unet: Callable[..., Any], say: Callable[[str], None]) -> None:
        self._unet, self._say = unet, say
        self._uses: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[..., Any]] = {}
        self._lock, self._on = Lock(), True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        key = (str(tree), tuple(_kind(leaf) for leaf in leaves))
        if key not in self._replays and self._on:
            with self._lock:  # the others wait for the one that records
                self._uses[key] += 1
                if self._uses[key] == RECORD_AT and len(self._replays) < MOST:
                    self._record(key, leaves, tree)
        replay = self._replays.get(key)
        if replay is None:
            return self._unet(*args, **kwargs)
        with torch.jit.optimized_execution(False):  # fused operations would round otherwise; each thread has its own
            return replay(*_tensors(leaves))

    def _record(self, key: Hashable, leaves: Sequence[Any], tree: Any) -> None:
        def forward(*tensors: Tensor) -> Any:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
            return self._unet(*args, **kwargs)

        tensors = [tensor.detach() for tensor in _tensors(leaves)]
        try:
            with torch.no_grad(), torch.jit.optimized_execution(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that shapes become constants is what is wanted: each has its own
                replay: Any = torch.jit.trace(forward, tuple(tensors), check_trace=False)
                same = all(map(torch.equal, forward(*tensors), replay(*tensors)))
        except Exception as fault:  # whatever torch finds that it cannot record
            self._off(first_line(fault))
            return
        if same:
            self._replays[key] = replay
        else:
            self._off("it does not replay to the bit")

    def _off(self, why: str) -> None:
        self._on = False
        self._say(f"The UNet cannot be recorded here ({why}); it runs as it is.")


def _kind(leaf: Any) -> Hashable:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
