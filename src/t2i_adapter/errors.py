"""The one exception for errors that the user can fix, and the removal of secrets from every text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

SECRET_NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
"""Environment variables whose values are never printed."""
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_SIGNATURE = re.compile(r"((?:https?|s3|hf)://[^\s?]*\?)[^\s'\"),;]+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORTEST = 6  # letters; hiding shorter words would hide half of every text
_OPEN, _CLOSE = "\ue000", "\ue001"  # around the path of an option; private use characters, rare in any text
_FLAG = re.compile(f"{_OPEN}([a-z0-9_.]+){_CLOSE}")
_kept: set[str] = set()


def register_secret(text: str | None) -> None:
    """Makes `redact` hide each word of `text` from now on; error messages of clients quote single words."""
    _kept.update(word for word in (text or "").split() if len(word) >= _SHORTEST)


def has_login(address: str) -> bool:
    """Whether an address holds a user name or password: scheme://user:password@host/..."""
    return _LOGIN.search(address) is not None


def redact(text: str) -> str:
    """`text` as it may be printed and logged.

    Secrets become "[secret]". Addresses lose their login, and their query, which may hold a signature. Characters that
    control a terminal or reverse the reading order are written as escapes.
    """
    _kept.update(word for name in SECRET_NAMES for word in os.environ.get(name, "").split() if len(word) >= _SHORTEST)
    for secret in sorted(_kept, key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    text = _SIGNATURE.sub(r"\1...", _LOGIN.sub("", text))
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain_flag(option: str) -> str:
    """The flag of an option by its path: "--optim.lr". The dataset's location is written --data."""
    return "--data" if option == "data.location" else f"--{option}"


def flag(option: str) -> str:
    """Names an option inside the text of a `UserError`, by its path in the option tree: flag("optim.lr").

    The front door that prints the error replaces it by the flag that its users type (`UserError.message`).
    """
    return f"{_OPEN}{option}{_CLOSE}"


class UserError(Exception):
    """An error that the user can fix: the front door prints one line and exits with code 2.

    The text says what was got, what is allowed and what to do. Secrets are removed from it here (`redact`).
    A mistake of ours is an `assert` or another exception, and keeps its traceback.

    Attributes:
        option: path in the option tree of the option to change ("optim.lr"), or None. The printed line begins with it.
        kind: class of the error for programs, such as "aspect" or "missing_file"; "" if nobody needs it.
    """

    def __init__(self, text: object = "", *, option: str | None = None, kind: str = "") -> None:
        self.option, self.kind = option, kind
        self._line = redact(f"{flag(option)} {text}" if option else str(text))
        super().__init__(self.message())

    def message(self, name: Callable[[str], str] = plain_flag) -> str:
        """The line to print. `name`: path of an option -> the flag that this front door's users type."""
        return _FLAG.sub(lambda found: name(found[1]), self._line)

    def within(self, place: str) -> UserError:
        """A copy of this error with `place`, such as the name of a file, in front of its line."""
        outer = UserError(f"{place}: {self._line}", kind=self.kind)
        outer.option = self.option
        return outer


def require(option: str, ok: bool, got: object, allowed: str) -> None:
    """Raises UserError about the option at this path of the tree unless its value `got` is `ok`."""
    if not ok:
        raise UserError(f"{got}: {allowed}", option=option)


class Stopped(BaseException):
    """A run was stopped before its last update by a signal or a time limit, after it was saved; it can be resumed.

    It is not an Exception, so that code which keeps a run alive through failures does not swallow it. `code` is the
    exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(fault: Exception) -> str:
    return str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
