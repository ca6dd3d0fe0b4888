"""The command: its verbs, its quick help, and how every end of it looks from outside."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i_adapter import __version__, cli
from t2i_adapter.cli import VERBS, main
from t2i_adapter.errors import UserError
from t2i_adapter.exits import guarded

COMMAND = [sys.executable, "-m", "t2i_adapter"]


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told and verb.summary in told for name, verb in VERBS.items())
    assert main([]) == 2
    assert capsys.readouterr().err == told


def test_group_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-data"]) == 0 and main(["make-data", "-h"]) == 0
    told = capsys.readouterr().out
    assert "make-data shapes" in told and "make-data emoji" in told and "evaluate" not in told


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"t2i-adapter {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["make-data", "shapes", "--help"]])
def test_help_is_quick_and_light(words: list[str]) -> None:
    """Issue: `--help` in under 0.5 s. 1.5 s here, as tests share the machine; torch alone takes longer to load."""
    code = f"import sys; from t2i_adapter.cli import main\ntry: main({words!r})\nfinally: print('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 1.5
    assert done.returncode == 0 and "usage: t2i-adapter" in done.stdout
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "trian: no such verb; did you mean `train`?"),
        (["make-data", "shape"], "make-data shape: no such verb; did you mean `make-data shapes`?"),
        (["make_data"], "did you mean `make-data`?"),
        (["qqq"], "qqq: no such verb; there are demo,"),
        (["--nonsense"], "--nonsense: no such verb"),
        (["train", "--data.resolutoin=8"], "--data.resolutoin=8: no such flag; did you mean --data.resolution=8?"),
        (["train", "--learning_rate", "1"], "--learning_rate: no such flag; did you mean --optim.lr?"),
        (["train", "----train.batch_size=4"], "no such flag; did you mean --train.batch_size=4?"),
        (["train", "--cache_dir=x"], "did you mean --base.cache_dir=x?"),
        (["train", "--qqqqqq", "1"], "--qqqqqq: no such flag; see `t2i-adapter train --help`"),
        (["train", "--train.batch_size", "x"], "--train.batch_size 'x': allowed is a whole number"),
        (["train", "--train.batch_size"], "--train.batch_size: needs a value; allowed is a whole number"),
        (["train", "--train.mixed-precision=fp8"], "--train.mixed_precision 'fp8': allowed is one of no, fp16, bf16"),
        (["train", "--optim.betas", "1"], "--optim.betas '1': allowed is 2 items, each a number"),
        (["train", "--hub.push=True"], "--hub.push=True: a switch takes no value; write --hub.push or --hub.no_push"),
        (["train", "stray"], "'stray' belongs to no flag"),
        (["train"], "--data is required: a folder, a file, shards or a hub id"),
        (["train", "--data.resolution", "0"], "--data.resolution 0: allowed is 1 to 8192 pixels"),
        (["train", "--data.resolution=100000"], "--data.resolution 100000: allowed is 1 to 8192 pixels"),
        (["train", "--optim.betas", "0.9", "1.5"], "1.5: allowed is 0 up to, not including, 1"),
        (["train", "--optim.lr=inf"], "--optim.lr inf: allowed is a number above 0"),
        (["train", "--optim.eps=-1"], "--optim.eps -1.0: allowed is a number above 0"),
        (["train", "--optim.weight_decay=-1"], "--optim.weight_decay -1.0: allowed is 0 or more"),
        (["train", "--optim.schedule=piecewise_constant"], "--optim.step_rules '': needs the form"),
        (["train", "--train.seed=-1"], "--train.seed -1: allowed is 0 to 2^63 - 1"),
        (["train", "--objective.noise_offset=nan"], "--objective.noise_offset 'nan': allowed is a number"),
        (["train", "--tracking.log_every=0"], "--tracking.log_every 0: 1 or more"),
        (["train", "--validation.prompts", "a"], "--validation.prompts is given without --validation.images"),
        (["train", "--recipe"], "--recipe: needs a value"),
        (["train", "--recipe", "/no/such.yaml"], "--recipe /no/such.yaml: No such file"),
        (["make-data", "shapes"], "--out: required, and not given"),
        (["make-data", "emoji", "--size", "8"], "--out and --package: required, and not given"),
        (
            ["make-data", "shapes", "--out", "x", "--condition", "depht"],
            "--condition 'depht': allowed is one of outline",
        ),
        (["make-data", "shapes", "--out", "x", "--num", "0"], "--num 0: allowed is 1 or more"),
        (["make-data", "shapes", "--ouy=x"], "--ouy=x: no such flag; did you mean --out=x?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert said in shown.err


def test_mistakes_are_one_line_without_utf8() -> None:
    """The line does not depend on the encoding of standard output."""
    done = subprocess.run(
        [*COMMAND, "train", "--train.batch_size", "x"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (2, "error: --train.batch_size 'x': allowed is a whole number\n")


def test_ends_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def action() -> None:
            raise error

        return guarded(action)

    assert guarded(lambda: None) == 0
    assert fail(UserError("two\n lines")) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert fail(KeyboardInterrupt()) == 130
    assert fail(OSError(errno.ENOSPC, "No space left on device", "/out/x")) == 2
    assert "error: /out/x: No space left on device; make room" in capsys.readouterr().err
    for mistake_of_ours in (AssertionError("x"), ValueError("x"), OSError(errno.EIO, "x"), BrokenPipeError()):
        with pytest.raises(type(mistake_of_ours)):
            fail(mistake_of_ours)


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom t2i_adapter.exits import guarded\n"
         "sys.stdin.read()\nsys.exit(guarded(lambda: print('x' * 200000)))"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""


def test_interrupt_leaves_no_traceback(tmp_path: Path) -> None:
    code = "import os, signal, sys\nfrom t2i_adapter.exits import guarded\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    code += "sys.exit(guarded(lambda: os.kill(os.getpid(), signal.SIGINT)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_module_and_table_are_the_same_command() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{cli.PROG} {__version__}\n")
