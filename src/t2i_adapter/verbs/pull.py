"""The verb `pull`: downloads an adapter from the hub, checks it, and says what it is and how to use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from t2i_adapter.config.tree import SECRET
from t2i_adapter.errors import UserError, redact, register_secret
from t2i_adapter.files import show_command, show_path, user_path
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.export.pull import Pulled


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """Download an adapter from the hub: its config, safetensors, record, card and pictures. Pickled files never."""

    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")]
    """Repository on the hub, ACCOUNT/NAME."""
    revision: str | None = None
    """Branch, tag or commit; None is main."""
    out: str | None = None
    """New or empty folder; None takes the repository's name."""
    token: str | None = field(default=None, metadata={SECRET: True})
    """Access token, for private and gated repositories; None uses the one of `hf auth login`."""

    def __post_init__(self) -> None:
        register_secret(self.token)
        if not self.repository.rpartition("/")[2].strip("./"):
            raise UserError(f"{self.repository!r}: name a repository of the hub as ACCOUNT/NAME")


def run(options: PullOptions) -> None:
    """Downloads the adapter and prints what it is."""
    preload("t2i_adapter.export.pull")
    from t2i_adapter.export.pull import pull

    out = user_path(options.out or options.repository.rpartition("/")[2])
    pulled = pull(options.repository, out, revision=options.revision, token=options.token)
    print(redact("\n".join(describe(pulled, out))))


def describe(pulled: Pulled, out: Path) -> list[str]:
    """Lines that say what the adapter is, and the command that uses it."""
    from t2i_adapter.annotators.registry import kinds

    config, metadata = pulled.config, pulled.metadata
    kind = "SDXL" if config.get("adapter_type") == "full_adapter_xl" else "Stable Diffusion 1 or 2"
    channels = config.get("in_channels", 3)
    rows: dict[str, Any] = {
        "adapter": f"{config.get('adapter_type', 'full_adapter')} for {kind}, {pulled.parameters:,} parameters",
        "commit": pulled.commit,
    }
    condition: dict[str, Any] = dict(metadata.condition) if metadata else {}
    if metadata:
        rows["base"] = metadata.base["name"]
        rows["trained"] = f"at {metadata.resolution} px, {metadata.steps} updates"
        rows["sampling"] = ", ".join(f"{k} {v}" for k, v in metadata.sampling.items() if k != "from") or "plain values"
    name, polarity = condition.get("name"), condition.get("polarity")
    options = condition.get("options")
    settings = ", ".join(f"{key} {value}" for key, value in options.items()) if isinstance(options, dict) else ""
    words = [str(name) if name else "not recorded", settings, "" if polarity in (None, "none") else str(polarity)]
    rows["condition"] = "; ".join([*filter(None, words), f"{channels} channel{'s' if channels != 1 else ''}"])
    lines = [f"{show_path(out)}: {len(pulled.files)} files"]
    lines += [f"  {label:<11}{value}" for label, value in rows.items()]
    if pulled.skipped:
        lines.append(f"  not downloaded: {len(pulled.skipped)} pickled files, such as {pulled.skipped[0]}")
    picture = ["--photo", "PHOTO.png"] if name in kinds() else ["--image", "CONDITION.png"]
    base = [] if metadata else ["--base", "BASE"]
    words = ["t2i-adapter", "generate", "--adapter", out, *base, "--prompt", "PROMPT", *picture]
    return [*lines, "Use it:", f"  {show_command(*words)}"]
