"""Where the time of a step goes: a trace of some steps, and one page that sums it up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from t2i_adapter.training.accumulate import Accumulation

FOLDER = "profile"
SKIP, STEPS = 3, 5
"""Updates left out at first, while buffers are allocated; updates that are looked at."""
DATA, BACKWARD = "waiting for data", "backward pass"
ADAPTER, UNET, OPTIMIZER, REST = "adapter, forward", "UNet, forward", "optimiser", "the rest"
PARTS = (DATA, ADAPTER, UNET, BACKWARD, OPTIMIZER)


class Profile:
    """Follows a run's updates: `step` is called after each, and writes trace and page after the last of them."""

    def __init__(
        self,
        accumulation: Accumulation,
        modules: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        folder: Path,
        updates: int,
    ) -> None:
        """modules: part -> network whose calls it is. updates: how many the run still makes."""
        self._accumulation, self._modules, self._optimizer, self._folder = accumulation, modules, optimizer, folder
        self._device = accumulation.accelerator.device
        self._steps = min(STEPS, updates)
        self._skip = min(SKIP, updates - self._steps)
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._undo: list[Callable[[], Any]] = []
        if self._skip == 0:
            self._begin()

    def step(self) -> None:
        """Counts an update."""
        self._skip -= 1
        if self._skip == 0:
            self._begin()
        elif self._skip == -self._steps:
            self._end()

    def _begin(self) -> None:
        self._attach()
        with_device = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._trace = profile(activities=[ProfilerActivity.CPU, *with_device])
        self._trace.start()
        self._wait()
        self._began = time.perf_counter()

    def _end(self) -> None:
        self._wait()
        total = time.perf_counter() - self._began
        self._trace.stop()
        for undo in self._undo:
            undo()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self._folder / "trace.json"))
        (self._folder / "summary.md").write_text(self._page(total), encoding="utf-8")
        print(f"{self._folder}: trace.json (opens in ui.perfetto.dev) and summary.md of {self._steps} updates")

    def _attach(self) -> None:
        """Has every part tell when it begins and ends. Threads that share a batch would overlap: there is one now."""
        before = self._accumulation.span, self._accumulation.side_by_side
        self._accumulation.span, self._accumulation.side_by_side = self._span, None
        self._undo.append(lambda: vars(self._accumulation).update(span=before[0], side_by_side=before[1]))
        for part, module in self._modules.items():
            self._follow(part, module.register_forward_pre_hook, module.register_forward_hook)
        self._follow(OPTIMIZER, self._optimizer.register_step_pre_hook, self._optimizer.register_step_post_hook)

    def _follow(self, part: str, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> None:
        """Times a part between two hooks."""
        spans: list[Any] = []

        def enter(*_: Any) -> None:
            spans.append(self._span(part))
            spans[-1].__enter__()

        def leave(*_: Any) -> None:
            spans.pop().__exit__(None, None, None)

        self._undo += [before(enter).remove, after(leave).remove]

    @contextlib.contextmanager
    def _span(self, part: str) -> Iterator[None]:
        """Adds the seconds inside to the part; the device's work is waited for, so that it counts where it belongs."""
        self._wait()
        began = time.perf_counter()
        with record_function(part):
            yield
            self._wait()
        self._seconds[part] += time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _page(self, total: float) -> str:
        rows = {**self._seconds, REST: total - sum(self._seconds.values())}
        lines = [f"| {part} | {1e3 * s / self._steps:.2f} | {s / total:.1%} |" for part, s in rows.items()]
        kind = "device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operations = self._trace.key_averages().table(sort_by=kind, row_limit=15, max_name_column_width=50)
        return "\n".join(
            [
                "# Where the time goes",
                "",
                f"{self._steps} updates on {self._device}, {1e3 * total / self._steps:.2f} ms each. The device was",
                "waited for between parts, and a batch was not shared between threads, so a step takes longer here",
                "than in a run that nobody looks at.",
                "",
                "| part | ms an update | share |",
                "|---|---|---|",
                *lines,
                "",
                "The operations that took most:",
                "",
                *(f"    {line}" for line in operations.splitlines()),
                "",
            ]
        )
