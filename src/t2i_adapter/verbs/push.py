"""The verb `push`: an adapter that is on the disk, to the hub."""

from __future__ import annotations

from t2i_adapter.errors import UserError
from t2i_adapter.export import hub
from t2i_adapter.export.card import add_evaluation, name_repository, set_license
from t2i_adapter.files import user_path
from t2i_adapter.verbs.push_options import PushOptions


def push(options: PushOptions) -> None:
    """Completes the card as asked, checks the way to the hub, uploads, and prints where it lies."""
    folder = user_path(options.folder)
    if not folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder.")
    if options.license:
        set_license(folder, options.license)
    if options.evaluation:
        add_evaluation(folder, options.evaluation)
    repo_id = hub.check_access(
        folder, model_id=options.model_id, token=options.token, private=options.private, asked_by="push"
    )
    name_repository(folder, repo_id)
    print(hub.push(folder, repo_id, token=options.token))
