"""Measures the studio under load: its start, events, long runs, many runs, large datasets.

    python benchmarks/studio.py [--rows 100000] [--files 20000] [--runs 50] [--seconds 10] [--only start events ...]

Each part starts a server of its own in a temporary folder, and asks it over the loopback address as a browser does.
Times are medians in milliseconds. They grow with the load of the machine (`load_average`); CPU seconds, which the
server's process used, hardly do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from common import make_parser, read_earlier, write_result
from PIL import Image
from run_page import entries, write_log, write_pictures

from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config
from t2i_adapter.runs.lock import lock
from t2i_adapter.runs.record import RUNNING

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
PARTS = ("start", "events", "runs", "data")
PAGES, RATE = 8, 1000
LOGGED, UPDATES_OF_EACH, UPDATES_OF_LONG = 10, 20_000, 150_000
"""Updates between two log entries (as in run_page.py), of each of the many runs, of the long run."""
ORIGINALS, SIDE = 64, 128
"""Different pictures of the large datasets, and their side in pixels: the other rows are further names of them."""


class Server:
    """A studio in a process of its own, and a browser's way to it."""

    def __init__(self, process: subprocess.Popen[str], began: float) -> None:
        assert process.stdout is not None
        self.process = process
        link = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        self.link_s = time.monotonic() - began
        self.address, _, self._token = link.removeprefix("http://").partition("/?token=")
        self._cookie = ""
        answer = self._ask("GET", f"/?token={self._token}")
        self._cookie = answer[1]["set-cookie"].partition(";")[0]
        self.first_byte_s = time.monotonic() - began

    def _ask(self, method: str, path: str, content: Any = None) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection(self.address, timeout=120)
        headers = {"cookie": self._cookie, "origin": f"http://{self.address}", "content-type": "application/json"}
        connection.request(method, path, None if content is None else json.dumps(content), headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body

    def get(self, path: str) -> bytes:
        status, _, body = self._ask("GET", path)
        assert status == 200, (path, status, body[:300])
        return body

    def post(self, path: str, content: Any) -> Any:
        status, _, body = self._ask("POST", path, content)
        assert status in (200, 201), (path, status, body[:300])
        return json.loads(body)

    def cpu_s(self) -> float:
        """CPU seconds that the server's process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mib(self) -> float:
        """Resident memory of the server's process."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return round(int(found[1]) / 1024, 1)


@contextmanager
def studio(root: Path) -> Iterator[Server]:
    """The command `t2i-adapter studio`, until the end of the block."""
    command = [sys.executable, "-m", "t2i_adapter", "studio", str(root), "--port", "0", "--no_open_browser"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process, began)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


class Page(threading.Thread):
    """An open page: reads the stream of events. chunks: (when, bytes) as they came."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.chunks: list[tuple[float, bytes]] = []
        self._connection = HTTPConnection(server.address, timeout=60)
        self._connection.request("GET", "/api/events", headers={"cookie": server._cookie})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.start()

    def run(self) -> None:
        with suppress(OSError, HTTPException):  # the server ends while it is read
            while data := self._answer.read1(1 << 20):
                self.chunks.append((time.monotonic(), data))

    def events(self, name: str) -> list[tuple[float, Any]]:
        """(when it came, its data) of each event of a name."""
        found, rest = [], b""
        for at, data in self.chunks:
            *whole, rest = (rest + data).split(b"\n\n")
            for event in whole:
                match = re.search(rb"^event: (\S+)\ndata: (.*)$", event, re.MULTILINE)
                if match and match[1].decode() == name:
                    found.append((at, json.loads(match[2])))
        return found


def milliseconds(action: Callable[[], object], times: int = 1) -> float:
    """Median time of an action."""
    found = []
    for _ in range(times):
        began = time.monotonic()
        action()
        found.append(1000 * (time.monotonic() - began))
    return round(statistics.median(found), 1)


def share_of_core(server: Server, seconds: float) -> float:
    """CPU time over wall time of the server that nobody asks anything."""
    before = server.cpu_s()
    time.sleep(seconds)
    return round((server.cpu_s() - before) / seconds, 4)


# Parts ----------------------------------------------------------------------------------------------------------------


def measure_start(root: Path, options: Any) -> dict[str, Any]:
    """From the command to the first byte of an answer, five times; memory and CPU of an empty studio at rest."""
    firsts, cpus = [], []
    for _ in range(5):
        with studio(root) as server:
            firsts.append(server.first_byte_s)
            cpus.append(server.cpu_s())
    with studio(root) as server:
        server.get("/api/state")
        time.sleep(2)
        rest = {"memory_at_rest_mib": server.memory_mib(), "cores_at_rest": share_of_core(server, options.seconds)}
    return {
        "first_byte_ms": round(1000 * statistics.median(firsts)),
        "first_byte_of_each_ms": [round(1000 * one) for one in firsts],
        "start_cpu_s": round(statistics.median(cpus), 2),
        **rest,
    }


def measure_events(root: Path, options: Any) -> dict[str, Any]:
    """`RATE` events a second to `PAGES` open pages."""
    command = [sys.executable, str(HERE / "studio_server.py"), str(root), str(RATE), str(options.seconds)]
    began = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        server = Server(process, began)
        pages = [Page(server) for _ in range(PAGES)]
        time.sleep(1)
        before, wall = server.cpu_s(), time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        published = int(process.stdout.readline())
        cpu, wall = server.cpu_s() - before, time.monotonic() - wall
        time.sleep(1)
        process.stdin.write("\n")
        process.stdin.close()
    got = [page.events("bench") for page in pages]
    resets = sum(len(page.events("reset")) for page in pages)
    late = sorted(1000 * (at - data["at"]) for one in got for at, data in one)
    in_order = all([data["n"] for _, data in one] == list(range(published)) for one in got)
    return {
        "pages": PAGES,
        "events_a_second": round(published / wall),
        "published": published,
        "lost": sum(published - len(one) for one in got),
        "in_order_and_once": in_order,
        "resets": resets,
        "latency_p50_ms": round(late[len(late) // 2], 1),
        "latency_p99_ms": round(late[len(late) * 99 // 100], 1),
        "server_cores": round(cpu / wall, 3),
    }


def measure_runs(root: Path, options: Any) -> dict[str, Any]:
    """The list of many runs, the numbers of a long one, and what the server does while nobody asks."""
    for number in range(options.runs):
        write_run(root / "runs" / f"run-{number:03d}", UPDATES_OF_EACH)
    long = root / "runs" / "long"
    write_run(long, UPDATES_OF_LONG)
    write_pictures(long, range(0, 4000, 200), SIDE)
    write_jobs(root, 200)
    lines = len((long / "metrics.jsonl").read_bytes().splitlines())
    with studio(root) as server:
        cpu = server.cpu_s()
        cold = milliseconds(lambda: server.get("/api/runs"))
        time.sleep(3)
        cpu = server.cpu_s() - cpu
        warm = milliseconds(lambda: server.get("/api/runs"), 20)
        jobs = milliseconds(lambda: server.get("/api/jobs"), 20)
        rest = share_of_core(server, options.seconds)
        runs = json.loads(server.get("/api/runs"))
        name = next(run["id"] for run in runs if run["name"] == "long")
        whole = milliseconds(lambda: server.get(f"/api/runs/{name}"), 5)
        before = server.cpu_s()
        first = milliseconds(lambda: server.get(f"/api/runs/{name}/metrics"))
        first_cpu = server.cpu_s() - before
        again = milliseconds(lambda: server.get(f"/api/runs/{name}/metrics"), 5)
        answer = server.get(f"/api/runs/{name}/metrics")
        content = json.loads(answer)
        appended = measure_append(server, long, options.seconds)
        memory = server.memory_mib()
    return {
        "many": {
            "runs": len(runs),
            "log_entries_of_each": UPDATES_OF_EACH // LOGGED,
            "ended_jobs": 200,
            "list_cold_ms": cold,
            "list_warm_ms": warm,
            "jobs_warm_ms": jobs,
            "first_look_cpu_s": round(cpu, 2),
            "cores_at_rest": rest,
            "memory_mib": memory,
        },
        "long": {
            "log_entries": UPDATES_OF_LONG // LOGGED,
            "log_lines": lines,
            "log_bytes": (long / "metrics.jsonl").stat().st_size,
            "run_ms": whole,
            "metrics_first_ms": first,
            "metrics_first_cpu_s": round(first_cpu, 2),
            "metrics_again_ms": again,
            "metrics_bytes": len(answer),
            "points": {name: len(curve[0]) for name, curve in content["curves"].items()},
            "looks": len(content["looks"]),
            "scores": len(content["scores"]),
            "live": appended,
        },
    }


def write_run(folder: Path, updates: int) -> None:
    """A run's log and record, and all its options, as the trainer writes them."""
    write_log(folder, updates)
    config = Config()
    changed = replace(config, train=replace(config.train, max_steps=updates, seed=1), output_dir=str(folder))
    (folder / "options.yaml").write_text(recipe.dump(changed))


def write_jobs(root: Path, count: int) -> None:
    """Folders of ended jobs, as the queue keeps them."""
    for number in range(count):
        folder = root / ".studio" / "jobs" / f"20261129-120000-{number:06x}"
        folder.mkdir(parents=True)
        job = {"verb": "plan", "argv": ["plan", "--data", "data"], "run": "", "created": 1.0, "processes": 1}
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "process.json").write_text(json.dumps({"pid": 1, "started": "never"}))
        (folder / "exit.json").write_text(json.dumps({"code": 0, "ended": 2.0}))
        (folder / "log").write_text("done\n" * 20)
        (folder / "progress").write_text(json.dumps({"phase": "planning", "done": 1, "total": 1}) + "\n")


def measure_append(server: Server, folder: Path, seconds: float) -> dict[str, Any]:
    """A long run that goes on: four log entries a second, until an open page has them."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "outcome": RUNNING}))
    held = lock(folder)
    page = Page(server)
    time.sleep(3)
    written, before, began = {}, server.cpu_s(), time.monotonic()
    with (folder / "metrics.jsonl").open("a") as log:
        step = UPDATES_OF_LONG
        while time.monotonic() - began < seconds:
            step += LOGGED
            log.write(json.dumps({**entries(LOGGED)[0], "step": step}) + "\n")
            log.flush()
            written[step] = time.monotonic()
            time.sleep(0.25)
    cpu, wall = server.cpu_s() - before, time.monotonic() - began
    time.sleep(1)
    came = {entry["step"]: at for at, data in page.events("metrics") for entry in data["entries"]}
    held.close()
    (folder / "run.json").write_text(json.dumps(record))
    late = sorted(1000 * (came[step] - at) for step, at in written.items() if step in came)
    return {
        "entries_a_second": 4,
        "written": len(written),
        "lost": len(written) - len(late),
        "latency_p50_ms": round(late[len(late) // 2]),
        "latency_p99_ms": round(late[len(late) * 99 // 100]),
        "server_cores": round(cpu / wall, 3),
    }


def write_originals(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for number in range(ORIGINALS):
        file = folder / f"{number}.jpg"
        Image.new("RGB", (SIDE, SIDE), (4 * number % 256, 80, 160)).save(file, quality=60)
        files.append(file)
    return files


def caption(number: int) -> str:
    """The captions of 1 row in `ORIGINALS` have the word that is searched for."""
    return f"a house by a lake, {'with a boat' if number % ORIGINALS == 7 else 'in the morning'}, number {number}"


def write_table(root: Path, rows: int) -> None:
    """A table whose rows name `ORIGINALS` files."""
    write_originals(root / "table" / "pictures")
    with (root / "table" / "metadata.jsonl").open("w") as file:
        for number in range(rows):
            row = {"file_name": f"pictures/{number % ORIGINALS}.jpg", "text": caption(number)}
            file.write(json.dumps(row) + "\n")


def write_folder(root: Path, rows: int) -> None:
    """A folder of pictures with captions beside them. The files are further names of `ORIGINALS` ones, to save time."""
    originals, folder = write_originals(root / "originals"), root / "folder"
    folder.mkdir()
    for number, file in enumerate(originals):
        file.with_suffix(".txt").write_text(caption(number))
    for number in range(rows):
        picture = originals[number % ORIGINALS]
        os.link(picture, folder / f"{number:06d}.jpg")
        os.link(picture.with_suffix(".txt"), folder / f"{number:06d}.txt")


def measure_data(root: Path, options: Any) -> dict[str, Any]:
    """The grid of a table and of a folder."""
    write_table(root, options.rows)
    write_folder(root, options.files)
    found = {}
    for name, location in (("table", "table/metadata.jsonl"), ("folder", "folder")):
        with studio(root) as server:
            found[name] = measure_grid(server, location)
            time.sleep(3)
            found[name]["cores_at_rest"] = share_of_core(server, options.seconds)
    return found


def measure_grid(server: Server, location: str) -> dict[str, Any]:
    """A dataset of pictures whose conditions an annotator makes: opened, scrolled, searched."""
    before = server.memory_mib()
    answer: dict[str, Any] = {}

    def opening() -> None:
        answer.update(server.post("/api/data", {"values": {"location": location, "condition": "canny"}}))

    opened = milliseconds(opening)
    rows = f"/api/data/{answer['id']}/rows"
    total = json.loads(server.get(f"{rows}?n=1"))["total"]
    far = total * 9 // 10
    picture = f"{rows}/{far}/image?side=160"
    found = {
        "opened_ms": opened,
        "rows": total,
        "first_rows_ms": milliseconds(lambda: server.get(f"{rows}?from=0&n=50"), 5),
        "far_row": far,
        "far_rows_ms": milliseconds(lambda: server.get(f"{rows}?from={far}&n=50"), 5),
        "picture_first_ms": milliseconds(lambda: server.get(picture)),
        "picture_again_ms": milliseconds(lambda: server.get(picture), 5),
        "search_first_ms": milliseconds(lambda: server.get(f"{rows}?find=boat&n=50")),
        "search_again_ms": milliseconds(lambda: server.get(f"{rows}?find=lake&n=50"), 5),
        "found": json.loads(server.get(f"{rows}?find=boat&n=1"))["total"],
    }
    return {**found, "memory_before_mib": before, "memory_after_mib": server.memory_mib()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the large table")
    parser.add_argument("--files", type=int, default=20_000, help="pictures of the large folder")
    parser.add_argument("--runs", type=int, default=50, help="runs in the list, besides the long one")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each rate is measured")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    options = parser.parse_args()
    functions = {
        "start": measure_start,
        "events": measure_events,
        "runs": measure_runs,
        "data": measure_data,
    }
    found = {} if set(options.only) == set(PARTS) else read_earlier("studio", options.out)
    for part in options.only:
        with tempfile.TemporaryDirectory() as place:
            found[part] = functions[part](Path(place), options)
            found[part]["load_average"] = round(os.getloadavg()[0], 1)
            print(json.dumps({part: found[part]}, indent=1), flush=True)
    write_result("studio", found, options.out, threads=1)


if __name__ == "__main__":
    main()
