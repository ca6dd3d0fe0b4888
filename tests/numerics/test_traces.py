"""Traces: a replay has the same bits, on several threads, for each shape; what cannot be traced logs a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_adapter.batches.example import example_batch
from t2i_adapter.config.tree import (
    BaseOptions,
    CheckpointOptions,
    Config,
    DataOptions,
    ObjectiveOptions,
    TrackingOptions,
    TrainOptions,
)
from t2i_adapter.training.cpu import trace
from t2i_adapter.training.cpu.threads import CpuThreads
from t2i_adapter.training.cpu.trace import MOST, TRACE_AT, TraceCache, is_traceable
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.verbs.train import run


def gradients(frozen: FrozenModel, adapter: Any, threads: CpuThreads, samples: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    batch = example_batch(frozen.unet.config, samples, height=64, width=64)
    adapter.zero_grad()
    threads.add(batch, 0.1)
    return [parameter.grad.clone() for parameter in adapter.parameters()]


def test_replayed_on_two_threads_it_gives_the_same_bits(adapter: Any, frozen: FrozenModel):
    lines: list[str] = []
    traces = TraceCache(lines.append)
    plain, replaying = (
        CpuThreads(2, adapter, lambda network, part: batch_losses(network, frozen, part), chosen)
        for chosen in (None, traces)
    )
    for seed in range(TRACE_AT + 3):  # parts of two and of three samples
        wanted, got = (gradients(frozen, adapter, threads, 5, seed) for threads in (plain, replaying))
        assert all(map(torch.equal, wanted, got)), f"update {seed}"
        with torch.no_grad():
            adapter.adapter.conv_in.weight.mul_(1.1)  # as an optimiser writes: in place
    assert len(traces._replays) == 2 and not lines
    gradients(frozen, adapter, replaying, 2, 0)
    assert len(traces._replays) == 2, "a rare shape is not traced"


def test_the_number_of_traced_shapes_is_limited():
    traces = TraceCache(print)
    for side in range(1, MOST + 4):
        x = torch.ones(side)
        for _ in range(TRACE_AT + 1):
            (got,) = traces.call(lambda x=x: [x * 2], [x])
            assert torch.equal(got, torch.full((side,), 2.0))
    assert len(traces._replays) == MOST


WEIGHT = torch.arange(12.0).view(4, 3)
OPERATIONS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "views of what is fixed": lambda x: [x @ WEIGHT, x @ WEIGHT[:, 1:], WEIGHT.t() @ x.t()],
    "written in place": lambda x: [torch.zeros(2).add_(x.sum(1)).mul_(2)],
    "an input returned": lambda x: [x, x.detach() + 1],
    "lists and empty ones": lambda x: [*x.split([1, 3], 1), *x.chunk(2), torch.zeros([]) + x.mean([])],
    "types, devices and infinities": lambda x: [x.to(torch.bfloat16), x.masked_fill(x > 0, float("-inf"))],
    "what none of the results needs": lambda x: [x + 1, (torch.sin(x), x * 2)[1]],
    "no numbers": lambda x: [x / 0, torch.log(-x.abs()), x * float("nan")],
    "gathered": lambda x: [WEIGHT[(x[0] > 0).long()]],
}


@pytest.mark.parametrize("function", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_any_operation_replays_on_other_numbers(function: Callable[[Tensor], Sequence[Tensor]]):
    lines: list[str] = []
    traces = TraceCache(lines.append)
    for seed in range(TRACE_AT + 3):
        torch.manual_seed(seed)
        x = torch.randn(2, 4)
        got = traces.call(lambda x=x: function(x), [x])
        for one, other in zip(got, function(x), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert len(traces._replays) == 1 and not lines


def by_its_own_count() -> Callable[[Tensor], Sequence[Tensor]]:
    """Returns a function whose result depends on a count that no trace has."""
    calls = iter(range(1000))
    return lambda x: [x * next(calls)]


def in_several(x: Tensor) -> Sequence[Tensor]:
    made = [x + 1, x + 2]
    torch._foreach_mul_(made, 2.0)
    return made


def read_back(x: Tensor) -> Sequence[Tensor]:
    return [x * x.sum().item()]


def by_the_numbers(x: Tensor) -> Sequence[Tensor]:
    return [x * x.tolist()[0][0]]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (by_its_own_count(), "does not replay to the bit"),
        (lambda x: [x + torch.rand(2, 4)], "does not replay to the bit"),
        (lambda x: [x * len(x[x > 0])], "does not replay to the bit"),
        (in_several, "writes into several tensors"),
        (read_back, "returns a number to Python"),
        (by_the_numbers, "does not replay to the bit"),
    ],
)
def test_what_cannot_be_traced_runs_directly_and_logs_one_line(
    function: Callable[[Tensor], Sequence[Tensor]], why: str
):
    lines: list[str] = []
    traces = TraceCache(lines.append)
    for seed in range(3 * TRACE_AT):
        torch.manual_seed(seed)
        x = torch.randn(2, 4)
        assert traces.call(lambda x=x: function(x), [x])
    assert not traces._replays
    (line,) = lines
    assert line.startswith("The step's operations cannot be traced here (") and why in line


def test_an_exception_during_tracing_is_raised():
    traces = TraceCache(print)

    def full(x: Tensor) -> Sequence[Tensor]:
        raise torch.OutOfMemoryError("no room")

    x = torch.ones(2)
    for _ in range(TRACE_AT + 1):
        with pytest.raises(torch.OutOfMemoryError):
            traces.call(lambda: full(x), [x])


@pytest.mark.parametrize(
    "train",
    [
        TrainOptions(),
        TrainOptions(mixed_precision="bf16"),
        TrainOptions(noise_draws=2, gradient_accumulation_steps=2, ema_decay=0.9),
    ],
    ids=["plain", "bf16", "noise draws, accumulated, EMA"],
)
def test_a_traced_run_is_the_same_run(
    train: TrainOptions, tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A resumed run is traced at another update, and must have the same numbers."""
    found = []
    for trace_at in (3, 10**6):
        config = Config(
            output_dir=str(tmp_path / str(trace_at)),
            base=BaseOptions(name=str(tiny_base)),
            data=DataOptions(location=str(tiny_data), resolution=64),
            train=replace(train, batch_size=4, max_steps=5, seed=5, cpu_threads=2),
            objective=ObjectiveOptions(min_snr_gamma=5.0),
            checkpoint=CheckpointOptions(every=5),
            tracking=TrackingOptions(report_to="none", log_every=1),
        )
        with monkeypatch.context() as patch:
            patch.setattr(trace, "TRACE_AT", trace_at)
            replays: list[object] = []
            patch.setattr(TraceCache, "_check", _kept(TraceCache._check, replays))
            run(config)
        assert len(replays) == (trace_at == 3)
        found.append(load_file(tmp_path / str(trace_at) / "checkpoint-5" / "training.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _kept(trial: Callable[..., Any], replays: list[object]) -> Callable[..., Any]:
    """`_check`, which also appends each trace that passes to `replays`."""

    def trying(traces: TraceCache, *args: Any) -> Any:
        found = trial(traces, *args)
        replays.extend(traces._replays.values())
        return found

    return trying


def test_only_plain_operations_are_traced():
    plain = Config()
    assert is_traceable(plain)
    assert not is_traceable(replace(plain, base=replace(plain.base, quantize="int8")))
    for name, value in {"gradient_checkpointing": True, "profile": True, "xformers": True, "compile": "on"}.items():
        assert not is_traceable(replace(plain, train=replace(plain.train, **{name: value}))), name
