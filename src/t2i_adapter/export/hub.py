"""Publishes an adapter on the hub: checks token and repository before a run, and uploads the files after it.

The access token goes to the hub's client only; it is removed from every message and written to no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from t2i_adapter.errors import UserError, flag, redact, register_secret
from t2i_adapter.export.release import Release
from t2i_adapter.files import show_command, user_path

READ_TIMEOUT = 100.0
"""Seconds without a byte before an attempt fails. The hub's client has no such limit itself; it makes six attempts."""


@dataclass(frozen=True)
class Place:
    """Where a commit goes. revision: a branch, None for main. is_pr: as a pull request to main. tag: of the commit.
    collection: the address's last part of a collection that the repository is added to."""

    repo_id: str
    revision: str | None = None
    is_pr: bool = False
    tag: str | None = None
    collection: str | None = None


def check_access(
    folder: str | Path,
    *,
    model_id: str | None,
    token: str | None,
    private: bool,
    place: str = flag("hub.push"),
    revision: str | None = None,
    is_pr: bool = False,
    tag: str | None = None,
    collection: str | None = None,
) -> Place:
    """Checks that the repository exists and is writable; creates it and the branch if they are missing.

    Args:
        folder: the adapter's folder; its name is the repository's if `model_id` is None.
        place: begins every message: the option or verb that needs the hub.
        is_pr: a pull request is to be opened, which needs a repository that exists and no right to write to it.

    Raises:
        UserError: if the token is missing or read-only, the hub refuses the name, the tag exists, the collection is
            missing, or the hub cannot be reached.
    """
    with hub_errors(place, token):
        api = HfApi(token=token)
        account = api.whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"{place}: the token is read-only; create one with write permission.")
        name = _full_id(model_id or user_path(folder).resolve().name, account["name"])
        if is_pr:
            _check_exists(api, name, place)
            return Place(name, is_pr=True)
        if collection:
            api.get_collection(collection)
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision or tag:
            refs = api.list_repo_refs(repo_id)
            if tag and tag in [ref.name for ref in refs.tags]:
                raise UserError(f"{tag}: {repo_id} has this tag already; name another one.", option="tag")
            if revision and revision not in [ref.name for ref in refs.branches]:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        return Place(repo_id, revision, False, tag, collection)


def push(release: Release, place: Place, *, token: str | None, message: str = "Add the adapter") -> str:
    """Uploads the files in one commit; returns the address of the commit, or of the pull request.

    Raises UserError if the upload fails; `push_command` returns the command that tries again.
    """
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in release.files]
    with hub_errors(f"Pushing to {place.repo_id}", token):
        api = HfApi(token=token)
        commit = api.create_commit(
            place.repo_id, operations, commit_message=message, revision=place.revision, create_pr=place.is_pr
        )
        if place.tag:
            api.create_tag(place.repo_id, tag=place.tag, revision=commit.oid)
        if place.collection:
            api.add_collection_item(place.collection, item_id=place.repo_id, item_type="model", exists_ok=True)
        return (commit.pr_url if place.is_pr else None) or commit.commit_url


def push_command(folder: str | Path, repo_id: str) -> str:
    """Returns the command that uploads the folder later."""
    return show_command("t2i-adapter", "push", "--folder", Path(folder), "--model_id", repo_id)


def _check_exists(api: HfApi, repo_id: str, place: str) -> None:
    try:
        api.model_info(repo_id)
    except RepositoryNotFoundError:
        raise UserError(
            f"{place}: {repo_id} does not exist, or is private, so no pull request can be opened to it. Push without "
            f"{flag('pr')} to create it."
        ) from None


def _full_id(name: str, account: str) -> str:
    return name if "/" in name else f"{account}/{name}"


@contextmanager
def hub_errors(place: str, token: str | None) -> Iterator[None]:
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
        text = f"{place}: the request to the hub failed ({type(fault).__name__}: {line[:300]})."
        raise UserError(" ".join(filter(None, [text, _advice(fault)]))) from None
    finally:
        client.timeout = before


def _advice(fault: Exception) -> str:
    """Returns what the user can do about an error of the hub."""
    if isinstance(fault, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE."
    if isinstance(fault, GatedRepoError):
        return "Accept the repository's conditions on its page, and log in with `hf auth login`."
    if isinstance(fault, RevisionNotFoundError):
        return "Name a branch, tag or commit of the repository."
    if isinstance(fault, RepositoryNotFoundError):
        return "Check the name; a private repository needs a token that may read it."
    if isinstance(fault, HFValidationError):
        return "A repository is named ACCOUNT/NAME, in letters, digits, - _ and dots."
    if isinstance(fault, ValueError):
        return ""
    status: Any = fault.response.status_code if isinstance(fault, HfHubHTTPError) else None
    if status == 401:
        return "Log in with `hf auth login`, or name a token that is valid."
    if status == 404:
        return "Check the name; what is private needs a token that may read it."
    if status == 403:
        return "The token has no right to do this: it needs write permission for this account or organisation."
    return "" if status is not None else "Check the connection, and try again."
