"""The device's memory: it is returned after a run, it may run out, and what is in it at first is never read."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.emulated import device
from support.runs import losses, read_metrics, tiny_config

from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import BaseOptions, Config
from t2i_adapter.devices import release
from t2i_adapter.errors import UserError
from t2i_adapter.models.encoders import encode_pixels
from t2i_adapter.models.open import open_base
from t2i_adapter.training.setup import make_trainer, set_up
from t2i_adapter.verbs.train import run

GPU = torch.device("cuda")


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    changes = {"train.max_steps": 3, "checkpoint.every": 3, "validation.budget": 0}
    # By default the device computes in bf16, where most of so small a run's memory does not grow with its batch.
    changes |= {
        "train.mixed_precision": "no",
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "data.prepared_dir": str(tmp_path / "data"),
    }
    return tiny_config(tiny_base, tiny_data, tmp_path / "run", changes)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "diffusion_pytorch_model.safetensors")


def test_a_run_returns_its_memory(config: Config):
    run(config)  # constants stay
    gc.collect()
    before = device.used()
    run(with_values(config, {"output_dir": f"{config.output_dir}-2", "train.ema_decay": 0.9}))
    gc.collect()
    assert device.used() <= before


@pytest.mark.parametrize(
    "changes",
    [
        {"train.mixed_precision": "fp16", "optim.name": "muon", "data.cache": "none", "train.noise_draws": 2},
        {"train.mixed_precision": "bf16", "base.quantize": "nf4", "train.ema_decay": 0.9, "data.num_workers": 1},
        {"train.gradient_checkpointing": True, "train.gradient_accumulation_steps": 2},
    ],
    ids=["fp16, muon, no cache", "bf16, nf4, EMA", "checkpointing, accumulation"],
)
def test_memory_is_not_read_before_it_is_written(config: Config, changes: dict[str, Any]):
    config = with_values(config, changes)
    folders = {"output_dir": f"{config.output_dir}-2", "data.prepared_dir": f"{config.data.prepared_dir}-2"}
    poisoned = with_values(config, folders)
    run(config)
    with device.poisoned():
        run(poisoned)
    assert losses(config.output_dir) == losses(poisoned.output_dir)
    clean, other = weights(config), weights(poisoned)
    assert all(torch.equal(clean[name], other[name]) for name in clean)


def peak_of_a_run(config: Config) -> tuple[int, int]:
    """Bytes in use before the updates of a run, and its peak."""
    Path(config.output_dir).mkdir(parents=True)
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    gc.collect()
    before = device.used()
    torch.cuda.reset_peak_memory_stats()
    trainer.fit()
    return before, device.peak()


def test_a_micro_batch_that_does_not_fit_is_computed_in_parts(config: Config, capsys: pytest.CaptureFixture[str]):
    config = with_values(config, {"train.batch_size": 8, "tracking.log_every": 1})
    before, peak = peak_of_a_run(config)
    small = with_values(config, {"output_dir": f"{config.output_dir}-small"})
    Path(small.output_dir).mkdir()
    setup = set_up(small)
    trainer = make_trainer(setup, setup.prepare_data())
    gc.collect()
    with device.limited(int(0.6 * (peak - before))):
        trainer.fit()
    assert "Out of memory for 8 samples at once: from here on 4" in capsys.readouterr().out
    assert losses(small.output_dir) == pytest.approx(losses(config.output_dir), rel=1e-4)


def test_a_single_sample_that_does_not_fit_is_one_line(config: Config):
    Path(config.output_dir).mkdir()
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    with device.limited(2**19), pytest.raises(UserError, match="Out of memory for a single sample") as told:
        trainer.fit()
    assert told.value.kind == "out_of_memory"


def taken(work: Any) -> int:
    """The peak of the bytes that `work` takes beyond those in use."""
    release(GPU)
    torch.cuda.reset_peak_memory_stats()
    before = device.used()
    work()
    return device.peak() - before


def test_pictures_and_captions_that_do_not_fit_are_encoded_in_parts(capsys: pytest.CaptureFixture[str]):
    base = open_base(BaseOptions())
    encoder, pixels = base.latent_encoder(GPU), torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8, device=GPU)
    whole = encode_pixels(encoder, pixels)
    with device.limited(taken(lambda: encode_pixels(encoder, pixels)) // 2):
        parts = encode_pixels(encoder, pixels)
    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-3)
    assert "Out of memory for 8 pictures to encode at once: from here on 4" in capsys.readouterr().err
    captions = [f"a red circle, number {number}" for number in range(8)]
    texts = base.text_encoder(GPU, torch.float32)
    states, pooled = texts.encode(captions)
    with device.limited(taken(lambda: texts.encode(captions)) * 2 // 3):
        again = texts.encode(captions)
    torch.testing.assert_close(again, (states, pooled), rtol=1e-4, atol=1e-4)
    assert "Out of memory for 8 captions at once" in capsys.readouterr().err
    with device.limited(2**12), pytest.raises(UserError, match="one of the captions .*--data.max_tokens") as told:
        texts.encode(captions)
    assert told.value.kind == "out_of_memory"


def with_pictures(config: Config, tiny_data: Path) -> Config:
    """A run that makes 4 pictures at its start and its end."""
    picture = next((tiny_data / "train").glob("*_outline.png"))
    values = {"validation.prompts": ("red circle",), "validation.images": (str(picture),), "validation.steps": 2}
    values |= {"validation.every": 3, "validation.num_images": 4, "validation.judge": "canny"}
    return with_values(config, values)


def test_pictures_of_a_validation_that_do_not_fit_are_made_in_parts(
    config: Config, tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    config = with_pictures(config, tiny_data)
    Path(config.output_dir).mkdir()
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    assert trainer.validate is not None
    adapter, validate = trainer.update.ema_or_adapter, trainer.validate
    score = validate(adapter, 0)
    with device.limited(taken(lambda: validate(adapter, 0)) * 2 // 3):
        assert validate(adapter, 0) == pytest.approx(score, abs=0.05)
    assert "Out of memory for 4 pictures at once: from here on 2" in capsys.readouterr().err


def test_a_validation_without_memory_costs_its_pictures_and_not_the_run(config: Config, tiny_data: Path):
    config = with_pictures(config, tiny_data)
    Path(config.output_dir).mkdir()
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    real = trainer.validate
    assert real is not None

    def in_little_memory(adapter: Any, step: int) -> float | None:
        with device.limited(2**14):
            return real(adapter, step)

    trainer.validate = in_little_memory
    trainer.fit()
    assert trainer.step == 3
    warnings = [row["warning"] for row in read_metrics(config.output_dir) if "warning" in row]
    assert len(warnings) == 2 and all("no pictures are made; training continues" in text for text in warnings)
