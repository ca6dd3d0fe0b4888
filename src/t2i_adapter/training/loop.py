"""The loop: a list of sentences."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from t2i_adapter.config.tree import Config, to_dict
from t2i_adapter.devices import on_cores
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.training import checkpoint, nonfinite, optim, tracking
from t2i_adapter.training.accumulate import Accumulation
from t2i_adapter.training.cpu.lanes import CpuThreads, count_cpu_threads
from t2i_adapter.training.cpu.trace import TraceCache, is_traceable
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.meter import Meter
from t2i_adapter.training.plan import Plan
from t2i_adapter.training.profile import ADAPTER, FOLDER, UNET, Profile
from t2i_adapter.training.saving import Saver
from t2i_adapter.training.signals import CODES, Stopper, reason
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch

# The main process may prepare data or validate for long while the others wait.
PATIENCE = timedelta(days=7)


@dataclass
class Trainer:
    """One run on one process; every process of a run holds an equal one.

    adapter: the network that learns, float32. batches: first step -> micro-batches from there on, in order,
    on the device.
    validate: (adapter, step) -> how well it controls, the higher the better, or None where nothing tells; or None for
    no validation; it is called on the main process. versions: library -> version. stopper: hears who wants it to stop.
    """

    config: Config
    plan: Plan
    accelerator: Accelerator
    adapter: Any
    frozen: FrozenModel
    batches: Callable[[int], Iterator[Batch]]
    validate: Callable[[Any, int], float | None] | None
    versions: dict[str, str]
    stopper: Stopper

    def __post_init__(self) -> None:
        self.step = 0
        self.output_dir = Path(self.config.output_dir)
        self.adapter.to(self.accelerator.device).train()
        self.weights = list(self.adapter.parameters())
        self.optimizer = optim.make_optimizer(self.config.optim, self.weights, self.plan.lr)
        self.lr_at = optim.lr_schedule(self.config.optim, self.optimizer, self.plan)
        self.ema = Ema(self.adapter, self.config.train.ema_decay) if self.config.train.ema_decay else None
        self.meter = Meter(self.accelerator.device)
        options = self.config.checkpoint
        self.saver = Saver(self.output_dir, checkpoint.Keep(options.keep, options.keep_every), tqdm.write)
        lanes = self._lanes()
        self.cores, self.cores_beside_lanes = torch.get_num_threads(), 1 if lanes else None
        # What accelerate makes of them: several processes, autocast, loss scaling.
        self.wrapped, self.wrapped_optimizer = self.accelerator.prepare(self.adapter, self.optimizer)
        self.guard = nonfinite.Guard(
            self.optimizer,
            told=nonfinite.supports_found_inf(self.optimizer),
            scaled=self.accelerator.scaler is not None,
        )
        self.passed_over = 0
        self.accumulation = Accumulation(
            self.accelerator, self.wrapped, self._losses, self.plan.accumulate, self.meter.add_loss
        )
        self.accumulation.side_by_side = lanes.add if lanes else None

    @property
    def published(self) -> Any:
        """The network that is saved, validated and published: the average, where there is one."""
        return self.ema.network if self.ema else self.adapter

    def fit(self) -> None:
        """Trains from the present step to the plan's last, logging, saving and validating on the way.

        Raises Stopped, everything saved, where it was asked to stop before.
        """
        self.stopper.begin_training(PATIENCE)
        try:
            self._validate_first()
            with on_cores(self.cores_beside_lanes):
                self._train()
        finally:
            self.saver.close()
        self.stopper.end_training()

    def _train(self) -> None:
        batches = self.meter.waiting(self.batches(self.step))
        profile = self._profile()
        with self._progress_bar() as bar:
            while self.step < self.plan.steps:
                self.advance(batches)
                bar.update()
                if profile:
                    profile.step()
                if self._due(self.config.tracking.log_every):
                    self._log(bar)
                if self._due(self.config.checkpoint.every):
                    self._save()
                if self._due(self.config.validation.every):
                    self._validate()
                why = self.stopper.asked(self.step)
                if why and self.step < self.plan.steps:
                    self._stop(why)

    def advance(self, batches: Iterator[Batch]) -> None:
        """One update: the gradients of the next global batch, and the optimiser's step."""
        self.accumulation.add(batches)
        self._update()

    def _profile(self) -> Profile | None:
        """Of the main process, where it is wanted."""
        if not self.config.train.profile or not self.accelerator.is_main_process:
            return None
        modules = {ADAPTER: self.adapter, UNET: self.frozen.unet}
        return Profile(
            self.accumulation, modules, self.optimizer, self.output_dir / FOLDER, self.plan.steps - self.step
        )

    def _due(self, every: int) -> bool:
        """Every so many steps, and at the last."""
        return self.step % every == 0 or self.step == self.plan.steps

    def _losses(self, batch: Batch) -> Tensor:
        return batch_losses(self.wrapped, self.frozen, batch, min_snr_gamma=self.config.objective.min_snr_gamma)

    def _lanes(self) -> CpuThreads | None:
        """On a CPU, the threads that share a micro-batch; made before accelerate wraps the adapter."""
        train, accelerator = self.config.train, self.accelerator
        count = count_cpu_threads(train.lanes, accelerator.device, train.batch_size, accelerator.num_processes)
        if count == 1:
            return None

        def losses(adapter: Any, batch: Batch) -> Tensor:
            def features(condition: Tensor) -> Any:
                with accelerator.autocast():
                    return adapter(condition)

            return batch_losses(features, self.frozen, batch, min_snr_gamma=self.config.objective.min_snr_gamma)

        return CpuThreads(count, self.adapter, losses, TraceCache(tqdm.write) if is_traceable(self.config) else None)

    def _update(self) -> None:
        """Clips, steps the optimiser at this step's learning rate, and counts the step."""
        norm = self.accelerator.clip_grad_norm_(self.weights, self.config.optim.max_grad_norm)
        assert norm is not None
        self.meter.add_step(norm, scaled=self.accelerator.scaler is not None)
        optim.set_lr(self.optimizer, self.lr_at(self.step))
        if self.guard.allows(norm, self.step):
            self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.adapter, self.step)
        self.step += 1
        self._pass_over(self.guard.known())

    def _log(self, bar: tqdm) -> None:
        """The one place in the loop where the host waits for the device."""
        self._pass_over(self.guard.all())
        values = self.meter.read(self.accelerator, self.plan.global_batch)
        bad = values.pop("nonfinite_steps")
        scaler = self.accelerator.scaler
        lost = scaler is not None and scaler.get_scale() < nonfinite.LEAST_SCALE
        if bad and self.config.train.on_nonfinite == "skip" and math.isnan(values["loss"]):
            return  # none of these steps was one, and each has been told
        if not math.isfinite(values["loss"]) or lost or (bad and self.config.train.on_nonfinite == "stop"):
            raise UserError(
                f"The loss or its gradient is no finite number any more, at step {self.step}. {self._advice()}"
            )
        values["lr"] = self.lr_at(self.step - 1)
        bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            samples_s=f"{values['samples_per_s']:.1f}",
            waiting=f"{values['wait_share']:.0%}",
            refresh=False,  # it is shown when the bar is next drawn
        )
        self._tell(values)

    def _tell(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            tracking.append_metrics(self.output_dir / "metrics.jsonl", values, self.step)
            tracking.log(self.accelerator, values, self.step)

    def _save(self) -> None:
        """Training waits for the copy; the file is written beside it."""
        self._pass_over(self.guard.all())
        if self.accelerator.is_main_process:
            with self.meter.paused():
                self.saver.save(checkpoint.take(self.published, self._training_state()))

    def _stop(self, why: int) -> None:
        """Saves, unless this step is saved already, and ends the run."""
        self.saver.wait()
        if self.saver.saved != self.step:
            self._save()
        self.saver.close()
        self.accelerator.wait_for_everyone()
        told = f"Stopped after step {self.step} of {self.plan.steps}: {reason(why)}."
        if self.accelerator.is_main_process and self.saver.saved != self.step:
            told += f" checkpoint-{self.step} could NOT be written; what was saved before is whole."
        raise Stopped(told, CODES[why])

    def _validate_first(self) -> None:
        if self.step == 0:
            self._validate()

    def _validate(self) -> None:
        if self.validate is None:
            return
        with self.meter.paused(), on_cores(self.cores):
            if self.accelerator.is_main_process:
                self._judge(self.stopper.unless_heard(partial(self.validate, self.published, self.step)))
            self.accelerator.wait_for_everyone()

    def _judge(self, score: float | None) -> None:
        """Logs how well the adapter controls, and keeps its checkpoint where it is better than any before."""
        if score is None:
            return
        self._tell({"control": score})
        if not self.config.checkpoint.keep_best or self.step == 0:
            return
        if self.saver.best is None or score > self.saver.best[1]:
            self.saver.wait()
            if self.saver.saved != self.step:
                self._save()
            self.saver.keep_as_best(self.step, score)

    # Numbers that are none ------------------------------------------------------------------------------------------

    def _pass_over(self, steps: list[int]) -> None:
        """Names the samples of bad steps, which every process has found alike, and keeps their batches.

        Raises UserError where there are to be none, or no more.
        """
        for step in steps:
            stops = self.config.train.on_nonfinite == "stop" or self.passed_over >= self.config.train.max_nonfinite
            told = f"The gradient of step {step} is no finite number and was not applied; {self._kept(step, stops)}"
            if stops:
                raise UserError(f"{told} {self._advice()}")
            self.passed_over += 1
            tqdm.write(f"{told} Passed over: {self.passed_over} of at most {self.config.train.max_nonfinite}.")

    def _kept(self, step: int, with_weights: bool) -> str:
        """A bad step's batch, built again as it was, in a file of its own; in words."""
        again = self.batches(step)
        batches = list(islice(again, self.plan.accumulate))
        names = ", ".join(map(str, nonfinite.suspects(batches, self._losses_alone)[:8]))
        rank = "" if self.accelerator.is_main_process else f".process-{self.accelerator.process_index}"
        file = self.output_dir / nonfinite.FOLDER / f"step-{step:06d}{rank}.safetensors"
        try:
            nonfinite.keep(file, step, batches, self.adapter.state_dict() if with_weights else {})
        except OSError as fault:
            return f"it had {names}; its batch could not be kept ({fault})."
        return f"it had {names}; its batch is kept as {file}."

    def _losses_alone(self, batch: Batch) -> Tensor:
        """As `_losses`, without the other processes."""
        return batch_losses(self.adapter, self.frozen, batch, min_snr_gamma=self.config.objective.min_snr_gamma)

    def _advice(self) -> str:
        known = checkpoint.list_checkpoints(self.output_dir)
        again = f"Resume from {known[-1][1].name} with --checkpoint.allow_changed" if known else "Start again"
        return (
            f"{again} and a lower --learning_rate, or --mixed_precision bf16 instead of fp16; "
            "or pass such steps over with --train.on_nonfinite skip."
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.plan.steps,
            initial=self.step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
            disable=not self.accelerator.is_local_main_process,
        )

    # Stopping and going on -----------------------------------------------------------------------------------------

    def _training_state(self) -> checkpoint.TrainingState:
        tensors, numbers = checkpoint.pack_optimizer(self.optimizer)
        if self.ema:
            tensors |= {f"weights.{name}": value for name, value in self.adapter.state_dict().items()}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "plan": self.plan.to_dict(),
            "numbers": numbers,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "passed_over": self.passed_over,
            "options": to_dict(self.config),
            "versions": self.versions,
        }
        return checkpoint.TrainingState(tensors, state)

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint as if the run had not stopped. Raises UserError where it does not fit."""
        published, training = checkpoint.load(folder)
        state, tensors = training.state, training.tensors
        raw = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        try:
            self.adapter.load_state_dict(raw or published)
            if self.ema:
                self.ema.network.load_state_dict(published)
        except RuntimeError as fault:
            raise UserError(f"{folder}: its adapter has another shape than this run's: {fault}") from fault
        if state["options"]["optim"]["name"] == self.config.optim.name:
            checkpoint.unpack_optimizer(self.optimizer, {**tensors, **state["numbers"]})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.passed_over = state["step"], state.get("passed_over", 0)
        if self.accelerator.is_main_process:
            for line in checkpoint.set_aside_after(self.output_dir, self.step):
                tqdm.write(line)
            self.saver.started_from(folder, self.step)
            tracking.truncate_metrics(self.output_dir / "metrics.jsonl", self.step)
