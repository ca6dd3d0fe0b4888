"""Options of the verb `studio`. Importing this module loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from t2i_adapter.errors import require

PORT = 8620


@dataclass(frozen=True)
class StudioOptions:
    """Where the studio works, and who can reach it."""

    root: Annotated[str, tyro.conf.Positional] = "."
    """Folder that the studio works in: data, runs and adapters that it shows lie in it, and nothing outside it is read
    or written."""
    runs: str = "runs"
    """Folder in the root that new runs are written to."""
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --expose."""
    port: int = PORT
    """Port to listen on; 0 takes a free one."""
    expose: bool = False
    """Allow a --host that other machines reach. Traffic is not encrypted: an ssh tunnel is safer."""
    host_name: tuple[str, ...] = ()
    """Names by which browsers may call this server, besides localhost: those of a proxy."""
    open_browser: bool = True
    """Open the page in a browser, if this machine has a screen."""
    link: bool = False
    """Print a new link for the studio that runs in this root, and exit. A link can be used once."""
    read_only: bool = False
    """With --link: the link only shows; who opens it can start and change nothing."""

    def __post_init__(self) -> None:
        require("port", 0 <= self.port < 65536, self.port, "allowed is 0 to 65535")
