"""Options of publishing. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from t2i_adapter.config.tree import SECRET
from t2i_adapter.errors import register_secret


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Publish an adapter on the hub: its weights, record, card and pictures, and nothing else of its folder."""

    folder: str
    """Folder of the adapter, as training leaves it."""
    model_id: str | None = None
    """Repository; None takes the folder's name under your account."""
    token: str | None = field(default=None, metadata={SECRET: True})
    """Access token with write permission; None uses the one `hf auth login` keeps. It is never written anywhere."""
    private: bool = True
    """Make the repository private, where it is created."""
    license: str | None = None
    """Licence of the adapter, for the card, for example apache-2.0; None leaves the card as it is."""
    evaluation: str | None = None
    """Folder that `evaluate` wrote: its numbers and its picture sheet are put into the card."""

    def __post_init__(self) -> None:
        register_secret(self.token)
