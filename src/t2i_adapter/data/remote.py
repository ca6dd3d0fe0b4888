"""Files elsewhere: found by glob and braces, fetched whole into a local folder of bounded size, and read from there.

Addresses are http(s), s3 (needs the extra `[s3]`) and hf, all through fsspec. A file is fetched once for all processes
of a machine: written aside, then renamed. What is used least recently goes first when the folder is full.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from t2i_adapter.errors import UserError, has_login
from t2i_adapter.files import user_path

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMES = ("http", "https", "s3", "hf")
PAUSES = (0.5, 2.0)
"""Seconds between tries of a remote read; one more try than there are pauses."""
FETCHED_BYTES = 64 * 2**30
"""What the folder of fetched files may hold."""
STALE_SECONDS = 86_400.0
"""Age at which a download that was never finished is taken for a killed process's."""
_CONNECT_SECONDS, _READ_SECONDS = 20, 60
_AT_ONCE = 16  # requests for sizes in flight
_SUM_BYTES = 4
_UNTOLD_BYTES = 2**30  # of a file whose size its server does not tell: a picture that a row names
_MAX_BRACES = 1_000_000
_TRY_AGAIN, _MISSING = (408, 425, 429), (404, 410)
_FOREIGN = ("aiohttp", "aiobotocore", "botocore", "httpx", "huggingface_hub", "fsspec", "s3fs")
_MARKS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "Content-MD5")

T = TypeVar("T")


@dataclass(frozen=True)
class Blob:
    """A file, local or remote.

    Attributes:
        name: its absolute path, or its URL.
        size: bytes; 0 where a server does not tell.
        stamp: changes when the file does; None where nothing tells.
    """

    name: str
    size: int
    stamp: str | None

    @property
    def is_remote(self) -> bool:
        return is_url(self.name)


def is_url(text: str) -> bool:
    return "://" in text


def base_name(text: str) -> str:
    """The last part of a path or URL, without what an address may have after its path."""
    path = re.split("[?#]", text, maxsplit=1)[0] if text.startswith(("http://", "https://")) else text
    return path.rpartition("/")[2]


def find(pattern: str, flag: str) -> list[Blob]:
    """The files that `pattern` names, sorted within each glob: braces ({000..009}, {a,b}), then globs (*, ?, [...]).

    A file of just that name goes first; http has no globs. Raises UserError where a name is of nothing, or cannot be
    asked for.
    """
    if not is_url(pattern) and local_path(pattern).is_file():
        return [local_blob(local_path(pattern), flag)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda one: _find(one, flag), expand(pattern))
        blobs = [blob for blobs in found for blob in blobs]
    return list({blob.name: blob for blob in blobs}.values())


def expand(pattern: str) -> list[str]:
    """Every name that the braces in `pattern` stand for; ranges keep leading zeros. Raises UserError past 1,000,000."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    spans = [_span(part) if inside % 2 else [part] for inside, part in enumerate(parts)]
    count = math.prod(map(len, spans))
    if not 1 <= count <= _MAX_BRACES:
        raise UserError(f"{pattern}: stands for {count:,} files; allowed are 1 to {_MAX_BRACES:,}.")
    choices = [
        _numbers(part, span) if isinstance(span, range) else span for part, span in zip(parts, spans, strict=True)
    ]
    return ["".join(names) for names in itertools.product(*choices)]


def _span(inside: str) -> Sequence[Any]:
    """What stands between braces: a range of numbers, or names between commas."""
    span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside)
    return range(int(span[1]), int(span[2]) + 1) if span else inside.split(",")


def _numbers(inside: str, span: range) -> list[str]:
    first = inside.partition("..")[0]
    return [str(number).zfill(len(first) if first.startswith("0") else 0) for number in span]


def _find(pattern: str, flag: str) -> list[Blob]:
    is_glob = bool(re.search(r"[*?\[]", pattern)) and not pattern.startswith("http")
    if not is_url(pattern) or pattern.startswith("file://"):
        return _find_local(pattern, flag, is_glob)
    if not is_glob:
        return [ask(pattern)]
    found = find_all(pattern)
    if not found:
        raise UserError(f"--{flag} {pattern}: names no file.")
    return found


def find_all(url: str, inner_glob: str = "") -> list[Blob]:
    """The remote files that a glob names, sorted; none where there are none. Raises UserError.

    `inner_glob` is added to the URL's path, for an `hf` URL whose revision is quoted.
    """
    system, inner = _file_system(url)
    pattern = f"{inner}/{inner_glob}" if inner_glob else inner
    found = attempt(lambda: system.glob(pattern, detail=True), url)
    return [_blob(system.unstrip_protocol(name), found[name]) for name in sorted(found)]


def _find_local(pattern: str, flag: str, is_glob: bool) -> list[Blob]:
    import glob

    path = local_path(pattern)
    names = sorted(glob.glob(str(path), recursive=True)) if is_glob else [str(path)]  # noqa: PTH207 - any root
    if not names:
        raise UserError(f"--{flag} {pattern}: names no file.")
    return [local_blob(Path(name), flag) for name in names]


def local_path(text: str) -> Path:
    """The file that a path or a file:// URL names."""
    if text.startswith("file://"):
        inner = re.split("[?#]", text, maxsplit=1)[0].removeprefix("file://")
        text = unquote("/" + inner.partition("/")[2])
    try:
        return user_path(text).absolute()
    except RuntimeError:  # ~NAME of nobody here
        return Path(text).absolute()


def local_blob(path: Path, flag: str) -> Blob:
    """Raises UserError where there is no such file."""
    try:
        state = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise UserError(f"--{flag} {path}: no such file.") from None
    return Blob(str(path), state.st_size, file_stamp(str(path), state))


def file_stamp(path: str, state: os.stat_result) -> str:
    return f"{path}\0{state.st_size}\0{state.st_mtime_ns}"


def ask(url: str) -> Blob:
    """Size and state of a remote file. Raises UserError naming the URL where it is not there or cannot be asked for."""
    system, inner = _file_system(url)
    return _blob(url, attempt(lambda: system.info(inner), url))


def read_tail(blob: Blob, count: int) -> bytes:
    """At least the last `count` bytes of a remote file: all of it from servers that send no part. Raises UserError."""
    system, inner = _file_system(blob.name)
    start = max(0, blob.size - count)
    return attempt(lambda: system.cat_file(inner, start=start, end=blob.size), blob.name)


def _blob(url: str, info: dict[str, Any]) -> Blob:
    size = int(info.get("size") or 0)
    mark = next((str(info[mark]) for mark in _MARKS if info.get(mark)), None)
    return Blob(url, size, None if mark is None else f"{url}\0{size}\0{mark}")


def attempt(function: Callable[[], T], url: str) -> T:
    """The function's value, tried again after pauses where the fault may pass. Raises UserError naming the URL and why.

    File systems raise the faults of the libraries below them: those are told by the package they come from.
    """
    for pause in (*PAUSES, None):
        try:
            return function()
        except UserError:
            raise
        except Exception as caught:
            fault = _cause(caught)
            if isinstance(fault, FileNotFoundError) or _status(fault) in _MISSING:
                raise UserError(f"{url}: no such file there.", kind="missing") from None
            if not isinstance(fault, OSError | ValueError) and type(fault).__module__.partition(".")[0] not in _FOREIGN:
                raise
            if pause is None or not _may_pass(fault):
                tries = f"{len(PAUSES) + 1} tries" if pause is None else "1 try"
                raise UserError(
                    f"{url}: cannot be read ({tries}): {_reason(fault)}. "
                    "Look at the address, the network and your credentials."
                ) from fault
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _cause(fault: Exception) -> Exception:
    """What is behind a missing file: fsspec says so of every web server that cannot be asked for a size."""
    cause = fault.__cause__
    is_web = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(fault, FileNotFoundError) and isinstance(cause, Exception) and is_web else fault


def _status(fault: Exception) -> int | None:
    """HTTP's status, as aiohttp, httpx and botocore have it."""
    response = getattr(fault, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(fault, "status", None) or getattr(response, "status_code", None)


def _may_pass(fault: Exception) -> bool:
    status = _status(fault)
    refused = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
    final = isinstance(fault, PermissionError | ValueError) or "Credentials" in type(fault).__name__
    return not refused and not final


def _reason(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return (lines[0] if lines else type(fault).__name__).rstrip(".")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL as it names things. Made anew: one made before a fork is of no use."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url or has_login(url):
        raise UserError(
            f"{url}: addresses of this kind are not read; allowed are {', '.join(SCHEMES)} and file, without a login."
        )
    try:
        import fsspec

        system = fsspec.filesystem(scheme, **_settings(scheme))
    except ImportError as fault:
        extra = "'sdxl-t2i-adapter[s3]'" if scheme == "s3" else "aiohttp"
        raise UserError(f"{url}: {scheme}:// needs a package that is not here: pip install {extra}") from fault
    return system, system._strip_protocol(url)


def _settings(scheme: str) -> dict[str, Any]:
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return {"client_kwargs": {"trust_env": True, "timeout": timeout}, "use_listings_cache": False}
    if scheme == "s3":
        waits = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "retries": {"max_attempts": 1}}
        return {"config_kwargs": waits, "use_listings_cache": False}
    return {"use_listings_cache": False}


class Store:
    """The local folder of fetched files and kept indices, under the cache's root; made when first written to."""

    def __init__(self, root: Path, limit: int = FETCHED_BYTES) -> None:
        self._fetched = root / "fetched"
        self._indices = root / "indices"
        self._limit = limit

    def local(self, blob: Blob) -> Path:
        """Where the file can be read: in place, or fetched. Raises UserError naming the URL where it cannot be."""
        if not blob.is_remote:
            return Path(blob.name)
        path = self.place(blob)
        if not _touch(path):
            with self._alone(path.name):
                if not _touch(path):
                    self._fetch(blob, path)
        return path

    def place(self, blob: Blob) -> Path:
        """Where a remote file lies once it is fetched."""
        name = hashlib.sha256((blob.stamp or blob.name).encode()).hexdigest()[:40]
        return self._fetched / name

    def index(self, key: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table that `make` gave for `key`, made once and kept."""
        import pyarrow as pa

        path = self._indices / (hashlib.sha256(key.encode()).hexdigest()[:40] + ".arrow")
        with suppress(OSError):
            content = memoryview(path.read_bytes())
            if content[:_SUM_BYTES] == _sum(content[_SUM_BYTES:]):
                return pa.ipc.open_file(pa.py_buffer(content[_SUM_BYTES:])).read_all()
        table = make()
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        _make_folder(self._indices)
        with _aside(path) as aside:
            aside.write_bytes(_sum(sink.getbuffer()) + sink.getbuffer())
        return table

    def _fetch(self, blob: Blob, path: Path) -> None:
        system, inner = _file_system(blob.name)
        self._make_room(blob.size)
        most = blob.size or min(self._limit, _UNTOLD_BYTES)

        def get() -> None:
            with _aside(path) as aside:
                system.get_file(inner, str(aside), callback=_bound(blob.name, most))
                if blob.size and aside.stat().st_size != blob.size:
                    raise OSError(f"{aside.stat().st_size:,} bytes arrived of {blob.size:,}")

        attempt(get, blob.name)

    def _make_room(self, need: int) -> None:
        """Deletes what was used least recently until `need` more bytes fit the limit, and the disk."""
        _make_folder(self._fetched)
        held = list(_held(self._fetched))
        total, free = sum(state.st_size for state, _ in held), shutil.disk_usage(self._fetched).free
        for state, path in sorted(held, key=lambda one: one[0].st_atime):
            is_dead = path.suffix == ".part" and time.time() - state.st_mtime > STALE_SECONDS
            if is_dead or (path.suffix != ".part" and (total + need > self._limit or need > free)):
                path.unlink(missing_ok=True)
                total, free = total - state.st_size, free + state.st_size
        if need > free:
            raise UserError(
                f"--data.prepared_dir {self._fetched}: a remote file of {need / 1e9:.1f} GB is to be kept here and "
                f"{free / 1e9:.1f} GB are free. Make room, or name a folder on another disk."
            )

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One thread of one process fetches a file; the others wait for it."""
        _make_folder(self._fetched)
        with (self._fetched / f".lock-{name[:2]}").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _bound(url: str, most: int) -> Any:
    """Stops a transfer of more than `most` bytes: a server need not ever come to an end."""
    from fsspec.callbacks import Callback

    class Bound(Callback):
        def call(self, *_: Any, **__: Any) -> None:
            if self.value > most:
                raise UserError(f"{url}: sends more than {most:,} bytes; it is not read.")

    return Bound()


def _sum(data: Any) -> bytes:
    """Tells a damaged index: arrow itself would read other numbers from it."""
    return zlib.crc32(data).to_bytes(_SUM_BYTES, "little")


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` when the block ends well."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _held(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """The files of a folder in which others write: one that is renamed while we look is left out."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            with suppress(FileNotFoundError):
                yield path.stat(), path


def _touch(path: Path) -> bool:
    """Notes that a fetched file is used, which is its time of access; False where it is not there."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(
            f"--data.prepared_dir: {folder} cannot be made ({fault.strerror}). Name a folder that can be written."
        ) from fault
