"""Campaigns against losing a run: kills at random moments, one process of two killed, a soak. Each has a result file.

    python benchmarks/campaigns.py kills --count 100 --minutes 90   benchmarks/campaign_kills.json
    python benchmarks/campaigns.py ranks --count 10                 benchmarks/campaign_ranks.json
    python benchmarks/campaigns.py soak --minutes 20                benchmarks/campaign_soak.json

The tests run the same code in short (tests/campaigns).
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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "campaigns")]

from forks import Forks  # noqa: E402
from kills import campaign  # noqa: E402
from soak import soak  # noqa: E402

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=("kills", "ranks", "soak"))
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--minutes", type=float, default=20, help="how long the soak goes, or the kills at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
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
    minutes = "" if options.campaign == "ranks" else f" --minutes {options.minutes:g}"
    return f"python benchmarks/campaigns.py {options.campaign}{counts}{minutes}"


def run_kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from test_kills import WORDS, make_data

    make_data(folder)
    with Forks(folder) as forks:
        found = campaign(forks, WORDS, kills=options.count, seed=options.seed, minutes=options.minutes, tell=_tell)
    return {"run": shlex.join(["t2i-adapter", *WORDS]), **found.to_json()}


def run_ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from test_ranks import kill_ranks

    return kill_ranks(folder, options.count, options.seed, _tell)


def run_soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return soak(folder, options.minutes)


def _tell(line: str) -> None:
    print(line, flush=True)


RUN = {"kills": run_kills, "ranks": run_ranks, "soak": run_soak}

if __name__ == "__main__":
    sys.exit(main())
