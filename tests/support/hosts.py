"""Hosts on this machine: network namespaces with an address each, on one switch; a host can be killed and cut off.

They need root and `ip` of iproute2. They share this machine's disk, as the nodes of a cluster share theirs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213.77"
"""The first three numbers of the hosts' addresses; they exist inside the namespaces alone."""


@dataclass(frozen=True)
class Host:
    """One host. space: its network namespace. port: its plug in the switch. log: what its programs print. names: its
    file /etc/hosts."""

    name: str
    address: str
    space: str
    switch: str
    port: str
    log: Path
    names: Path

    def start(self, words: Sequence[str], cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a program on this host, which has the host's name too."""
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        enter = ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "sh", "-c", script]
        named = {**os.environ, **env, "GLOO_SOCKET_IFNAME": "eth0"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*enter, self.name, str(self.names), *words],
                cwd=cwd,
                env=named,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def kill(self) -> None:
        """Kills all processes of this host at once, as a power cut does."""
        found = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, check=False)
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def cut_off(self) -> None:
        """Takes the host's network away; its processes go on."""
        _ip("-n", self.switch, "link", "set", self.port, "down")


class Hosts:
    """`with Hosts(folder, 2) as hosts`: that many hosts, host-1 and on. At the end nothing of them is left."""

    def __init__(self, folder: Path, count: int) -> None:
        """folder: where the hosts' logs are written."""
        self._key = f"t2i-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._spaces = [f"{self._key}-{number}" for number in range(count + 1)]
        self._folder = folder
        self.hosts: list[Host] = []

    def __enter__(self) -> list[Host]:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self.hosts

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def _make(self) -> None:
        switch, *spaces = self._spaces
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        names = self._folder / "hosts"
        known = [f"{NETWORK}.{number} host-{number}\n" for number in range(1, len(spaces) + 1)]
        names.write_text("127.0.0.1 localhost\n" + "".join(known))
        for number, space in enumerate(spaces, 1):
            port, address = f"port{number}", f"{NETWORK}.{number}"
            _ip("netns", "add", space)
            _ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            name = f"host-{number}"
            self.hosts.append(Host(name, address, space, switch, port, self._folder / f"{name}.log", names))


def why_no_hosts() -> str:
    """Why this machine cannot have such hosts; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "`ip` of iproute2 or `unshare` of util-linux is missing"
    name = f"t2i-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made ({tried.stderr.strip()})"
    pair = ["ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", "eth1", "netns", name]
    made = subprocess.run(pair, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"no pair of network devices can be made ({made.stderr.strip()})" if made.returncode else ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
