"""What a command prints and returns when it fails: one line and an exit code for what the user can fix."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from t2i_adapter.errors import Stopped, UserError, redact

STDOUT = 1  # file descriptor


_MENDED_BY = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "make it writable"}
"""Faults of a disk that a person can mend, and how."""


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; turns what a person did, or can mend, into one line and an exit code."""
    # Or else it warns, each time it is imported, that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.excepthook = _show_traceback
    try:
        action()
        sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error))
    except Stopped as stop:
        print(stop, file=sys.stderr, end="\n" * bool(str(stop)))  # of several processes one tells
        return stop.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # what is still buffered goes nowhere
        return 141  # as a program that dies of SIGPIPE
    except OSError as error:
        if error.errno not in _MENDED_BY:
            raise
        place = error.filename or "the output folder"
        return _refuse(f"{place}: {error.strerror}; {_MENDED_BY[error.errno]}, or write elsewhere")
    return 0


def _show_traceback(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """As Python shows it, with what is secret taken out."""
    print(redact("".join(traceback.format_exception(kind, fault, trace))), end="", file=sys.stderr)


def _refuse(message: str) -> int:
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _reader_is_gone() -> bool:
    """Whether it is standard output's reader that went away, and not a pipe of our own."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
