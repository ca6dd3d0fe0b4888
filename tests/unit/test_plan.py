"""The forecast of `plan` against the bytes of real tensors, and its texts."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from t2i_adapter.batches.example import example_batch
from t2i_adapter.cards import card_bytes
from t2i_adapter.cli import main
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config, TrainOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.base import enable_gradient_checkpointing
from t2i_adapter.models.open import open_base
from t2i_adapter.models.quantize import FORMATS, quantize
from t2i_adapter.training.forecast import EFFICIENCY
from t2i_adapter.training.memory import Shapes, Watermark, largest_batch
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.verbs.plan import PlanOptions

MIB = 2**20
RUN = "--data.resolution 128 --data.num_workers 0 --tracking.report_to none --train.seed 0 --train.cpu_threads 1"
SMALL = "plan --pairs 1000 --data.resolution 64 --no_probe"
"""A plan for the embedded base, without a dataset."""


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command and returns what it prints."""

    def run(command: str, *words: str, code: int = 0) -> str:
        assert main([*command.split(), *words]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    yield run


def shapes(kind: str = "none", blocks: str | None = None) -> Shapes:
    base = open_base(BaseOptions(quantize=kind))  # pyright: ignore[reportArgumentType]
    train = TrainOptions(gradient_checkpointing=blocks is not None, checkpoint_blocks=blocks or "all")  # pyright: ignore[reportArgumentType]
    config = replace(Config(), base=base.options, train=train)
    return Shapes(config, base, build_adapter(AdapterOptions(), base.unet_config), torch.float32)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", *FORMATS])
def test_the_base_has_the_bytes_that_its_tensors_have(kind: str):
    base = open_base(BaseOptions())
    unet = base.unet("cpu", torch.float32)
    if kind != "none":
        quantize(unet, kind, "cpu")  # pyright: ignore[reportArgumentType]
    real = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    assert shapes(kind).memory(1, height=64, width=64).base == real


@pytest.mark.parametrize("blocks", [None, "large", "all"])
def test_a_real_step_takes_the_bytes_that_were_foretold(blocks: str | None):
    """At every batch: the place of the peak changes with it, so no line through two batches holds for the others.

    The tensors of a real step are counted at batch 1 to 16. At the large batches torch's allocator is asked too, which
    sees what operations take inside; at the small ones these scratch buffers of a CPU are more than the rest.
    """
    base = open_base(BaseOptions())
    unet = base.unet("cpu", torch.float32)
    if blocks:
        enable_gradient_checkpointing(unet, blocks)  # pyright: ignore[reportArgumentType]
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    frozen = FrozenModel(unet, NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32)

    def step(size: int) -> None:
        batch = example_batch(base.unet_config, size, height=128, width=128)  # alive until the step's end
        batch_losses(adapter, frozen, batch).mean().backward()

    foretold = shapes(blocks=blocks)
    for size in (1, 2, 4, 16):
        adapter.zero_grad()
        gc.collect()
        with Watermark() as watermark:
            step(size)
        expected = foretold.step(size, height=128, width=128).peak
        assert watermark.peak == pytest.approx(expected, rel=0.02), size
        if size == 16:
            assert allocated(step, size, adapter) == pytest.approx(expected, rel=0.06), size


def allocated(step: Any, size: int, adapter: Any) -> int:
    """Most bytes that torch's allocator holds in a step, by its own events."""
    adapter.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(size)
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_memory_falls_with_every_means():
    steps = [shapes(blocks=blocks).memory(8, height=128, width=128).step for blocks in (None, "large", "all")]
    assert steps[0] > 1.3 * steps[1] > 1.3 * 1.3 * steps[2]
    bases = [shapes(kind).memory(1, height=64, width=64).base for kind in ("none", "int8", "nf4")]
    assert bases[0] > bases[1] > bases[2]


@pytest.mark.parametrize("room", [0.5, 1, 5.2, 9, 30, 33, 34, 400])
def test_the_largest_batch_is_the_largest_that_fits(room: float):
    """With gradient checkpointing the peak of a small batch lies elsewhere than that of a large one."""
    found = shapes(blocks="all")
    tried: list[int] = []

    def peak(size: int) -> int:
        tried.append(size)
        return found.step(size, height=128, width=128).peak

    largest = largest_batch(peak, room * MIB)
    assert len(set(tried)) <= 6
    assert largest == 0 or peak(largest) <= room * MIB
    assert peak(largest + 1) > room * MIB


def test_the_largest_batch_of_any_convex_peak_is_found():
    for room in range(0, 400, 7):
        for kinks in ((5, 1, 2), (40, 1, 9), (60, 3, 3), (100, 1, 30)):
            flat, slow, steep = kinks

            def peak(size: int, flat: int = flat, slow: int = slow, steep: int = steep) -> int:
                return max(flat + slow * size, steep * size)

            expected = max((size for size in range(1, 400) if peak(size) <= room), default=0)
            assert largest_batch(peak, room) == expected, (room, kinks)


# Texts ----------------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_card_measures_nothing_and_tells_the_largest_batch(tiny_data: Path, said: Any):
    told = said(f"plan {RUN} --data {tiny_data} --card 8GB")
    assert "not measured on 8GB" in told and "largest micro-batch" in told and "8.0 GiB on 8GB" in told


def test_a_probe_tells_samples_and_hours(tiny_data: Path, said: Any):
    told = said(f"plan {RUN} --data {tiny_data} --train.batch_size 2 --train.max_steps 100000")
    hours, rate = re.search(r"([\d.]+) hours of steps at ([\d.,]+) samples/s .*measured on random", told).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert float(hours) == pytest.approx(200000 / float(rate.replace(",", "")) / 3600, rel=0.1)


def test_a_recipe_is_planned_with_flags_on_top(tiny_data: Path, tmp_path: Path, said: Any):
    (tmp_path / "recipe.yaml").write_text(f"data: {{location: {tiny_data}, resolution: 64}}\ntrain: {{batch_size: 3}}")
    words = ("--train.gradient_accumulation_steps", "5", "--no_probe")
    assert "15 = 3 x 5 accumulated" in said("plan --recipe", str(tmp_path / "recipe.yaml"), *words)


def test_a_number_of_pairs_needs_no_dataset(said: Any):
    told = said(f"{SMALL} --train.batch_size 4 --data /nowhere --train.epochs 3")
    assert "training pairs 1,000" in told and "updates        750" in told


@pytest.mark.parametrize(("kind", "bytes_each"), [("canny", 64 * 64 // 8), ("grey", 64 * 64), ("palette", 3 * 64 * 64)])
def test_the_kind_of_condition_decides_the_cache(kind: str, bytes_each: int, said: Any):
    disk = json.loads(said(f"{SMALL} --json --data.text_cache live --data.condition {kind}"))["disk"]
    assert disk["cache"] == 1000 * (bytes_each + 2 * 8 * 8 * 8)


def test_each_machine_holds_a_cache_unless_they_share_it(said: Any):
    command = f"{SMALL} --machines 3 --gpus 4"
    found = json.loads(said(f"{command} --json"))
    assert found["plan"]["processes"] == 12 and found["plan"]["global_batch"] == 48
    assert found["disk"]["cache_on_all_machines"] == 3 * found["disk"]["cache"]
    assert "on each machine" in said(command) and "--data.prepared_dir is a folder that all machines share" in said(
        command
    )
    assert "machine" not in re.search(r"disk .*", said(SMALL))[0]  # pyright: ignore[reportOptionalSubscript]


# Speed and money ------------------------------------------------------------------------------------------------------


def test_a_named_card_has_a_forecast_of_hours_and_money(said: Any):
    command = f"{SMALL} --train.mixed_precision bf16 --train.max_steps 1000000 --gpus 2 --price 2.5"
    slow, fast = (json.loads(said(f"{command} --json --card", card)) for card in ("A100", "h100"))
    assert slow["speed_is"] == "assumed"
    assert slow["samples_per_s"][0] == pytest.approx(312e12 * EFFICIENCY[0] / slow["flops_per_sample"])
    assert fast["samples_per_s"][1] / slow["samples_per_s"][1] == pytest.approx(989.4 / 312)
    samples = 4 * 1_000_000  # of one process
    assert slow["hours"][0] == pytest.approx(samples / slow["samples_per_s"][1] / 3600)
    assert slow["cost"] == pytest.approx([hours * 2 * 2.5 for hours in slow["hours"]])
    told = said(f"{command} --card A100")
    assert "assumed: 35% to 50% of the card's matrix rate; not measured" in told and "at 2.5 for a GPU's hour" in told


def test_json_is_all_that_is_printed(tiny_data: Path, said: Any):
    found = json.loads(said(f"plan {RUN} --data {tiny_data} --no_probe --json"))
    assert found["memory"]["total"] == sum(
        found["memory"][name] for name in ("program", "base", "adapter", "optimizer", "ema", "step")
    )
    assert found["samples_per_s"] is None and found["hours"] is None


def test_the_ways_to_save_memory_are_compared(said: Any):
    command = f"{SMALL} --compare --card"
    rows = json.loads(said(f"{command} A100 --json"))["compare"]
    assert len(rows) == 2 * 3 * 4
    assert {row["precision"] for row in rows} == {"bf16", "no"}
    [best] = [row for row in rows if row["is_best"]]
    assert (best["precision"], best["blocks"], best["quantize"]) == ("bf16", "none", "none")
    assert best["samples_per_s"] == max(row["samples_per_s"] for row in rows)
    by = {(row["precision"], row["blocks"], row["quantize"]): row for row in rows}
    assert by["bf16", "all", "none"]["largest_batch"] > by["bf16", "none", "none"]["largest_batch"]
    assert by["bf16", "all", "none"]["flops"] > by["bf16", "none", "none"]["flops"]
    assert all(row["device"] <= 80 * 2**30 for row in rows)


@pytest.mark.soak
def test_the_table_marks_the_best_for_a_card_without_bf16(said: Any):
    told = said(f"{SMALL} --compare --card T4")
    [best] = [line for line in told.splitlines() if line.endswith("<- best")]
    assert best.split()[:3] == ["fp16", "none", "none"] and "bf16" not in told


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plan", "--pairs is missing: write the number of pairs, such as 3000000, or name the dataset with --data"),
        ("plan --pairs 0", "--pairs 0: 1 or more"),
        ("plan --pairs many", "--pairs 'many': allowed is a whole number"),
        (f"{SMALL} --machines 0", "--machines 0: 1 or more"),
        (f"{SMALL} --card Voodoo", "--card Voodoo: unknown card; write its memory, such as 24GB, or one of T4, V100"),
        (f"{SMALL} --card T4 --train.mixed_precision bf16", "bf16: T4 has no units for it; use fp16"),
        (f"{SMALL} --compare --card 0.6GB", "nothing fits into 0.6 GiB: the least is 0.6 GiB, with"),
        (
            f"{SMALL} --base.name stabilityai/stable-diffusion-xl-refiner-1.0",
            "is SDXL's refiner, whose UNet no T2I-Adapter fits; use the base, stabilityai/stable-diffusion-xl-base-1.0",
        ),
    ],
)
def test_a_mistake_is_one_line(words: str, expected: str, said: Any):
    [line] = [line for line in said(words, code=2).splitlines() if line.startswith("error:")]
    assert expected in line


def test_an_unknown_card_is_one_line():
    with pytest.raises(UserError, match=r"--card Voodoo: unknown card"):
        PlanOptions(card="Voodoo")
    assert card_bytes("rtx4090") == card_bytes("24 GB") == 24 * 2**30
