"""Muon: momentum whose update of each weight matrix is orthogonalised (Jordan et al. 2024), AdamW for the rest.

Orthogonalising costs the same for any batch size, and the ranks share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MOMENTUM = 0.95
_ROUNDS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # X <- aX + b(XX')X + c(XX')^2 X drives singular values to about 1
_ADAM_RMS = 0.2  # RMS of a typical AdamW update, to which Muon's is scaled (arXiv 2502.16982, 2.2)


class Muon(torch.optim.Optimizer):
    """Weights of two dimensions and more by Muon, all others by AdamW, at one learning rate and decoupled decay.

    A convolution is a matrix (out, in * kh * kw). With several ranks each orthogonalises its share; their gradients
    must be equal, as they are after an all-reduce.

    Like torch's fused optimisers it reads the attribute `found_inf`, a () tensor on the device: if that is not 0, the
    step changes neither weights nor state, and the host need not know.

    betas, eps: for the AdamW part.
    """

    _step_supports_amp_scaling = True  # by this name torch's GradScaler knows that `step` reads `found_inf`

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is None
        assert getattr(self, "grad_scale", None) is None, "the gradients are scaled back before a step"
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_skipped = None if found_inf is None else found_inf != 0
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            decay = 1 - group["lr"] * group["weight_decay"]
            matrices = [p for p in used if p.ndim >= 2]
            for parameter, update in zip(matrices, self._updates(matrices, is_skipped), strict=True):
                _assign(parameter, parameter.mul(decay).sub_(update.view_as(parameter), alpha=group["lr"]), is_skipped)
            for parameter in (p for p in used if p.ndim < 2):
                self._adam_step(parameter, group, decay, is_skipped)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch leaves it where it was loaded
                state["step"] = state["step"].to(parameter.device)

    def _updates(self, matrices: list[nn.Parameter], is_skipped: Tensor | None) -> list[Tensor]:
        """The orthogonalised momenta, (out, rest) each: every rank computes its share, and receives all."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        updates = []
        for i, parameter in enumerate(matrices):
            direction = self._momentum(parameter, is_skipped)
            updates.append(orthogonal(direction) if i % world == rank else torch.zeros_like(direction))
        if several:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = [
                part.view_as(u) for u, part in zip(updates, flat.split([u.numel() for u in updates]), strict=True)
            ]
        return updates

    def _momentum(self, parameter: nn.Parameter, is_skipped: Tensor | None) -> Tensor:
        """Nesterov momentum, (out, rest): the gradient moved towards its running mean."""
        assert parameter.grad is not None
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp(parameter.grad, 1 - _MOMENTUM)
        _assign(state["momentum"], momentum, is_skipped)
        return parameter.grad.lerp(momentum, _MOMENTUM).flatten(1)

    def _adam_step(
        self, parameter: nn.Parameter, group: dict[str, Any], decay: float, is_skipped: Tensor | None
    ) -> None:
        """AdamW's step, whose decoupled decay multiplies the weights by `decay`."""
        assert parameter.grad is not None
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(
                step=torch.zeros((), device=parameter.device),  # where skipped steps are not counted either
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )
        b1, b2 = group["betas"]
        new = {
            "step": state["step"] + 1,
            "exp_avg": state["exp_avg"].lerp(parameter.grad, 1 - b1),
            "exp_avg_sq": state["exp_avg_sq"].lerp(parameter.grad.square(), 1 - b2),
        }
        scale = (new["exp_avg_sq"] / _correction(b2, new["step"])).sqrt_().add_(group["eps"])
        scale.mul_(_correction(b1, new["step"]))
        _assign(parameter, parameter.mul(decay).addcdiv_(new["exp_avg"], scale, value=-group["lr"]), is_skipped)
        for name, value in new.items():
            _assign(state[name], value, is_skipped)


def _assign(target: Tensor, value: Tensor, is_skipped: Tensor | None) -> None:
    """Writes `value` into `target`, unless `is_skipped`, a () bool on their device, is true."""
    target.copy_(value if is_skipped is None else torch.where(is_skipped, target, value))


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step, () float32, without the digits that the subtraction would lose."""
    return torch.expm1(step * (math.log(beta) if beta else -math.inf)).neg_()


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximates U V' of the singular value decomposition U S V' of (m,n) by Newton-Schulz rounds, scaled to the RMS
    of an AdamW update."""
    a, b, c = _QUINTIC
    x = (matrix / (matrix.norm() + 1e-7)).to(_product_type(matrix))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype) * (_ADAM_RMS * max(matrix.shape) ** 0.5)


def _product_type(matrix: Tensor) -> torch.dtype:
    """bfloat16, whose few digits the rounds do not need; float32 on a CPU without AVX-512, where products in
    bfloat16 are emulated and take more than ten times as long."""
    is_slow = matrix.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.float32 if is_slow else torch.bfloat16
