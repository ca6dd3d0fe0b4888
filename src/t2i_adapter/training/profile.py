"""Where the time of a step goes: a trace of a few steps, and a page that sums it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

FOLDER = "profile"
SKIP, STEPS = 3, 5
"""Steps before the profile, in which buffers are allocated; steps in the profile."""
DATA, ADAPTER, UNET = "waiting for data", "adapter, forward", "UNet, forward"
BACKWARD, OPTIMIZER, REST = "backward pass", "optimiser", "the rest"
EXCHANGE = "exchange of gradients, and waiting for other processes"
PARTS = (DATA, ADAPTER, UNET, BACKWARD, OPTIMIZER)
"""Parts of a step, which its code marks with `mark`."""


_EXCHANGE_NOTE = "The exchange is not overlapped with the backward pass here; without the profile it is."


def is_profiling() -> bool:
    """Whether this step is in a profile."""
    return torch.autograd._profiler_enabled()


@contextmanager
def mark(part: str) -> Iterator[None]:
    """Names a part of a step in the profile. In a profile it waits for the GPU, so that a part's time on the host
    includes its kernels; otherwise it costs about a microsecond."""
    _wait()
    with record_function(part):
        yield
        _wait()


def _wait() -> None:
    if is_profiling() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Profile:
    """Profiles some steps of a run. Call `step` after each; the last one writes trace.json and summary.md."""

    def __init__(self, modules: dict[str, Any], folder: Path, steps: int, device: torch.device) -> None:
        """modules: part -> network whose calls are that part. steps: how many the run will still make."""
        self._folder, self._device, self._steps = folder, device, min(STEPS, steps)
        self._skip = min(SKIP, steps - self._steps)
        self._hooks = [hook for part, module in modules.items() for hook in _mark_calls(part, module)]
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")],
            schedule=self._action,
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def step(self) -> None:
        """Counts a step."""
        self._profiler.step()

    def _action(self, step: int) -> ProfilerAction:
        """What torch's profiler does in a step, counted from 0."""
        left = self._skip + self._steps - step
        if left <= 0:
            return ProfilerAction.NONE
        if left == 1:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.RECORD if step >= self._skip else ProfilerAction.WARMUP

    def _write(self, trace: profile) -> None:
        for hook in self._hooks:
            hook.remove()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._folder / "trace.json"))
        (self._folder / "summary.md").write_text(self._page(trace), encoding="utf-8")
        print(f"{self._folder}: trace.json (opens in ui.perfetto.dev) and summary.md of {self._steps} steps")

    def _page(self, trace: profile) -> str:
        averages = trace.key_averages()
        host = {
            row.key: row.cpu_time_total / 1e3 for row in averages if row.device_type == torch.autograd.DeviceType.CPU
        }
        total = host["ProfilerStep*"]
        rows = {part: host.get(part, 0.0) for part in PARTS}
        if EXCHANGE in host:  # it runs inside the backward pass
            rows[BACKWARD] -= host[EXCHANGE]
            rows[EXCHANGE] = host[EXCHANGE]
        rows[REST] = total - sum(rows.values())
        kind = "device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = averages.table(sort_by=kind, row_limit=15, max_name_column_width=50)
        return "\n".join(
            [
                "# Where the time goes",
                "",
                f"{self._steps} steps on {self._device}, {total / self._steps:.2f} ms each. Each part waits for the",
                "device, and one thread computes a batch, so a step takes longer here than without the profile.",
                *[_EXCHANGE_NOTE] * (EXCHANGE in host),
                "",
                "| part | ms a step | share |",
                "|---|---|---|",
                *(f"| {part} | {ms / self._steps:.2f} | {ms / total:.1%} |" for part, ms in rows.items()),
                "",
                "The operations that took most time:",
                "",
                *(f"    {line}" for line in table.splitlines()),
                "",
            ]
        )


def _mark_calls(part: str, module: Any) -> list[Any]:
    """Marks every call of a module; returns the hooks, which `remove` takes away."""
    marks: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        marks.append(mark(part))
        marks[-1].__enter__()

    def leave(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
