"""Runs a long campaign of faults against training runs; the result is benchmarks/results/campaign_NAME_*.json.

    python tests/campaigns/run.py kills --count 100 --minutes 90       kills a run at random moments
    python tests/campaigns/run.py ranks --count 10                     kills one of two processes, chosen at random
    python tests/campaigns/run.py full_disk --count 60 --minutes 60    fills a small disk for a while
    python tests/campaigns/run.py read_only --count 60 --minutes 60    makes the output folder read-only for a while
    python tests/campaigns/run.py damage --count 100                   damages files of the newest checkpoints
    python tests/campaigns/run.py soak --minutes 60                    runs as many updates as eight hours have

The tests in this folder run the same code for a short time. full_disk and read_only mount folders, which needs root.
The exit code is 1 if a fault was found.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

from common import make_parser, write_result  # noqa: E402
from support.disks import damaged_checkpoints, failing_disk, full_disk, read_only_folder  # noqa: E402
from support.forks import Forks  # noqa: E402
from support.kills import WORDS, campaign, make_data  # noqa: E402
from support.ranks import kill_ranks  # noqa: E402
from support.soak import soak  # noqa: E402

RUN = shlex.join(["t2i-adapter", *WORDS])


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("campaign", choices=tuple(CAMPAIGNS))
    parser.add_argument("--count", type=int, default=100, help="kills, spells of a failing disk, or damaged runs")
    parser.add_argument(
        "--minutes", type=float, default=60, help="begin no run after this time; ranks, damage: no limit"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"campaign-{options.campaign}-"))
    started = time.monotonic()
    try:
        found = CAMPAIGNS[options.campaign](folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "command": shlex.join(["python", "tests/campaigns/run.py", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started),
        **found,
    }
    write_result(f"campaign_{options.campaign}", result, options.out)
    return 1 if found.get("faults") or found.get("flat") is False else 0


def run_kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    with Forks(folder) as forks:
        found = campaign(forks, WORDS, kills=options.count, seed=options.seed, minutes=options.minutes, log=_log)
    return {"run": RUN, **found.to_json()}


def run_ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return kill_ranks(folder, options.count, options.seed, _log)


def run_disk(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    mounted = {"full_disk": full_disk, "read_only": read_only_folder}[options.campaign]
    with mounted(folder) as disk, Forks(folder) as forks:
        chance = {"spells": options.count, "seed": options.seed, "minutes": options.minutes}
        return {"run": RUN, **failing_disk(forks, WORDS, disk, log=_log, **chance)}


def run_damage(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    with Forks(folder) as forks:
        found = damaged_checkpoints(forks, WORDS, rounds=options.count, seed=options.seed, log=_log)
    return {"run": RUN, **found}


def run_soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return soak(folder, options.minutes)


def _log(line: str) -> None:
    print(line, flush=True)


CAMPAIGNS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "kills": run_kills,
    "ranks": run_ranks,
    "full_disk": run_disk,
    "read_only": run_disk,
    "damage": run_damage,
    "soak": run_soak,
}

if __name__ == "__main__":
    sys.exit(main())
