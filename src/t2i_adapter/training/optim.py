"""The optimiser, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from t2i_adapter.config import OptimOptions
from t2i_adapter.errors import UserError
from t2i_adapter.training.plan import Plan


def make_optimizer(options: OptimOptions, parameters: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW (2101.05101 decoupled decay), or its 8-bit form from bitsandbytes. Raises UserError if that is missing."""
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": options.betas,
        "weight_decay": options.weight_decay,
        "eps": options.eps,
    }
    if options.name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as fault:
        raise UserError(
            "--use_8bit_adam needs bitsandbytes: pip install 'sdxl-t2i-adapter[adam8bit]', or leave the flag out."
        ) from fault
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def lr_schedule(options: OptimOptions, optimizer: torch.optim.Optimizer, plan: Plan) -> Callable[[int], float]:
    """step -> learning rate, for any of diffusers' schedules.

    Counted in updates of the whole run, so it is the same on any number of processes, and a resumed run needs no state.
    """
    scheduler = get_scheduler(
        options.schedule,
        optimizer=optimizer,
        step_rules=options.step_rules or None,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=plan.steps,
        num_cycles=options.num_cycles,
        power=options.power,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda step: plan.lr * factor(step)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
