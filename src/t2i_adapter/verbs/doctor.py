"""The verb `doctor`: reads a data set once, tells what is wrong with it, and ends with 1 where there are errors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.formats import located
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.doctor.findings import find, skip_keys
from t2i_adapter.doctor.needs import Measured, find_needs, measure
from t2i_adapter.doctor.page import make_html
from t2i_adapter.doctor.report import Report, to_json, to_text
from t2i_adapter.doctor.row import Examiner
from t2i_adapter.doctor.scan import Scan, scan
from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic
from t2i_adapter.models.base import Base
from t2i_adapter.models.encoders import count_tokens
from t2i_adapter.models.open import open_base
from t2i_adapter.verbs.doctor_options import DoctorOptions

CUT_MULTIPLE = 8  # pixels: what the VAE makes one cell of


def run(options: DoctorOptions) -> None:
    """Prints what was found and writes the files asked for. Raises SystemExit(1) where there are errors."""
    # Rows that are at fault must not keep the data from being opened: each is told when it is read.
    data = replace(located(options.location, options.data), on_bad_sample="skip")
    if data.resolution % CUT_MULTIPLE:
        raise UserError(f"--data.resolution {data.resolution}: allowed are multiples of {CUT_MULTIPLE}")
    source = open_source(data, options.seed)
    stage = PairTransform.of(data, options.in_channels, source.annotate)
    base = open_base(options.base)
    report = look_over(source, stage, base, data, options)
    print(to_text(report))
    write(report, source, options)
    if report.count("error"):
        raise SystemExit(1)


def look_over(source: Source, stage: PairTransform, base: Base, data: DataOptions, options: DoctorOptions) -> Report:
    """Reads every row, and finds what is wrong and what a run takes."""
    started = time.monotonic()
    count = partial(count_tokens, base.tokenizers()[0])
    found = scan(Examiner(source, stage), count, data.caption_prefix, options.workers)
    seconds = time.monotonic() - started
    findings = find(found, data.resolution, lambda number: source[number].image)
    measured = _measure(found, source, stage, base, options.measure)
    needs = find_needs(found, base, data, stage.framing.count, measured)
    return Report(source.describe(), found, findings, needs, stage.framing, seconds)


def write(report: Report, source: Source, options: DoctorOptions) -> None:
    """The files that the options ask for."""
    if options.json:
        _write(options.json, json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if options.html:
        _write(options.html, make_html(report, source, options.seed))
    if options.skip_list:
        keys = skip_keys(report.scan, list(report.findings))
        _write(options.skip_list, "".join(f"{key}\n" for key in keys))
        print(f"{options.skip_list}: {len(keys)} rows; leave them out with --data.skip {options.skip_list}")


def _measure(found: Scan, source: Source, stage: PairTransform, base: Base, count: int) -> Measured | None:
    """Encodes the first few rows that can be read."""
    numbers: Sequence[Any] = np.flatnonzero(found.rows["is_read"])[:count].tolist()
    if not numbers:
        return None
    samples = [source[number] for number in numbers]
    crops = [stage.crop(sample, 0).image for sample in samples]
    return measure(base, crops, [sample.captions[0] for sample in samples])


def _write(file: Path, text: str) -> None:
    try:
        write_atomic(file, [text.encode()])
    except OSError as fault:
        raise UserError(f"{file}: cannot be written: {fault.strerror}") from fault
