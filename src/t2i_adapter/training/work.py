"""What a run's sample costs, for its log: operations, and the time that the card's matrix units need for them."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import Accelerator

from t2i_adapter.cards import card_of_device
from t2i_adapter.config.tree import Config
from t2i_adapter.models.base import Base
from t2i_adapter.models.joint import adapters_in
from t2i_adapter.training.flops import Flops, rates_of
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.meter import Work

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_counted: dict[str, Flops] = {}


def sample_work(config: Config, base: Base, adapter: Any, accelerator: Accelerator) -> Work:
    """The work of a sample of `data.resolution` squared pixels; pictures of buckets have about that area.

    It is counted once in a process for each kind of run, without the device.
    """
    side, precision = config.data.resolution, accelerator.mixed_precision
    sizes = [dict(base.unet_config), *(dict(part.config) for part in adapters_in(adapter))]
    train = config.train
    options = (side, config.base.quantize, train.noise_draws, train.gradient_checkpointing, train.checkpoint_blocks)
    key = json.dumps([precision, options, config.data.max_tokens, sizes], sort_keys=True, default=str)
    if key not in _counted:
        shapes = Shapes(config, base, adapter, _DTYPES.get(precision, torch.float32))
        _counted[key] = shapes.flops(height=side, width=side)
    flops, device = _counted[key], accelerator.device
    card = card_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None:
        return Work(flops.total, None)
    rates = rates_of(precision, allow_tf32=train.allow_tf32, quantize=config.base.quantize, card=card)
    return Work(flops.total, flops.seconds(card, *rates))
