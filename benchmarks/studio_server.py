"""The server side of benchmarks/studio.py: a studio in this process that publishes events by itself.

    python benchmarks/studio_server.py FOLDER EVENTS_A_SECOND SECONDS

It prints the address with its token, waits for a line on stdin, publishes, and prints how many events it published.
Each event has the time of its making, so that a page of the same machine can tell how long it was under way.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import uvicorn

from t2i_adapter.studio.app import make_app
from t2i_adapter.studio.datasets import Datasets
from t2i_adapter.studio.guard import Keys
from t2i_adapter.studio.hub import Hub
from t2i_adapter.studio.jobs import Jobs
from t2i_adapter.studio.paints import Paints
from t2i_adapter.studio.places import Places
from t2i_adapter.studio.run_views import Runs
from t2i_adapter.studio.server import Studio

TICK = 0.01
"""Seconds between two bundles of events, as a process that reads files would publish them."""


def publish(hub: Hub, rate: int, seconds: float) -> int:
    """Publishes `rate` events a second; returns how many."""
    began, number = time.monotonic(), 0
    while (now := time.monotonic() - began) < seconds:
        while number < now * rate:
            hub.publish("bench", {"n": number, "at": time.monotonic(), "loss": 0.1234, "step": number})
            number += 1
        time.sleep(TICK)
    return number


def main() -> None:
    root, rate, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    places = Places(root, "runs")
    places.state.mkdir(exist_ok=True)
    hub, keys = Hub(), Keys(places.state)
    studio = Studio(places, keys, Jobs(places), Paints(places, hub), Runs(places), hub, Datasets(places))
    config = uvicorn.Config(
        make_app(studio), port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen(128)
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/?token={keys.new_link('owner')}", flush=True)
    sys.stdin.readline()
    print(publish(hub, rate, seconds), flush=True)
    sys.stdin.readline()  # until the pages have read everything


if __name__ == "__main__":
    main()
