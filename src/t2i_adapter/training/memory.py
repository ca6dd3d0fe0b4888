"""Memory of a training step, computed without weights: the step runs on meta tensors, which have shapes only."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import text_length

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

    def memory(self, batch_size: int, *, height: int, width: int) -> Memory:
        """Memory for a micro-batch of pictures of height x width pixels."""
        trained = sum(parameter.numel() for parameter in self._adapter.parameters())
        return Memory(
            base=sum(tensor.nbytes for tensor in _tensors(self._unet)),
            adapter=4 * trained,
            optimizer=OPTIMIZER_BYTES[self.config.optim.name] * trained,
            ema=4 * trained if self.config.train.ema_decay else 0,
            step=self._step_bytes(batch_size, height, width),
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

    def _step_bytes(self, batch_size: int, height: int, width: int) -> int:
        """Peak of the bytes that a step allocates."""
        for parameter in self._adapter.parameters():
            parameter.grad = None
        batch = example_batch(
            self.base.unet_config,
            batch_size,
            height=height,
            width=width,
            channels=self._adapter.config["in_channels"],
            draws=self.config.train.noise_draws,
            length=text_length(self.config.data.max_tokens),
            device="meta",
        )
        inputs = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
        with _fused_attention(), Watermark() as watermark:
            batch_losses(self._run_adapter, self._frozen, batch).mean().backward()
        return inputs + watermark.peak

    def _run_adapter(self, condition: torch.Tensor) -> Any:
        """Emulates autocast, which caches low-precision copies of the weights but does nothing on meta tensors."""
        if self.dtype == torch.float32:
            return self._adapter(condition)
        cast = {name: parameter.to(self.dtype) for name, parameter in self._adapter.named_parameters()}
        return torch.func.functional_call(self._adapter, cast, (condition.to(self.dtype),))


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
