"""The verb `studio`: starts the server, or prints a new link for the one that runs."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import show_path, user_path, write_atomic
from t2i_adapter.runs.lock import holder, lock
from t2i_adapter.runs.metrics import integer, read_json, text_of
from t2i_adapter.studio.options import StudioOptions

if TYPE_CHECKING:
    from t2i_adapter.studio.places import Places
    from t2i_adapter.studio.server import Studio

ADDRESS = "address.json"
"""In the studio's folder: where its server listens."""


def run(options: StudioOptions) -> None:
    """Serves until it is interrupted. Jobs go on after that. Raises UserError."""
    root = user_path(options.root)
    if not root.is_dir():
        raise UserError(f"{options.root}: no such folder; name one that holds, or will hold, your data and runs")
    if options.link:
        return _print_link(root.resolve(), options)
    _check_host(options)
    return _serve(root, options)


def _serve(root: Path, options: StudioOptions) -> None:
    import uvicorn

    from t2i_adapter.studio.app import Server, make_app
    from t2i_adapter.studio.places import Places

    places = Places(root, options.runs)
    try:
        places.state.mkdir(exist_ok=True, mode=0o700)
    except OSError as fault:
        raise UserError(f"{root}: cannot be written ({fault.strerror})") from None
    if holder(places.state) is not None:
        raise UserError(
            f"{show_path(root)}: a studio runs in this folder already; `t2i-adapter studio {show_path(root)} --link` "
            "prints a link to it"
        )
    os.chdir(places.root)  # options name files from the root, here as in the jobs
    with contextlib.closing(lock(places.state)), _listen(options) as listener:
        host, port = listener.getsockname()[:2]
        write_atomic(places.state / ADDRESS, [json.dumps({"host": host, "port": port}).encode()])
        studio = open_studio(places)
        link = _link(host, port, studio.keys.new_link("owner"))
        _announce(options, host, port, link)
        config = uvicorn.Config(
            make_app(studio, options.host_name),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        server = Server(config, studio)
        if options.open_browser and _has_screen():
            threading.Timer(0.5, webbrowser.open, [link]).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        running = [job for job in studio.jobs.all() if job.state == "running"]
        waiting = [job for job in studio.jobs.all() if job.state == "queued"]
        if running:
            print(f"{len(running)} job{'s' * (len(running) > 1)} go on without the studio; it shows them again later.")
        if waiting:
            print(f"{len(waiting)} waiting job{'s' * (len(waiting) > 1)} will start when the studio runs again.")


def open_studio(places: Places) -> Studio:
    """The parts of a studio in a root whose folder `.studio` exists. Raises UserError."""
    from t2i_adapter.studio.datasets import Datasets
    from t2i_adapter.studio.guard import Keys, remove_keys
    from t2i_adapter.studio.hub import Hub
    from t2i_adapter.studio.jobs import Jobs
    from t2i_adapter.studio.paints import Paints
    from t2i_adapter.studio.run_views import Runs
    from t2i_adapter.studio.server import Studio

    is_from_elsewhere = places.is_from_elsewhere()
    if is_from_elsewhere:
        remove_keys(places.state)
    hub = Hub()
    paints = Paints(places, hub)
    jobs = Jobs(places, before_device=paints.end)
    if is_from_elsewhere:  # its jobs may be of somebody else, who could run anything
        jobs.cancel_waiting()
        places.settle()
    return Studio(places, Keys(places.state), jobs, paints, Runs(places), hub, Datasets(places))


def _listen(options: StudioOptions) -> socket.socket:
    """A socket that listens. Raises UserError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as fault:
        raise UserError(
            f"{options.host} port {options.port}: cannot be used ({fault.strerror or fault}); choose another "
            f"{flag('port')}, or 0 for any free one",
            option="port",
        ) from None
    return listener


def _check_host(options: StudioOptions) -> None:
    """Raises UserError if other machines could reach the server and --expose is not given."""
    if options.expose or _is_own(options.host):
        return
    raise UserError(
        f"{options.host}: other machines could reach it, and its traffic is not encrypted. Use an ssh tunnel, "
        f"ssh -L {options.port}:127.0.0.1:{options.port} HOST, or add {flag('expose')}.",
        option="host",
    )


def _is_own(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _print_link(root: Path, options: StudioOptions) -> None:
    from t2i_adapter.studio.guard import Keys
    from t2i_adapter.studio.places import STATE

    state = root / STATE
    address = read_json(state / ADDRESS)
    port = integer(address.get("port"))
    if holder(state) is None or port is None:
        raise UserError(f"{options.root}: no studio runs in this folder; start one: t2i-adapter studio", option="link")
    token = Keys(state).new_link("reader" if options.read_only else "owner")
    print(_link(text_of(address.get("host")), port, token))


def _link(host: str, port: int, token: str) -> str:
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/?token={token}"


def _announce(options: StudioOptions, host: str, port: int, link: str) -> None:
    print(f"The studio is at\n  {link}\nThe link works once; `t2i-adapter studio --link` prints another.")
    if os.environ.get("SSH_CONNECTION"):
        print(f"From another machine, first: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}")
    if not _is_own(host):
        print("warning: other machines can reach this address, and the traffic is not encrypted.", file=sys.stderr)
    print("Ctrl-C ends the studio; jobs go on.", flush=True)


def _has_screen() -> bool:
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
