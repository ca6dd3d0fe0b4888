"""The verb `push`: uploads a finished adapter, or a checkpoint of a run, to the hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_adapter.config.tree import SECRET, licence_of
from t2i_adapter.errors import UserError, flag, register_secret, require
from t2i_adapter.files import show_path, user_path

if TYPE_CHECKING:
    from t2i_adapter.export.release import Release


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish an adapter on the hub: its weights, record, card, pictures, numbers and recipe, and no other file."""

    folder: str
    """Folder of the adapter, as training writes it. Nothing in it is changed."""
    checkpoint: str | None = None
    """Publish this checkpoint of the folder's run, such as checkpoint-500; `best` is the one with the highest
    validation score."""
    model_id: str | None = None
    """Repository; None takes the folder's name under your account."""
    revision: str | None = None
    """Branch to commit to; it is created if it is missing. None is main."""
    pr: bool = False
    """Open a pull request to main, in a repository that exists; for repositories of others."""
    tag: str | None = None
    """Tag of the new commit, such as v1."""
    collection: str | None = None
    """Collection of the hub that the repository is added to, as in its address: ACCOUNT/TITLE-NUMBER."""
    message: str = "Add the adapter"
    """Title of the commit."""
    dry_run: bool = False
    """List the files with their bytes and stop. Nothing is sent, and no network is needed."""
    out: str | None = None
    """New folder to write the files into, as they are published, to look at them first."""
    token: str | None = field(default=None, metadata={SECRET: True})
    """Access token with write permission; None uses the one of `hf auth login`. It is never written to a file."""
    private: bool = True
    """Make the repository private, if it does not exist yet."""
    license: str | None = None
    """Licence of the adapter for the card, for example apache-2.0; None leaves the card as it is."""
    license_name: str | None = None
    """Name of a licence that the hub does not know, with --license other."""
    license_link: str | None = None
    """Address of that licence's text, with --license other."""
    evaluation: str | None = None
    """Folder that `evaluate` wrote for this adapter: its numbers and pictures are added to the card."""

    def __post_init__(self) -> None:
        register_secret(self.token)
        licence_of(self.license, self.license_name, self.license_link)
        require("message", bool(self.message.strip()), repr(self.message), "a title of one letter or more")
        for name in ("revision", "tag", "collection"):
            if self.pr and getattr(self, name):
                raise UserError(
                    f"{getattr(self, name)}: a pull request goes to main, without a tag or collection; omit this or "
                    f"{flag('pr')}",
                    option=name,
                )


def run(options: PushOptions) -> None:
    """Collects the files, lists or writes them, checks the token and the repository, uploads, and prints the
    address."""
    folder = user_path(options.folder)
    if not folder.is_dir():
        raise UserError(f"{options.folder}: no such folder.", option="folder")
    if options.checkpoint is None:
        return _push(options, folder, folder.resolve().name)
    from t2i_adapter.training.publish import save_checkpoint

    with tempfile.TemporaryDirectory(prefix="t2i-adapter-push-") as name:
        stage = Path(name) / folder.resolve().name
        save_checkpoint(folder, options.checkpoint, stage)
        return _push(options, stage, stage.name)


def _push(options: PushOptions, folder: Path, name: str) -> None:
    from t2i_adapter.export import hub
    from t2i_adapter.export.release import make_release, write_release

    licence = licence_of(options.license, options.license_name, options.license_link)
    repo_id, place = options.model_id or name, None
    release = make_release(folder, repo_id, licence=licence, evaluation=options.evaluation)  # before the hub is asked
    if not options.dry_run:
        place = hub.check_access(
            folder,
            model_id=options.model_id,
            token=options.token,
            private=options.private,
            place="push",
            revision=options.revision,
            is_pr=options.pr,
            tag=options.tag,
            collection=options.collection,
        )
        if place.repo_id != repo_id:
            release = make_release(folder, place.repo_id, licence=licence, evaluation=options.evaluation)
    for note in release.notes:
        print(note, flush=True)
    if options.out:
        write_release(release, options.out)
        print(show_path(options.out))
    if place is None:
        print(_describe(options, release, repo_id))
    else:
        print(hub.push(release, place, token=options.token, message=options.message))


def _describe(options: PushOptions, release: Release, repo_id: str) -> str:
    """The files and the commit that a push would send."""
    where = repo_id if "/" in repo_id else f"{repo_id} (under your account)"
    branch = "as a pull request to main" if options.pr else f"branch {options.revision or 'main'}"
    tag = f", tag {options.tag}" if options.tag else ""
    total = sum(file.size for file in release.files)
    width = len(f"{total:,}")
    rows = [f"  {file.size:>{width},}  {file.name}" for file in release.files]
    return "\n".join(
        [
            f'{where}, {branch}{tag}: "{options.message}"',
            *rows,
            f"  {total:>{width},}  bytes in {len(release.files)} files. Nothing was sent.",
        ]
    )
