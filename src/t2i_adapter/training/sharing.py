"""Finds out which processes of a run see one cache, so that these divide the work of preparing between them.

Whether machines share a disk is not assumed: each process writes a token into its cache and looks for the tokens of the
others.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from t2i_adapter.cache.context import CachePlace, open_notes
from t2i_adapter.data.notes import Notes
from t2i_adapter.errors import UserError

SEEN_WITHIN = 5.0
"""Seconds in which a token that another machine has written must appear."""


class Group(NamedTuple):
    """The processes that see this process's cache: its rank among them, and their number. run_id: names the run's
    notes."""

    rank: int
    world: int
    run_id: str


class _Process(NamedTuple):
    """token: what it has written; "" if it failed. fault: why."""

    machine: str
    local_rank: int
    token: str
    fault: str


def find_group(accelerator: Accelerator, place: CachePlace) -> Group:
    """The processes that see one cache with this one. Logs on process 0 which machines share it.

    Raises UserError on every process if one of them cannot write to its cache.
    """
    run_id = [secrets.token_hex(8)]
    broadcast_object_list(run_id)
    if accelerator.num_processes == 1:
        return Group(0, 1, run_id[0])
    notes = open_notes(place.root, place.mirror, run_id[0])
    own, rank = _write_token(notes, accelerator), accelerator.process_index
    # Nobody has looked for a token before all are written: so no system has cached that one is missing.
    processes = [_Process(*one) for one in gather_object([tuple(own)])]
    failed = next((number for number, one in enumerate(processes) if one.fault), None)
    if failed is not None:
        other = f"process {failed} on {processes[failed].machine}: "
        raise UserError(f"{'' if failed == rank else other}{processes[failed].fault}", option="data.prepared_dir")
    seen = gather_object([_look(notes, [one.token for one in processes])])
    members = [mutual(seen, number) for number in range(len(processes))]
    group = [number for number, others in enumerate(members) if others == members[rank]]
    machines = machine_numbers([one.local_rank for one in processes])
    if line := describe([sorted({machines[one] for one in some}) for some in unique(members)], processes, machines):
        where = place.mirror.url if place.mirror else place.root
        accelerator.print(line.format(where=where), flush=True)
    return Group(group.index(rank), len(group), f"{run_id[0]}-{group[0]}")


def _write_token(notes: Notes, accelerator: Accelerator) -> _Process:
    token, fault = secrets.token_hex(8), ""
    try:
        notes.write(f"token.{accelerator.process_index}", token.encode())
    except OSError as error:
        where = getattr(notes, "folder", "")
        fault = f"{where}: cannot be written ({error.strerror}). Name a folder that every machine can write to."
    except UserError as error:
        fault = str(error)
    return _Process(platform.node(), accelerator.local_process_index, token, fault)


def _look(notes: Notes, tokens: Sequence[str]) -> list[int]:
    """The processes whose tokens appear within SEEN_WITHIN."""
    end, seen = time.monotonic() + SEEN_WITHIN, set[int]()
    while True:
        for number in set(range(len(tokens))) - seen:
            with suppress(OSError):
                if notes.read(f"token.{number}") == tokens[number].encode():
                    seen.add(number)
        if len(seen) == len(tokens) or time.monotonic() > end:
            return sorted(seen)
        time.sleep(0.2)


def mutual(seen: Sequence[Sequence[int]], rank: int) -> frozenset[int]:
    """The processes that `rank` sees and that see it, itself included. seen: what each process sees."""
    return frozenset({rank} | {other for other in seen[rank] if rank in seen[other]})


def unique(members: Sequence[frozenset[int]]) -> list[list[int]]:
    """The groups: processes with the same members, in the order of their first process."""
    found: dict[frozenset[int], list[int]] = {}
    for number, others in enumerate(members):
        found.setdefault(others, []).append(number)
    return list(found.values())


def machine_numbers(local_ranks: Sequence[int]) -> list[int]:
    """The machine of each process, from 0: a launcher numbers the processes of a machine consecutively, from 0."""
    numbers, number = list[int](), -1
    for local_rank in local_ranks:
        number += local_rank == 0
        numbers.append(max(number, 0))
    return numbers


def describe(groups: Sequence[Sequence[int]], processes: Sequence[_Process], machines: Sequence[int]) -> str:
    """A line about the machines of each group, with {where} for the cache; "" for a run on one machine that sees one
    cache."""
    count = machines[-1] + 1
    if len(groups) == 1:
        return f"cache: {count} machines share {{where}}: each encodes a part" if count > 1 else ""
    if all(len(group) == 1 for group in groups) and count == len(groups):
        return f"cache: {count} machines do not share {{where}}: each encodes all"
    names = [processes[machines.index(number)].machine.replace("{", "{{").replace("}", "}}") for number in range(count)]
    lists = "; ".join(", ".join(f"{number} ({names[number]})" for number in group) for group in groups)
    return (
        f"cache: the machines see {len(groups)} caches at {{where}}, and each is filled by those that see it: {lists}"
    )
