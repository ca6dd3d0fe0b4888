"""Campaigns against losing a run, each with a result file benchmarks/campaign_NAME.json.

    python benchmarks/campaigns.py kills --count 100 --minutes 90       at random moments
    python benchmarks/campaigns.py ranks --count 10                     of one process of two, by chance
    python benchmarks/campaigns.py full_disk --count 60 --minutes 60    a small disk that is full for a while
    python benchmarks/campaigns.py read_only --count 60 --minutes 60    a folder that cannot be written for a while
    python benchmarks/campaigns.py damage --count 100                   of the last checkpoints' files
    python benchmarks/campaigns.py soak --minutes 60                    the updates of eight hours

The tests run the same code in short (tests/campaigns). full_disk and read_only mount folders, which takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "campaigns")]

from support.disks import damaged_checkpoints, failing_disk, full_disk, read_only_folder  # noqa: E402
from support.forks import Forks  # noqa: E402
from support.kills import WORDS, campaign, make_data  # noqa: E402
from support.soak import soak  # noqa: E402
from test_ranks import kill_ranks  # noqa: E402

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=tuple(RUN))
    parser.add_argument("--count", type=int, default=100, help="kills, spells of a failing disk, or damages")
    parser.add_argument("--minutes", type=float, default=60, help="how long a campaign goes at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="result file; benchmarks/campaign_NAME.json where it is not given")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"campaign-{options.campaign}-"))
    started = time.monotonic()
    try:
        found = RUN[options.campaign](folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": _command(options),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), busy with other work",
        "versions": {name: version(name) for name in LIBRARIES},
        "seconds": round(time.monotonic() - started),
        **found,
    }
    out = options.out or ROOT / "benchmarks" / f"campaign_{options.campaign}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 1 if found.get("faults") or found.get("flat") is False else 0


def _command(options: argparse.Namespace) -> str:
    counts = "" if options.campaign == "soak" else f" --count {options.count}"
    minutes = "" if options.campaign in ("ranks", "damage") else f" --minutes {options.minutes:g}"
    return f"python benchmarks/campaigns.py {options.campaign}{counts}{minutes}"


def run_kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    with Forks(folder) as forks:
        found = campaign(forks, WORDS, kills=options.count, seed=options.seed, minutes=options.minutes, tell=_tell)
    return {"run": _shown(WORDS), **found.to_json()}


def run_ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return kill_ranks(folder, options.count, options.seed, _tell)


def run_disk(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    spoilt = {"full_disk": full_disk, "read_only": read_only_folder}[options.campaign]
    with spoilt(folder) as disk, Forks(folder) as forks:
        chance = {"spells": options.count, "seed": options.seed, "minutes": options.minutes}
        return {"run": _shown(WORDS), **failing_disk(forks, WORDS, disk, tell=_tell, **chance)}


def run_damage(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    make_data(folder)
    with Forks(folder) as forks:
        found = damaged_checkpoints(forks, WORDS, rounds=options.count, seed=options.seed, tell=_tell)
    return {"run": _shown(WORDS), **found}


def run_soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return soak(folder, options.minutes)


def _shown(words: Sequence[str]) -> str:
    return shlex.join(["t2i-adapter", *words])


def _tell(line: str) -> None:
    print(line, flush=True)


RUN = {
    "kills": run_kills,
    "ranks": run_ranks,
    "full_disk": run_disk,
    "read_only": run_disk,
    "damage": run_damage,
    "soak": run_soak,
}

if __name__ == "__main__":
    sys.exit(main())
