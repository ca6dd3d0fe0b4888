"""Measures what the studio costs before anybody uses it: seconds from the command to the first byte, and memory.

    python benchmarks/studio_start.py [--starts 9] [--runs 50] [--wait 3]

It starts `t2i-adapter studio` in a folder with runs, each of 15,000 logged updates, opens the link that it prints, asks
for the page and for the list of runs, and reads the process's CPU seconds and its resident memory: before the first
request, after `--wait` seconds of rest, and after the list. The figures are medians over the starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path

from common import make_parser, write_result

STEPS, EVERY = 15_000, 10


def write_run(folder: Path) -> None:
    """A finished run's folder with its log."""
    folder.mkdir(parents=True)
    line = {"loss": 0.1, "grad_norm": 1.0, "samples_per_s": 40.0, "wait_share": 0.01, "lr": 1e-4}
    entries = [json.dumps({"step": step, **line}) for step in range(EVERY, STEPS + 1, EVERY)]
    (folder / "metrics.jsonl").write_text("\n".join(entries) + "\n", encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"outcome": "finished", "started": 1.7e9, "steps": STEPS}))
    (folder / "options.yaml").write_text(f"train:\n  max_steps: {STEPS}\n")


def ask(port: int, path: str, cookie: str = "") -> tuple[int, str, bytes]:
    """(status, Set-Cookie, body) of a GET."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"localhost:{port}", "Cookie": cookie})
    answer = connection.getresponse()
    found = answer.status, answer.getheader("set-cookie") or "", answer.read()
    connection.close()
    return found


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(root: Path, wait: float) -> dict[str, float]:
    """One start."""
    words = [sys.executable, "-m", "t2i_adapter", "studio", str(root), "--port", "0", "--no_open_browser"]
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    link = next(found for line in process.stdout if (found := re.search(r"http://\S+:(\d+)(/\S+)", line)))
    port = int(link[1])
    status, cookie, _ = ask(port, link[2])
    assert status == 303
    first = time.perf_counter() - begun
    found = {"first_byte_s": first, "cpu_s": cpu_seconds(process.pid), "first_mib": memory(process.pid)}
    cookie = cookie.partition(";")[0]
    assert ask(port, "/", cookie)[0] == 200
    time.sleep(wait)
    found["rest_mib"] = memory(process.pid)
    begun = time.perf_counter()
    status, _, body = ask(port, "/api/runs", cookie)
    found |= {"list_s": time.perf_counter() - begun, "list_mib": memory(process.pid), "listed": len(json.loads(body))}
    process.send_signal(signal.SIGINT)
    process.wait(30)
    process.stdout.close()
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--wait", type=float, default=3.0, help="seconds of rest before the memory is read")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        for number in range(options.runs):
            write_run(root / "runs" / f"run-{number:02d}")
        starts = []
        for _ in range(options.starts):
            shutil.rmtree(root / ".studio", ignore_errors=True)
            starts.append(measure(root, options.wait))
    medians = {name: round(statistics.median(start[name] for start in starts), 3) for name in starts[0]}
    print(json.dumps(medians, indent=1))
    setting = {"starts": options.starts, "runs": options.runs, "updates": STEPS, "log_every": EVERY}
    setting["load_average"] = round(os.getloadavg()[0], 1)  # of other programs too: seconds grow with it
    write_result("studio_start", {"run": setting, "medians": medians, "starts": starts}, options.out, threads=1)


if __name__ == "__main__":
    main()
