"""Publishes an adapter on the hub: checks token and repository before a run, and uploads the files after it.

The access token goes to the hub's client only; it is removed from every message and written to no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import get_session

from t2i_adapter.errors import UserError, flag, redact, register_secret
from t2i_adapter.export.card import CARD, PICTURE_NAME, PICTURES
from t2i_adapter.files import show_command, user_path
from t2i_adapter.models.record import CONFIG, FILE_NAME, WEIGHTS, WEIGHTS_FP16, read_metadata

READ_TIMEOUT = 100.0
"""Seconds without a byte before an attempt fails. The hub's client has no such limit itself; it makes six attempts."""
FILES = (CONFIG, WEIGHTS, WEIGHTS_FP16, CARD)


def check_access(
    folder: str | Path, *, model_id: str | None, token: str | None, private: bool, place: str = flag("hub.push")
) -> str:
    """Checks that the repository exists and is writable, and creates it if it is missing; returns its id.

    Args:
        folder: the adapter's folder; its name is the repository's if `model_id` is None.
        place: begins every message: the option or verb that needs the hub.

    Raises:
        UserError: if the token is missing or read-only, the hub refuses the name, or the hub cannot be reached.
    """
    with _hub_errors(place, token):
        api = HfApi(token=token)
        account = api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"{place}: the token is read-only; create one with write permission.")
        name = model_id or user_path(folder).resolve().name
        return api.create_repo(_full_id(name, account["name"]), private=private, exist_ok=True).repo_id


def push(folder: str | Path, repo_id: str, *, token: str | None, message: str = "Add the adapter") -> str:
    """Uploads the adapter, its record, its card and its pictures in one commit; returns the commit's address.

    Other files of the folder are not uploaded. Raises UserError if the upload fails; the local files are unchanged
    then, and `push_command` returns the command that tries again.
    """
    operations = list(_operations(Path(folder)))
    with _hub_errors(f"Pushing to {repo_id}", token):
        commit = HfApi(token=token).create_commit(repo_id, operations, commit_message=message)
        return commit.commit_url


def push_command(folder: str | Path, repo_id: str) -> str:
    """Returns the command that uploads the folder later."""
    return show_command("t2i-adapter", "push", "--folder", Path(folder), "--model_id", repo_id)


def _operations(folder: Path) -> Iterator[CommitOperationAdd]:
    metadata = read_metadata(folder)
    if metadata is None or not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no finished adapter found; its files are {CONFIG}, {WEIGHTS} and {FILE_NAME}.")
    for name in FILES:
        if (folder / name).is_file():
            yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=_no_link(folder / name))
    record = json.dumps(metadata.without_local_paths().to_dict(), indent=2, ensure_ascii=False) + "\n"
    yield CommitOperationAdd(path_in_repo=FILE_NAME, path_or_fileobj=record.encode())
    for picture in sorted((folder / PICTURES).glob("*")):
        if PICTURE_NAME.fullmatch(picture.name) and picture.is_file():
            yield CommitOperationAdd(path_in_repo=f"{PICTURES}/{picture.name}", path_or_fileobj=_no_link(picture))


def _no_link(path: Path) -> Path:
    """Refuses links: in a folder from somebody else they could point to any file of this machine."""
    if path.is_symlink() or path.parent.is_symlink():
        raise UserError(f"{path}: is a link, and links are not uploaded; replace it by the file itself.")
    return path


def _full_id(name: str, account: str) -> str:
    return name if "/" in name else f"{account}/{name}"


@contextmanager
def _hub_errors(place: str, token: str | None) -> Iterator[None]:
    """Turns every error of the hub or the network into a UserError of one line, without the token.

    It catches all exceptions: the client passes on those of its HTTP library, which differ between versions, and a
    failed upload must not end a run with a traceback.
    """
    register_secret(token)
    register_secret(get_token())
    client = get_session()
    before, client.timeout = client.timeout, READ_TIMEOUT
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        line = " ".join(redact(str(fault)).split())
        raise UserError(f"{place}: the request to the hub failed ({type(fault).__name__}: {line[:300]}).") from None
    finally:
        client.timeout = before
