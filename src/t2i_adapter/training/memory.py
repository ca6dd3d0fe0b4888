"""Memory and operations of a training step without weights: it runs on meta tensors, which have shapes only."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import T2IAdapter, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import Config
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.models.base import Base, enable_gradient_checkpointing
from t2i_adapter.models.joint import JointAdapter, adapters_in
from t2i_adapter.models.quantize import quantize
from t2i_adapter.training.flops import FlopCount, Flops
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import Batch, text_length

OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 4}
"""Bytes of each optimiser's state for one parameter: two moments, or one."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device. step: the peak of a forward and backward pass, gradients included."""

    base: int
    adapter: int
    optimizer: int
    ema: int
    step: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.optimizer + self.ema + self.step


class StepCost(NamedTuple):
    """What one micro-step takes. peak: bytes of its tensors at their most, inputs and gradients included."""

    peak: int
    flops: Flops


class Shapes:
    """A run's networks on the meta device, built once for batches of any size."""

    def __init__(self, config: Config, base: Base, adapter: Any, dtype: torch.dtype) -> None:
        """adapter: the one to train; only its shapes are used. dtype: arithmetic of the run."""
        self.config, self.base, self.dtype = config, base, dtype
        with torch.device("meta"):
            self._unet = self._make_unet()
            self._adapter = _same_shapes(adapter).train()
        schedule = NoiseSchedule.of(base.scheduler()).to(torch.device("meta"))
        self._frozen = FrozenModel(self._unet, schedule, base.latent_scale, dtype)
        self._costs: dict[tuple[int, int, int], StepCost] = {}

    def memory(self, batch_size: int, *, height: int, width: int) -> Memory:
        """Memory for a micro-batch of pictures of height x width pixels."""
        return replace(self.state(), step=self.step(batch_size, height=height, width=width).peak)

    def state(self) -> Memory:
        """Memory of the weights and the optimiser, without a step."""
        trained = sum(parameter.numel() for parameter in self._adapter.parameters())
        return Memory(
            base=sum(tensor.nbytes for tensor in _tensors(self._unet)),
            adapter=4 * trained,
            optimizer=OPTIMIZER_BYTES[self.config.optim.name] * trained,
            ema=4 * trained if self.config.train.ema_decay else 0,
            step=0,
        )

    def _make_unet(self) -> Any:
        config, kind = self.config, self.config.base.quantize
        with _default_dtype(self.dtype):
            unet: Any = UNet2DConditionModel.from_config(dict(self.base.unet_config))
        unet.eval().requires_grad_(False)
        if kind != "none":
            quantize(unet, kind, "meta")
        if config.train.gradient_checkpointing:
            enable_gradient_checkpointing(unet, config.train.checkpoint_blocks)
        return unet

    def step(self, batch_size: int, *, height: int, width: int) -> StepCost:
        """Memory and operations of a micro-step with pictures of height x width pixels."""
        key = (batch_size, height, width)
        if key not in self._costs:
            self._costs[key] = self._run_step(batch_size, height, width)
        return self._costs[key]

    def flops(self, *, height: int, width: int) -> Flops:
        """Operations of one sample. They take half the time of `step` to count."""
        with _fused_attention(), FlopCount() as count:
            self._losses(self._batch(1, height, width)).backward()
        return count.flops

    def _run_step(self, batch_size: int, height: int, width: int) -> StepCost:
        for parameter in self._adapter.parameters():
            parameter.grad = None
        batch = self._batch(batch_size, height, width)
        inputs = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
        with _fused_attention(), Watermark() as watermark, FlopCount() as count:
            self._losses(batch).backward()
        return StepCost(inputs + watermark.peak, count.flops)

    def _batch(self, size: int, height: int, width: int) -> Batch:
        return example_batch(
            self.base.unet_config,
            size,
            height=height,
            width=width,
            channels=self._adapter.config["in_channels"],
            draws=self.config.train.noise_draws,
            length=text_length(self.config.data.max_tokens),
            device="meta",
        )

    def _losses(self, batch: Batch) -> torch.Tensor:
        """The mean loss, ()."""
        return batch_losses(self._run_adapter, self._frozen, batch).mean()

    def _run_adapter(self, condition: torch.Tensor) -> Any:
        """Emulates autocast, which caches low-precision copies of the weights but does nothing on meta tensors."""
        if self.dtype == torch.float32:
            return self._adapter(condition)
        cast = {name: parameter.to(self.dtype) for name, parameter in self._adapter.named_parameters()}
        return torch.func.functional_call(self._adapter, cast, (condition.to(self.dtype),))


def largest_batch(peak: Callable[[int], int], room: float) -> int:
    """The largest batch whose step fits into `room` bytes; 0 if not even one sample does.

    peak: samples of a batch -> bytes of its step. Every tensor's size is a constant plus a part that grows with the
    batch. A peak is the maximum of sums of these, so it is convex: a line through two points lies above it between
    them and below it beyond them. Therefore few batches need be tried.
    """
    if peak(1) > room:
        return 0
    if peak(2) > room:
        return 1
    before, low, high = 1, 2, None
    while high is None or high > low + 1:
        slope = max(1.0, (peak(low) - peak(before)) / (low - before))
        guess = low + int((room - peak(low)) / slope)  # no larger batch fits
        if guess == low:
            return low
        if high is not None and guess >= high:
            chord = low + int((room - peak(low)) * (high - low) / (peak(high) - peak(low)))  # this one fits
            guess = min(max(chord, low + 1), high - 1)
        if peak(guess) <= room:
            before, low = low, guess
        else:
            high = guess
    return low


def _same_shapes(adapter: Any) -> Any:
    """A network of the adapter's shapes, on the default device."""
    parts: list[Any] = [T2IAdapter.from_config(part.config) for part in adapters_in(adapter)]
    return parts[0] if len(parts) == 1 else JointAdapter(parts)


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Forces flash attention, as devices compute it: on meta tensors torch falls back to the full L x L matrix.

    torch's function is patched, because a dispatch mode is not active in what the backward pass recomputes.
    """

    def fused(query: Any, key: Any, value: Any, *_: Any, scale: float | None = None, **__: Any) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)[0]

    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class Watermark(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are still alive; `peak` is the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in before and storage not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.alive -= size


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
