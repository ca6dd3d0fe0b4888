"""The hub: checked before a run, fed after it. The token is handed to the hub's client and appears nowhere else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import get_session

from t2i_adapter.errors import UserError, redact, register_secret
from t2i_adapter.export.card import CARD, PICTURE_NAME, PICTURES
from t2i_adapter.files import user_path
from t2i_adapter.models.record import CONFIG, FILE_NAME, WEIGHTS, WEIGHTS_FP16, read_metadata

PATIENCE = 100.0
"""Seconds without a byte after which an attempt is given up, of the client's six; it would wait for ever."""
FILES = (CONFIG, WEIGHTS, WEIGHTS_FP16, CARD)


def check_access(
    folder: str | Path, *, model_id: str | None, token: str | None, private: bool, asked_by: str = "--push_to_hub"
) -> str:
    """Makes sure that the repository is there and can be written to, making it if it is not; returns its id.

    Args:
        folder: the adapter's folder; its name names the repository where `model_id` is None.
        asked_by: the flag or verb that messages name.

    Raises:
        UserError: no token, a token that may only read, a name the hub refuses, or no hub in reach.
    """
    with _asking_the_hub(asked_by, token):
        api = HfApi(token=token)
        account = api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"{asked_by}: the token may only read; make one that may write.")
        name = model_id or user_path(folder).resolve().name
        return api.create_repo(_full_id(name, account["name"]), private=private, exist_ok=True).repo_id


def push(folder: str | Path, repo_id: str, *, token: str | None, message: str = "Add the adapter") -> str:
    """Uploads the adapter, its record, its card and its pictures in one commit; returns the commit's address.

    Nothing else of the folder is uploaded. Raises UserError if the hub does not take it; nothing here is lost then,
    and `push_command` is the line that tries again.
    """
    operations = list(_operations(Path(folder)))
    with _asking_the_hub(f"Pushing to {repo_id}", token):
        commit = HfApi(token=token).create_commit(repo_id, operations, commit_message=message)
        return commit.commit_url


def push_command(folder: str | Path, repo_id: str) -> str:
    """The command that uploads the folder later."""
    return shlex.join(["t2i-adapter", "push", "--folder", str(folder), "--model_id", repo_id])


def _operations(folder: Path) -> Iterator[CommitOperationAdd]:
    metadata = read_metadata(folder)
    if metadata is None or not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: there is no finished adapter ({CONFIG}, {WEIGHTS}, {FILE_NAME}).")
    for name in FILES:
        if (folder / name).is_file():
            yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=_own(folder / name))
    record = json.dumps(metadata.without_local_paths().to_dict(), indent=2, ensure_ascii=False) + "\n"
    yield CommitOperationAdd(path_in_repo=FILE_NAME, path_or_fileobj=record.encode())
    for picture in sorted((folder / PICTURES).glob("*")):
        if PICTURE_NAME.fullmatch(picture.name) and picture.is_file():
            yield CommitOperationAdd(path_in_repo=f"{PICTURES}/{picture.name}", path_or_fileobj=_own(picture))


def _own(path: Path) -> Path:
    """A link in a folder that came from elsewhere could name any file of this machine."""
    if path.is_symlink() or path.parent.is_symlink():
        raise UserError(f"{path}: is a link, and what it leads to is not uploaded: put the file itself in its place.")
    return path


def _full_id(name: str, account: str) -> str:
    return name if "/" in name else f"{account}/{name}"


@contextmanager
def _asking_the_hub(what: str, token: str | None) -> Iterator[None]:
    """Any fault of the hub or the way to it becomes a UserError of one line, without the token, which clients quote.

    All exceptions are taken: the client lets those of its HTTP library through, which differ between its versions,
    and a failed upload must never end a run in another way than this.
    """
    register_secret(token)
    register_secret(get_token())
    client = get_session()
    before, client.timeout = client.timeout, PATIENCE
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        line = " ".join(redact(str(fault)).split())
        raise UserError(f"{what}: the hub does not take it ({type(fault).__name__}: {line[:300]}).") from None
    finally:
        client.timeout = before
