"""Sets up a run: checks options against files and models, cheapest first, then builds the trainer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list
from diffusers.utils.import_utils import is_xformers_available
from torch import Tensor

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.devices import limit_malloc_arenas, release
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import write_atomic
from t2i_adapter.models.adapter import build_adapter, check_fits, check_resolution, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.training import checkpoint, optim, tracking
from t2i_adapter.training.data import make_batches, prepare_data
from t2i_adapter.training.data_record import DataCheck, DataRecord
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.lock import lock
from t2i_adapter.training.loop import PATIENCE, Trainer
from t2i_adapter.training.plan import Plan, make_plan
from t2i_adapter.training.resume import check_same_run, rate_change
from t2i_adapter.training.signals import Stopper
from t2i_adapter.training.step import FrozenModel
from t2i_adapter.training.update import Update
from t2i_adapter.training.validation import Row, Validator, find_judge, read_rows, text_states
from t2i_adapter.types import Batch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Mixed precision as accelerate names it -> dtype of the frozen base and the encoders."""
OPTIONS = "options.yaml"
"""In a run's folder: its resolved options and seed, a recipe that repeats or resumes the run."""


@dataclass(frozen=True)
class Inputs:
    """What preparing the data needs, all of it checked; no large weights are loaded yet."""

    config: Config
    accelerator: Accelerator
    base: Base
    adapter: Any
    source: Source
    rows: list[Row]

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the frozen base and the encoders."""
        return DTYPES[self.accelerator.mixed_precision]

    def prepare_data(self) -> CachedDataset | LiveDataset:
        """Encodes what the cache does not have yet, which may take hours, and frees the encoders' memory.

        Raises UserError, before that if the pictures are not those of the checkpoint to resume from.
        """
        prompts, check = [row.prompt for row in self.rows], self.data_check()
        dataset = prepare_data(self.config, self.accelerator, self.base, self.source, self.dtype, prompts, check)
        release(self.accelerator.device)
        return dataset

    def data_check(self) -> DataCheck | None:
        """Compares the data with that of the checkpoint to resume from; None for a new run."""
        return None


@dataclass(frozen=True)
class Setup(Inputs):
    """A run whose options are checked. resume: the checkpoint to continue from; judge: measures validation pictures."""

    plan: Plan
    judge: Annotator | None
    resume: Path | None

    def data_check(self) -> DataCheck | None:
        if self.resume is None:
            return None
        return DataCheck(DataRecord.read(self.resume), self.resume.name, self.config.checkpoint.allow_changed)


def open_inputs(config: Config, accelerator: Accelerator, seed: int) -> Inputs:
    """Opens base, adapter and dataset, and reads the validation pictures. Raises UserError."""
    rows = read_rows(config)
    base = open_base(config.base)
    adapter = make_adapter(config, base, seed)
    return Inputs(config, accelerator, base, adapter, open_source(config.data, seed), rows)


def set_up(config: Config) -> Setup:
    """Checks the options against files and models, cheapest first. Raises UserError."""
    _check_packages(config)
    accelerator = make_accelerator(config)
    resume = _find_checkpoint(accelerator, config)
    seed = _seed(accelerator, config, resume)
    inputs = open_inputs(config, accelerator, seed)
    plan = make_plan(
        config,
        samples=len(inputs.source),
        processes=accelerator.num_processes,
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        seed=seed,
        trainable_parameters=sum(parameter.numel() for parameter in inputs.adapter.parameters()),
        device=str(accelerator.device),
    )
    if resume:
        state = checkpoint.read_state(resume)
        for line in check_same_run(state, config, plan.to_dict(), resume.name) + rate_change(state, config, plan):
            accelerator.print(line)
    return Setup(**vars(inputs), plan=plan, judge=find_judge(config, inputs.source.annotate), resume=resume)


def _check_packages(config: Config) -> None:
    """Raises UserError if an option needs a package that is not installed."""
    optim.check_available(config.optim)
    if config.train.xformers and not is_xformers_available():
        raise UserError("needs a package: pip install xformers, or omit it.", option="train.xformers")


def make_accelerator(config: Config) -> Accelerator:
    """Ranks, device and mixed precision. fp16 needs a GPU; without one the run prints a line and computes in fp32."""
    limit_malloc_arenas()
    wanted = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in DTYPES:
        raise UserError(f"{wanted}: allowed are {', '.join(DTYPES)}.", option="train.mixed_precision")
    has_gpu = torch.cuda.is_available()
    precision = "no" if wanted == "fp16" and not has_gpu else wanted
    output = Path(config.output_dir)
    log_with: Any = tracking.trackers_named(config.tracking.report_to)
    AcceleratorState._reset_state()  # it keeps the mixed precision of an earlier run in this process
    accelerator = Accelerator(
        cpu=not has_gpu and not torch.backends.mps.is_available(),
        mixed_precision=precision,
        log_with=log_with,
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / config.tracking.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if precision != wanted:
        accelerator.print("train.mixed_precision fp16 needs a GPU and none was found: this run computes in fp32.")
    if config.train.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def make_adapter(config: Config, base: Base, seed: int) -> Any:
    """The adapter to train, float32: loaded, or random by the seed; checked against base and resolution."""
    if config.adapter.init_from:
        adapter = load_adapter(config.adapter.init_from, cache_dir=config.base.cache_dir)
        channels = adapter.config["in_channels"]
        if channels != config.adapter.in_channels:
            raise UserError(
                f"{config.adapter.init_from} takes {channels}-channel pictures: "
                f"set {flag('adapter.in_channels')} {channels}."
            )
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            adapter = build_adapter(config.adapter, base.unet_config)
    check_fits(adapter.config, base.unet_config, config.adapter.init_from or "the adapter")
    check_resolution(config.data.resolution, config.data.resolution, adapter.config)
    return adapter


def _find_checkpoint(accelerator: Accelerator, config: Config) -> Path | None:
    """The checkpoint to resume from. Raises UserError if a new run would be mixed into an old one's folder."""
    output = Path(config.output_dir)
    if config.checkpoint.resume is None:
        old = checkpoint.list_checkpoints(output)
        if old:
            lock(output).close()  # raises a better error if that run is still going on
            raise UserError(
                f"{output} has {old[-1][1].name} of an earlier run: resume it with {flag('checkpoint.resume')} auto, "
                "or name another folder.",
                option="output_dir",
            )
        return None
    found, skipped = checkpoint.find(output, config.checkpoint.resume)
    for line in skipped:
        accelerator.print(line)
    accelerator.print(f"Resuming from {found}." if found else f"No checkpoint in {output} yet: a new run begins.")
    return found


def _seed(accelerator: Accelerator, config: Config, resume: Path | None) -> int:
    """The seed of the options, or of the resumed run, or a random one; equal on every rank."""
    if config.train.seed is not None:
        return config.train.seed
    if resume:
        return checkpoint.read_state(resume)["plan"]["seed"]
    random = [secrets.randbelow(2**31)]
    broadcast_object_list(random)
    return random[0]


def make_trainer(setup: Setup, dataset: CachedDataset | LiveDataset, stopper: Stopper | None = None) -> Trainer:
    """Loads the UNet and builds the trainer. `Encoders` load a text encoder or VAE only if a batch needs one.

    Raises UserError if the data is not that of the checkpoint to resume from.
    """
    config, accelerator, plan, dtype = setup.config, setup.accelerator, setup.plan, setup.dtype
    record, check = DataRecord.of(dataset), setup.data_check()
    for line in check.check(record, dataset.source, dataset.numbers) if check else ():
        accelerator.print(line)
    frozen = load_frozen_model(config, setup.base, accelerator.device, dtype, steps=plan.steps)
    encoders = Encoders(setup.base, accelerator.device, dtype, max_tokens=config.data.max_tokens)
    seeded = replace(config, train=replace(config.train, seed=plan.seed))

    def batches(start_step: int) -> Iterator[Batch]:
        return make_batches(
            dataset,
            seeded,
            encoders,
            accelerator,
            start_step=start_step,
            stop_step=plan.steps,
            num_timesteps=frozen.schedule.num_timesteps,
        )

    validator = _validator(setup, frozen, dataset, encoders)
    update = Update(config, plan, accelerator, setup.adapter, frozen)
    return Trainer(update, batches, validator, stopper or Stopper(), record)


def _validator(
    setup: Setup, frozen: FrozenModel, dataset: CachedDataset | LiveDataset, encoders: Encoders
) -> Validator | None:
    if not setup.rows or not setup.accelerator.is_main_process:
        return None
    prompts = [row.prompt for row in setup.rows]
    text = text_states(
        prompts,
        {prompt: _states(dataset, encoders, prompt, frozen) for prompt in {"", *prompts}},
        zeros=setup.base.zeros_for_empty_prompt,
        repeat=setup.config.validation.num_images,
    )
    return Validator(
        setup.config, setup.base, frozen, setup.rows, text, setup.accelerator, setup.plan.seed, setup.judge
    )


def _states(
    dataset: CachedDataset | LiveDataset, encoders: Encoders, prompt: str, frozen: FrozenModel
) -> tuple[Tensor, Tensor]:
    """A prompt's text states (L,D) and pooled state (P,), from the cache or encoded now."""
    record = dataset.text(prompt)
    if record:
        states, pooled = torch.tensor(record.states), torch.tensor(record.pooled)
    else:
        states, pooled = (part[0] for part in encoders.states([prompt]))
    return states.to(frozen.unet.device, frozen.dtype), pooled.to(frozen.unet.device, frozen.dtype)


def write_options(config: Config, plan: Plan) -> None:
    """Writes options.yaml into the run's folder."""
    plain = replace(config.checkpoint, resume=None, allow_changed=False)
    seeded = replace(config, train=replace(config.train, seed=plan.seed), checkpoint=plain)
    write_atomic(Path(config.output_dir) / OPTIONS, [recipe.dump(seeded).encode()])
