"""Measures everything that needs a GPU: one command, ten minutes, from a clean checkout.

    pip install -e . pytest pytest-timeout
    python benchmarks/gpu.py --minutes 10                      all parts, the most important first
    python benchmarks/gpu.py --minutes 5 --parts speed,memory  these parts
    python benchmarks/gpu.py --tiny                            tries the program itself: small networks, a CPU, a minute
    python benchmarks/gpu.py --table FILE                      prints the tables of the documentation from a result

SDXL has its true size and random weights, which are made on the card; nothing is downloaded. Each part may use a share
of the time that is left, and what it does not use goes to the parts behind it. Rows are measured in processes of their
own: a row that crashes or does not fit costs this row only, and its reason is written in its place. The result file is
written after each row. A program that is killed leaves a valid file, in which `complete` is false.

    tests      tests/gpu
    speed      training steps at 1024 px: bf16 at batch sizes up to the largest that fits; compiled, float8, CUDA graphs
    memory     the most memory of a step beside what `t2i-adapter plan` says
    recipes    the recipes for 8 and 24 GB, held to these
    script     the diffusers script and this one, fp16, in turn; needs --script PATH/train_t2i_adapter_sdxl.py
    inference  what an adapter and a ControlNet add to the making of a picture
    train      `t2i-adapter train`, plain and with train.deterministic
    quantised  speed, gradient and losses of the quantised bases

Speeds are medians of rounds, with the slowest and the fastest round. `share_of_matmul` is the step's FLOPs (counted for
a frozen base, 1 sample: `step_tflop`) a second over the rate of one large bf16 matrix product on the same card.
It exits with 1 if a row failed, 2 if it cannot measure at all, and 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from children import last_line, run_child  # noqa: E402
from common import RESULTS, make_parser, newest, today, write_json  # noqa: E402
from gpu_tables import best_batch, tables  # noqa: E402

Figures = dict[str, Any]
SHARES = {
    "tests": 0.25,
    "speed": 0.45,
    "memory": 0.3,
    "recipes": 0.3,
    "script": 0.4,
    "inference": 0.4,
    "train": 0.5,
    "quantised": 1.0,
}
"""Part -> the share of the time left that it may use, most important first."""
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tyro", "yaml", "PIL", "cv2", "tqdm")
NO_TIME = "no time left; run this part alone with --parts"
LADDER = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128)
LARGE, ALL = {"recompute": "large"}, {"recompute": "all"}
INT8, FLOAT8, NF4 = ({"quantize": kind} for kind in ("int8", "float8", "nf4"))
COMPILED, GRAPHS = {"compile": "on"}, {"compile": "graphs"}


def step(name: str, batch: int | str, group: str, **settings: Any) -> Figures:
    """A row of part `speed`. batch: "best" is the batch size with the most samples a second in plain bf16."""
    return {"name": name, "kind": "step", "batch": batch, "group": group, "settings": settings}


ROWS: dict[str, tuple[Figures, ...]] = {
    "card": ({"name": "card", "kind": "card"},),
    "speed": (
        *({**step(f"bf16-{size}", size, "plain"), "ladder": "bf16"} for size in LADDER),
        step("compiled", "best", "compiled", **COMPILED),
        step("float8-compiled", "best", "compiled", **FLOAT8, **COMPILED),
        step("float8", "best", "compiled", **FLOAT8),
        step("graphs", "best", "graphs", **GRAPHS),
        step("graphs-1", 1, "graphs", **GRAPHS),
        step("unfrozen", 4, "other", unfrozen=True),
        step("recompute", 16, "other", **ALL),
    ),
    "memory": tuple(
        {"name": name, "kind": "memory", "batch": batch, "settings": settings}
        for name, batch, settings in (
            ("plain-1", 1, {}),
            ("all-16", 16, ALL),
            ("plain-8", 8, {}),
            ("all-1", 1, ALL),
            ("large-4", 4, LARGE),
            ("int8-all-1", 1, INT8 | ALL),
            ("float8-4", 4, FLOAT8),
            ("nf4-all-1", 1, NF4 | ALL),
        )
    ),
    "recipes": tuple(
        {"name": name, "kind": "limit", "group": name, "limit_gib": gib, "batches": batches, "settings": settings}
        for name, gib, batches, settings in (
            ("8gib", 8, (1, 2, 4), {**INT8, **ALL, "optimizer": "adamw8bit"}),
            ("24gib", 24, (1, 2, 4, 6), LARGE),
            ("24gib-float8", 24, (1, 2, 4, 6), FLOAT8 | LARGE),
        )
    ),
    "inference": (
        *({"name": name, "kind": "network", "network": name} for name in ("unet", "adapter", "controlnet")),
        *({"name": f"picture-{arm}", "kind": "picture", "arm": arm} for arm in ("base", "adapter", "controlnet")),
    ),
    "train": (
        {"name": "base", "kind": "write", "group": "write"},
        {"name": "train", "kind": "train", "batch": 4, "steps": 20, "group": "commands"},
        {
            "name": "train-deterministic",
            "kind": "train",
            "batch": 4,
            "steps": 20,
            "group": "commands",
            "options": ["deterministic"],
        },
    ),
    "quantised": (
        {"name": "cosine", "kind": "cosine", "batch": 1},
        *(step(f"{kind}-4", 4, "steps", quantize=kind) for kind in ("none", "float8", "int8", "nf4")),
        {"name": "8gib-curve", "kind": "curve", "steps": 200, "settings": INT8 | ALL, "against": ALL, "group": "curve"},
    ),
}


class Session:
    """A result file that grows, and the processes that measure its rows."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.until = time.monotonic() + 60 * options.minutes
        self.out: Path | None = options.out
        self.result: Figures = {"complete": False, "settings": self._settings(), "parts": {}}
        self._env = {**os.environ, "PYTHONPATH": self._python_path(), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if options.tiny:  # small operations on several threads are slow beside other programs
            self._env.setdefault("OMP_NUM_THREADS", "1")
        self._tasks = 0
        self._rows: Figures | None = None  # of the part that is being measured

    def _settings(self) -> Figures:
        return {"minutes": self.options.minutes, "parts": list(self.options.parts), "tiny": self.options.tiny}

    @staticmethod
    def _python_path() -> str:
        inherited = os.environ.get("PYTHONPATH")
        return os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks"), *([inherited] if inherited else [])])

    # The file --------------------------------------------------------------------------------------------------------

    def open(self) -> str | None:
        """Measures the card, and begins the result file. Returns why it cannot, or None.

        Parts that are not measured this time are copied from the file that is replaced, or from the newest one of this
        hardware.
        """
        (_, found), *_ = self.rows("card", self.until)
        if "measured" not in found:
            return found.get("failed") or found.get("skipped") or "the card was not measured"
        hardware = found["measured"]["hardware"]
        if self.out is None:
            name = f"gpu_{hardware}_{today()}.json"
            self.out = Path(tempfile.gettempdir()) / name if self.options.tiny else RESULTS / name
        earlier = self.out if self.out.is_file() else None if self.options.tiny else newest("gpu", hardware)
        parts = json.loads(earlier.read_text(encoding="utf-8"))["parts"] if earlier else {}
        self.result = {"measured": found.pop("measured"), **self.result, "card": found, "parts": parts}
        self.save()
        return None

    def save(self) -> None:
        assert self.out is not None
        write_json(self.out, self.result)

    def measure(self, part: str) -> None:
        began = time.monotonic()
        until = began + SHARES[part] * max(0.0, self.until - began)
        rows = self._rows = {}
        entry = self.result["parts"][part] = {"measured": self.result["measured"], "seconds": 0.0, "rows": rows}
        special: dict[str, Callable[[float], Iterator[tuple[str, Figures]]]] = {
            "tests": self.tests,
            "script": self.script,
        }
        for name, found in special[part](until) if part in special else self.rows(part, until):
            rows[name] = found
            entry["seconds"] = round(time.monotonic() - began, 1)
            self.save()
            print(f"{part}  {name}  {summary(found)}", flush=True)
        entry["seconds"] = round(time.monotonic() - began, 1)
        self.save()

    # Rows in processes of their own ----------------------------------------------------------------------------------

    def rows(self, part: str, until: float) -> Iterator[tuple[str, Figures]]:
        """The rows of a part with their figures, each group of rows in a process, and another one after a crash."""
        waiting = [dict(row) for row in ROWS[part]]
        if self.options.tiny:
            waiting = [_tiny(row) for row in waiting if "ladder" not in row or row["batch"] in LADDER[:2]]
        if part == "inference":
            waiting = [{"steps": 2 if self.options.tiny else 30, **row} for row in waiting]
        while waiting:
            group = waiting[0].get("group")
            now = [row for row in waiting if row.get("group") == group]
            for row in now:
                if row.get("batch") == "best":
                    row["batch"] = best_batch(self.result) or 4
            for name, found in self._process(now, until):
                waiting = [row for row in waiting if row["name"] != name]
                yield name, found

    def _process(self, rows: list[Figures], until: float) -> Iterator[tuple[str, Figures]]:
        """The rows that one process finished, and that during which it ended; at least one."""
        if time.monotonic() > until:
            yield from ((row["name"], {"skipped": NO_TIME}) for row in rows)
            return
        self._tasks += 1
        task, out, log = (self.scratch / f"{self._tasks}.{ending}" for ending in ("task", "rows", "log"))
        context = {
            "size": "tiny" if self.options.tiny else "true",
            "configs": str(self.scratch / "configs"),
            "scratch": str(self.scratch),
            "until": time.time() + until - time.monotonic(),
            "rounds": 2 if self.options.tiny else 5,
            "round_s": 0.0 if self.options.tiny else 0.8,
        }
        card = self.result.get("card", {})
        context |= {"tflop": card.get("step_tflop"), "matmul": card.get("matmul_tflop_per_s")}
        task.write_text(json.dumps({"context": context, "rows": rows}))
        out.touch()
        done: set[str] = set()
        fresh: list[tuple[str, Figures]] = []
        begun: list[str] = []

        def read() -> None:
            entries = [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
            begun[:] = [entry["begin"] for entry in entries if "begin" in entry]
            fresh[:] = [(entry["end"], entry["found"]) for entry in entries if "end" in entry]
            self._keep(fresh)

        grace = 5  # seconds: a row looks at the time between its rounds
        words = [sys.executable, ROOT / "benchmarks" / "gpu_rows.py", task, out]
        code = run_child(words, log, until=until + grace, env=self._env, on_poll=read)
        done |= {name for name, _ in fresh}
        yield from fresh
        if len(done) == len(rows):
            return
        if code is None:
            reason = {"skipped": NO_TIME}
            yield from ((row["name"], reason) for row in rows if row["name"] not in done)
        elif not fresh or "failed" not in fresh[-1][1]:
            name = next((name for name in begun if name not in done), rows[0]["name"])
            yield name, {"failed": f"the process ended with code {code}: {last_line(log)}"}

    def _keep(self, fresh: list[tuple[str, Figures]]) -> None:
        """Writes rows while their process goes on, so that a killed program loses the present row only."""
        if self._rows is not None and any(name not in self._rows for name, _ in fresh):
            self._rows.update(fresh)
            self.save()

    # Parts that are programs -----------------------------------------------------------------------------------------

    def tests(self, until: float) -> Iterator[tuple[str, Figures]]:
        """tests/gpu, a row a test. On a card nothing else than a failing test may fail: warnings of other versions of
        torch do not."""
        if importlib.util.find_spec("pytest") is None:
            yield "pytest", {"skipped": "pytest is missing; run `pip install pytest pytest-timeout`"}
            return
        log = self.scratch / "tests.log"
        words = [sys.executable, "-m", "pytest", "tests/gpu", "-vv", "--tb=line", "-p", "no:cacheprovider"]
        words += ["-o", "addopts=", "-o", "filterwarnings=ignore", "-o", "markers=gpu\ntimeout\nsoak"]
        began = time.monotonic()
        code = run_child(words, log, until=until, env=self._env, cwd=ROOT)
        text = log.read_text(encoding="utf-8", errors="replace")
        states = re.findall(r"^tests/gpu/(\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, flags=re.MULTILINE)
        reasons = dict(re.findall(r"^(?:FAILED|ERROR) tests/gpu/(\S+) - (.*)$", text, flags=re.MULTILINE))
        for name, state in states:
            if state in ("FAILED", "ERROR"):
                yield name, {"failed": reasons.get(name, "see the log of pytest")}
            else:
                yield name, {"skipped": "it does not run here"} if state == "SKIPPED" else {"passed": True}
        if code is None:
            yield "rest", {"skipped": NO_TIME}
        elif not states:
            yield "pytest", {"failed": f"the process ended with code {code}: {last_line(log)}"}
        seconds = {"seconds": round(time.monotonic() - began, 1)}
        kinds = {"passed_tests": ("PASSED",), "failed_tests": ("FAILED", "ERROR"), "skipped_tests": ("SKIPPED",)}
        yield "all", seconds | {kind: sum(state in names for _, state in states) for kind, names in kinds.items()}

    def script(self, until: float) -> Iterator[tuple[str, Figures]]:
        """The diffusers script and ours: batch 1, then 4, 8, ... until one does not fit or the time is over."""
        if self.options.script is None:
            yield "script", {"skipped": "name the diffusers script with --script PATH/train_t2i_adapter_sdxl.py"}
            return
        base = self.scratch / "base"
        if not (base / "model_index.json").is_file():
            yield from self._process([{"name": "base", "kind": "write"}], until)
        pixels, device = (64, "cpu") if self.options.tiny else (1024, "cuda")
        for size in (1, 2) if self.options.tiny else (1, 4, 8, 16):
            log, out = self.scratch / f"script-{size}.log", self.scratch / f"script-{size}.json"
            words = [sys.executable, ROOT / "benchmarks" / "compare_diffusers.py", "--script", self.options.script]
            words += ["--base", base, "--resolution", pixels, "--batch", size, "--device", device, "--out", out]
            words += ["--pairs", 16, "--steps", 4 if self.options.tiny else 12, "--rounds", 1, "--once"]
            words += [] if self.options.tiny else ["--precision", "fp16"]
            code = run_child(words, log, until=until, env=self._env)
            if code is None:
                yield f"batch-{size}", {"skipped": NO_TIME}
                return
            if code:
                yield f"batch-{size}", {"failed": last_line(log)}
                return
            yield f"batch-{size}", {"batch": size, **json.loads(out.read_text())["rounds"][0]}


def _tiny(row: Figures) -> Figures:
    """The row with small numbers, in the same process as the other rows, uncompiled: compiling takes a minute."""
    small: Figures = {"group": None, **({} if row.get("batch") != "best" else {"batch": 4})}
    small |= {"batch": min(row["batch"], 4)} if isinstance(row.get("batch"), int) else {}
    if "steps" in row:
        small["steps"] = 4
    if row["kind"] == "limit":
        small["batches"] = (1, 2)
    if "compile" in row.get("settings", {}):
        small["settings"] = {key: value for key, value in row["settings"].items() if key != "compile"}
    return {**row, **small}


def summary(found: Figures) -> str:
    """The figures of a row in one line."""
    numbers = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    return "  ".join(f"{name} {value}" for name, value in numbers.items() if name != "losses")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts")
    parser.add_argument("--parts", default=",".join(SHARES), help="parts with commas between")
    parser.add_argument("--script", type=Path, help="the diffusers script, for part script")
    parser.add_argument("--tiny", action="store_true", help="small networks; on a CPU if there is no CUDA device")
    parser.add_argument("--table", type=Path, help="print the tables of this result file and end")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    if unknown := [part for part in wanted if part not in SHARES]:
        parser.error(f"--parts {unknown[0]}: allowed are {', '.join(SHARES)}")
    options.parts = [part for part in SHARES if part in wanted]
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes}: allowed is a number above 0")
    if options.script and not options.script.is_file():
        parser.error(
            f"--script {options.script}: no such file. It is in the diffusers repository, examples/t2i_adapter."
        )
    return options


def cannot_measure(*, tiny: bool) -> str | None:
    """Why nothing can be measured here and what to do, or None."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return f"missing packages: {', '.join(missing)}; run `pip install -e .` with this Python first"
    if tiny:
        return None
    import torch

    if torch.cuda.device_count() == 0:  # unlike is_available() it does not start CUDA if the driver can answer
        return "no CUDA device found; --tiny tries this program on a CPU"
    return None


def main() -> None:
    options = parse()
    if options.table:
        print(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if reason := cannot_measure(tiny=options.tiny):
        print(f"gpu.py: {reason}", file=sys.stderr)
        raise SystemExit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="t2i-adapter-gpu-") as scratch:
        session = Session(options, Path(scratch))
        if reason := session.open():
            print(f"gpu.py: {reason}", file=sys.stderr)
            raise SystemExit(2)
        for part in options.parts:
            session.measure(part)
        session.result["complete"] = True
        session.save()
    print(tables(session.result))
    print(session.out)
    rows = [found for part in options.parts for found in session.result["parts"][part]["rows"].values()]
    raise SystemExit(1 if any("failed" in found for found in rows) else 0)


if __name__ == "__main__":
    main()
