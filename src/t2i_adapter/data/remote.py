"""Finds files by name, braces and globs, and reads remote ones: http(s), s3 (extra `[s3]`) and hf, through fsspec.

A request that fails for a passing reason is retried. `store.Store` keeps what is downloaded.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from t2i_adapter.data.addresses import Blob, expand, is_url, local_blob, local_path
from t2i_adapter.data.names import is_litter
from t2i_adapter.errors import UserError, first_line, has_login
from t2i_adapter.files import atomic_path

SCHEMES = ("http", "https", "s3", "hf")
PAUSES = (0.5, 2.0)
"""Seconds between tries of a request; there is one more try than pauses."""
_CONNECT_SECONDS, _READ_SECONDS = 20, 60
_THREADS = 16  # concurrent requests for sizes
_TRY_AGAIN, _MISSING = (408, 425, 429), (404, 410)  # HTTP statuses
_FOREIGN = ("aiohttp", "aiobotocore", "botocore", "httpx", "huggingface_hub", "fsspec", "s3fs")
_MARKS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "Content-MD5")

T = TypeVar("T")


def find(pattern: str) -> list[Blob]:
    """The files that `pattern` names, sorted within each glob: braces ({000..009}, {a,b}), then globs (*, ?, [...]).

    A local file with exactly this name comes first; http has no globs. Raises UserError if a name matches no file, or
    cannot be requested.
    """
    if not is_url(pattern) and local_path(pattern).is_file():
        return [local_blob(local_path(pattern))]
    with ThreadPoolExecutor(_THREADS) as pool:
        blobs = [blob for found in pool.map(_find, expand(pattern)) for blob in found]
    return list({blob.name: blob for blob in blobs}.values())


def _find(pattern: str) -> list[Blob]:
    is_glob = bool(re.search(r"[*?\[]", pattern)) and not pattern.startswith("http")
    if not is_url(pattern) or pattern.startswith("file://"):
        path = local_path(pattern)
        names = sorted(glob.glob(str(path), recursive=True)) if is_glob else [str(path)]  # noqa: PTH207 - any root
        found = [local_blob(Path(name)) for name in names]
    elif is_glob:
        found = find_all(pattern)
    else:
        found = [ask(pattern)]
    if not found:
        raise UserError(f"{pattern}: names no file.", option="data.location")
    return found


def find_all(url: str, inner_glob: str = "") -> list[Blob]:
    """The remote files that a glob matches, sorted, without litter (`names.is_litter`). Raises UserError.

    `inner_glob` is added to the URL's path, for an `hf` URL whose revision is quoted.
    """
    system, inner = _file_system(url)
    pattern = f"{inner}/{inner_glob}" if inner_glob else inner
    found = attempt(lambda: system.glob(pattern, detail=True), url)
    names = (name for name in sorted(found) if not is_litter(name.rpartition("/")[2]))
    return [_blob(system.unstrip_protocol(name), found[name]) for name in names]


def ask(url: str) -> Blob:
    """Size and stamp of a remote file. Raises UserError if it is missing or cannot be requested."""
    system, inner = _file_system(url)
    return _blob(url, attempt(lambda: system.info(inner), url))


def read_tail(blob: Blob, count: int) -> bytes:
    """The last `count` bytes of a remote file, or all of it if the server sends no ranges. Raises UserError."""
    system, inner = _file_system(blob.name)
    start = max(0, blob.size - count)
    return attempt(lambda: system.cat_file(inner, start=start, end=blob.size), blob.name)


def list_files(url: str) -> list[Blob]:
    """The files directly below an s3 address, sorted; none if there is no such folder. Raises UserError."""
    system, inner = _file_system(url)
    try:
        found = attempt(lambda: system.ls(inner, detail=True), url)
    except UserError as fault:
        if fault.kind != "missing":
            raise
        bucket = inner.partition("/")[0]
        attempt(lambda: system.ls(bucket), f"s3://{bucket}", "listed")  # an empty folder and no bucket are different
        return []
    files = {info["name"]: info for info in found if info.get("type") == "file"}
    return [_blob(system.unstrip_protocol(name), files[name]) for name in sorted(files)]


def read(url: str) -> bytes | None:
    """The content of a remote file; None if it is missing. Raises UserError."""
    system, inner = _file_system(url)
    try:
        return attempt(lambda: system.cat_file(inner), url)
    except UserError as fault:
        if fault.kind != "missing":
            raise
        return None


def write(url: str, data: bytes) -> None:
    """Creates or replaces a file on object storage. Raises UserError."""
    system, inner = _file_system(url)
    attempt(lambda: system.pipe_file(inner, data), url, "written")


def create(url: str, data: bytes) -> bool:
    """Creates a file on object storage; False if it exists. Raises UserError."""
    system, inner = _file_system(url)

    def put() -> bool:
        try:
            system.pipe_file(inner, data, mode="create")
        except FileExistsError:
            return False
        return True

    return attempt(put, url, "written")


def upload(path: Path, url: str) -> None:
    """Copies a file to object storage, where it appears whole or not at all. Raises UserError."""
    system, inner = _file_system(url)
    attempt(lambda: system.put_file(str(path), inner), url, "written")


def remove(url: str) -> None:
    """Deletes a file on object storage, if it exists. Raises UserError."""
    system, inner = _file_system(url)
    attempt(lambda: system.rm_file(inner), url, "deleted")


def download(blob: Blob, path: Path, most: int) -> None:
    """Writes a remote file to `path`, whole or not at all. Raises UserError, also after `most` bytes."""
    system, inner = _file_system(blob.name)

    def get() -> None:
        with atomic_path(path) as temporary:
            system.get_file(inner, str(temporary), callback=_bound(blob.name, most))
            size = temporary.stat().st_size
            if blob.size and size != blob.size:
                raise OSError(f"{size:,} bytes arrived of {blob.size:,}")

    attempt(get, blob.name)


def _bound(url: str, most: int) -> Any:
    """An fsspec callback that ends a transfer after `most` bytes: a server may send without end."""
    from fsspec.callbacks import Callback

    class Bound(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if self.value > most:
                raise UserError(f"{url}: sends more than {most:,} bytes, the most that is read.")

    return Bound()


def _blob(url: str, info: dict[str, Any]) -> Blob:
    size = int(info.get("size") or 0)
    mark = next((str(info[mark]) for mark in _MARKS if info.get(mark)), None)
    return Blob(url, size, None if mark is None else f"{url}\0{size}\0{mark}")


def attempt(function: Callable[[], T], url: str, what: str = "read") -> T:
    """The function's value. Retries after pauses if the error may pass. Raises UserError with the URL and the reason.

    what: what is done with the URL, for messages.

    File systems raise errors of the libraries below them; an error's module shows whether it is one of those.
    """
    for pause in (*PAUSES, None):
        try:
            return function()
        except UserError:
            raise
        except Exception as caught:
            fault = _cause(caught)
            if isinstance(fault, FileNotFoundError) or _status(fault) in _MISSING:
                missing = "no such file there." if what == "read" else "no such bucket. Create it, or name another one."
                raise UserError(f"{url}: {missing}", kind="missing") from None
            if not isinstance(fault, OSError | ValueError) and type(fault).__module__.partition(".")[0] not in _FOREIGN:
                raise
            if pause is None or not _may_pass(fault):
                tries = f"{len(PAUSES) + 1} tries" if pause is None else "1 try"
                refused = isinstance(fault, PermissionError) or _status(fault) == 403
                advice = "Check the address, the network and your credentials."
                if refused and url.startswith("s3://"):
                    advice = (
                        "The bucket refuses these credentials. Allow them to list the bucket and to read and write its "
                        "objects, or set other credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)."
                    )
                raise UserError(
                    f"{url}: cannot be {what} ({tries}): {first_line(fault).rstrip('.')}. {advice}"
                ) from fault
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _cause(fault: Exception) -> Exception:
    """The error behind a FileNotFoundError: fsspec raises one for every web server that fails to send a size."""
    cause = fault.__cause__
    is_web = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(fault, FileNotFoundError) and isinstance(cause, Exception) and is_web else fault


def _status(fault: Exception) -> int | None:
    """The HTTP status in an error of aiohttp, httpx or botocore; None if it has none."""
    response = getattr(fault, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(fault, "status", None) or getattr(response, "status_code", None)


def _may_pass(fault: Exception) -> bool:
    status = _status(fault)
    refused = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
    final = isinstance(fault, PermissionError | ValueError) or "Credentials" in type(fault).__name__
    return not refused and not final


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL's path in it. Always new: one made before a fork does not work."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url or has_login(url):
        raise UserError(
            f"{url}: addresses of this kind are not supported; allowed are {', '.join(SCHEMES)} and file, without a "
            "login."
        )
    try:
        import fsspec

        system = fsspec.filesystem(scheme, **_settings(scheme))
    except ImportError as fault:
        extra = "'sdxl-t2i-adapter[s3]'" if scheme == "s3" else "aiohttp"
        raise UserError(f"{url}: {scheme}:// needs a package that is not installed: pip install {extra}") from fault
    return system, system._strip_protocol(url)


def _start_anew() -> None:
    """Makes fsspec start its thread again in a forked process; versions up to 2025.3 wait forever for the parent's."""
    if asyn := sys.modules.get("fsspec.asyn"):
        asyn.reset_lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_anew)


def _settings(scheme: str) -> dict[str, Any]:
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return {"client_kwargs": {"trust_env": True, "timeout": timeout}, "use_listings_cache": False}
    if scheme == "s3":  # `attempt` retries
        waits = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "retries": {"max_attempts": 1}}
        return {"config_kwargs": waits, "use_listings_cache": False}
    return {"use_listings_cache": False}
