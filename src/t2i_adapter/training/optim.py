"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from t2i_adapter.config.tree import OptimOptions
from t2i_adapter.devices import hardware_of
from t2i_adapter.errors import UserError
from t2i_adapter.training.muon import Muon
from t2i_adapter.training.plan import Plan


def check_available(options: OptimOptions) -> None:
    """Raises UserError if the optimiser needs a package that is not installed."""
    if options.name != "adamw8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "adamw8bit needs bitsandbytes: pip install 'sdxl-t2i-adapter[adam8bit]', or use adamw.", option="optim.name"
        )


def make_optimizer(options: OptimOptions, parameters: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW (decoupled decay, 1711.05101), its 8-bit form (2110.02861) from bitsandbytes, or Muon."""
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": options.betas,
        "weight_decay": options.weight_decay,
        "eps": options.eps,
    }
    if options.name == "muon":
        return Muon(parameters, **settings)
    if options.name == "adamw":
        # Fused into one kernel: on a CPU a quarter of the time (benchmarks/results/speed_options_2cpu_2026-11-26.json).
        parameters = list(parameters)
        fused = hardware_of(parameters[0].device).can("fused_adamw")
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    return importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **settings)


def lr_schedule(options: OptimOptions, plan: Plan) -> Callable[[int], float]:
    """step -> learning rate, for any of diffusers' schedules.

    It counts updates of the whole run, so it is equal for any number of ranks, and a resumed run needs no state. The
    schedule begins at update `options.schedule_from`, and has the peak rate before.
    """
    first = options.schedule_from
    scheduler = get_scheduler(
        options.schedule,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=plan.lr),  # diffusers reads its rate
        step_rules=options.step_rules or None,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=plan.steps - first,
        num_cycles=options.num_cycles,
        power=options.power,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda step: plan.lr * (factor(step - first) if step >= first else 1.0)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
