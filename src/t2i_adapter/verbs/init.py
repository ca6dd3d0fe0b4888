"""The verb `init`: looks at a dataset and writes a commented recipe for it and for this machine's card.

Without any words on the command line it asks for what it needs; no other verb asks. Importing this module loads no
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from t2i_adapter.cards import GIB, card_bytes
from t2i_adapter.config.dataset import DatasetOptions
from t2i_adapter.config.tree import NANO, DataOptions
from t2i_adapter.errors import UserError, require
from t2i_adapter.files import show_path
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from t2i_adapter.data.source import Source

SDXL, SDXL_VAE = "stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix"
SDXL_SIZE = 1024
LOOKED_AT = 64
"""Rows of the quick look, chosen by seed 0."""
GLOBAL_BATCH = 16
_EPOCHS = 100
_STEPS = (2_000, 20_000)
"""Fewest and most updates of a recipe for SDXL; between them, 100 epochs."""


@dataclass(frozen=True, kw_only=True)
class InitOptions(DatasetOptions):
    """Look at a dataset and write a recipe that trains on it with this machine's card. Without words it asks."""

    location: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DATA]")] = None
    """The dataset, which may also be written without --data."""
    condition: str | None = None
    """Kind of condition to make from the pictures (`t2i-adapter conditions` lists them). None takes the condition
    pictures of the dataset, or canny if it has none."""
    base: str | None = None
    """Base model. None is SDXL on a GPU, and nano, the base inside the package, on a machine without one."""
    card: str | None = None
    """Card to write the recipe for: its memory, such as 24GB, or a name, such as "RTX 4090"; None is this machine's."""
    output_dir: str = "adapter"
    """Folder that the training writes to."""
    out: str = "recipe.yaml"
    """File of the recipe; an existing file is not replaced."""

    def __post_init__(self) -> None:
        require(
            "data", not (self.location and self.data), self.data, f"DATA ({self.location}) names the dataset already"
        )
        card_bytes(self.card)


def run(options: InitOptions) -> None:
    """Prints what the dataset holds, and writes the recipe. Raises UserError."""
    is_asking = options == InitOptions()
    options = replace(options, data=options.data or options.location, location=None)
    if is_asking:
        options = replace(options, data=_ask("Dataset (a folder of pictures, a manifest, shards or a hub id)"))
    file = Path(options.out)
    if file.exists():
        raise UserError(f"{options.out}: this file exists; name another one.", option="out")
    preload("t2i_adapter.doctor.report")
    data, source = open_data(options, is_asking)
    memory = card_bytes(options.card) if options.card else _memory()
    base = options.base or (SDXL if memory else NANO)
    data = replace(data, resolution=_native_size(base))
    print(source.describe())
    for line in quick_look(source, data):
        print(line)
    text = "".join(f"{line}\n" for line in recipe_lines(options, data, base, memory, len(source), source.describe()))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as fault:
        raise UserError(f"{options.out}: cannot be written ({fault.strerror}).", option="out") from fault
    card = options.card or (f"a card of {memory / GIB:.0f} GiB" if memory else "a CPU")
    print(f"{options.out}: a recipe for {card}. Train with:\n  t2i-adapter train --recipe {show_path(options.out)}")


def open_data(options: InitOptions, is_asking: bool) -> tuple[DataOptions, Source]:
    """Opens the dataset. Where it has no condition pictures or no captions, a choice is made and printed, or asked for.

    Raises UserError.
    """
    from t2i_adapter.annotators.registry import open_annotator
    from t2i_adapter.data.source import open_source

    data = options.dataset(condition=options.condition)
    if not data.location:
        raise UserError("is required: a folder of pictures, a manifest, shards or a hub id", option="data")
    for _ in range(3):
        try:
            source = open_source(data, seed=0)
            break
        except UserError as fault:
            if fault.kind == "caption" and data.captions == "auto":
                chosen = _choose("There are no captions. none, or filename (the pictures' names)", "none", is_asking)
                data = replace(data, captions=chosen)
            elif fault.kind == "no condition" and data.condition is None:
                chosen = _choose("There are no condition pictures. Kind to make of the pictures", "canny", is_asking)
                data = replace(data, condition=chosen)
            else:
                raise
    else:
        raise AssertionError("each choice is made once")
    if data.condition:
        open_annotator(data.condition)
    return data, source


def quick_look(source: Source, data: DataOptions) -> Iterator[str]:
    """Lines about what is wrong with the first rows of a dataset, as `doctor` writes them."""
    from t2i_adapter.config.tree import BaseOptions
    from t2i_adapter.data.pair import PairTransform
    from t2i_adapter.data.source import open_source
    from t2i_adapter.doctor.report import diagnose, finding_line
    from t2i_adapter.models.open import open_base

    few = open_source(replace(data, max_train_samples=LOOKED_AT, on_bad_sample="skip"), seed=0)
    transform = PairTransform.of(data, 3, few.annotate)
    report = diagnose(few, transform, open_base(BaseOptions()), data, timed_rows=0, workers=0)
    yield from (finding_line(finding, report.scan) for finding in report.findings)
    rows = "every row" if len(few) == len(source) else f"{len(few)} of {len(source)} rows"
    yield f"Looked at {rows}: {report.verdict}. `t2i-adapter doctor` reads all of them and checks more."


def recipe_lines(
    options: InitOptions, data: DataOptions, base: str, memory: int | None, pairs: int, what: str
) -> Iterator[str]:
    """The lines of the YAML recipe. `memory`: of the card in bytes; None for a CPU. `what` describes the dataset."""
    yield f"# Written by `t2i-adapter init`: {what.splitlines()[0]}."
    yield "# `t2i-adapter train --help` explains every option; a flag beside --recipe wins over this file."
    yield "# `t2i-adapter plan --recipe FILE` predicts memory, disk and time before anything is trained."
    sections = {"": {"output_dir": options.output_dir}, **_sections(data, base, memory, pairs)}
    for section, values in sections.items():
        if section:
            yield f"{section}:"
        for name, value in values.items():
            value, comment = value if isinstance(value, tuple) else (value, "")
            shown = yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=10**6).strip()
            indent = "  " if section else ""
            yield f"{indent}{shown}{f'  # {comment}' if comment else ''}"


def _sections(data: DataOptions, base: str, memory: int | None, pairs: int) -> dict[str, dict[str, Any]]:
    """Section -> option -> value, or (value, comment)."""
    chosen = {
        name: getattr(data, name)
        for name in _DATA
        if getattr(data, name) != DataOptions.__dataclass_fields__[name].default
    }
    if data.condition:
        chosen["condition"] = data.condition, "made from the pictures; `t2i-adapter conditions` lists the kinds"
    if base == NANO:
        return {
            "base": {"name": (NANO, f"inside the package, for a CPU; a GPU trains {SDXL}")},
            "data": {**chosen, "resolution": data.resolution, "num_workers": 0},
            "objective": {"min_snr_gamma": (0.05, "so small a base decides the layout at the highest noise levels")},
            "optim": {"lr": 0.002, "schedule": "cosine", "warmup_steps": 10},
            "train": {"batch_size": GLOBAL_BATCH, "max_steps": (400, "minutes on two cores"), "seed": 0},
            "checkpoint": {"every": 100},
        }
    gib = (memory or 24 * GIB) / GIB
    batch = 8 if gib >= 75 else 4 if gib >= 38 else 2 if gib >= 22 else 1
    steps = min(max(pairs * _EPOCHS // GLOBAL_BATCH, _STEPS[0]), _STEPS[1])
    saving: dict[str, Any] = {}
    if gib < 15:
        saving["gradient_checkpointing"] = True, "less memory, more time"
    models: dict[str, Any] = {"name": base}
    if base == SDXL:
        models |= {"variant": "fp16", "vae": (SDXL_VAE, "SDXL's own VAE overflows in half precision")}
    if gib < 11:
        models["quantize"] = "int8", "8 bits a weight of the frozen base; docs/memory.md"
    optim: dict[str, Any] = {"lr": (1e-5, "of the official adapters"), "schedule": "constant_with_warmup"}
    if gib < 11:
        optim = {"name": ("adamw8bit", "pip install 'sdxl-t2i-adapter[adam8bit]'"), **optim}
    return {
        "base": models,
        "data": {
            **chosen,
            "resolution": data.resolution,
            "proportion_empty_prompts": (0.1, "so that guidance works without a prompt, too"),
            "num_workers": 2,
        },
        "optim": {**optim, "warmup_steps": 500},
        "train": {
            "batch_size": batch,
            "gradient_accumulation_steps": (GLOBAL_BATCH // batch, f"{GLOBAL_BATCH} pairs an update"),
            "max_steps": (steps, f"{steps * GLOBAL_BATCH / pairs:,.0f} epochs of {pairs:,} pairs"),
            "mixed_precision": "bf16",
            "allow_tf32": True,
            **saving,
        },
        "checkpoint": {"every": 1000},
    }


_DATA = (
    *("location", "split", "kind", "image_column", "conditioning_image_column", "caption_column"),
    *("conditioning_dir", "captions", "skip", "background"),
)


def _native_size(base: str) -> int:
    """Side in pixels of the pictures that a base makes by default. Of a base on the hub only its UNet's config is read.

    SDXL's side, with a line about it, if the base cannot be read here.
    """
    if base in (NANO, SDXL):
        return 128 if base == NANO else SDXL_SIZE
    from t2i_adapter.models.open import native_size

    size = native_size(base)
    if size is None:
        print(f"{base}: cannot be read here, so the recipe takes SDXL's {SDXL_SIZE} pixels; change data.resolution.")
    return size or SDXL_SIZE


def _memory() -> int | None:
    """Memory of this machine's GPU in bytes; None without one."""
    from t2i_adapter.devices import choose_device, memory_bytes

    return memory_bytes(choose_device())


def _ask(question: str) -> str:
    """The answer that the user types. Raises UserError if nobody can."""
    if not sys.stdin.isatty():
        raise UserError("is required: a folder of pictures, a manifest, shards or a hub id", option="data")
    answer = input(f"{question}: ").strip()
    if not answer:
        raise UserError("is required: a folder of pictures, a manifest, shards or a hub id", option="data")
    return answer


def _choose(question: str, default: str, is_asking: bool) -> str:
    """The user's choice; without questions the default, which is printed."""
    if not is_asking:
        print(f"{question}: {default} is taken.")
        return default
    return input(f"{question} [{default}]: ").strip() or default
