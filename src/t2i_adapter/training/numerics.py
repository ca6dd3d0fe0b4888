"""How exactly a run computes: its precision on this device, torch's switches for TF32, autotuning and determinism."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from t2i_adapter.abilities import Hardware
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError, first_line, flag

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS reads it at its first product. With a workspace of fixed size it adds in one order."""
_GPUS = ("cuda", "rocm", "xpu")
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""Part of torch's error for an operation that has no deterministic form on the device."""


def choose_precision(wanted: str | None, hardware: Hardware) -> tuple[str, list[str]]:
    """The precision of a run ("no", "fp16" or "bf16"), and lines about it for the log.

    wanted: what the options or accelerate's configuration name; None takes bf16 on a GPU that has it, else float32.
    Raises UserError for bf16 on a device without.
    """
    if wanted is None:
        if hardware.kind not in _GPUS:
            return "no", []
        if hardware.can("bf16"):
            return "bf16", []
        line = f"{hardware.lacks('bf16')}: this run computes in fp32; --train.mixed_precision fp16 is faster."
        return "no", [line[0].upper() + line[1:]]
    if wanted == "fp16" and not hardware.can("fp16"):
        return "no", ["train.mixed_precision fp16 needs a GPU and none was found: this run computes in fp32."]
    if wanted == "bf16" and not hardware.can("bf16"):
        instead = "fp16 or no" if hardware.can("fp16") else "no"
        raise UserError(f"bf16: {hardware.lacks('bf16')}; use {instead}.", option="train.mixed_precision")
    return wanted, []


def idle_options(config: Config, hardware: Hardware) -> list[str]:
    """A line for each option that has less effect on this device than its name promises.

    Raises UserError for options that exclude each other.
    """
    train = config.train
    if train.deterministic and train.xformers:
        raise UserError(
            f"xFormers' backward pass adds in any order; omit {flag('train.xformers')}: torch's own attention has "
            "a deterministic form.",
            option="train.deterministic",
        )
    lines = []
    if train.allow_tf32 and not hardware.can("tf32"):
        lines.append(f"--train.allow_tf32 has no effect: {hardware.lacks('tf32')}.")
    if config.base.quantize == "float8" and hardware.kind in _GPUS and not hardware.can("float8"):
        lines.append(
            f"--base.quantize float8 saves memory and no time: {hardware.lacks('float8')}. Products are computed in "
            "the run's own precision."
        )
    if train.compile != "off" and not hardware.can("compile"):
        lines.append(f"--train.compile {train.compile} will not work: {hardware.lacks('compile')}.")
    elif train.compile == "graphs" and not hardware.can("cuda_graphs"):
        lines.append(f"--train.compile graphs compiles without graphs: {hardware.lacks('cuda_graphs')}.")
    return lines


def is_exact(hardware: Hardware, *, deterministic: bool) -> bool:
    """Whether the same run repeats to the bit on this device: a CPU adds in one order, and a GPU if it must."""
    return hardware.kind == "cpu" or deterministic


def prepare_deterministic(config: Config) -> None:
    """Sets what CUDA's libraries read at their first use; call it before the device is used. What the user has set
    stays. Raises UserError if the process has used CUDA without it."""
    if not config.train.deterministic or WORKSPACE in os.environ:
        return
    if torch.cuda.is_initialized():
        raise UserError(
            f"this process has used CUDA already; set {WORKSPACE}=:4096:8 before it starts.",
            option="train.deterministic",
        )
    os.environ[WORKSPACE] = ":4096:8"


class _Switches(NamedTuple):
    """torch's switches of the whole process."""

    tf32: bool
    autotune: bool
    cudnn_deterministic: bool
    cudnn_attention: bool
    fill_new_memory: bool
    deterministic: bool
    warn_only: bool

    @classmethod
    def read(cls) -> _Switches:
        """As they are now."""
        backends = torch.backends
        return cls(
            tf32=bool(backends.cuda.matmul.allow_tf32),
            autotune=backends.cudnn.benchmark,
            cudnn_deterministic=backends.cudnn.deterministic,
            cudnn_attention=backends.cuda.cudnn_sdp_enabled(),
            fill_new_memory=torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore[reportAttributeAccessIssue]
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def apply(self) -> None:
        backends = torch.backends
        backends.cuda.matmul.allow_tf32 = self.tf32
        backends.cudnn.benchmark = self.autotune
        backends.cudnn.deterministic = self.cudnn_deterministic
        backends.cuda.enable_cudnn_sdp(self.cudnn_attention)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_new_memory  # pyright: ignore[reportAttributeAccessIssue]
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)


def set_switches(config: Config) -> None:
    """Sets torch's switches for the whole process to what this run's options say; call it inside `restored_switches`.

    cuDNN's autotuning, which times several algorithms for each new shape of a convolution, is on if all pictures have
    one size. Deterministic: an operation without a deterministic form raises an error instead of running.
    """
    now, exact = _Switches.read(), config.train.deterministic
    _Switches(
        tf32=config.train.allow_tf32,
        autotune=config.data.buckets == "none" and not exact,
        cudnn_deterministic=exact,
        # cuDNN's attention adds in any order in its backward pass. The next switch but one makes torch's other
        # attention kernels deterministic.
        cudnn_attention=now.cudnn_attention and not exact,
        fill_new_memory=now.fill_new_memory and not exact,  # NaN in new memory shows reads of it, and takes time
        deterministic=exact,
        warn_only=False,
    ).apply()


@contextmanager
def restored_switches() -> Iterator[None]:
    """At its end torch's switches are what they were, for a program that trains and then does other work.

    Raises UserError for an operation that has no deterministic form.
    """
    before = _Switches.read()
    try:
        yield
    except RuntimeError as fault:
        if _NOT_DETERMINISTIC not in str(fault):
            raise
        raise UserError(
            f"an operation of this run has no deterministic form here ({first_line(fault)}); omit it.",
            option="train.deterministic",
        ) from fault
    finally:
        before.apply()
