"""Events: what the watcher publishes of files that change, and the stream that pages read."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import entries_of, gain_entry, log_entry, write_pictures, write_run

from t2i_adapter.studio import hub as hub_module
from t2i_adapter.studio import places as places_module
from t2i_adapter.studio import watch as watch_module
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.jobs import Jobs
from t2i_adapter.studio.paints import Paints
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run_views import Runs
from t2i_adapter.studio.watch import Watch

Event = tuple[int, str, Any]


def parse(text: str) -> Iterator[Event]:
    """(number, name, data) of the events of a stream's text."""
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "event" in fields:
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])


async def waiting(stream: AsyncIterator[str], seconds: float = 0.1) -> list[Event]:
    """The events that a stream has now. It cannot be read on after that."""
    found: list[Event] = []
    while True:
        task = asyncio.ensure_future(anext(stream, None))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done or task.result() is None:
            task.cancel()
            return found
        found += parse(task.result() or "")


def events(hub: Hub, after: int | None) -> list[Event]:
    """What a page gets that has seen the events up to a number."""
    return asyncio.run(waiting(hub.stream(after)))


# The stream ---------------------------------------------------------------------------------------------------------


def test_a_page_that_comes_back_gets_what_it_missed():
    hub = Hub()
    for number in range(5):
        hub.publish("job", {"n": number})
    first = hub.number - 4
    assert [name for _, name, _ in events(hub, None)] == ["hello"]
    assert events(hub, None)[0][0] == hub.number, "and knows from where to go on"
    assert [data["n"] for _, _, data in events(hub, first + 1)] == [2, 3, 4]
    assert events(hub, hub.number) == []


def test_a_page_that_missed_too_much_begins_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "MOST_KEPT", 3)
    hub = Hub()
    begin = hub.number
    for number in range(5):
        hub.publish("job", {"n": number})
    assert [name for _, name, _ in events(hub, begin)] == ["reset"]
    assert [name for _, name, _ in events(hub, begin + 1)] == ["reset"]
    assert [data["n"] for _, _, data in events(hub, begin + 2)] == [2, 3, 4]
    assert [name for _, name, _ in events(hub, hub.number + 10**6)] == ["reset"], "a number of the future"


def test_a_page_of_an_earlier_server_begins_anew():
    """The new server may have published more events by now than the page has seen of the old one."""
    old = Hub()
    for _ in range(3):
        old.publish("job", {})
    time.sleep(0.02)
    new = Hub()
    for _ in range(10):
        new.publish("job", {})
    assert [name for _, name, _ in events(new, old.number)] == ["reset"]


def test_a_slow_page_begins_anew_and_the_others_are_not_held_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "MOST_WAITING", 10)
    hub = Hub()

    async def both() -> tuple[list[Event], list[Event]]:
        slow, quick, seen = hub.stream(None), hub.stream(None), list[Event]()

        async def read() -> None:
            async for text in quick:
                seen.extend(parse(text))

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        text = await anext(slow) + await anext(slow)
        for number in range(30):
            hub.publish("job", {"n": number})
            await asyncio.sleep(0.005)
        text += await anext(slow) + await anext(slow)
        reading.cancel()
        return list(parse(text)), seen

    slow, quick = asyncio.run(both())
    assert [data["n"] for _, name, data in quick if name == "job"] == list(range(30))
    assert [name for _, name, _ in slow][:2] == ["hello", "reset"]
    assert [data["n"] for _, name, data in slow if name == "job"] == list(range(20, 30))


def test_events_of_many_threads_have_numbers_without_a_gap():
    hub = Hub()
    begin = hub.number

    async def read() -> list[Event]:
        publish = lambda: [hub.publish("job", {}) for _ in range(200)]  # noqa: E731
        threads = [threading.Thread(target=publish, daemon=True) for _ in range(4)]
        found: list[Event] = []
        async for text in hub.stream(begin):
            if not found and not threads[0].ident:
                for thread in threads:
                    thread.start()
            found += parse(text)
            if len(found) == 800:
                break
        return found

    assert [number for number, _, _ in asyncio.run(read())] == list(range(begin + 1, begin + 801))


def test_a_closed_page_frees_its_place_and_a_closed_hub_ends_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "MOST_PAGES", 1)
    hub = Hub()

    async def use() -> None:
        page = hub.stream(None)
        await anext(page)
        assert hub.is_full()
        assert await waiting(hub.stream(None)) == []
        await page.aclose()  # type: ignore[attr-defined]
        assert not hub.is_full()
        other = hub.stream(None)
        await anext(other)
        await anext(other)
        hub.close()
        assert await asyncio.wait_for(anext(other, "ended"), 5) == "ended"

    asyncio.run(use())


def test_a_quiet_stream_stays_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "PAUSE", 0.02)
    hub = Hub()

    async def read() -> str:
        stream = hub.stream(hub.number)
        return "".join([await anext(stream) for _ in range(3)])

    assert ": still here\n\n" in asyncio.run(read())


def test_numbers_that_a_browser_does_not_read_become_null():
    hub = Hub()
    hub.publish("metrics", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "name": "\udcff\u2028"})
    ((_, _, data),) = events(hub, hub.number - 1)
    assert data == {"a": [None, 1.5], "b": {"c": None}, "name": "\udcff\u2028"}


# The watcher --------------------------------------------------------------------------------------------------------


class Watched:
    """A watcher that looks when it is asked to."""

    def __init__(self, root: Path) -> None:
        self.root, self.hub, self.places = root, Hub(), Places(root, "runs")
        self.jobs, self.runs = Jobs(self.places), Runs(self.places)
        self.watch = Watch(self.hub, self.jobs, self.runs, Paints(self.places, self.hub))
        self._seen = self.hub.number

    def look(self, *names: str) -> list[tuple[str, Any]]:
        """The events of these names since the last look; none of the device, which changes each time."""
        self.watch.look()
        found = events(self.hub, self._seen)
        self._seen = self.hub.number
        return [(name, data) for _, name, data in found if name != "device" and (not names or name in names)]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(watch_module, "SLOWLY", 0.0)
    monkeypatch.setattr(places_module, "_RESCAN_SECONDS", -1.0)
    return Watched(tmp_path)


def append(run: Path, *entries: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def test_a_run_that_appears_changes_and_vanishes_is_told(watched: Watched):
    assert watched.look() == []
    run = write_run(watched.root / "runs" / "a", entries_of(20), record={"outcome": "stopped"})
    ((name, row),) = watched.look()
    assert (name, row["name"], row["step"]) == ("run", "runs/a", 20) or (name, row["step"]) == ("run", 20)
    assert watched.look() == [], "nothing has changed"
    append(run, log_entry(30, 0.5), gain_entry(30, 0.2))
    found = dict(watched.look())
    assert found["run"]["step"] == 30
    assert [entry["step"] for entry in found["metrics"]["entries"]] == [30, 30]
    assert found["metrics"]["at"] == (run / "metrics.jsonl").stat().st_size
    shutil.rmtree(run)
    assert watched.look() == [("run_gone", {"id": row["id"]})]


def test_a_line_that_is_being_written_waits(watched: Watched):
    run = write_run(watched.root / "runs" / "a", entries_of(20), record={"outcome": "stopped"})
    watched.look()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss"')
        file.flush()
        assert watched.look("metrics") == []
        file.write(': 0.5}\n{"step": 40, "loss": NaN}\nnonsense\n{"ste')
        file.flush()
        ((_, data),) = watched.look("metrics")
    assert data["entries"] == [{"step": 30, "loss": 0.5}, {"step": 40, "loss": None}]


@pytest.mark.parametrize("how", ["cut", "replaced", "removed"])
def test_a_log_that_was_cut_makes_the_page_read_it_again(watched: Watched, how: str):
    """A resumed run cuts its log at the checkpoint."""
    run = write_run(watched.root / "runs" / "a", entries_of(100), record={"outcome": "stopped"})
    ((_, row),) = watched.look()
    log = run / "metrics.jsonl"
    if how == "cut":
        with log.open("r+") as file:
            file.truncate(log.stat().st_size // 2)
    elif how == "replaced":
        (run / "new").write_text(json.dumps(log_entry(10, 0.1)) + "\n")
        (run / "new").replace(log)
    else:
        log.unlink()
    assert watched.look("run_reset", "metrics") == [("run_reset", {"run": row["id"]})]
    append(run, log_entry(60, 0.25))
    last = [data["entries"][-1]["step"] for name, data in [*watched.look(), *watched.look()] if name == "metrics"]
    assert last == [60]


def test_new_pictures_are_told_after_the_log_names_their_step(watched: Watched):
    run = write_run(watched.root / "runs" / "a", entries_of(20), record={"outcome": "stopped"})
    watched.look()
    write_pictures(run, [30])
    append(run, log_entry(30, 0.5))
    assert [(name, data["step"]) for name, data in watched.look("picture")] == [("picture", 30)]
    append(run, log_entry(40, 0.5))
    assert watched.look("picture") == []


def test_jobs_are_started_and_told_with_their_log(watched: Watched):
    words = ["make-data", "shapes", "--out", "made", "--num", "2", "--num_test", "0", "--size", "32"]
    job = watched.jobs.add("make-data shapes", words)
    states, text, deadline = list[str](), "", time.monotonic() + 60
    while "done" not in states:
        assert time.monotonic() < deadline, states
        for name, data in watched.look():
            states += [data["state"]] if name == "job" else []
            text += data["text"] if name == "log" else ""
        time.sleep(0.05)
    assert list(dict.fromkeys(states)) in (["queued", "running", "done"], ["queued", "done"])
    assert "made" in text + "".join(data["text"] for _, data in watched.look("log"))
    shutil.rmtree(job.folder)
    assert watched.look() == [("job_gone", {"id": job.id})]


def test_a_run_of_a_terminal_keeps_the_card(watched: Watched):
    """A job of the device waits while another program trains in this root."""
    run = write_run(watched.root / "runs" / "a", entries_of(20), record={})
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom t2i_adapter.runs.lock import lock\n"
        "held = lock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        job = watched.jobs.add("train", ["train", "--help"])
        states = [data["state"] for name, data in watched.look("run")]
        watched.look()
        assert states == ["running"]
        assert watched.jobs.read(job.id).state == "queued"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    deadline = time.monotonic() + 60
    while watched.jobs.read(job.id).state != "done":
        assert time.monotonic() < deadline
        watched.look()
        time.sleep(0.05)


def test_a_folder_that_cannot_be_read_does_not_end_the_watcher(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    calls = []

    def broken(*_: Any) -> Any:
        calls.append(1)
        raise RuntimeError("gone while it was read")

    monkeypatch.setattr(watched.runs, "row", broken)
    monkeypatch.setattr(watch_module, "EVERY", 0.01)
    monkeypatch.setattr(watch_module, "SLOWLY", 0.02)
    write_run(watched.root / "runs" / "a", entries_of(20), record={"outcome": "stopped"})
    watched.watch.start()
    deadline = time.monotonic() + 20
    while len(calls) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    watched.watch.stop()
    assert "could not look" in caplog.text
