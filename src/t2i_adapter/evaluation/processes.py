"""Several processes of one evaluation, as `torchrun` and `accelerate launch` start them.

Each process generates its share of the pictures and writes them to one folder. They meet before and after that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from t2i_adapter.errors import UserError

START = timedelta(minutes=30)
"""Most time that a process waits for the others to start."""
PATIENCE = timedelta(days=2)
"""Most time that a process waits for the others to finish their shares. If one ends, it stops waiting at once."""


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, seen from one of them.

    Attributes:
        rank: number of this process; rank 0 measures and prints.
        world: world size.
    """

    rank: int = 0
    world: int = 1
    _groups: list[Any] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Returns when all processes have called it. Raises UserError if another one has ended."""
        if self.world == 1:
            return
        import torch.distributed as dist

        try:
            if not self._groups:
                dist.init_process_group("gloo", timeout=START)
                self._groups.append(dist.new_group(timeout=PATIENCE))
            dist.barrier(self._groups[0])
        except (RuntimeError, ValueError) as fault:
            raise UserError(
                f"process {self.rank} of {self.world} stops because another process has ended or cannot be reached; "
                "its own message says why. Start the same command again: finished pictures are kept.",
                kind="process_ended",
            ) from fault

    def leave(self) -> None:
        """Ends the connection to the other processes, if there is one."""
        if self._groups:
            import torch.distributed as dist

            self._groups.clear()
            dist.destroy_process_group()


def find_processes() -> Processes:
    """Returns what the launcher's environment says; one process without a launcher."""
    rank, world = (int(os.environ.get(name) or default) for name, default in _VARIABLES.items())
    return Processes(rank, world)


_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1}
