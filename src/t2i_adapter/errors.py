"""The one exception for what a person can mend, and what of any text may be shown."""

from __future__ import annotations

import os
import re

SECRET_NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
"""Variables of the environment whose values are never shown."""
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_SIGNATURE = re.compile(r"((?:https?|s3|hf)://[^\s?]*\?)[^\s'\"),;]+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORTEST = 6  # letters: hiding less would hide half of every text
_kept: set[str] = set()


def keep_secret(text: str | None) -> None:
    """Takes `text` out of everything that `public` is given from now on: each of its words, for clients quote them."""
    _kept.update(word for word in (text or "").split() if len(word) >= _SHORTEST)


def has_login(address: str) -> bool:
    """Whether an address holds a user's name or password: scheme://user:password@host/..."""
    return _LOGIN.search(address) is not None


def public(text: str) -> str:
    """`text` as it may be shown and logged.

    Secrets are "[secret]"; addresses lose their login, and what follows their question mark, where signatures stand;
    what steers a terminal or reverses the reading order is written as its escape.
    """
    _kept.update(word for name in SECRET_NAMES for word in os.environ.get(name, "").split() if len(word) >= _SHORTEST)
    for secret in sorted(_kept, key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    text = _SIGNATURE.sub(r"\1...", _LOGIN.sub("", text))
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Something the person who ran the command can mend: it becomes one clear line and exit code 2.

    The message says what was got, what is allowed, and what to do, naming the file, row, flag or column; what of it is
    secret is taken out here (`public`), wherever it came from and wherever it goes.
    A mistake of ours is an `assert` or any other exception, and keeps its traceback.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(public(str(message)))


class Stopped(BaseException):
    """A run ended before its last step because a signal or a time limit asked it to, and can go on from where it is.

    Not an Exception: what keeps a run alive through faults must not swallow it. `code` is the exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
