"""The verb `doctor`: reads a whole dataset once and reports what is wrong with it.

The exit code is 1 if there are errors. Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from t2i_adapter.config.tree import BaseOptions, DataOptions
from t2i_adapter.errors import UserError, require
from t2i_adapter.files import show_path
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.data.source import Source
    from t2i_adapter.doctor.report import Report

CELL = 8
"""Side in pixels of the square that the VAE encodes into one latent cell."""


@dataclass(frozen=True)
class DoctorOptions:
    """Read a whole dataset once and report what is wrong with it. The exit code is 1 if there are errors."""

    location: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DATA]")] = None
    """The dataset, which may also be written without --data."""
    data: DataOptions = field(default_factory=DataOptions)
    """How the dataset is read and cropped, as in training."""
    base: BaseOptions = field(default_factory=BaseOptions)
    """The base model: its tokenizer counts the captions' tokens, and its encoders are timed."""
    in_channels: Literal[1, 3] = 3
    """Channels of the adapter's condition; the size of the cache depends on them."""
    measure: int = 4
    """Rows that are encoded with the base to measure time and memory; 0 leaves both unmeasured."""
    workers: int | None = None
    """Processes that read rows; None starts one a core, 0 reads in the main process."""
    json: Path | None = None
    """File for all findings, as JSON."""
    html: Path | None = None
    """File for an HTML page with the worst rows and a random sample; it needs no network."""
    skip_list: Path | None = None
    """File for the keys of the rows to skip, one a line; --data.skip reads it."""
    seed: int = 0
    """Chooses the rows if --data.max_train_samples is set, and the page's random sample."""

    def __post_init__(self) -> None:
        for name in ("measure", "workers", "seed"):
            value = getattr(self, name)
            require(name, value is None or value >= 0, value, "allowed is 0 or more")
        if self.location and self.data.location:
            text = f"{self.data.location}: DATA ({self.location}) names the dataset already; remove one of them."
            raise UserError(text, option="data.location")
        if not self.location and not self.data.location:
            raise UserError("is required: a folder, manifest, shards or a hub id", option="data.location")
        for name in ("json", "html", "skip_list"):
            file = getattr(self, name)
            if file is not None and not file.parent.is_dir():
                raise UserError(f"{file}: the folder {file.parent} does not exist; create it first.", option=name)
            if file is not None and file.is_dir():
                raise UserError(f"{file}: is a folder; name a file.", option=name)


def run(options: DoctorOptions) -> None:
    """Prints the report and writes the files that the options name. Raises SystemExit(1) if there are errors."""
    preload("t2i_adapter.doctor.report")
    from t2i_adapter.data.pair import PairTransform
    from t2i_adapter.data.source import open_source
    from t2i_adapter.doctor.report import diagnose, to_text
    from t2i_adapter.models.open import open_base

    # "skip" lets a dataset with bad rows be opened: each bad row is reported when it is read.
    data = replace(options.data, location=options.location or options.data.location, on_bad_sample="skip")
    if data.resolution % CELL:
        raise UserError(f"{data.resolution}: allowed are multiples of {CELL}.", option="data.resolution")
    source = open_source(data, options.seed)
    transform = PairTransform.of(data, options.in_channels, source.annotate)
    base = open_base(options.base)
    report = diagnose(source, transform, base, data, timed_rows=options.measure, workers=options.workers)
    print(to_text(report))
    _write_files(report, source, options)
    if report.count("error"):
        raise SystemExit(1)


def _write_files(report: Report, source: Source, options: DoctorOptions) -> None:
    import json

    from t2i_adapter.doctor.findings import skip_keys
    from t2i_adapter.doctor.html import make_html
    from t2i_adapter.doctor.report import to_json

    if options.json:
        _write("json", options.json, json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if options.html:
        _write("html", options.html, make_html(report, source, options.seed))
    if options.skip_list:
        keys = skip_keys(report.scan, report.findings)
        _write("skip_list", options.skip_list, "".join(f"{key}\n" for key in keys))
        place = show_path(options.skip_list)
        print(f"{place}: {len(keys)} rows; to skip them, train with --data.skip {place}")


def _write(option: str, file: Path, text: str) -> None:
    from t2i_adapter.files import write_atomic

    try:
        write_atomic(file, [text.encode()])
    except OSError as fault:
        raise UserError(f"{file}: cannot be written: {fault.strerror}.", option=option) from fault
