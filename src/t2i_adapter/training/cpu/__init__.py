"""Faster gradients on a CPU: threads share a micro-batch and replay traces of its operations.

The rest of `training/` uses `cpu_gradients` and `build_in_process`. `threads.py` holds the threads, `trace.py` the
traces, and `feeding.py` builds batches beside the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from t2i_adapter.config.tree import Config
from t2i_adapter.training.cpu.threads import CpuThreads, count_cpu_threads
from t2i_adapter.training.cpu.trace import TraceCache, is_traceable
from t2i_adapter.types import Batch


def cpu_gradients(
    config: Config, accelerator: Accelerator, adapter: Any, losses: Callable[[Any, Batch], Tensor]
) -> CpuThreads | None:
    """Threads that compute gradients side by side, or None if one thread is as good: on a GPU, with several ranks, for
    one sample, and in a profile, which follows one thread.

    adapter: the network to train, before accelerate wraps its forward. losses: (adapter, batch) -> each sample's (B,).
    """
    train = config.train
    count = count_cpu_threads(train.cpu_threads, accelerator.device, train.batch_size, accelerator.num_processes)
    if count == 1 or train.profile:
        return None

    def autocast_losses(network: Any, batch: Batch) -> Tensor:
        def features(*inputs: Tensor) -> Any:
            with accelerator.autocast():
                return network(*inputs)

        return losses(features, batch)

    return CpuThreads(count, adapter, autocast_losses, TraceCache(tqdm.write) if is_traceable(config) else None)
