"""Measures the studio under load: its start, events, long runs, many runs, large datasets.

    python benchmarks/studio.py [--rows 100000] [--files 20000] [--runs 50] [--seconds 10] [--only start events ...]

Each part starts a server of its own in a temporary folder, and asks it over the loopback address as a browser does. The
part `browser` drives Chromium; it is skipped without Playwright or Chromium. Times are medians in milliseconds. They
grow with the load of the machine (`load_average`); CPU seconds, which the server's process used, hardly do.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import make_parser, read_earlier, write_result
from run_page import entries, write_pictures
from studio_client import Page, Server, milliseconds, share_of_core, studio
from studio_folders import write_folder, write_jobs, write_run, write_table

from t2i_adapter.runs.lock import lock
from t2i_adapter.runs.record import RUNNING

HERE = Path(__file__).resolve().parent
PARTS = ("start", "events", "runs", "data", "browser")
PAGES, RATE, JOBS = 8, 1000, 200
LOGGED, UPDATES_OF_EACH, UPDATES_OF_LONG = 10, 20_000, 150_000
"""Updates between two log entries (as in run_page.py), of each of the many runs, of the long run."""


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
    write_pictures(long, range(0, 4000, 200), 128)
    write_jobs(root, JOBS)
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
            "ended_jobs": JOBS,
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


def measure_browser(root: Path, options: Any) -> dict[str, Any]:
    """The pages of the large table and of the long run in Chromium, until they show what they are for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or find_spec("playwright") is None:
        return {"skipped": "needs Playwright and Chromium"}
    from playwright.sync_api import sync_playwright

    write_table(root, options.rows)
    write_run(root / "runs" / "long", UPDATES_OF_LONG)
    with studio(root) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        name, _, value = server.cookie.partition("=")
        context.add_cookies([{"name": name, "value": value, "url": f"http://{server.address}"}])
        page = context.new_page()
        data = server.post("/api/data", {"values": {"location": "table/metadata.jsonl", "condition": "canny"}})["id"]
        run = json.loads(server.get("/api/runs"))[0]["id"]
        far = options.rows * 9 // 10

        def opened(path: str, script: str) -> None:
            page.goto(f"http://{server.address}{path}")
            page.wait_for_function(script)

        def jumped() -> None:
            page.evaluate(
                "() => { const grid = document.querySelector('.grid'); grid.scrollTop = 0.9 * grid.scrollHeight }"
            )
            page.wait_for_function(f"() => {SHOWN}.some((tile) => tile.dataset.place > {far - 100})")

        found = {
            "rows": options.rows,
            "grid_ms": milliseconds(lambda: opened(f"/data/{data}", f"() => {SHOWN}.length > 10")),
            "grid_far_ms": milliseconds(jumped),
            "tiles": page.evaluate("() => document.querySelectorAll('.tile').length"),
            "frame_ms": page.evaluate(SCROLL),
            "log_entries": UPDATES_OF_LONG // LOGGED,
            "run_ms": milliseconds(lambda: opened(f"/runs/{run}", DRAWN), 3),
            "charts": page.evaluate("() => document.querySelectorAll('.chart canvas').length"),
        }
        browser.close()
    return found


SHOWN = "[...document.querySelectorAll('.tile')].filter((tile) => tile.querySelector('.caption')?.textContent)"
"""Tiles of the grid that have their caption."""
DRAWN = "() => document.querySelectorAll('.chart canvas').length > 5"
SCROLL = """async () => {
  const grid = document.querySelector(".grid");
  const times = [];
  for (let n = 0; n < 60; n++) {
    const began = performance.now();
    grid.scrollTop -= 40;
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - began);
  }
  return Math.round(10 * times.sort((a, b) => a - b)[30]) / 10;
}"""
"""Scrolls 60 times; returns the median time of a frame in milliseconds."""


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
        "browser": measure_browser,
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
