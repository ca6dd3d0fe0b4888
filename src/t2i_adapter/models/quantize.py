"""Quantises the base's UNet to 8 or 4 bits, so that it takes less memory while an adapter is trained through it.

The linear layers of the transformer blocks, nine tenths of SDXL's UNet, are stored quantised. Each product dequantises
its matrix, in the forward pass and again in the backward pass, so a full-precision copy exists only during a product.
Gradients flow to the layer's input; the weights are frozen. Convolutions, norms, the embeddings of time and size, and
the first and last layer stay as they are: they are small, and the most sensitive to rounding.
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

from t2i_adapter.devices import hardware_of, send

Format = Literal["float8", "int8", "nf4"]
FORMATS: tuple[Format, ...] = get_args(Format)

FLOAT8 = torch.float8_e4m3fn
"""Three bits of mantissa; the largest value is 448."""
NF4_BLOCK = 64
"""Number of weights that share a scale in nf4."""


class Codec(NamedTuple):
    """How a format stores a weight matrix (out, in).

    Attributes:
        bits: bits of one weight, without its share of the scales.
        quantize: matrix -> stored data and scales.
        dequantize: stored data, scales and a dtype -> weights in that dtype.
    """

    bits: int
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def quantize(unet: Any, format: Format, device: torch.device | str) -> Any:
    """Replaces the linear layers of the UNet's transformer blocks by quantised ones on the device; returns the UNet.

    The matrices are moved one by one, so the device never holds the full-precision UNet; other layers are not moved.
    """
    for name, module in list(unet.named_modules()):
        for child, layer in list(module.named_children()):
            if is_quantized(f"{name}.{child}", layer):
                setattr(module, child, QuantizedLinear(layer, format, device))
    return unet


def is_quantized(name: str, layer: nn.Module) -> bool:
    """Whether `quantize` replaces the UNet's layer of this dotted name."""
    return isinstance(layer, nn.Linear) and ".attentions." in name


def stored_bytes(out_features: int, in_features: int, format: Format) -> int:
    """Returns the bytes of a quantised matrix with its scales."""
    weights = out_features * in_features
    if format == "nf4":
        blocks = math.ceil(weights / NF4_BLOCK)
        return blocks * (NF4_BLOCK // 2 + 4)
    return weights + 4 * out_features


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored quantised."""

    def __init__(self, layer: nn.Linear, format: Format, device: torch.device | str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = layer.in_features, layer.out_features, format
        data, scale = CODECS[format].quantize(layer.weight.detach().to(device))
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        shape = (self.out_features, self.in_features)
        return _Product.apply(x, self.data, self.scale, self.bias, self.format, shape)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class _Product(torch.autograd.Function):
    """x W^T + b. It saves the quantised W for the backward pass, and returns a gradient of x only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, format: Format, shape: Any
    ) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.format, ctx.shape = format, shape
        if format == "float8" and multiplies_float8(x.device, x.dtype, shape):
            product = float8_product(x, data, scale)
            return product if bias is None else product + bias
        return F.linear(x, _dequantize(format, data, scale, x.dtype, shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        data, scale = ctx.saved_tensors
        if ctx.format == "float8" and multiplies_float8(gradient.device, gradient.dtype, ctx.shape):
            of_x = float8_gradient(gradient, data, scale)
        else:
            of_x = gradient @ _dequantize(ctx.format, data, scale, gradient.dtype, ctx.shape)
        return of_x, None, None, None, None, None


def _dequantize(format: Format, data: Tensor, scale: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Returns the weight matrix (out, in)."""
    flat = CODECS[format].dequantize(data, scale, dtype).flatten()
    return flat[: shape[0] * shape[1]].view(shape)  # nf4 pads its last block


# Products in float8 --------------------------------------------------------------------------------------------------


def multiplies_float8(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """Whether the device multiplies float8 matrices of this shape (out, in) faster than `dtype`."""
    fits = dtype == torch.bfloat16 and shape[0] % 16 == 0 and shape[1] % 16 == 0
    return fits and hardware_of(device).can("float8")


def float8_product(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x (..., in) times W^T in float8, each row of x quantised with its own scale -> (..., out)."""
    quantized, rows = _quantize_rows(x.flatten(0, -2))
    product = torch._scaled_mm(quantized, data.view(FLOAT8).t(), scale_a=rows, scale_b=scale.t(), out_dtype=x.dtype)
    return product.unflatten(0, x.shape[:-1])


def float8_gradient(gradient: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """gradient (..., out) times W in float8 -> (..., in).

    W's scales lie along the summed dimension, so the gradient is multiplied by them before the product.
    """
    quantized, rows = _quantize_rows(gradient.flatten(0, -2) * scale.to(gradient.dtype).t())
    columns = data.view(FLOAT8).t().contiguous().t()  # float8 units need the second matrix in column-major layout
    ones = scale.new_ones(1, data.shape[1])
    product = torch._scaled_mm(quantized, columns, scale_a=rows, scale_b=ones, out_dtype=gradient.dtype)
    return product.unflatten(0, gradient.shape[:-1])


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, n) -> its float8 values, and the scale (rows, 1) by which each row was divided."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (x / scale.to(x.dtype)).clamp(-448, 448).to(FLOAT8), scale


# Formats -------------------------------------------------------------------------------------------------------------


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127, and a scale for each output (row)."""
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (exact / scale).round().to(torch.int8), scale


def _dequantize_int8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.to(dtype) * scale.to(dtype)


def _quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values, and a scale for each output (row)."""
    data, scale = _quantize_rows(weight.float())
    return data.view(torch.uint8), scale  # as bytes, because `unet.to(dtype)` would cast float8


def _dequantize_float8(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return data.view(FLOAT8).to(dtype) * scale.to(dtype)


def _nf4_levels() -> list[float]:
    """Returns the 16 values of QLoRA's NormalFloat (2305.14314, appendix E): scaled quantiles of a normal distribution.

    The probabilities are evenly spaced between `tail` and 1/2: eight for the positive values, seven for the negative.
    0, -1 and 1 are exact.
    """
    tail = 0.9677083
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(tail + (0.5 - tail) * i / 8) for i in range(8)]
    negative = [-quantile(tail + (0.5 - tail) * i / 7) for i in range(7)]
    return [value / positive[0] for value in sorted([*negative, 0.0, *positive])]


@cache
def _levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the levels on the device, copied once."""
    return send(torch.tensor(_nf4_levels(), dtype=dtype), device)


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights a byte, each the index of the nearest of 16 levels, and a scale for each block of 64."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    levels = _levels(weight.device, torch.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale, middles, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def _dequantize_nf4(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([data >> 4, data & 15], dim=-1).flatten(1)
    return _levels(data.device, dtype)[codes.int()] * scale.to(dtype)


CODECS: dict[Format, Codec] = {
    "int8": Codec(8, _quantize_int8, _dequantize_int8),
    "float8": Codec(8, _quantize_float8, _dequantize_float8),
    "nf4": Codec(4, _quantize_nf4, _dequantize_nf4),
}
