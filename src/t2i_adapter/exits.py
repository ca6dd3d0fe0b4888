"""What a command prints and returns when it fails: one line and an exit code for what the user can fix.

Exit codes: 0 done, 2 an error that the user can fix, 130 interrupted, 141 the reader of the output is gone; a run that
is stopped has its own (`training/signals.py`). A mistake of ours keeps its traceback and Python's code 1.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from t2i_adapter.environment import set_defaults
from t2i_adapter.errors import Stopped, UserError, redact

_STDOUT, _STDERR = 1, 2  # file descriptors
_DISK_REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "make it writable"}
"""Disk errors that the user can fix -> what to do."""


def guarded(action: Callable[[], None], name: Callable[[str], str] = "--{}".format) -> int:
    """Runs `action` and returns the exit code. `name`: path of an option -> the flag that the user types for it."""
    set_defaults()
    sys.excepthook = _show_traceback
    _prepare_output()
    try:
        action()
        sys.stdout.flush()
    except UserError as error:
        return _refuse(error.message(name))
    except Stopped as stop:
        print(stop, file=sys.stderr, end="\n" * bool(str(stop)))  # only the main process has a message
        return stop.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone(_STDOUT) and not _reader_is_gone(_STDERR):
            raise
        discard_lost_output()
        return 141  # as a program that dies of SIGPIPE
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
            raise
        text = str(error).strip().splitlines()[0]
        return _refuse(f"out of memory: {text} Use smaller options, or a device with more memory")
    except OSError as error:
        if error.errno not in _DISK_REMEDIES:
            raise
        place = error.filename or "the output folder"
        return _refuse(f"{place}: {error.strerror}; {_DISK_REMEDIES[error.errno]}, or write elsewhere")
    return 0


def _show_traceback(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, with secrets removed."""
    print(redact("".join(traceback.format_exception(kind, fault, trace))), end="", file=sys.stderr)


def _prepare_output() -> None:
    """Makes printing work with any output: a letter that its encoding does not have is written as an escape, and what
    is printed to a closed output is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - never closed
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(message: str) -> int:
    with suppress(OSError):  # the code is returned even if nobody reads the line
        sys.stdout.flush()
    with suppress(OSError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def discard_lost_output() -> None:
    """Discards what is printed from here on, or is still buffered, if its reader or terminal is gone."""
    for output in (_STDOUT, _STDERR):
        if _reader_is_gone(output):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)


def _reader_is_gone(descriptor: int) -> bool:
    """Whether the reader of an output went away, and not the reader of a pipe of our own."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
