"""Bases that are known by name, GPUs by name, and the operations of a step."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.runs import read_metrics, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from t2i_adapter.batches.example import example_batch
from t2i_adapter.cards import CARDS, card_of_device, find_card
from t2i_adapter.cli import main
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.known import KnownBase, known_base, known_names
from t2i_adapter.models.open import open_base
from t2i_adapter.training.flops import FlopCount, Flops, rates_of
from t2i_adapter.training.memory import Shapes
from t2i_adapter.training.step import FrozenModel, batch_losses
from t2i_adapter.types import text_widths
from t2i_adapter.verbs.train import run

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("name", "weights", "family", "size", "widths", "prediction"),
    [
        (SDXL, 2_567_463_684, "sdxl", 1024, (2048, 1280), "epsilon"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964, "sd", 512, (768, 0), "epsilon"),
        ("stabilityai/stable-diffusion-2-1", 865_910_724, "sd", 768, (1024, 0), "v_prediction"),
        ("stabilityai/stable-diffusion-2-1-base", 865_910_724, "sd", 512, (1024, 0), "epsilon"),
    ],
)
def test_a_known_base_has_the_published_sizes(
    name: str, weights: int, family: str, size: int, widths: tuple[int, int], prediction: str
):
    base = KnownBase(BaseOptions(name=name))
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(base.unet_config))
    assert sum(parameter.numel() for parameter in unet.parameters()) == weights
    assert (base.family.key, base.native_size, text_widths(base.unet_config)) == (family, size, widths)
    assert base.scheduler().config["prediction_type"] == prediction
    assert base.latent_scale.scale == (0.13025 if family == "sdxl" else 0.18215,) * 4
    with pytest.raises(UserError, match="its unet is not on this machine"):
        base.unet("cpu", torch.float32)


def test_every_name_has_its_sizes():
    assert len(known_names()) > 10
    for name in known_names():
        assert KnownBase(BaseOptions(name=name)).latent_scale.scale


@pytest.mark.parametrize("name", [SDXL, "stabilityai/stable-diffusion-2-1-base"])
def test_a_known_base_is_planned_without_a_connection(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    words = f"plan --pairs 1000 --base.name {name} --data.resolution 64 --card 24GB --json"
    assert main([*words.split(), "--base.vae", "madebyollin/sdxl-vae-fp16-fix"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == name


def test_a_base_that_is_here_is_used_itself(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert known_base(BaseOptions(name=SDXL)) is not None
    assert known_base(BaseOptions(name=str(tiny_base))) is None and known_base(BaseOptions()) is None
    commit = "0" * 40
    cached = tmp_path / "hub" / f"models--{SDXL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(tiny_base)
    assert known_base(BaseOptions(name=SDXL, cache_dir=str(tmp_path / "hub"))) is None
    monkeypatch.chdir(tmp_path)
    Path(SDXL).mkdir(parents=True)
    assert known_base(BaseOptions(name=SDXL)) is None, "a folder of this name"


def test_the_refiner_is_refused_before_it_is_downloaded():
    with pytest.raises(UserError, match=f"is SDXL's refiner.*use the base, {SDXL}"):
        open_base(BaseOptions(name="stabilityai/stable-diffusion-xl-refiner-1.0"))


# GPUs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_card_is_known_by_what_its_driver_reports(reported: str, name: str | None):
    assert card_of_device(reported) is (CARDS[name] if name else None)


def test_the_table_of_cards_is_consistent():
    for name, card in CARDS.items():
        assert find_card(name.lower().replace(" ", "-")) is card
        assert (card.fp8 is not None) == (card.capability >= (8, 9)), name
        assert (card.bf16 is not None) == (card.tf32 is not None) == (card.capability >= (8, 0)), name
        assert card.fp16 > card.fp32 and (card.fp8 is None or card.fp8 > card.fp16), name


def test_the_units_of_a_run_follow_its_precision():
    card, old = CARDS["H100"], CARDS["T4"]
    assert rates_of("bf16", allow_tf32=False, quantize="none", card=card) == ("bf16", "bf16")
    assert rates_of("bf16", allow_tf32=False, quantize="float8", card=card) == ("bf16", "fp8")
    assert rates_of("bf16", allow_tf32=False, quantize="float8", card=CARDS["A100"]) == ("bf16", "bf16")
    assert rates_of("no", allow_tf32=True, quantize="none", card=card) == ("tf32", "tf32")
    assert rates_of("no", allow_tf32=True, quantize="none", card=old) == ("fp32", "fp32")
    work = Flops(products=989.4e12, convolutions=2 * 989.4e12)
    assert work.seconds(card, "bf16") == pytest.approx(3)
    assert work.seconds(card, "bf16", "fp8") == pytest.approx(2 + 989.4 / 1978.9)
    assert work.seconds(old, "bf16") is None


# Operations ----------------------------------------------------------------------------------------------------------


def test_only_what_is_computed_is_counted():
    frozen, trained = torch.nn.Linear(32, 64).requires_grad_(False), torch.nn.Linear(64, 16)
    x = torch.rand(8, 32, requires_grad=True)
    with FlopCount() as count:
        trained(frozen(x)).sum().backward()
    first, second = 2 * 8 * 32 * 64, 2 * 8 * 64 * 16
    assert count.flops == Flops(products=2 * first + 3 * second), "no gradient of the frozen weight"


def test_a_real_step_has_the_operations_that_were_counted_without_it(tiny_base: Path):
    """Against torch's own counter on a real step. On a CPU it does not know attention, which is left out there."""
    base = open_base(BaseOptions(name=str(tiny_base)))
    adapter = build_adapter(AdapterOptions(), base.unet_config)
    frozen = FrozenModel(
        base.unet("cpu", torch.float32), NoiseSchedule.of(base.scheduler()), base.latent_scale, torch.float32
    )
    counted = Shapes(Config(), base, adapter, torch.float32).step(2, height=64, width=64).flops
    with FlopCounterMode(display=False) as counter:
        batch_losses(adapter, frozen, example_batch(base.unet_config, 2, height=64, width=64)).mean().backward()
    assert counted.attention > 0
    assert counted.total - counted.attention == counter.get_total_flops()


def test_sdxl_takes_15_tflop_a_sample():
    """At 1024 px, with the adapter's own gradients, and attention's scores computed again in its backward pass."""
    base = KnownBase(BaseOptions(name=SDXL))
    found = Shapes(Config(), base, build_adapter(AdapterOptions(), base.unet_config), torch.bfloat16)
    flops = found.flops(height=1024, width=1024)
    assert flops.total == pytest.approx(15.22e12, rel=0.001)
    assert flops.total - flops.attention / 7 == pytest.approx(14.8e12, rel=0.005), "attention: 2 forward, 5 backward"


# The log -------------------------------------------------------------------------------------------------------------


def test_a_run_logs_its_operations_and_its_memory(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(tiny_base, tiny_data, tmp_path / "run", {"train.max_steps": 3})
    run(config)
    base = open_base(config.base)
    shapes = Shapes(config, base, build_adapter(AdapterOptions(), base.unet_config), torch.float32)
    each = shapes.step(1, height=64, width=64).flops.total
    for row in read_metrics(tmp_path / "run"):
        assert row["tflop_per_s"] == pytest.approx(row["samples_per_s"] * each / 1e12)
        assert 0.05 < row["peak_memory_gib"] < 100 and "peak_share" not in row and "peak_reserved_gib" not in row
    assert "TFLOP/s a process\n" in capsys.readouterr().out
