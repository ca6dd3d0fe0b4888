"""Reads and checks `t2i_adapter.json`, the record of an adapter's training that lies beside its weights.

It also names the files of an adapter's folder. Importing this module loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, user_path, write_atomic
from t2i_adapter.types import CHUNK_TOKENS, MaxTokens

FILE_NAME = "t2i_adapter.json"
"""The record's file in an adapter's folder."""
CONFIG = "config.json"
"""The network's sizes, as diffusers reads them."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The weights in fp32, as diffusers reads them."""
WEIGHTS_FP16 = "diffusion_pytorch_model.fp16.safetensors"
"""The weights in fp16, as diffusers reads them with variant="fp16"."""
SCHEMA = 1
MAX_RESOLUTION = 8192
BASE_FIELDS = ("name", "config", "revision", "variant", "vae")


@dataclass(frozen=True)
class Metadata:
    """The contents of t2i_adapter.json.

    Attributes:
        base: the frozen model of the training: {name, config, revision, variant, vae, family}; only `name` is
            required. No family stands for SDXL; "sd" is Stable Diffusion 1 or 2.
        condition: the condition pictures: {channels, name, options, polarity, ...} as far as known.
        resolution: side in pixels of the training crops.
        data: the dataset.
        optim: summary of the optimiser's options.
        training: summary of the other options.
        steps: number of updates.
        seed: the run's seed.
        versions: versions of the libraries.
        sampling: recommended options of sampling ({scale, guidance, ...}), which `generate` takes by default, and under
            "from" the measurement that recommends them.
    """

    base: Mapping[str, Any]
    condition: Mapping[str, Any] = field(default_factory=dict)
    resolution: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Any, where: str = FILE_NAME) -> Metadata:
        """Builds the record from parsed JSON. Raises UserError, with `where` and the key, if a value is malformed."""
        content = _checked(data, where, "the content", dict)
        if content.get("schema", SCHEMA) != SCHEMA:
            raise UserError(f"{where}: schema {content['schema']!r}; this version reads schema {SCHEMA}.")
        known = {"schema", *cls.__dataclass_fields__}
        if unknown := sorted(set(content) - known):
            raise UserError(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(known))}.")
        record = cls(
            base=_checked_base(content.get("base"), where),
            **{key: _checked(content.get(key, {}), where, key, dict) for key in _MAPPINGS},
            **{key: _checked(content.get(key), where, key, int, optional=True) for key in _NUMBERS},
        )
        if record.resolution is not None and not 1 <= record.resolution <= MAX_RESOLUTION:
            raise UserError(f"{where}: resolution is {record.resolution}; allowed is 1 to {MAX_RESOLUTION} pixels.")
        tokens = record.max_tokens
        if not isinstance(tokens, int) or tokens not in get_args(MaxTokens):
            known = ", ".join(map(str, get_args(MaxTokens)))
            raise UserError(f"{where}: training.max_tokens is {tokens!r}; allowed are {known}.")
        return record

    @property
    def max_tokens(self) -> MaxTokens:
        """Tokens of a caption that the training read; 75 in a record that does not have it."""
        return self.training.get("max_tokens", CHUNK_TOKENS)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, from which `from_dict` makes an equal record.

        A record that recommends no options of sampling has no such key, so that earlier versions read it.
        """
        content = {"schema": SCHEMA, **asdict(self)}
        return content if self.sampling else {key: value for key, value in content.items() if key != "sampling"}

    def without_local_paths(self) -> Metadata:
        """Returns the record as it is uploaded: with local paths shortened to their last part."""
        return replace(self, **{key: _without_paths(getattr(self, key)) for key in ("base", *_MAPPINGS)})


_MAPPINGS = ("condition", "data", "optim", "training", "versions", "sampling")
_NUMBERS = ("resolution", "steps", "seed")


def read_metadata(adapter: str | Path) -> Metadata | None:
    """Reads the record from an adapter's folder or hub repository; None if it has none, as adapters of other trainers.

    Raises UserError if the file is malformed.
    """
    folder = user_path(adapter)
    path = folder / FILE_NAME if folder.is_dir() else _from_hub(str(adapter))
    if path is None or not path.is_file():
        return None
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path} cannot be read as JSON: {fault}.") from fault
    return Metadata.from_dict(data, str(path))


def write_sampling(folder: Path, sampling: Mapping[str, Any]) -> Metadata:
    """Puts recommended options of sampling into the record of an adapter's folder, in place of earlier ones.

    Returns the new record. Raises UserError if the record is missing or malformed, or cannot be written.
    """
    path = folder / FILE_NAME
    record = read_metadata(folder)
    if record is None:
        raise UserError(f"{folder}: there is no {FILE_NAME} to write the recommended options into.")
    record = replace(record, sampling=sampling)
    text = json.dumps(record.to_dict(), indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomic(path, [text.encode()])
    except OSError as fault:
        raise UserError(f"{path}: the recommended options cannot be written ({fault.strerror}).") from fault
    return record


def describe_measurement(sampling: Mapping[str, Any]) -> str | None:
    """Returns a sentence about the measurement that recommends a record's options, for the card; None without one."""
    found = sampling.get("from")
    if not isinstance(found, Mapping):
        return None
    numbers = [found.get(key) for key in ("recommended", "default", "pairs")]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    return (
        f"On {found['pairs']} held-out pairs that took no part in the choice, {found.get('metric')} is "
        f"{found['recommended']:.3f} with these values and {found['default']:.3f} with the default point."
    )


def _from_hub(name: str) -> Path | None:
    """Downloads the record of an adapter on the hub; None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, FILE_NAME))
    except (OSError, HfHubHTTPError, HFValidationError):
        return None  # loading the adapter reports it if the repository does not exist


def is_path(name: str) -> bool:
    """Whether the name of a base, VAE or dataset is a local path or an address, not a hub id."""
    return name.startswith((".", "~", "/", "\\")) or ":" in name or Path(name).exists() or name.count("/") > 1


def _checked_base(value: Any, where: str) -> dict[str, Any]:
    """Returns the record's `base` if its fields have the right types. Raises UserError."""
    base = _checked(value, where, "base", dict)
    _checked(base.get("name"), where, "base.name", str)
    for key in (*BASE_FIELDS[1:], "family"):
        _checked(base.get(key), where, f"base.{key}", str, optional=True)
    return base


def _checked(value: Any, where: str, key: str, kind: type, *, optional: bool = False) -> Any:
    """Returns the value if it is of type `kind` (or None, if `optional`). Raises UserError."""
    if (optional and value is None) or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    allowed = {dict: "an object", str: "a text", int: "a whole number"}[kind]
    raise UserError(f"{where}: {key} is {value!r}; it must be {allowed}.")


def _without_paths(value: Any) -> Any:
    """Shortens every local path and address in nested JSON to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or not is_path(value):
        return value
    return Path(value.partition("?")[0] if "://" in value else value).name  # what follows "?" may be a signature
