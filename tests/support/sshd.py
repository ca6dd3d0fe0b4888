"""An ssh server of this machine's own user on the loopback addresses. It needs Debian's package openssh-server."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from support.slurm import SBIN, free_ports

MISSING = [program for program in ("sshd", "ssh", "ssh-keygen") if shutil.which(program, path=SBIN) is None]
SEPARATION = Path("/run/sshd")
"""The folder that sshd requires of root."""
SERVER = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT = """
Host *
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Server:
    """A context that runs the server. `command` is the words that log in to it at any loopback address."""

    def __enter__(self) -> Server:
        self.folder = Path(tempfile.mkdtemp(prefix="sshd-"))
        self.made = os.getuid() == 0 and not SEPARATION.exists()
        if self.made:
            SEPARATION.mkdir(mode=0o755)
        (port,) = free_ports(1)
        for name in ("host", "user"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True, timeout=60)
        (self.folder / "server").write_text(SERVER.format(port=port, folder=self.folder))
        (self.folder / "client").write_text(CLIENT.format(port=port, folder=self.folder))
        self.command = f"ssh -F {self.folder}/client"
        program = shutil.which("sshd", path=SBIN)
        assert program
        with (self.folder / "log").open("wb") as log:  # sshd starts itself again, so it needs its whole path
            self.process = subprocess.Popen([program, "-D", "-e", "-f", f"{self.folder}/server"], stderr=log)
        end = time.monotonic() + 30
        while subprocess.run([*self.command.split(), "127.0.0.2", "true"], check=False, timeout=30).returncode:
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.made:
            SEPARATION.rmdir()
