"""A frozen UNet whose large matrices are kept in 8 or 4 bits, through which gradients still flow to its inputs.

The linear layers of the transformer blocks (nine tenths of SDXL's UNet) are stored narrow and widened for each
product, in the forward pass and again in the backward pass, so that no wide copy outlives its product. Convolutions,
norms, embeddings of time and size, and the first and last layer stay as they are: they are few, and the most delicate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["float8", "int8", "nf4"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FLOAT8 = torch.float8_e4m3fn
"""Three bits of mantissa; the largest is 448."""
NF4_BLOCK = 64
"""Weights that share a scale in nf4."""


class Format(NamedTuple):
    """How a weight (out, in) is stored: as bytes and scales. bits: a weight's, its share of the scales left out."""

    bits: int
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def quantize(unet: Any, kind: Kind, device: torch.device | str) -> Any:
    """Replaces the linear layers of the UNet's transformer blocks by narrow ones on the device; returns the UNet.

    Each matrix crosses over by itself, so the device never holds the wide UNet; the other layers stay where they are.
    """
    for name, module in list(unet.named_modules()):
        for child, layer in list(module.named_children()):
            if is_quantized(f"{name}.{child}", layer):
                setattr(module, child, NarrowLinear(layer, kind, device))
    return unet


def is_quantized(name: str, layer: nn.Module) -> bool:
    """Whether the UNet's layer of this dotted name is among those that are stored narrow."""
    return isinstance(layer, nn.Linear) and ".attentions." in name


def stored_bytes(out_features: int, in_features: int, kind: Kind) -> int:
    """Bytes of a narrow matrix with its scales."""
    weights = out_features * in_features
    if kind == "nf4":
        blocks = math.ceil(weights / NF4_BLOCK)
        return blocks * (NF4_BLOCK // 2 + 4)
    return weights + 4 * out_features


class NarrowLinear(nn.Module):
    """A frozen linear layer in few bits."""

    def __init__(self, layer: nn.Linear, kind: Kind, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        data, scale = FORMATS[kind].pack(layer.weight.detach().to(device))
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        shape = (self.out_features, self.in_features)
        return _Product.apply(x, self.data, self.scale, self.bias, self.kind, shape)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T + b that keeps the narrow W for its backward pass, and gives a gradient to x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, kind: Kind, shape: Any
    ) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.kind, ctx.shape = kind, shape
        if kind == "float8" and multiplies_float8(x.device, x.dtype, shape):
            product = float8_product(x, data, scale)
            return product if bias is None else product + bias
        return F.linear(x, _wide(kind, data, scale, x.dtype, shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        data, scale = ctx.saved_tensors
        if ctx.kind == "float8" and multiplies_float8(gradient.device, gradient.dtype, ctx.shape):
            answer = float8_gradient(gradient, data, scale)
        else:
            answer = gradient @ _wide(ctx.kind, data, scale, gradient.dtype, ctx.shape)
        return answer, None, None, None, None, None


def _wide(kind: Kind, data: Tensor, scale: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    flat = FORMATS[kind].unpack(data, scale, dtype)
    return flat.flatten()[: shape[0] * shape[1]].view(shape)


# Products in float8 --------------------------------------------------------------------------------------------------


@cache
def _has_float8_units(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 9)  # Ada and Hopper on


def multiplies_float8(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """Whether the device multiplies float8 matrices of this shape (out, in) faster than `dtype`."""
    fits = dtype == torch.bfloat16 and shape[0] % 16 == 0 and shape[1] % 16 == 0
    return fits and device.type == "cuda" and _has_float8_units(device.index)


def float8_product(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x (..., in) times W^T in float8, each row of x narrowed by its own scale -> (..., out)."""
    narrow, rows = _narrow_rows(x.flatten(0, -2))
    wide = torch._scaled_mm(narrow, data.view(FLOAT8).t(), scale_a=rows, scale_b=scale.t(), out_dtype=x.dtype)
    return wide.unflatten(0, x.shape[:-1])


def float8_gradient(gradient: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """gradient (..., out) times W in float8 -> (..., in). W's scales belong to what is summed over: they go first."""
    narrow, rows = _narrow_rows(gradient.flatten(0, -2) * scale.to(gradient.dtype).t())
    columns = data.view(FLOAT8).t().contiguous().t()  # the layout that float8 units ask of the second matrix
    ones = scale.new_ones(1, data.shape[1])
    wide = torch._scaled_mm(narrow, columns, scale_a=rows, scale_b=ones, out_dtype=gradient.dtype)
    return wide.unflatten(0, gradient.shape[:-1])


def _narrow_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, n) -> the same in float8, and the scale (rows, 1) that each row was divided by."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (x / scale.to(x.dtype)).clamp(-448, 448).to(FLOAT8), scale


# Formats -------------------------------------------------------------------------------------------------------------


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and a scale for each output."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (wide / scale).round().to(torch.int8), scale


def _unpack_int8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.to(dtype) * scale.to(dtype)


def _pack_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 and a scale for each output."""
    data, scale = _narrow_rows(weight.float())
    return data.view(torch.uint8), scale  # as bytes, which no cast of the whole model's floating-point type touches


def _unpack_float8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.view(FLOAT8).to(dtype) * scale.to(dtype)


def _nf4_levels() -> list[float]:
    """The 16 values of QLoRA's NormalFloat (2305.14314, appendix E): quantiles of a normal, 0 and both ends exact.

    The quantiles are taken between `tail` and 1/2 at evenly spaced places, eight for the positive side, seven for the
    negative, and scaled to 1.
    """
    tail = 0.9677083
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(tail + (0.5 - tail) * place / 8) for place in range(8)]
    negative = [-quantile(tail + (0.5 - tail) * place / 7) for place in range(7)]
    return [value / positive[0] for value in sorted([*negative, 0.0, *positive])]


@cache
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The levels where they are needed, copied there once: a copy in each step would wait for the device."""
    return torch.tensor(_nf4_levels(), dtype=dtype, device=device)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights a byte, each the nearest of 16 levels, and a scale for each block of 64."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    levels = _levels(weight.device, torch.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale, middles, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def _unpack_nf4(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([data >> 4, data & 15], dim=-1).flatten(1)
    return _levels(data.device, dtype)[codes.int()] * scale.to(dtype)


FORMATS: dict[Kind, Format] = {
    "int8": Format(8, _pack_int8, _unpack_int8),
    "float8": Format(8, _pack_float8, _unpack_float8),
    "nf4": Format(4, _pack_nf4, _unpack_nf4),
}
