"""The verb `export`: an adapter as another program takes it. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from t2i_adapter.errors import UserError
from t2i_adapter.files import output_folder, show_path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write an adapter as another program takes it, with what belongs beside it, and check what was written."""

    folder: Annotated[str, tyro.conf.Positional]
    """The adapter: its folder, or a hub id."""
    to: Literal["diffusers", "comfyui", "a1111", "invoke", "civitai", "space"]
    """The program: `comfyui` and `a1111` (Forge too) take one file, `invoke` (SD.Next too) and `diffusers` a folder,
    `civitai` a zip, and `space` is a page on the hub."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of the weights. None is fp16, and for `diffusers` and `invoke` fp32 with fp16 beside it."""
    out: str = "exports"
    """Folder for the result."""
    name: str | None = None
    """Name of the adapter, with which the files' names begin; None takes the folder's."""
    pictures: str | None = None
    """Folder that `generate` wrote: its pictures are shown. None takes the sample pictures of the run, if it has
    some."""
    license: str | None = None
    """Licence of the adapter, for example apache-2.0; None takes that of the adapter's card."""
    author: str | None = None
    """Who made the adapter, for the file's metadata."""
    base: str | None = None
    """The base that a Space loads, as a hub id; None takes the one of the adapter's training."""

    def __post_init__(self) -> None:
        if self.base is not None and self.to != "space":
            raise UserError(f"{self.base}: only --to space needs it; omit it.", option="base")


def run(options: ExportOptions) -> None:
    """Checks that the program reads the adapter correctly, writes the files, and prints their paths and places."""
    from t2i_adapter.export import programs, space
    from t2i_adapter.export.to_program import export, open_bundle

    bundle = open_bundle(
        options.folder,
        name=options.name,
        license=options.license,
        author=options.author,
        pictures=options.pictures,
    )
    programs.check(bundle.network, options.to)
    record = bundle.description.record
    found = programs.warnings(
        bundle.network, options.to, record.resolution if record else None, bundle.description.sampling
    )
    if options.to == "space":
        base = space.space_base(record.base if record else None, options.base)
        found += filter(None, [space.describe_base(base)])
    if options.to in ("comfyui", "civitai") and not bundle.samples:
        found.append("no pictures of the adapter were found; --pictures names a folder that `generate` wrote.")
    for line in found:
        print(f"warning: {line}", flush=True)
    for path in export(bundle, options.to, options.dtype, output_folder(options.out), options.base):
        print(show_path(path), flush=True)
    program = programs.PROGRAMS[options.to]
    multiple = programs.size_multiple(bundle.network)
    print(f"{program.title}: {program.place}. Pictures there need sides of multiples of {multiple} pixels.")
