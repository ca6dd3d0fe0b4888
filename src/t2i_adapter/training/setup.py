"""Sets up a run: checks options against files and models, cheapest first, and builds the trainer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
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
from t2i_adapter.config import recipe as load
from t2i_adapter.config.tree import Config
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.devices import limit_malloc_arenas, release
from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic
from t2i_adapter.models.adapter import build_adapter, check_fits, check_resolution, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.training import checkpoint, optim, tracking
from t2i_adapter.training import resume as continuity
from t2i_adapter.training.data import make_batches, prepare_data
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.lock import lock
from t2i_adapter.training.loop import PATIENCE, Trainer
from t2i_adapter.training.plan import Plan, make_plan
from t2i_adapter.training.signals import Stopper
from t2i_adapter.training.step import FrozenModel
from t2i_adapter.training.validation import Row, Validator, find_judge, read_rows, text_states
from t2i_adapter.types import Batch

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "sdxl-t2i-adapter")


OPTIONS = "options.yaml"
"""In a run's folder: its resolved options with the seed, a recipe that repeats it or goes on with it."""


@dataclass(frozen=True)
class Setup:
    """A run whose options have been checked and whose parts are found; no large weights are loaded yet."""

    config: Config
    accelerator: Accelerator
    base: Base
    adapter: Any
    source: Source
    plan: Plan
    rows: list[Row]
    judge: Annotator | None
    resume: Path | None


def set_up(config: Config) -> Setup:
    """Checks the options against files and models, cheapest first."""
    _check_packages(config)
    accelerator = make_accelerator(config)
    rows = read_rows(config)
    resume = _find_checkpoint(accelerator, config)
    seed = _seed(accelerator, config, resume)
    base = open_base(config.base)
    adapter = make_adapter(config, base, seed)
    source = open_source(config.data, seed)
    plan = make_plan(
        config,
        samples=len(source),
        processes=accelerator.num_processes,
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        seed=seed,
        trainable_parameters=sum(parameter.numel() for parameter in adapter.parameters()),
        device=str(accelerator.device),
    )
    if resume:
        _check_same_run(accelerator, config, plan, resume)
    judge = find_judge(config, source.annotate)
    return Setup(config, accelerator, base, adapter, source, plan, rows, judge, resume)


def _check_packages(config: Config) -> None:
    """Optional packages that the options ask for."""
    optim.check_available(config.optim)
    if config.train.xformers and not is_xformers_available():
        raise UserError("--enable_xformers_memory_efficient_attention: pip install xformers, or leave the flag out.")


def make_accelerator(config: Config) -> Accelerator:
    """Processes, device and arithmetic; fp16 needs a GPU, and without one the run goes on in fp32, saying so."""
    limit_malloc_arenas()
    wanted = config.train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in DTYPES:
        raise UserError(f"--mixed_precision {wanted}: allowed are {', '.join(DTYPES)}.")
    has_gpu = torch.cuda.is_available()
    precision = "no" if wanted == "fp16" and not has_gpu else wanted
    output = Path(config.output_dir)
    log_with: Any = tracking.trackers_named(config.tracking.report_to)
    AcceleratorState._reset_state()  # it remembers the arithmetic of an earlier run in this process
    accelerator = Accelerator(
        cpu=not has_gpu and not torch.backends.mps.is_available(),
        mixed_precision=precision,
        log_with=log_with,
        project_config=ProjectConfiguration(str(output), logging_dir=str(output / config.tracking.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if precision != wanted:
        accelerator.print("--mixed_precision fp16 needs a GPU and there is none here: this run computes in fp32.")
    if config.train.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def make_adapter(config: Config, base: Base, seed: int) -> Any:
    """The adapter to train, float32: continued, or random by the seed; checked against base and resolution."""
    if config.adapter.init_from:
        adapter = load_adapter(config.adapter.init_from, cache_dir=config.base.cache_dir)
        channels = adapter.config["in_channels"]
        if channels != config.adapter.in_channels:
            raise UserError(
                f"{config.adapter.init_from} takes {channels}-channel pictures: set --adapter.in_channels {channels}."
            )
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            adapter = build_adapter(config.adapter, base.unet_config)
    check_fits(adapter.config, base.unet_config, config.adapter.init_from or "the adapter")
    check_resolution(config.data.resolution, config.data.resolution, adapter.config)
    return adapter


def _find_checkpoint(accelerator: Accelerator, config: Config) -> Path | None:
    """Where to go on from; refuses to mix a new run into an old one's folder."""
    output = Path(config.output_dir)
    if config.checkpoint.resume is None:
        old = checkpoint.list_checkpoints(output)
        if old:
            lock(output).close()  # if that run still goes on, this says so instead
            raise UserError(
                f"--output_dir {output} holds {old[-1][1].name} of an earlier run: go on with "
                "--resume_from_checkpoint auto, or name another folder."
            )
        return None
    found, skipped = checkpoint.find(output, config.checkpoint.resume)
    for line in skipped:
        accelerator.print(line)
    accelerator.print(f"Resuming from {found}." if found else f"No checkpoint in {output} yet: a new run begins.")
    return found


def _seed(accelerator: Accelerator, config: Config, resume: Path | None) -> int:
    """The seed given, or the resumed run's, or one drawn here; the same on every process."""
    if config.train.seed is not None:
        return config.train.seed
    if resume:
        return checkpoint.read_state(resume)["plan"]["seed"]
    drawn = [secrets.randbelow(2**31)]
    broadcast_object_list(drawn)
    return drawn[0]


def make_trainer(setup: Setup, stopper: Stopper | None = None) -> Trainer:
    """Prepares the data, then loads the UNet: the encoders have left the device by then, but for those that encode
    within the step, which come when the first batch needs them."""
    config, accelerator, plan, base = setup.config, setup.accelerator, setup.plan, setup.base
    dtype = DTYPES[accelerator.mixed_precision]
    facts = prepare_data(config, accelerator, base, setup.source, dtype, [row.prompt for row in setup.rows])
    release(accelerator.device)
    frozen = load_frozen_model(config, base, accelerator.device, dtype, steps=plan.steps)
    encoders = Encoders(base, accelerator.device, dtype)
    seeded = replace(config, train=replace(config.train, seed=plan.seed))

    def batches(start_step: int) -> Iterator[Batch]:
        return make_batches(
            facts,
            seeded,
            encoders,
            accelerator,
            start_step=start_step,
            stop_step=plan.steps,
            num_timesteps=frozen.schedule.num_timesteps,
        )

    validator = _validator(setup, frozen, facts, encoders)
    return Trainer(
        config, plan, accelerator, setup.adapter, frozen, batches, validator, versions(), stopper or Stopper()
    )


def _validator(
    setup: Setup, frozen: FrozenModel, facts: CachedDataset | LiveDataset, encoders: Encoders
) -> Validator | None:
    if not setup.rows or not setup.accelerator.is_main_process:
        return None
    prompts = [row.prompt for row in setup.rows]
    text = text_states(
        prompts,
        {prompt: _states(facts, encoders, prompt, frozen) for prompt in {"", *prompts}},
        zeros=setup.base.zeros_for_empty_prompt,
        repeat=setup.config.validation.num_images,
    )
    return Validator(
        setup.config, setup.base, frozen, setup.rows, text, setup.accelerator, setup.plan.seed, setup.judge
    )


def _states(
    facts: CachedDataset | LiveDataset, encoders: Encoders, prompt: str, frozen: FrozenModel
) -> tuple[Tensor, Tensor]:
    record = facts.text(prompt)
    if record:
        states, pooled = torch.tensor(record.states), torch.tensor(record.pooled)
    else:
        states, pooled = (part[0] for part in encoders.states([prompt]))
    return states.to(frozen.unet.device, frozen.dtype), pooled.to(frozen.unet.device, frozen.dtype)


def _check_same_run(accelerator: Accelerator, config: Config, plan: Plan, folder: Path) -> None:
    """Lists what has changed since a checkpoint. Raises UserError where that makes another run, unless it may."""
    state = checkpoint.read_state(folder)
    found = continuity.changes(state, config, plan.to_dict())
    for change in found:
        accelerator.print(f"Changed since {folder.name}: {change}")
    for name, now in versions().items():
        before = state.get("versions", {}).get(name, now)
        if before != now:
            accelerator.print(f"Changed since {folder.name}: {name} {before} -> {now}; last bits may differ")
    continuity.check(found, folder.name, allowed=config.checkpoint.allow_changed)


def _write_options(config: Config, plan: Plan) -> None:
    """The resolved options and the plan, beside the run; options.yaml is a recipe that repeats it."""
    output = Path(config.output_dir)
    plain = replace(config.checkpoint, resume=None, allow_changed=False)
    seeded = replace(config, train=replace(config.train, seed=plan.seed), checkpoint=plain)
    write_atomic(output / OPTIONS, [load.dump(seeded).encode()])


def versions() -> dict[str, str]:
    """Library -> version of what a run's numbers depend on."""
    return {name: version(name) for name in LIBRARIES}
