"""A Slurm cluster on this machine, in a temporary folder: two nodes with a fake GPU each, own ports, an own key.

It needs Debian's packages slurmctld, slurmd, slurm-client and munge. Nothing of it outlives the context.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "scancel", "srun")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""PATH with the folders of the daemons, which a user's PATH may not have."""
MISSING = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
NODES = ("127.0.0.1", "127.0.0.2")
"""The names of the nodes, which are addresses too: a job file hands the name of its first node to the others."""
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{more}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs=4 RealMemory=4000 Gres=gpu:1 State=IDLE\n"


class Cluster:
    """A context that runs the cluster. Its partitions are `low` and `high`; a job of `high` preempts one of `low`.

    A preempted job has `grace` seconds. more: further lines of slurm.conf.
    """

    def __init__(self, grace: int = 60, more: str = "") -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-")
        )  # short: the path of munge's socket has 107 letters at most
        self.folder.chmod(0o755)  # munged requires that every user reaches its socket; its key stays private
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._jobs: list[str] = []
        host, ports = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
        text = CONF.format(host=host, ports=ports, folder=self.folder, user=getpass.getuser(), grace=grace, more=more)
        for name, port in zip(NODES, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SBIN}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = ("key-file", "socket", "log-file", "pid-file", "seed-file")
        flags = [f"--{place}={self.folder}/munge.{place.partition('-')[0]}" for place in places]
        self._launch("munged", "--foreground", "--num-threads=2", *flags)
        self._await(lambda: (self.folder / "munge.socket").exists(), "munged makes no socket")
        self._launch("slurmctld", "-D")
        for name in NODES:
            self._launch("slurmd", "-D", "-N", name)
        self._await(self._is_up, "the nodes do not become idle")

    def _launch(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._daemons.append(daemon)

    def _is_up(self) -> bool:
        shown = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T", check=False).splitlines()
        return sorted(line.split()[-1] for line in shown if line) == ["idle"] * len(NODES)

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
            self.run("scancel", job, check=False)
        if self._jobs:
            done = time.monotonic() + 60
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < done:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> str:
        """Runs a command of Slurm and returns what it prints."""
        env = {**self.env, **(env or {})}
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}{self.logs()}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Runs `sbatch WORDS` in `cwd` and returns the job's number."""
        job = self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).strip()
        self._jobs.append(job)
        return job

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` prints of a job, or of the last task of an array: name -> value."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return dict(re.findall(r"(\w+)=(\S*)", lines[0]))

    def states(self, job: str) -> list[str]:
        """The state of a job, or of each task of an array."""
        return re.findall(r"\bJobState=(\w+)", self.run("scontrol", "--oneliner", "show", "job", job))

    def wait(self, job: str, state: str, seconds: float = 240) -> None:
        """Waits until the job, or each task of an array, has this state."""
        self._await(lambda: set(self.states(job)) == {state}, f"job {job} does not become {state}", seconds)

    def _await(self, condition: Callable[[], object], failure: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, f"{ended} ended: {self.logs()}"
            assert time.monotonic() < end, f"{failure} in {seconds} s; {self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The queue, and the ends of the daemons' logs."""
        queue = self.run("squeue", "--format=%i %P %T %M %N %r", check=False)
        return queue + "\n".join(f"{log.name}: {log.read_text()[-800:]}" for log in sorted(self.folder.glob("*.out")))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
