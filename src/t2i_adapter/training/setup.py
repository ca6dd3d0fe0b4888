"""Sets up a run: checks options against files and models, cheapest first, then builds the trainer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from diffusers.utils.import_utils import is_xformers_available
from torch import Tensor

from t2i_adapter.annotators.registry import Annotator
from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.cache.dataset import CachedDataset, LiveDataset
from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.devices import (
    release,
)
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import write_atomic
from t2i_adapter.models.adapter import build_adapter, check_fits, check_resolution, load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.open import open_base
from t2i_adapter.runs.lock import lock
from t2i_adapter.training import checkpoint, compose, optim
from t2i_adapter.training.accelerator import DTYPES, make_accelerator, patience_of
from t2i_adapter.training.agree import agree_on_checkpoint, agree_on_data, agree_on_inputs
from t2i_adapter.training.data import make_batches, prepare_data
from t2i_adapter.training.data_record import DataCheck, DataRecord
from t2i_adapter.training.events import Callback
from t2i_adapter.training.frozen_model import load_frozen_model
from t2i_adapter.training.held_out import HeldOut, choose_held_out
from t2i_adapter.training.looks import LookPlan
from t2i_adapter.training.loop import Trainer
from t2i_adapter.training.measured import Measured, describe_looks, make_control, make_look_plan, prepare_measured
from t2i_adapter.training.peers import Peers
from t2i_adapter.training.pictures import Pictures, text_states
from t2i_adapter.training.plan import Plan, make_plan, split_batch
from t2i_adapter.training.resume import check_same_run, rate_change, versions
from t2i_adapter.training.signals import Stopper
from t2i_adapter.training.step import FrozenModel
from t2i_adapter.training.update import Update
from t2i_adapter.training.validation import Row, Validator, check_best, find_judge, read_rows
from t2i_adapter.training.work import sample_work
from t2i_adapter.types import Batch

T = TypeVar("T")
MUCH_LARGER = 1.5
"""Share of the base's own size at which a run's size gets a line."""
OPTIONS = "options.yaml"
"""In a run's folder: its resolved options and seed, a recipe that repeats or resumes the run."""


class RunData(NamedTuple):
    """The prepared data of a run. measured: only on the main process, and if the run measures its control."""

    training: CachedDataset | LiveDataset
    measured: Measured | None


@dataclass(frozen=True)
class Inputs:
    """What preparing the data needs, all of it checked; no large weights are loaded yet."""

    config: Config
    accelerator: Accelerator
    base: Base
    adapter: Any
    held_out: HeldOut
    rows: list[Row]

    @property
    def source(self) -> Source:
        """The pairs to train on."""
        return self.held_out.training

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the frozen base and the encoders."""
        return DTYPES[self.accelerator.mixed_precision]

    @property
    def measured_pairs(self) -> int:
        """Number of held-out pairs that the run measures."""
        return len(self.held_out.measured) if self.config.validation.budget else 0

    def prepare_data(self) -> RunData:
        """Encodes what the cache does not have yet, which may take hours, and frees the encoders' memory.

        Raises UserError, before that if the pictures are not those of the checkpoint to resume from.
        """
        prompts, check = [row.prompt for row in self.rows], self.data_check()
        dataset = self.all_work(
            lambda: prepare_data(self.config, self.accelerator, self.base, self.source, self.dtype, prompts, check)
        )
        measured = None
        if self.measured_pairs:
            measured = self.main_works(partial(self._prepare_measured, self.measured_pairs))
        release(self.accelerator.device)
        return RunData(dataset, measured)

    def _prepare_measured(self, count: int) -> Measured | None:
        return prepare_measured(self.config, self.held_out, count, self.base, self.accelerator.device, self.dtype)

    def main_works(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on the main process, which alone calls it."""
        return work() if self.accelerator.is_main_process else None

    def all_work(self, work: Callable[[], T]) -> T:
        """What `work` returns on this process."""
        return work()

    def data_check(self) -> DataCheck | None:
        """Compares the data with that of the checkpoint to resume from; None for a new run."""
        return None


@dataclass(frozen=True)
class Setup(Inputs):
    """A run whose options are checked.

    looks: when it measures its control. judge: scores its pictures. resume: the checkpoint to continue from. peers: the
    processes of the run.
    """

    peers: Peers
    plan: Plan
    looks: LookPlan
    judge: Annotator | None
    resume: Path | None

    @property
    def measured_pairs(self) -> int:
        return self.looks.pairs

    def main_works(self, work: Callable[[], T]) -> T | None:
        return self.peers.main_works(work)

    def all_work(self, work: Callable[[], T]) -> T:
        return self.peers.all_work(work)

    def describe(self) -> str:
        """The plan for people."""
        looks = describe_looks(self.looks, self.held_out, self.config.validation.budget)
        return f"{self.source.describe()}\nPlan\n{self.plan.describe()}\n{looks}"

    def data_check(self) -> DataCheck | None:
        if self.resume is None:
            return None
        return DataCheck(DataRecord.read(self.resume), self.resume.name, self.config.checkpoint.allow_changed)


def open_inputs(config: Config, accelerator: Accelerator, seed: int, base: Base | None = None) -> Inputs:
    """Opens base, adapter and dataset, and reads the validation pictures. Raises UserError.

    base: to use instead of opening the one that the options name.
    """
    compose.check_options(config)
    rows = read_rows(config)
    base = base or open_base(config.base)
    adapter = make_adapter(config, base, seed)
    parts = compose.find_parts(config, adapter)
    held_out = choose_held_out(config, open_source(config.data, seed, parts))
    return Inputs(config, accelerator, base, adapter, held_out, rows)


def set_up(config: Config, base: Base | None = None) -> Setup:
    """Checks the options against files and models, cheapest first. base: as of `open_inputs`. Raises UserError.

    What all processes must share is decided by the main one, or compared.
    """
    _check_packages(config)
    accelerator = make_accelerator(config)
    peers = Peers(accelerator, patience_of(config))
    with peers.naming_losses():
        return _set_up(config, accelerator, peers, base)


def _set_up(config: Config, accelerator: Accelerator, peers: Peers, base: Base | None) -> Setup:
    config = peers.together(lambda: split_batch(config, accelerator.num_processes))
    resume = agree_on_checkpoint(peers, Path(config.output_dir), lambda: _find_checkpoint(accelerator, config))
    seed = _seed(peers, config, resume)
    if resume and "held_out" not in checkpoint.read_state(resume)["options"].get("validation", {}):
        # An older version wrote the checkpoint, and left no pairs out of training.
        config = replace(config, validation=replace(config.validation, split="none"))
    inputs = peers.together(lambda: open_inputs(config, accelerator, seed, base))
    for line in _odd_size(config.data.resolution, inputs.base):
        accelerator.print(line)
    source = inputs.source
    agree_on_inputs(peers, config, inputs.base, source, accelerator.mixed_precision, inputs.held_out.line)
    for line in _other_versions(peers):
        accelerator.print(line)
    plan, judge = peers.together(lambda: _plan(config, inputs, seed, resume))
    has_judge = peers.from_main(lambda: judge is not None)
    looks = peers.from_main(lambda: make_look_plan(config, plan, inputs.held_out, is_scored=has_judge))
    check_best(config, has_score=bool(looks.steps) or (has_judge and bool(inputs.rows)))
    return Setup(**vars(inputs), peers=peers, plan=plan, looks=looks, judge=judge, resume=resume)


def _plan(config: Config, inputs: Inputs, seed: int, resume: Path | None) -> tuple[Plan, Annotator | None]:
    """The plan, compared with that of the checkpoint to resume from, and the judge."""
    accelerator = inputs.accelerator
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
    return plan, find_judge(config, inputs.source.annotate)


def _other_versions(peers: Peers) -> Iterator[str]:
    """A line for each process that has another version of a library than the main one."""
    first, *others = peers.gather(versions())
    for rank, found in enumerate(others, 1):
        different = [f"{name} {found[name]} (process 0: {first[name]})" for name in first if found[name] != first[name]]
        if different:
            yield f"{peers.name(rank)} has {', '.join(different)}: last bits may differ between machines."


def _check_packages(config: Config) -> None:
    """Raises UserError if an option needs a package that is not installed."""
    optim.check_available(config.optim)
    if config.train.xformers and not is_xformers_available():
        raise UserError("needs a package: pip install xformers, or omit it.", option="train.xformers")


def make_adapter(config: Config, base: Base, seed: int) -> Any:
    """The adapter to train, float32: loaded, or random by the seed; checked against base and resolution. Of several, a
    `JointAdapter`."""
    if config.adapter.compose:
        adapter: Any = compose.load_adapters(config, base.unet_config)
    elif config.adapter.init_from:
        adapter = load_adapter(config.adapter.init_from, cache_dir=config.base.cache_dir)
        channels = adapter.config["in_channels"]
        if channels != config.adapter.in_channels:
            raise UserError(
                f"{config.adapter.init_from} takes {channels}-channel pictures: "
                f"set {flag('adapter.in_channels')} {channels}."
            )
        if (kind := adapter.config["adapter_type"]) != (config.adapter.type or kind):
            raise UserError(f"{config.adapter.init_from} is a {kind}: set {flag('adapter.type')} {kind}, or omit it.")
    else:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            adapter = build_adapter(config.adapter, base.unet_config)
    check_fits(adapter.config, base.unet_config, config.adapter.init_from or "the adapter")
    check_resolution(config.data.resolution, config.data.resolution, adapter.config)
    return adapter


def _odd_size(resolution: int, base: Base) -> Iterator[str]:
    """A line if the run's pictures are much larger than those that the base was made for."""
    if resolution >= MUCH_LARGER * base.native_size:
        yield (
            f"The base {base.name} makes pictures of {base.native_size} px by default, and this run trains at "
            f"{resolution}: more memory and time, and pictures that the base draws less well. Its own size is "
            f"{flag('data.resolution')} {base.native_size}."
        )


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


def _seed(peers: Peers, config: Config, resume: Path | None) -> int:
    """The seed of the options, or of the resumed run, or a random one; equal on every rank."""
    if config.train.seed is not None:
        return config.train.seed
    if resume:
        return checkpoint.read_state(resume)["plan"]["seed"]
    return peers.from_main(lambda: secrets.randbelow(2**31))


def make_trainer(
    setup: Setup, data: RunData, stopper: Stopper | None = None, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Loads the UNet and builds the trainer. `Encoders` load a text encoder or VAE only if a batch needs one.

    Raises UserError if the data is not that of the checkpoint to resume from.
    """
    config, accelerator, plan, dtype = setup.config, setup.accelerator, setup.plan, setup.dtype
    dataset = data.training
    record, check = DataRecord.of(dataset), setup.data_check()
    agree_on_data(setup.peers, dataset.numbers, record)
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

    update = Update(config, plan, accelerator, setup.adapter, frozen)
    if accelerator.is_main_process:  # the one that logs
        update.meter.work = sample_work(config, setup.base, setup.adapter, accelerator)
    pictures = Pictures(setup.base, frozen, accelerator.device)

    def states(known: CachedDataset | LiveDataset, prompt: str) -> tuple[Tensor, Tensor]:
        return _states(known, encoders, prompt, frozen)

    validator = _validator(setup, pictures, partial(states, dataset))
    control = None
    if data.measured:
        control = make_control(
            config,
            plan,
            setup.looks,
            data.measured,
            base=setup.base,
            frozen=frozen,
            encoders=encoders,
            pictures=pictures,
            judge=setup.judge,
            states=states,
        )
    return Trainer(
        update,
        batches,
        validator,
        stopper or Stopper(),
        record,
        peers=setup.peers,
        validates=bool(setup.rows),
        control=control,
        look_steps=setup.looks.steps,
        callbacks=callbacks,
    )


def _validator(setup: Setup, pictures: Pictures, states: Callable[[str], tuple[Tensor, Tensor]]) -> Validator | None:
    """states: a prompt's text states."""
    if not setup.rows or not setup.accelerator.is_main_process:
        return None
    prompts = [row.prompt for row in setup.rows]
    text = text_states(
        prompts,
        {prompt: states(prompt) for prompt in {"", *prompts}},
        zeros=setup.base.zeros_for_empty_prompt,
        repeat=setup.config.validation.num_images,
    )
    return Validator(setup.config, pictures, setup.rows, text, setup.accelerator, setup.plan.seed, setup.judge)


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
