"""One update of the adapter: gradients, clipping, learning rate, NaN guard, optimiser, EMA.

`loop.py` decides when to log, save, validate and stop; this file alone changes weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.training import checkpoint, nonfinite, optim
from t2i_adapter.training.accumulate import Accumulation, plain_gradients
from t2i_adapter.training.cpu import cpu_gradients
from t2i_adapter.training.ema import Ema
from t2i_adapter.training.meter import Meter
from t2i_adapter.training.plan import Plan
from t2i_adapter.training.profile import ADAPTER, EXCHANGE, OPTIMIZER, UNET, is_profiling, mark
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch


class Update:
    """Trains the adapter by one global batch a call; `step` counts the calls. Every rank holds an equal one.

    adapter: the network to train, float32; it is moved to the device. `meter` collects the numbers of each update.
    """

    def __init__(self, config: Config, plan: Plan, accelerator: Accelerator, adapter: Any, frozen: FrozenModel) -> None:
        self.config, self.plan, self.accelerator, self.adapter, self.frozen = config, plan, accelerator, adapter, frozen
        self.step = 0
        self.meter = Meter(accelerator.device)
        self.adapter.to(accelerator.device).train()
        self._weights = list(adapter.parameters())
        self._optimizer = optim.make_optimizer(config.optim, self._weights, plan.lr)
        self.lr_at = optim.lr_schedule(config.optim, plan)
        self._ema = Ema(adapter, config.train.ema_decay) if config.train.ema_decay else None
        self._threads = cpu_gradients(config, accelerator, adapter, self.losses)
        # accelerate adds DDP, autocast and loss scaling.
        self._wrapped, self._wrapped_optimizer = accelerator.prepare(adapter, self._optimizer)
        exchange_by(self._wrapped, config.train.exchange, is_profiled=config.train.profile)
        self.guard = nonfinite.Guard(
            self._optimizer,
            supports_found_inf=nonfinite.supports_found_inf(self._optimizer),
            is_scaled=accelerator.scaler is not None,
        )
        add_gradients = (
            self._threads.add if self._threads else plain_gradients(accelerator, partial(self.losses, self._wrapped))
        )
        self._accumulation = Accumulation(
            accelerator, self._wrapped, add_gradients, plan.accumulate, self.meter.add_loss
        )

    def __call__(self, batches: Iterator[Batch]) -> None:
        """Makes one update from the next micro-batches. Call it inside `running`."""
        self._accumulation.add(batches)
        self._apply()

    def running(self) -> contextlib.AbstractContextManager[None]:
        """The context in which updates are made; it shares a CPU's cores between this thread and those it starts."""
        return self._threads.feeding() if self._threads else contextlib.nullcontext()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `running`, the context for other work: it has all cores, and does not count towards samples/s."""
        with self.meter.paused(), self._threads.pausing() if self._threads else contextlib.nullcontext():
            yield

    @property
    def ema_or_adapter(self) -> Any:
        """The network to save, validate and publish: the EMA if there is one."""
        return self._ema.network if self._ema else self.adapter

    def losses(self, adapter: Any, batch: Batch) -> Tensor:
        """Each sample's loss (B,) with `adapter`: the trained one, or that one wrapped."""
        return batch_losses(adapter, self.frozen, batch, min_snr_gamma=self.config.objective.min_snr_gamma)

    def _apply(self) -> None:
        """Clips the gradients, steps the optimiser at this step's learning rate, updates the EMA, counts the step."""
        norm = self.accelerator.clip_grad_norm_(self._weights, self.config.optim.max_grad_norm)
        assert norm is not None
        self.meter.add_step(norm, is_scaled=self.accelerator.scaler is not None)
        optim.set_lr(self._optimizer, self.lr_at(self.step))
        if self.guard.allows(norm, self.step):
            with mark(OPTIMIZER):
                self._wrapped_optimizer.step()
        self._wrapped_optimizer.zero_grad()
        if self._ema:
            self._ema.update(self.adapter, self.step)
        self.step += 1

    def profiled_modules(self) -> dict[str, Any]:
        """Name in a profile -> network."""
        return {ADAPTER: self.adapter, UNET: self.frozen.unet}

    def state(self) -> checkpoint.TrainingState:
        """What a resumed run needs besides `ema_or_adapter`."""
        tensors, numbers = checkpoint.pack_optimizer(self._optimizer)
        if self._ema:
            tensors |= {f"weights.{name}": value for name, value in self.adapter.state_dict().items()}
        scaler = self.accelerator.scaler
        scaling = scaler.state_dict() if scaler is not None else {}
        return checkpoint.TrainingState(tensors, {"step": self.step, "numbers": numbers, "scaler": scaling})

    def load(self, weights: dict[str, Tensor], training: checkpoint.TrainingState) -> None:
        """Restores what `ema_or_adapter` and `state` held; another optimiser's state is skipped.

        Raises UserError if the adapter has another shape.
        """
        state, tensors = training.state, training.tensors
        raw = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        try:
            self.adapter.load_state_dict(raw or weights)
            if self._ema:
                self._ema.network.load_state_dict(weights)
        except RuntimeError as fault:
            raise UserError(f"the adapter has another shape than this run's: {fault}") from fault
        if state["options"]["optim"]["name"] == self.config.optim.name:
            checkpoint.unpack_optimizer(self._optimizer, {**tensors, **state["numbers"]})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def exchange_options() -> DistributedDataParallelKwargs:
    """How accelerate wraps the adapter with several processes.

    Gradients are views of the buffers that are exchanged, which saves one copy of them (79 M float32 at SDXL's size).
    static_graph stays off: it expects equal backward passes in every step, and a batch that runs out of memory is
    computed again in parts.
    """
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def exchange_by(wrapped: Any, numbers: str, *, is_profiled: bool) -> None:
    """Exchanges gradients in `numbers`, as in `train.exchange`. Does nothing with one process.

    wrapped: the adapter as accelerate returned it. is_profiled: marks the exchange while a step is in a profile.
    """
    if not isinstance(wrapped, DistributedDataParallel) or (numbers == "fp32" and not is_profiled):
        return
    exchange = default_hooks.bf16_compress_hook if numbers == "bf16" else default_hooks.allreduce_hook

    def hook(group, bucket):  # DDP refuses annotations that are text, as they all are in this file
        if not is_profiling():
            return exchange(group, bucket)
        with mark(EXCHANGE):
            result = exchange(group, bucket).wait()
        done: Future[Tensor] = Future()
        done.set_result(result)
        return done

    wrapped.register_comm_hook(dist.group.WORLD, hook)
