"""The verb `push`: uploads a finished adapter's folder to the hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from t2i_adapter.config.tree import SECRET
from t2i_adapter.errors import UserError, register_secret
from t2i_adapter.files import user_path


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish an adapter on the hub: its weights, record, card and pictures, and no other file of its folder."""

    folder: str
    """Folder of the adapter, as training writes it."""
    model_id: str | None = None
    """Repository; None takes the folder's name under your account."""
    token: str | None = field(default=None, metadata={SECRET: True})
    """Access token with write permission; None uses the one of `hf auth login`. It is never written to a file."""
    private: bool = True
    """Make the repository private, if it does not exist yet."""
    license: str | None = None
    """Licence of the adapter for the card, for example apache-2.0; None leaves the card as it is."""
    evaluation: str | None = None
    """Folder that `evaluate` wrote: its numbers and its picture sheet are added to the card."""

    def __post_init__(self) -> None:
        register_secret(self.token)


def run(options: PushOptions) -> None:
    """Completes the card, checks the token and the repository, uploads, and prints the commit's address."""
    from t2i_adapter.export import hub
    from t2i_adapter.export.card import add_evaluation, name_repository, set_license, update_sampling
    from t2i_adapter.models.record import read_metadata

    folder = user_path(options.folder)
    if not folder.is_dir():
        raise UserError(f"{options.folder}: no such folder.", option="folder")
    if (record := read_metadata(folder)) is not None:
        update_sampling(folder, record.without_local_paths())
    if options.license:
        set_license(folder, options.license)
    if options.evaluation:
        add_evaluation(folder, options.evaluation)
    repo_id = hub.check_access(
        folder, model_id=options.model_id, token=options.token, private=options.private, place="push"
    )
    name_repository(folder, repo_id)
    print(hub.push(folder, repo_id, token=options.token))
