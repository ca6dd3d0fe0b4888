"""Runs verbs against a hub on loopback, several in one process, because the hub's client reads its address once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.push_hub import Hub

PROGRAM = """
import contextlib, io, json, sys
from t2i_adapter.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


class Done(NamedTuple):
    """A verb that has ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error. Fails unless there is one line, and exit code 2."""
        assert self.code == 2, (self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


def run_verbs(hub: Hub, *commands: Sequence[str | Path], cwd: Path, **environment: str) -> list[Done]:
    """Runs each command line (without `t2i-adapter`) in the folder `cwd`, with the hub's address."""
    variables = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([list(map(str, words)) for words in commands])],
        env=variables | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [Done(*each) for each in json.loads(done.stdout.splitlines()[-1])]
