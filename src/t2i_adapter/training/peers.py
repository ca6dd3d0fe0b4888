"""The processes of a run, seen from one of them: they share decisions, wait for each other, and notice a lost one.

A decision that all must share is made by the main process and sent to the others (`from_main`), or made by each and
compared (`compare`). Every process must make the same calls in the same order. With one process they cost nothing.

The gradients have a group of their own, accelerate's. What is exchanged here goes by gloo, over the hosts' network, so
no GPU waits for it.
"""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator

from t2i_adapter.errors import Stopped, UserError, first_line, flag

T = TypeVar("T")
_WORKING, _DONE, _FAILED = 0, 1, 2
"""What the main process sends while the others wait for it."""
SHORT_BEAT = 5.0
"""Seconds between two signs of life of processes that all work: one that fails ends as soon as the others know."""
MOST_BEAT = 60.0
"""Most seconds between two signs of life of the main process."""
_LOST = re.compile(
    r"gloo|nccl|pair closure|timed out|connection (closed|reset|refused|was)|broken pipe|socket|no route to host",
    re.IGNORECASE,
)
"""Words of the plain RuntimeErrors that torch raises when another process cannot be reached."""


class Peers:
    """The processes of a run. As a context, its end waits for all of them unless this one fails.

    Attributes:
        rank: number of this process. world: world size.
        machines: the machine's name of each process.
        group: gloo group of all processes; None if there is one.
    """

    def __init__(self, accelerator: Accelerator, patience: timedelta = timedelta(minutes=30)) -> None:
        """patience: most time that a process waits for a word of another one."""
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.machines: list[str] = [platform.node()]
        self.group: Any = None
        self._patience = patience
        self._beat = min(MOST_BEAT, patience.total_seconds() / 4)
        if self.world > 1:
            with self.naming_losses():
                self.group = dist.new_group(backend="gloo", timeout=patience)
                self.machines = self.gather(platform.node())

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Stopped):
            # The others end after the main process: a launcher ends all as soon as one has a code other than 0.
            self.main_works(lambda: None)
            if self.group is not None:
                dist.destroy_process_group(self.group)
        self.group = None

    def name(self, rank: int) -> str:
        """How messages call a process."""
        return f"process {rank} on {self.machines[rank]}"

    def main_works(self, work: Callable[[], T]) -> T | None:
        """Runs `work` on the main process while the others wait; returns its result there, and None to the others.

        The main process sends a sign of life meanwhile, so that the others notice if it is lost, however long it works.
        Raises UserError on the others if `work` raises.
        """
        if self.group is None:
            return work()
        if self.rank:
            while (word := self._hear()) == _WORKING:
                pass
            if word == _FAILED:
                raise UserError(f"{self.name(0)} fails; its own message says why.", kind="process_ended")
            return None
        with self._signs_of_life():
            return work()

    def all_work(self, work: Callable[[], T]) -> T:
        """Runs `work`, which makes no call here, on every process, and returns its result when all have ended theirs.

        It may take hours, and longer on one process than on another: meanwhile all send signs of life, so a process
        that is lost is noticed all the same. Raises UserError on the others if `work` raises on one.
        """
        if self.group is None:
            return work()
        group: Any = dist.new_group(backend="gloo", timeout=self._patience)
        ended, failed, faults, lost = threading.Event(), threading.Event(), list[RuntimeError](), list[int]()

        def beat() -> None:
            try:
                is_over = False
                while not is_over:
                    ended.wait(min(SHORT_BEAT, self._beat))
                    words = torch.zeros(self.world, dtype=torch.int64)
                    words[self.rank] = _FAILED if failed.is_set() else _DONE if ended.is_set() else _WORKING
                    dist.all_reduce(words, dist.ReduceOp.MAX, group)
                    lost[:] = (words == _FAILED).nonzero().flatten().tolist()
                    is_over = bool(lost) or bool((words == _DONE).all())
            except RuntimeError as fault:
                faults.append(fault)

        thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
        thread.start()
        try:
            result = work()
        except BaseException:
            failed.set()
            raise
        finally:
            ended.set()
            thread.join()
        if faults:
            raise faults[0]
        if lost:
            raise UserError(f"{self.name(lost[0])} fails; its own message says why.", kind="process_ended")
        dist.destroy_process_group(group)
        return result

    def from_main(self, make: Callable[[], T]) -> T:
        """Returns on every process what `make` returns on the main one, which alone calls it. The result is pickled."""
        result = self.main_works(make)
        if self.group is None:
            return cast(T, result)  # one process is the main one
        box = [result]
        dist.broadcast_object_list(box, 0, self.group)
        return cast(T, box[0])

    def gather(self, value: Any) -> list[Any]:
        """Returns `value` of each process, by rank. It is pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action`, which calls nothing here, on every process and returns its result; if it raises UserError on
        one of them, all raise UserError."""
        if self.group is None:
            return action()
        result, error = None, None
        try:
            result = action()
        except UserError as fault:
            error = fault
        faults = self.gather(str(error or ""))
        if error:
            raise error
        failed = next((rank for rank, fault in enumerate(faults) if fault), None)
        if failed is not None:
            raise UserError(f"{self.name(failed)} fails: {faults[failed]}")
        return cast(T, result)  # `action` has returned

    def compare(self, views: Mapping[str, str], advice: str, *, option: str | None = None) -> None:
        """Raises UserError on every process unless all have equal values in `views`.

        views: what is compared, in words -> its value. advice: a sentence with what to do.
        option: of the error; None takes the one whose path is the name in `views`, if there is a dot in it.
        """
        if self.group is None:
            return
        all_views: list[dict[str, str]] = self.gather(dict(views))
        for name in sorted({name for view in all_views for name in view}):
            values = [view.get(name, "unknown") for view in all_views]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is None:
                continue
            said = ", ".join(f"{self.name(rank)} {values[rank]}" for rank in (0, other))
            if "." in name:
                raise UserError(f"is not the same on all processes: {said}. {advice}", option=option or name)
            raise UserError(f"the processes see different {name}: {said}. {advice}", option=option)

    @contextmanager
    def naming_losses(self) -> Iterator[None]:
        """Turns the errors by which torch reports a lost process, raised inside, into a UserError with its machine."""
        try:
            yield
        except RuntimeError as fault:
            if self.world == 1 or not is_loss(fault):
                raise
            raise UserError(f"{self._loss()} ({first_line(fault)[:200]})", kind="process_ended") from fault

    def _loss(self) -> str:
        here = self.machines[self.rank] if len(self.machines) > 1 else platform.node()
        elsewhere = [rank for rank, machine in enumerate(self.machines) if machine != here]
        others = elsewhere or [rank for rank in range(len(self.machines)) if rank != self.rank]
        named = ", ".join(map(self.name, others[:4])) + (", ..." if len(others) > 4 else "") or "the others"
        return (
            f"process {self.rank} of {self.world} on {here} lost its connection to {named}: a process has ended, or a "
            "machine or the network is down. Its own message says why, if there is one. Start the same command again "
            f"with {flag('checkpoint.resume')} auto; {flag('train.patience')} is how long a process is waited for."
        )

    def _hear(self) -> int:
        word = torch.zeros((), dtype=torch.int64)
        dist.broadcast(word, 0, self.group)
        return int(word)

    def _send(self, word: int) -> None:
        dist.broadcast(torch.tensor(word), 0, self.group)

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        ended, faults = threading.Event(), list[RuntimeError]()

        def beat() -> None:
            try:
                while not ended.wait(self._beat):
                    self._send(_WORKING)
            except RuntimeError as fault:
                faults.append(fault)

        thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
        thread.start()
        word = _FAILED
        try:
            yield
            word = _DONE
        finally:
            ended.set()
            thread.join()  # before any other exchange, so that all processes have the same order of them
            if not faults:
                self._send(word)
        if faults:
            raise faults[0]


def is_loss(fault: BaseException) -> bool:
    """Whether an exception reports that another process cannot be reached."""
    return isinstance(fault, dist.DistError) or (
        isinstance(fault, RuntimeError) and _LOST.search(str(fault)) is not None
    )


def find_peers_failed(fault: RuntimeError, patience: timedelta) -> UserError:
    """The error for a run whose processes did not find each other within `patience`."""
    place = f"{os.environ.get('MASTER_ADDR', 'unknown')}:{os.environ.get('MASTER_PORT', 'unknown')}"
    return UserError(
        f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')} on {platform.node()} could not "
        f"join the others at {place} within {patience}: check that process 0 runs there, that its name leads to an "
        "address that this machine reaches, and that no firewall closes the port; with several networks, name the one "
        f"between the machines in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. ({first_line(fault)[:200]})",
        kind="process_ended",
    )
