"""The drop-in script's flags are those of the diffusers script, row by row, and mean what they mean there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2i_adapter.config.read import option_types, with_values
from t2i_adapter.config.tree import Config, to_dict
from t2i_adapter.errors import UserError
from t2i_adapter.script import flag_table, parse, script_defaults
from t2i_adapter.script_flags import ROWS, SCRIPT_WAYS

ROOT = Path(__file__).parents[2]
THEIRS: list[dict[str, Any]] = json.loads((ROOT / "tests/assets/diffusers_flags.json").read_text())["flags"]
NAMED = ["--pretrained_model_name_or_path=base", "--train_data_dir=data"]
OUR_OWN_DEFAULT = {"--dataloader_num_workers"}  # docs/diffusers-script.md says why
SAMPLES = {"str": "word", "int": "7", "float": "0.25"}


def test_all_flags_in_order() -> None:
    assert [f"--{row.flag}" for row in ROWS] == [theirs["flag"] for theirs in THEIRS]
    assert len(ROWS) == 56


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda theirs: theirs["flag"])
def test_row_is_as_in_the_script(theirs: dict[str, Any]) -> None:
    (row,) = (row for row in ROWS if f"--{row.flag}" == theirs["flag"])
    assert (row.type is None) == (theirs.get("action") == "store_true")
    if row.type is not None:
        assert row.type.__name__ == theirs["type"]
        assert (row.default == theirs["default"]) is (theirs["flag"] not in OUR_OWN_DEFAULT)
    assert row.choices == (tuple(theirs["choices"]) if "choices" in theirs else None)
    assert row.nargs == theirs.get("nargs")
    assert row.required == theirs.get("required", False)


def sample(theirs: dict[str, Any]) -> tuple[list[str], Any]:
    """Words that give the flag, and the value they mean."""
    flag = theirs["flag"]
    if theirs.get("action"):
        return [flag], True
    if "choices" in theirs:
        return [flag, theirs["choices"][-1]], theirs["choices"][-1]
    if flag == "--lr_scheduler":
        return [flag, "cosine"], "cosine"
    text = SAMPLES[theirs["type"]]
    value = {"str": str, "int": int, "float": float}[theirs["type"]](text)
    return ([flag, text, text], (text, text)) if theirs.get("nargs") else ([f"{flag}={text}"], value)


def at(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda theirs: theirs["flag"])
def test_flag_sets_its_places_and_nothing_else(theirs: dict[str, Any]) -> None:
    (row,) = (row for row in ROWS if f"--{row.flag}" == theirs["flag"])
    words, value = sample(theirs)
    beside = {
        "validation_prompt": ["--validation_image", "a", "b"],
        "validation_image": ["--validation_prompt", "a", "b"],
    }
    named = [word for word in NAMED if not word.startswith(theirs["flag"])]
    if row.flag == "dataset_name":
        named.remove("--train_data_dir=data")
    before = parse([*NAMED, *beside.get(row.flag, [])]) if row.flag not in beside else None
    after = parse([*named, *words, *beside.get(row.flag, [])]).config
    expected = row.given if row.type is None else value
    assert all(at(after, path) == expected for path in row.paths)
    if before is not None and row.flag != "dataset_name":
        assert after == with_values(before.config, dict.fromkeys(row.paths, expected))


def test_defaults_are_the_scripts() -> None:
    config = script_defaults()
    for row in ROWS:
        if row.type is None or row.flag == "pretrained_model_name_or_path":
            continue
        expected = () if row.nargs else row.default
        assert all(at(config, path) == expected for path in row.paths), row.flag
    assert at(config, "base.name") == ""
    assert all(at(config, path) == value for path, value in SCRIPT_WAYS.items())
    switched = [at(config, path) for row in ROWS if row.type is None for path in row.paths if row.given is True]
    assert switched and not any(switched)


def test_every_place_is_an_option() -> None:
    known = set(option_types(Config))
    places = {path.removesuffix(".0").removesuffix(".1") for row in ROWS for path in row.paths}
    assert places <= known
    assert set(SCRIPT_WAYS) <= known


GUIDE = [
    "--pretrained_model_name_or_path=base",
    "--output_dir=out",
    "--dataset_name=fusing/fill50k",
    "--mixed_precision=fp16",
    "--resolution=1024",
    "--learning_rate=1e-5",
    "--max_train_steps=15000",
    "--validation_image",
    "./conditioning_image_1.png",
    "./conditioning_image_2.png",
    "--validation_prompt",
    "red circle with blue background",
    "cyan circle with brown floral background",
    "--validation_steps=100",
    "--train_batch_size=1",
    "--gradient_accumulation_steps=4",
    "--report_to=wandb",
    "--seed=42",
    "--push_to_hub",
]


def test_the_guides_command_line() -> None:
    """Field by field: what is given, and for the rest what the script does by default."""
    flags = parse(GUIDE)
    assert not flags.dry_run
    assert to_dict(flags.config) == {
        "output_dir": "out",
        "base": {
            "name": "base",
            "config": None,
            "revision": None,
            "variant": None,
            "vae": None,
            "cache_dir": None,
            "quantize": "none",
        },
        "adapter": {
            "init_from": None,
            "type": None,
            "in_channels": 3,
            "num_res_blocks": None,
            "init": "default",
            "compose": [],
        },
        "data": {
            "location": "fusing/fill50k",
            "dataset_config_name": None,
            "dataset_revision": None,
            "kind": "auto",
            "conditioning_dir": None,
            "captions": "auto",
            "streaming": False,
            "split": "train",
            "cache_dir": None,
            "image_column": "image",
            "conditioning_image_column": "conditioning_image",
            "caption_column": "text",
            "condition": None,
            "conditions": [],
            "max_train_samples": None,
            "resolution": 1024,
            "crops_coords_top_left_h": 0,
            "crops_coords_top_left_w": 0,
            "proportion_empty_prompts": 0,
            "num_workers": None,
            "prepared_dir": None,
            "local_gb": 64.0,
            "part": None,
            "on_missing": "encode",
            "skip": None,
            "on_bad_sample": "fail",
            "max_bad_share": 0.01,
            "buckets": "none",
            "bucket_step": 64,
            "crop": "center",
            "flip": False,
            "views": 1,
            "condition_kind": "map",
            "background": "white",
            "caption_prefix": "",
            "shuffle_tags": False,
            "keep_tags": 0,
            "max_tokens": 75,
            "cache": "disk",
            "text_cache": "auto",
        },
        "objective": {
            "timesteps": "cubic",
            "logit_mean": 0.0,
            "logit_std": 1.0,
            "stratify": False,
            "min_snr_gamma": None,
            "noise_offset": 0.0,
        },
        "optim": {
            "name": "adamw",
            "lr": 1e-5,
            "scale_lr": False,
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "eps": 1e-08,
            "max_grad_norm": 1.0,
            "schedule": "constant",
            "warmup_steps": 500,
            "schedule_from": 0,
            "num_cycles": 1,
            "power": 1.0,
            "step_rules": "",
        },
        "train": {
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
            "global_batch": None,
            "noise_draws": 1,
            "max_steps": 15000,
            "epochs": 1,
            "stop_when": "done",
            "device": "auto",
            "mixed_precision": "fp16",
            "gradient_checkpointing": False,
            "checkpoint_blocks": "all",
            "seed": 42,
            "allow_tf32": False,
            "deterministic": False,
            "profile": False,
            "xformers": False,
            "compile": "off",
            "channels_last": False,
            "cpu_threads": None,
            "ema_decay": 0.0,
            "max_time": None,
            "stop_signals": ["TERM", "INT", "USR1", "USR2", "HUP"],
            "stop_code": None,
            "patience": "30m",
            "exchange": "fp32",
            "on_nonfinite": "stop",
            "max_nonfinite": 10,
        },
        "checkpoint": {
            "every": 500,
            "keep": 3,
            "keep_every": None,
            "keep_best": False,
            "resume": None,
            "allow_changed": False,
        },
        "validation": {
            "prompts": ["red circle with blue background", "cyan circle with brown floral background"],
            "images": ["./conditioning_image_1.png", "./conditioning_image_2.png"],
            "num_images": 4,
            "every": 100,
            "steps": 20,
            "guidance": 5.0,
            "judge": None,
            "budget": 0.05,
            "held_out": 32,
            "split": None,
        },
        "tracking": {
            "report_to": "wandb",
            "project": "sd_xl_train_t2iadapter",
            "logging_dir": "logs",
            "log_every": 10,
        },
        "hub": {
            "push": True,
            "model_id": None,
            "private": True,
            "license": None,
            "license_name": None,
            "license_link": None,
        },
    }


def test_the_guides_typo_shows_the_right_flag() -> None:
    typo = [word.replace("--gradient_acc", "----gradient_acc") for word in GUIDE]
    with pytest.raises(UserError, match=r"^----gradient_accumulation_steps=4: .*--gradient_accumulation_steps=4\?$"):
        parse(typo)


def test_docs_show_the_rows() -> None:
    assert (ROOT / "docs/diffusers-script.md").read_text().endswith(flag_table())
