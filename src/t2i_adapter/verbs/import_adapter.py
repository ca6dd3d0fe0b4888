"""The verb `import`: an adapter of other programs as a folder of this one. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import show_path, user_path

if TYPE_CHECKING:
    from diffusers import T2IAdapter

    from t2i_adapter.models.record import Metadata


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make a folder of diffusers from an adapter's file of other programs, also from the official files."""

    source: Annotated[str, tyro.conf.Positional]
    """The file (.safetensors, or .pth and its like, of which only tensors are read), or a folder that holds one."""
    out: str
    """Folder for the adapter; it must be new or empty."""
    kind: Literal["auto", "full_adapter_xl", "full_adapter", "light_adapter"] = "auto"
    """The adapter's kind; `auto` finds it by the names and shapes of the weights. SD 1.5 adapters with conditions of 4
    or 12 channels look like those of SDXL: name `full_adapter` for them."""
    base: str | None = None
    """The base of its training, for the record t2i_adapter.json: hub id or file. None takes the one in the file's
    metadata. Without either no record is written, and `generate` needs --base."""
    condition: str | None = None
    """Kind of its conditions, for the record: one of `t2i-adapter conditions`, options after commas."""
    resolution: int | None = None
    """Side in pixels of the training's pictures, for the record."""

    def __post_init__(self) -> None:
        if self.resolution is not None and not 1 <= self.resolution <= 8192:
            raise UserError(f"{self.resolution}: allowed is 1 to 8192 pixels.", option="resolution")


def run(options: ImportOptions) -> None:
    """Reads the adapter, writes its folder, and prints what it is."""
    from t2i_adapter.export.adapter import save_adapter

    target = user_path(options.out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{options.out}: exists and is not empty; name a new folder.", option="out")
    adapter, record = _read(_find(user_path(options.source)), options)
    record = _complete(record, options, adapter.config)
    save_adapter(adapter, target, metadata=record)
    sizes = adapter.config
    print(
        f"{sizes['adapter_type']}: conditions of {sizes['in_channels']} channels, features of "
        f"{', '.join(map(str, sizes['channels']))} channels, {sizes['num_res_blocks']} blocks a stage"
    )
    if record is None:
        print("Its base is not known, so no record was written; --base names it here, or later in `generate`.")
    print(show_path(target))


def _find(source: Path) -> Path:
    """Returns the file of weights, or a folder of diffusers. Raises UserError."""
    from t2i_adapter.export.weights_file import PICKLED
    from t2i_adapter.models.record import CONFIG, WEIGHTS

    if not source.is_dir() or ((source / CONFIG).is_file() and (source / WEIGHTS).is_file()):
        return source
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", *PICKLED))
    if len(files) != 1:
        names = ", ".join(path.name for path in files[:5]) or "none"
        raise UserError(f"{source}: the folder must hold one file of weights; found: {names}. Name the file.")
    return files[0]


def _read(source: Path, options: ImportOptions) -> tuple[T2IAdapter, Metadata | None]:
    """Returns the adapter in float32, and its record if it has one."""
    import torch

    from t2i_adapter.export.layouts import find_network, make_adapter
    from t2i_adapter.export.modelspec import read_record
    from t2i_adapter.export.weights_file import read_tensors
    from t2i_adapter.models.adapter import load_adapter
    from t2i_adapter.models.record import read_metadata

    kind = None if options.kind == "auto" else options.kind
    if source.is_dir():
        adapter = load_adapter(str(source))
        if kind not in (None, found := adapter.config["adapter_type"]):
            raise UserError(f"{kind}: {source}/config.json says {found}; omit the option.", option="kind")
        return adapter, read_metadata(source)
    tensors, metadata = read_tensors(source)
    try:
        network, names = find_network({name: tuple(tensor.shape) for name, tensor in tensors.items()}, kind)
    except UserError as fault:
        raise fault.within(str(source)) from None
    weights = {target: tensors[name].to(torch.float32) for name, target in names.items()}
    return make_adapter(network, weights), read_record(metadata, str(source))


def _complete(record: Metadata | None, options: ImportOptions, sizes: Any) -> Metadata | None:
    """Returns the record with what the options add; None if the base is not known. Raises UserError."""
    from dataclasses import replace

    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.models.record import Metadata

    if options.base is not None:
        record = replace(record or Metadata(base={}), base={"name": options.base})
    if record is None:
        given = {"condition": options.condition, "resolution": options.resolution}
        if named := next((name for name, value in given.items() if value is not None), None):
            raise UserError(
                f"is for the record, which needs the base: set {flag('base')} too, or omit {flag(named)}.",
                option=named,
            )
        return None
    condition = {**record.condition, "channels": sizes["in_channels"]}
    if options.condition is not None:
        condition = {**open_annotator(options.condition).record(), "channels": sizes["in_channels"]}
    return replace(record, condition=condition, resolution=options.resolution or record.resolution)
