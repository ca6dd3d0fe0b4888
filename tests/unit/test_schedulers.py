"""A base's scheduler: DDPM's schedule is read as the base's own class reads it; every other one is refused by name."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.cli import main
from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.scheduler import DDPM_SCHEDULERS

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OPTIONAL = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}
"""They need scipy, which the tests do not install; without it they cannot be built here."""
EDM = {"prediction_type": "epsilon", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "base")


def write_scheduler(base: Path, content: Any) -> Path:
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    return base


def change_scheduler(base: Path, **values: Any) -> Path:
    content = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    return write_scheduler(base, {**content, **values})


def schedule(base: Path) -> NoiseSchedule:
    return NoiseSchedule.of(open_base(BaseOptions(name=str(base))).scheduler())


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # KDPM2 with numpy 2
@pytest.mark.parametrize("name", DDPM_SCHEDULERS)
def test_the_schedule_is_that_of_the_bases_own_class(base: Path, name: str) -> None:
    kind = getattr(diffusers, name)
    try:
        kind()
    except ImportError:
        assert name in OPTIONAL
        pytest.skip("needs scipy")
    variants: list[dict[str, Any]] = [{}, {"beta_schedule": "linear"}, {"prediction_type": "v_prediction"}]
    if "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters:
        variants.append({"rescale_betas_zero_snr": True})
    for variant in variants:
        own = kind(**SDXL | variant)
        own.save_pretrained(base / "scheduler")
        read = schedule(base)
        assert read.prediction == own.config["prediction_type"]
        alphas = own.alphas_cumprod.double().sqrt().float()
        assert torch.equal(read.alphas[:-1], alphas[:-1])
        if variant.get("rescale_betas_zero_snr"):
            assert read.alphas[-1] == 0 and alphas[-1] < 1e-3
        else:
            assert read.alphas[-1] == alphas[-1]


def test_trained_betas_are_read(base: Path) -> None:
    betas = np.linspace(0.001, 0.02, 50).tolist()
    write_scheduler(base, {"_class_name": "DDIMScheduler", "num_train_timesteps": 50, "trained_betas": betas})
    read = schedule(base)
    np.testing.assert_allclose(read.alphas.numpy() ** 2, np.cumprod(1 - np.array(betas)), rtol=1e-5)


def test_settings_of_sampling_change_no_schedule(base: Path, tiny_base: Path) -> None:
    change_scheduler(
        base, use_karras_sigmas=True, final_sigmas_type="sigma_min", sigma_min=0.1, sigma_max=10.0, prediction_type=None
    )
    assert torch.equal(schedule(base).alphas, schedule(tiny_base).alphas)
    assert schedule(base).prediction == "epsilon"


@pytest.mark.parametrize(
    "name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"]
)
def test_a_scheduler_of_another_process_is_refused(base: Path, name: str) -> None:
    getattr(diffusers, name)().save_pretrained(base / "scheduler")
    with pytest.raises(UserError, match=rf"scheduler_config\.json: .*{name}\..*EulerDiscreteScheduler.*Use a base"):
        open_base(BaseOptions(name=str(base)))


def test_the_class_in_the_index_of_the_pipeline_is_checked(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(UserError, match=r"model_index\.json: .*EDMEulerScheduler"):
        open_base(BaseOptions(name=str(base)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_flow_sigmas", True, "use_flow_sigmas is True; allowed is false"),
        (
            "prediction_type",
            "flow_prediction",
            "prediction_type is flow_prediction; allowed is epsilon or v_prediction",
        ),
        ("prediction_type", "sample", "prediction_type is sample; allowed is epsilon or v_prediction"),
        ("timestep_type", "continuous", "timestep_type is continuous; allowed is discrete"),
        ("beta_schedule", "sigmoid", "beta_schedule is sigmoid; allowed is linear, scaled_linear, squaredcos_cap_v2"),
        ("beta_start", "0.00085", "beta_start is 0.00085; allowed is a number between 0 and 1"),
        ("beta_end", 2.0, r"beta_end is 2\.0; allowed is a number between 0 and 1"),
        ("num_train_timesteps", 0, "num_train_timesteps is 0; allowed is a whole number"),
        ("trained_betas", [0.1, 0.2], r"trained_betas is \[0\.1, 0\.2\]; allowed is null, or num_train_timesteps"),
        ("rescale_betas_zero_snr", "yes", "rescale_betas_zero_snr is yes; allowed is true or false"),
        ("_class_name", None, "no class of a scheduler is named"),
    ],
)
def test_a_value_that_means_another_schedule_is_refused(base: Path, key: str, value: Any, said: str) -> None:
    change_scheduler(base, **{key: value})
    with pytest.raises(UserError, match=said):
        open_base(BaseOptions(name=str(base)))


@pytest.mark.parametrize("key", sorted(SDXL))
def test_a_key_whose_default_differs_between_classes_is_required(base: Path, key: str) -> None:
    """HeunDiscreteScheduler begins at beta 0.00085 by default, EulerDiscreteScheduler at 0.0001."""
    write_scheduler(base, {"_class_name": "HeunDiscreteScheduler", **{k: v for k, v in SDXL.items() if k != key}})
    with pytest.raises(UserError, match=f"{key} is missing; allowed is"):
        open_base(BaseOptions(name=str(base)))


@pytest.mark.parametrize(
    "content", [{"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, **EDM}, FLOW], ids=["edm", "flow"]
)
@pytest.mark.parametrize("verb", ["train", "prepare", "plan", "doctor", "generate", "evaluate"])
def test_each_verb_refuses_it_before_anything_is_encoded(
    verb: str,
    content: dict[str, Any],
    base: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(base))).unet_config)
    save_adapter(network, tmp_path / "adapter", metadata={"base": {"name": str(base)}, "resolution": 64}, fp16=False)
    Image.new("RGB", (64, 64)).save(tmp_path / "condition.png")
    write_scheduler(base, content)
    monkeypatch.setenv("T2I_ADAPTER_CACHE", str(tmp_path / "cache"))
    data = ["--data", str(tiny_data), "--data.resolution", "64"]
    adapter = ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    flags = {
        "generate": [*adapter, "--prompt", "red circle", "--image", str(tmp_path / "condition.png")],
        "evaluate": [*adapter, "--data", str(tiny_data), "--num", "2"],
        "train": ["--base.name", str(base), *data, "--output_dir", str(tmp_path / "out"), "--train.max_steps", "1"],
    }
    assert main([verb, *flags.get(verb, ["--base.name", str(base), *data])]) == 2
    printed = capsys.readouterr()
    assert f"scheduler_config.json: the scheduler's class is {content['_class_name']}." in printed.err
    assert not list(tmp_path.glob("cache/**/*.*")) and not (tmp_path / "out" / "adapter").exists()
    assert not list(tmp_path.glob("out/*.png"))


def test_a_base_for_inpainting_is_refused(base: Path) -> None:
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(UserError, match="its UNet takes 9 channels, as bases for inpainting .* allowed is 4"):
        open_base(BaseOptions(name=str(base)))
