"""The training loop: when a run logs, saves, validates, stops and resumes. `update.py` makes each step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from t2i_adapter.config.tree import to_dict
from t2i_adapter.devices import is_out_of_memory, release
from t2i_adapter.errors import Stopped, UserError, first_line, flag
from t2i_adapter.progress import Bar, progress_bar
from t2i_adapter.runs.page import write_report
from t2i_adapter.training import advice, checkpoint, nonfinite, tracking
from t2i_adapter.training.advice import Advisor
from t2i_adapter.training.control import Control, Findings
from t2i_adapter.training.data_record import DataRecord
from t2i_adapter.training.events import Callback, Event, StopTraining
from t2i_adapter.training.peers import Peers
from t2i_adapter.training.profile import FOLDER, Profile
from t2i_adapter.training.resume import versions
from t2i_adapter.training.saving import Saver
from t2i_adapter.training.signals import Reason, Stopper
from t2i_adapter.training.update import Update
from t2i_adapter.types import Batch

T = TypeVar("T")
METRICS = "metrics.jsonl"
"""In a run's folder: a line of JSON for each log entry."""


class Trainer:
    """One run on one rank; every rank of a run holds an equal one."""

    def __init__(
        self,
        update: Update,
        batches: Callable[[int], Iterator[Batch]],
        validate: Callable[[Any, int], float | None] | None,
        stopper: Stopper,
        data: DataRecord,
        *,
        peers: Peers,
        validates: bool = False,
        control: Control | None = None,
        look_steps: Collection[int] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """batches: first step -> this rank's micro-batches from there on, in order, on the device.

        validate: (adapter, step) -> score of the adapter, higher is better, or None if it is not measured; only the
        main process has one. data: what the batches are made of. peers: the processes of the run. validates: whether
        the main process validates, the same on all. control: measures held-out pairs after the steps `look_steps`; only
        the main process has one. callbacks: get an `Event` for each log entry.

        After `fit`, `first_step` is the step that it began at, and `seconds` what it took.
        """
        self.update, self.batches, self.validate, self.stopper = update, batches, validate, stopper
        self.data, self.control, self._look_steps = data, control, frozenset(look_steps)
        self._callbacks = tuple(callbacks)
        self._peers, self._validates = peers, validates
        self.config, self.plan, self.accelerator = update.config, update.plan, update.accelerator
        self.output_dir = Path(self.config.output_dir)
        options = self.config.checkpoint
        self.saver = Saver(self.output_dir, checkpoint.KeepPolicy(options.keep, options.keep_every), self._warn)
        self.skipped_steps = 0
        self.first_step = 0
        self.seconds = 0.0
        self.is_plateau = False
        self._began = time.monotonic()

    @property
    def step(self) -> int:
        """Updates made so far, those before a resume included."""
        return self.update.step

    def fit(self) -> None:
        """Trains from the present step to the plan's last, or to the plateau; logs, saves and validates when due.

        Raises Stopped, after saving a checkpoint, if a signal or a limit ends the run early.
        """
        self.stopper.begin_training(self._peers.group)
        self.first_step, self._began = self.step, time.monotonic()
        try:
            self._validate_first()
            with self.update.running():
                self._train()
        finally:
            self.saver.close()
        self.seconds = time.monotonic() - self._began
        self.stopper.end_training()

    def _train(self) -> None:
        batches = self.update.meter.waiting(self.batches(self.step))
        profile = self._profile()
        with self._progress_bar() as bar:
            while self.step < self.plan.steps and not self.is_plateau:
                self.update(batches)
                self._skip(self.update.guard.known())
                bar.update()
                if profile:
                    profile.step()
                if self._is_due(self.config.tracking.log_every):
                    self._log(bar)
                if self._is_due(self.config.checkpoint.every):
                    self._save()
                if self._is_due(self.config.validation.every):
                    self._validate()
                if self.step in self._look_steps:
                    self._look()
                reason = self.stopper.stop_reason(self.step)
                if reason == Reason.PLATEAU:
                    self._end_at_plateau()
                elif reason and self.step < self.plan.steps:
                    self._stop(reason)

    def _profile(self) -> Profile | None:
        if not self.config.train.profile or not self.accelerator.is_main_process:
            return None
        steps = self.plan.steps - self.step
        return Profile(self.update.profiled_modules(), self.output_dir / FOLDER, steps, self.accelerator.device)

    def _is_due(self, every: int) -> bool:
        """True at each multiple of `every` and at the last step."""
        return self.step % every == 0 or self.step == self.plan.steps

    def _log(self, bar: Bar) -> None:
        """Logs the numbers since the last entry. The one place in the loop where the host waits for the device."""
        self._skip(self.update.guard.all())
        values = self.update.meter.read(self.accelerator, self.plan.global_batch)
        bad = values.pop("nonfinite_steps")
        scaler = self.accelerator.scaler
        scale_is_lost = scaler is not None and scaler.get_scale() < nonfinite.LEAST_SCALE
        if bad and self.config.train.on_nonfinite == "skip" and math.isnan(values["loss"]):
            return  # every step since the last entry was skipped, and `_skip` has reported each
        stops = bad and self.config.train.on_nonfinite == "stop"
        if not math.isfinite(values["loss"]) or scale_is_lost or stops:
            raise UserError(f"Step {self.step}: NaN or inf in the loss or its gradient. {self._advice()}", kind="nan")
        values["lr"] = self.update.lr_at(self.step - 1)
        bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            samples_s=f"{values['samples_per_s']:.1f}",
            waiting=f"{values['wait_share']:.0%}",
            refresh=False,  # the bar shows it when it is next drawn
        )
        self._track(values)

    def _track(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self._record(values)
            tracking.log(self.accelerator, values, self.step)

    def _record(self, values: Mapping[str, Any]) -> None:
        """Writes an entry into the run's log, and calls the callbacks with it."""
        tracking.append_metrics(self.output_dir / METRICS, values, self.step)
        event = Event(self.step, self.plan.steps, values, self.output_dir)
        try:
            for callback in self._callbacks:
                callback(event)
        except StopTraining:
            self.stopper.request(Reason.CALLED_OFF)

    def _warn(self, text: str) -> None:
        """Prints a warning, and logs it for the run's page."""
        tqdm.write(text)
        if self.accelerator.is_main_process:
            self._record({"warning": text})

    def _save(self) -> None:
        """Copies the state to host memory, and lets a thread write it while training continues."""
        self._skip(self.update.guard.all())
        if self.accelerator.is_main_process:
            with self.update.meter.paused():
                self.saver.save(checkpoint.snapshot(self.update.ema_or_adapter, self._training_state()))

    def _stop(self, reason: Reason) -> None:
        """Saves this step unless its checkpoint exists, and raises Stopped."""
        self._skip(self.update.guard.all())
        self._peers.main_works(self._save_last)
        text = f"Stopped after step {self.step} of {self.plan.steps}: {reason.text}."
        if self.accelerator.is_main_process and self.saver.saved != self.step:
            text += f" checkpoint-{self.step} could NOT be written; the older checkpoints are whole."
        raise Stopped(text, self.stopper.exit_code(reason))

    def _save_last(self) -> None:
        self.saver.wait()
        if self.saver.saved != self.step:
            self._save()
        self.saver.close()

    def _end_at_plateau(self) -> None:
        """Saves this step unless its checkpoint exists; the run then ends as after its last step."""
        self.is_plateau = True
        self.saver.wait()
        if self.saver.saved != self.step:
            self._save()
        self._validate()
        if self.control:
            self.control.end(self.step)

    # Validation -----------------------------------------------------------------------------------------------------

    def _validate_first(self) -> None:
        if self.step == 0:
            self._validate()

    def _validate(self) -> None:
        if self._validates:
            with self.update.paused():
                self._peers.main_works(self._validate_here)

    def _validate_here(self) -> None:
        if self.validate:
            self._score(self._measured(partial(self.validate, self.update.ema_or_adapter, self.step)))

    def _measured(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None if the run was stopped meanwhile, or if there is too little memory for a picture:
        that costs the pictures, and the training goes on."""
        try:
            return self.stopper.unless_stopped(work)
        except (UserError, RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            text = first_line(fault)
        release(self.accelerator.device)
        self._warn(f"Step {self.step}: out of memory, so no pictures are made; training continues. {text}")
        return None

    def _score(self, score: float | None) -> None:
        """Logs a validation's score, and marks the checkpoint of this step as the best if it is."""
        if score is None:
            return
        self._track({"control": score})
        if not self.config.checkpoint.keep_best or self.step == 0 or self.control:
            return
        if self.saver.best is None or score > self.saver.best[1]:
            self.saver.wait()
            if self.saver.saved != self.step:
                self._save()
            self.saver.keep_as_best(self.step, score)

    def _look(self) -> None:
        """Measures control on held-out pairs, and asks the run to stop if no gain is left and the options say so."""
        with self.update.paused():
            self._peers.main_works(self._look_here)

    def _look_here(self) -> None:
        if self.control:
            elapsed = time.monotonic() - self._began
            self._report(self._measured(partial(self.control, self.update.ema_or_adapter, self.step, elapsed)))

    def _report(self, found: Findings | None) -> None:
        """Logs what a look found, keeps the checkpoints that may be the best, and acts on a plateau."""
        if found is None or self.control is None:
            return
        for entry in found.entries:
            self._record(entry)
        for line in found.lines:
            tqdm.write(line)
        began = time.monotonic()
        write_report(self.output_dir)
        self.control.seconds += time.monotonic() - began
        tracking.log(self.accelerator, found.scalars(), self.step)
        advisor = self.control.advisor
        if self.config.checkpoint.keep_best:
            self._keep_best(advisor)
        if self.config.train.stop_when == "plateau" and advisor.is_plateau:
            self.stopper.request(Reason.PLATEAU)

    def _keep_best(self, advisor: Advisor) -> None:
        """Saves this step if it may become the best, and marks the best one."""
        candidates, best = advisor.candidates(), advisor.best()
        if self.step in candidates:
            self.saver.wait()
            if self.saver.saved != self.step:
                self._save()
        self.saver.protect(candidates)
        if best is not None:
            look = next(look for look in advisor.looks if look.step == best)
            self.saver.keep_as_best(best, float(advice.benefit(look).mean()))

    # NaN and inf ----------------------------------------------------------------------------------------------------

    def _skip(self, steps: list[int]) -> None:
        """Counts and reports steps skipped for NaN or inf, and saves their batches. All ranks have the same steps.

        Raises UserError if the options allow no such step, or no more.
        """
        for step in steps:
            train = self.config.train
            stops = train.on_nonfinite == "stop" or self.skipped_steps >= train.max_nonfinite
            text = f"Step {step}: NaN or inf in the gradient; the update was skipped. {self._save_bad(step, stops)}"
            if stops:
                raise UserError(f"{text} {self._advice()}", kind="nan")
            self.skipped_steps += 1
            self._warn(f"{text} Skipped steps: {self.skipped_steps} of at most {train.max_nonfinite}.")

    def _save_bad(self, step: int, with_weights: bool) -> str:
        """Builds a skipped step's batches again and saves them to a file; returns a text with the bad samples' names
        and the file."""
        batches = list(islice(self.batches(step), self.plan.accumulate))
        names = ", ".join(map(str, nonfinite.suspects(batches, self._losses)[:8]))
        rank = "" if self.accelerator.is_main_process else f".process-{self.accelerator.process_index}"
        file = self.output_dir / nonfinite.FOLDER / f"step-{step:06d}{rank}.safetensors"
        try:
            nonfinite.write(file, step, batches, self.update.adapter.state_dict() if with_weights else {})
        except OSError as fault:
            return f"Samples: {names}. Their batch could not be saved ({fault})."
        return f"Samples: {names}. Their batch is saved as {file}."

    def _losses(self, batch: Batch) -> Tensor:
        """Each sample's loss, computed on this rank alone."""
        return self.update.losses(self.update.adapter, batch)

    def _advice(self) -> str:
        known = checkpoint.list_checkpoints(self.output_dir)
        again = f"Resume from {known[-1][1].name} with {flag('checkpoint.allow_changed')}" if known else "Start again"
        return (
            f"{again} and a lower {flag('optim.lr')}, or {flag('train.mixed_precision')} bf16 instead of fp16; "
            f"or skip such steps with {flag('train.on_nonfinite')} skip."
        )

    def _progress_bar(self) -> Bar:
        return progress_bar(
            "training",
            self.plan.steps,
            "step",
            done=self.step,
            is_reported=self.accelerator.is_local_main_process,
            leave=True,
            delay=0,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,  # in a log file, one line in 10 s
        )

    # Checkpoint and resume ------------------------------------------------------------------------------------------

    def _training_state(self) -> checkpoint.TrainingState:
        update, (tensors, data) = self.update.state(), self.data.pack()
        run = {
            "data": data,
            "plan": self.plan.to_dict(),
            "skipped_steps": self.skipped_steps,
            "options": to_dict(self.config),
            "versions": versions(),
        }
        return checkpoint.TrainingState(update.tensors | tensors, {**update.state, **run})

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint as if the run had not stopped. Raises UserError if it does not fit."""
        weights, training = checkpoint.load(folder)
        try:
            self.update.load(weights, training)
        except UserError as fault:
            raise fault.within(str(folder)) from fault
        self.skipped_steps = training.state["skipped_steps"]
        if self.accelerator.is_main_process:
            for line in checkpoint.set_aside_after(self.output_dir, self.step):
                tqdm.write(line)
            self.saver.started_from(folder, self.step)
            tracking.truncate_metrics(self.output_dir / METRICS, self.step)
            if self.control:
                self.control.resume(self.step)
