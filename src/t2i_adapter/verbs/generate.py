"""The verb `generate`: pictures from prompts and condition pictures, each with a JSON file to generate it again.

Its options are in `generation/request.py`, what it writes in `generation/records.py`. Importing this module loads no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from t2i_adapter.errors import flag
from t2i_adapter.files import output_folder, show_path
from t2i_adapter.generation.request import GenerateOptions, Job, make_jobs
from t2i_adapter.generation.schedulers import DEFAULT, find_sampler
from t2i_adapter.imports import preload

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from t2i_adapter.annotators.registry import Annotator
    from t2i_adapter.generation.options import SamplingOptions
    from t2i_adapter.generation.pipeline import Models
    from t2i_adapter.generation.prompts import Picture
    from t2i_adapter.generation.records import Settled
    from t2i_adapter.generation.redraw import Redraw
    from t2i_adapter.models.family import AdapterPipeline

__all__ = ["GenerateOptions", "Job", "Opener", "make_jobs", "run"]


class Opener:
    """Opens what generates pictures. A program that generates often keeps it open by its own opener."""

    def models(self, options: GenerateOptions) -> list[Models]:
        """Finds the adapters and their base. Raises UserError."""
        from t2i_adapter.generation.pipeline import open_several

        return open_several(options)

    def pipeline(self, options: GenerateOptions, models: Sequence[Models]) -> AdapterPipeline:
        """Loads the base, and puts everything on its device. Raises UserError."""
        from t2i_adapter.models.lora_file import Lora

        loras = [Lora.parse(text) for text in options.lora]
        return models[0].pipeline(models[1:], loras=loras, quantized=options.quantize)


def run(options: GenerateOptions, opener: Opener | None = None) -> list[Path]:
    """Generates `num` pictures for each prompt, and writes each to `out` when its batch is finished.

    Returns the pictures' files, column by column of the grid. Raises UserError.
    """
    preload("t2i_adapter.generation.pipeline")
    from tqdm import tqdm

    from t2i_adapter.generation.controlnet import Controlled, load_controlnet
    from t2i_adapter.generation.generate import encode_prompts, generate_batches
    from t2i_adapter.generation.pipeline import describe_differences
    from t2i_adapter.generation.records import picture_record, png_parameters, save_picture
    from t2i_adapter.reports.grid import save_grid

    opener = opener or Opener()
    jobs = make_jobs(options)
    first = _read(jobs[0].pictures[0])
    models = opener.models(options)
    size = _picture_size(options, models, first)
    annotators = _annotators(options, models, jobs)
    conditions = _conditions(jobs, models, size, annotators)
    redraw = _redraw(options, jobs, size)
    controlled = [_read_rgb(job.controlnet_image, size, "controlnet_image") for job in jobs if job.controlnet_image]
    out = output_folder(options.out)
    columns = [_settle(column, models, annotators, size, redraw) for _, column in options.columns()]
    base = models[0].base
    schedulers = [_scheduler(column.scheduler, models[0], column.sampling[0].steps) for column in columns]
    for line in (*describe_differences(options.adapter, models), *_described(options, models, columns[0].sampling)):
        print(line, flush=True)
    pipeline = opener.pipeline(options, models)
    network = None
    if options.controlnet:
        device = pipeline._execution_device
        network = load_controlnet(options.controlnet, base.unet_config, device, models[0].dtype)
    own, sheet, paths = pipeline.scheduler, [], []
    for (heading, _), column, scheduler in zip(options.columns(), columns, schedulers, strict=True):
        pipeline.scheduler = scheduler or own
        common = column.sampling[0]
        texts = encode_prompts(
            pipeline,
            [job.prompt for job in jobs],
            guidance=common.guidance,
            negative=options.negative,
            max_tokens=models[0].max_tokens,
            is_quiet=bool(paths),
        )
        batches = generate_batches(
            pipeline,
            texts,
            conditions,
            [job.seed for job in jobs],
            size=size,
            sampling=common,
            strengths=[sampling.strength for sampling in column.sampling],
            redraw=redraw and replace(redraw, strength=column.strength),
            controlled=Controlled(network, controlled, options.controlnet_scale) if network else None,
            progress=f"generating {heading}".strip(),
        )
        pictures = []
        made = (picture for batch in batches for picture in batch)
        for job, shown, picture in zip(jobs, conditions, made, strict=True):
            kept = [one if source.is_photo else None for one, source in zip(shown, job.pictures, strict=True)]
            paths.append(save_picture(out, picture, picture_record(column, job), png_parameters(column, job), kept))
            pictures += [picture] if options.grid else []
            with tqdm.external_write_mode():
                print(show_path(paths[-1]), flush=True)
        sheet.append((heading, pictures))
    if options.grid:
        print(show_path(save_grid(paths[0], jobs, conditions, sheet)), flush=True)
    pipeline.scheduler = own
    return paths


def _read(picture: Picture) -> Image.Image:
    from t2i_adapter.generation.condition import read_condition, read_photo

    return read_photo(picture.file) if picture.is_photo else read_condition(picture.file)


def _picture_size(options: GenerateOptions, models: Sequence[Models], condition: Image.Image) -> tuple[int, int]:
    """Returns (height, width) in pixels: from the options, else the first adapter's training resolution, else the
    condition's size."""
    from t2i_adapter.models.adapter import check_resolution

    side = models[0].resolution
    default = (side, side) if side else (condition.height, condition.width)
    height, width = options.height or default[0], options.width or default[1]
    for model in models:
        check_resolution(height, height, model.adapter_config, "height")
        check_resolution(width, width, model.adapter_config, "width")
    return height, width


def _annotators(options: GenerateOptions, models: Sequence[Models], jobs: Sequence[Job]) -> list[Annotator | None]:
    """Opens each adapter's annotator, if one of its conditions is made of a photo. Raises UserError."""
    from t2i_adapter.generation.condition import find_annotator
    from t2i_adapter.generation.several import of_adapter

    found: list[Annotator | None] = []
    for number, model in enumerate(models):
        if any(job.pictures[number].is_photo for job in jobs):
            named = of_adapter(options.condition, number)
            named = None if named == "none" else named
            found.append(find_annotator(named, model.metadata, options.adapter[number]))
        else:
            found.append(None)
    return found


def _conditions(
    jobs: Sequence[Job], models: Sequence[Models], size: tuple[int, int], annotators: Sequence[Annotator | None]
) -> list[list[Image.Image]]:
    """Returns each picture's conditions, one an adapter; each file is read and made into a condition once."""
    from t2i_adapter.generation.condition import fit_condition, make_condition

    made: dict[tuple[Picture, int], Image.Image] = {}
    for job in jobs:
        for number, (source, model) in enumerate(zip(job.pictures, models, strict=True)):
            if (source, number) in made:
                continue
            picture, annotator = _read(source), annotators[number]
            made[source, number] = (
                make_condition(picture, size, model.channels, annotator)
                if source.is_photo and annotator
                else fit_condition(picture, size, model.channels)
            )
    return [[made[source, number] for number, source in enumerate(job.pictures)] for job in jobs]


def _read_rgb(file: str, size: tuple[int, int], option: str) -> Image.Image:
    """Reads a picture whose numbers count as they are, fitted to `size`."""
    from t2i_adapter.generation.condition import fit_condition, read_condition

    return fit_condition(read_condition(file, flag(option)), size, 3)


def _redraw(options: GenerateOptions, jobs: Sequence[Job], size: tuple[int, int]) -> Redraw | None:
    """Reads the pictures to begin from, and their masks; None if there are none."""
    from t2i_adapter.data.pair import IMAGE_FILTER
    from t2i_adapter.generation.condition import fit, read_photo
    from t2i_adapter.generation.redraw import DEFAULT_STRENGTH, InitImage, Redraw

    if not jobs[0].init_image:
        return None
    inits = []
    for job in jobs:
        picture = fit(read_photo(job.init_image or "", flag("init_image")), size, IMAGE_FILTER)
        inits.append(InitImage(picture, _read_rgb(job.mask, size, "mask").convert("L") if job.mask else None))
    default = 1.0 if any(job.mask for job in jobs) else DEFAULT_STRENGTH
    return Redraw(inits, default if options.strength is None else options.strength, options.mask_blur)


def _settle(
    options: GenerateOptions,
    models: Sequence[Models],
    annotators: Sequence[Annotator | None],
    size: tuple[int, int],
    redraw: Redraw | None,
) -> Settled:
    """Gives every option a value."""
    from t2i_adapter.generation.records import Settled
    from t2i_adapter.models.distilled import base_advice

    base = models[0].base
    advice = base_advice(base.unet_config, base.scheduler_config)
    sampling = options.settle_all([model.recommended for model in models], advice)
    strength = None if redraw is None else (redraw.strength if options.strength is None else options.strength)
    advised = advice.scheduler if advice else None
    return Settled(options, sampling, models, annotators, size, strength, options.scheduler or advised or DEFAULT)


def _scheduler(name: str, models: Models, steps: int) -> Any:
    """Returns the scheduler of that name; None for the pipeline's own. Raises UserError."""
    from t2i_adapter.generation.schedulers import make_scheduler

    if find_sampler(name) == (DEFAULT, False):
        return None
    return make_scheduler(name, dict(models.base.scheduler().config), steps)


def _described(
    options: GenerateOptions, models: Sequence[Models], sampling: Sequence[SamplingOptions]
) -> Iterator[str]:
    """Yields lines for the log: what is taken from the records and the base without being asked for."""
    from t2i_adapter.models.distilled import base_advice, may_be_distilled

    if line := models[0].describe_text():
        yield line
    base = models[0].base
    if options.steps is None or options.guidance is None:
        advice = base_advice(base.unet_config, base.scheduler_config)
        hint = advice.describe() if advice else may_be_distilled(base.unet_config, base.scheduler_config)
        if hint:
            yield hint
    yield from options.describe_points([model.recommended for model in models], sampling)
