"""Leaves a process as it was before a run, because the run may be inside somebody else's program.

Ray Train, Kubeflow and notebooks call `t2i_adapter.train` in a process group, and a thread, of their own, and go on
afterwards.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

_STATES: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Inside, a run may start: accelerate's state is empty, and the environment names this process's rank.

    At the end these are as before: the process group, accelerate's state, the environment, `sys.argv`, torch's number
    of threads and random state. A process group that the run has made is destroyed; one that was there stays and works.
    `Stopper` restores signal handlers, `numerics.restored_switches` torch's switches.
    """
    had_group = _has_group()
    environment, words = dict(os.environ), list(sys.argv)
    states = [dict(state._shared_state) for state in _STATES]
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    for state in _STATES:
        state._shared_state.clear()
    if had_group:
        _name_rank()
    failed = True
    try:
        yield
        failed = False
    finally:
        if _has_group() and not had_group and (not failed or dist.get_backend() == "gloo"):
            dist.destroy_process_group()  # NCCL may wait for the other processes, which need not be there any more
        for state, content in zip(_STATES, states, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        _restore_environment(environment)
        sys.argv[:] = words


def _restore_environment(before: Mapping[str, str]) -> None:
    """Changes what differs alone: other threads may read the environment meanwhile."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _name_rank() -> None:
    """Sets what a launcher would set from the process group that is there; accelerate reads nothing else."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if (
        os.environ.get("RANK") == str(rank)
        and os.environ.get("WORLD_SIZE") == str(world)
        and "LOCAL_RANK" in os.environ
    ):
        return
    machines: list[Any] = [None] * world
    dist.all_gather_object(machines, platform.node())
    here = [other for other in range(world) if machines[other] == machines[rank]]
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": here.index(rank), "LOCAL_WORLD_SIZE": len(here)}
    os.environ.update({name: str(value) for name, value in names.items()})
