"""The loop: a list of sentences."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from t2i_adapter.config import Config, to_dict
from t2i_adapter.errors import UserError
from t2i_adapter.training import checkpoint, optim, tracking
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.meter import Meter
from t2i_adapter.training.plan import Plan
from t2i_adapter.training.step import Frozen, batch_losses
from t2i_adapter.types import Batch


@dataclass
class Trainer:
    """One run on one process; every process of a run holds an equal one.

    adapter: the network that learns, float32. batches: first step -> micro-batches from there on, in order,
    on the device.
    validate: (adapter, step) -> None, or None; it is called on the main process. versions: library -> version.
    """

    config: Config
    plan: Plan
    accelerator: Accelerator
    adapter: Any
    frozen: Frozen
    batches: Callable[[int], Iterator[Batch]]
    validate: Callable[[Any, int], None] | None
    versions: dict[str, str]

    def __post_init__(self) -> None:
        self.step = 0
        self.output_dir = Path(self.config.output_dir)
        self.adapter.to(self.accelerator.device).train()
        self.optimizer = optim.make_optimizer(self.config.optim, self.adapter.parameters(), self.plan.lr)
        self.lr_at = optim.lr_schedule(self.config.optim, self.optimizer, self.plan)
        self.ema = Ema(self.adapter, self.config.train.ema_decay) if self.config.train.ema_decay else None
        self.meter = Meter(self.accelerator.device)
        # What accelerate makes of them: several processes, autocast, loss scaling.
        self.wrapped, self.wrapped_optimizer = self.accelerator.prepare(self.adapter, self.optimizer)

    @property
    def published(self) -> Any:
        """The network that is saved, validated and published: the average, where there is one."""
        return self.ema.network if self.ema else self.adapter

    def fit(self) -> None:
        """Trains from the present step to the plan's last, logging, saving and validating on the way."""
        self._validate_first()
        batches = self.batches(self.step)
        with self._progress_bar() as bar:
            while self.step < self.plan.steps:
                self._accumulate(batches)
                self._update()
                bar.update()
                if self._due(self.config.tracking.log_every):
                    self._log(bar)
                if self._due(self.config.checkpoint.every):
                    self._save()
                if self._due(self.config.validation.every):
                    self._validate()

    def _due(self, every: int) -> bool:
        """Every so many steps, and at the last."""
        return self.step % every == 0 or self.step == self.plan.steps

    def _accumulate(self, batches: Iterator[Batch]) -> None:
        """Adds the gradients of one global batch; processes exchange them once, with the last micro-batch."""
        count = self.plan.accumulate
        for micro in range(count):
            batch = next(batches)
            last = micro == count - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                gamma = self.config.objective.min_snr_gamma
                loss = batch_losses(self.wrapped, self.frozen, batch, min_snr_gamma=gamma).mean() / count
                self.accelerator.backward(loss)
            self.meter.add_loss(loss.detach())

    def _update(self) -> None:
        """Clips, steps the optimiser at this step's learning rate, and counts the step."""
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.optim.max_grad_norm)
        assert norm is not None
        self.meter.add_step(norm, scaled=self.accelerator.scaler is not None)
        optim.set_lr(self.optimizer, self.lr_at(self.step))
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.adapter, self.step)
        self.step += 1

    def _log(self, bar: tqdm) -> None:
        """The one place in the loop where the host waits for the device."""
        values = self.meter.read(self.accelerator, self.plan.global_batch)
        if not math.isfinite(values["loss"]) or values.pop("nonfinite_steps"):
            raise self._diverged()
        values["lr"] = self.lr_at(self.step - 1)
        bar.set_postfix(loss=f"{values['loss']:.4f}", samples_s=f"{values['samples_per_s']:.1f}")
        if self.accelerator.is_main_process:
            tracking.append_metrics(self.output_dir / "metrics.jsonl", values, self.step)
            tracking.log(self.accelerator, values, self.step)

    def _save(self) -> None:
        with self.meter.paused():
            if not self.meter.is_finite(self.accelerator):
                raise self._diverged()
            if self.accelerator.is_main_process:
                self._write_checkpoint()
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self) -> None:
        try:
            checkpoint.save(self.output_dir, self.published, self._training_state(), self.config.checkpoint.keep)
        except OSError as fault:
            tqdm.write(
                f"checkpoint-{self.step} could not be written ({fault}); training goes on, the older ones are whole."
            )

    def _validate_first(self) -> None:
        if self.step == 0:
            self._validate()

    def _validate(self) -> None:
        if self.validate is None:
            return
        with self.meter.paused():
            if self.accelerator.is_main_process:
                self.validate(self.published, self.step)
            self.accelerator.wait_for_everyone()

    def _diverged(self) -> UserError:
        known = checkpoint.list_checkpoints(self.output_dir)
        advice = f"resume from {known[-1][1].name}" if known else "start again"
        return UserError(
            f"The loss or its gradient is no finite number any more, at step {self.step}. Nothing of it was saved: "
            f"{advice} with a lower --learning_rate, or with --mixed_precision bf16 instead of fp16."
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
            tensors |= {f"weights.{name}": value.detach() for name, value in self.adapter.state_dict().items()}
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "samples": self.step * self.plan.global_batch,
            "seed": self.plan.seed,
            "numbers": numbers,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "options": to_dict(self.config),
            "versions": self.versions,
        }
        return checkpoint.TrainingState(tensors, state)

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint as if the run had not stopped."""
        published, training = checkpoint.load(folder, self.accelerator.device)
        raw = {name.removeprefix("weights."): t for name, t in training.tensors.items() if name.startswith("weights.")}
        self.adapter.load_state_dict(raw or published)
        if self.ema:
            self.ema.network.load_state_dict(published)
        checkpoint.unpack_optimizer(self.optimizer, {**training.tensors, **training.state["numbers"]})
        if self.accelerator.scaler is not None and training.state["scaler"]:
            self.accelerator.scaler.load_state_dict(training.state["scaler"])
        self.step = training.state["step"]
        if self.accelerator.is_main_process:
            tracking.truncate_metrics(self.output_dir / "metrics.jsonl", self.step)
