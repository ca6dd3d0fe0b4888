"""The drop-in script's parsing: old and new flags together, and mistakes as one line before anything heavy loads."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i_adapter.config.read import with_values
from t2i_adapter.config.recipe import dump
from t2i_adapter.script import _warn_of_idle_flags, main, parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_t2i_adapter_sdxl.py"
NAMED = ["--pretrained_model_name_or_path=base", "--train_data_dir=data"]


def test_old_and_new_flags_mix_in_any_order_and_form() -> None:
    plain = parse(NAMED).config
    mixed = parse(
        shlex.split(
            f"--optim.warmup_steps 20 {' '.join(NAMED)} --learning_rate 3e-4 --use_8bit_adam --adam_beta2=.99"
            " --validation_prompt 'a cat' 'two dogs' --objective.noise-offset=0.1 --validation_image=x.png"
        )
    ).config
    changed = {
        "optim.warmup_steps": 20,
        "optim.lr": 3e-4,
        "optim.name": "adamw8bit",
        "optim.betas": (0.9, 0.99),
        "validation.prompts": ("a cat", "two dogs"),
        "validation.images": ("x.png",),
        "objective.noise_offset": 0.1,
    }
    assert mixed == with_values(plain, changed)


def test_recipe_lies_between_the_scripts_defaults_and_the_new_flags(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: {name: mine}\ndata: {dataset_name: me/pairs}\noptim: {lr: 1e-3, warmup_steps: 5}\n")
    flags = parse(["--recipe", str(file), "--optim.lr", "2e-3", "--dry-run"])
    assert flags.dry_run
    assert (flags.config.base.name, flags.config.data.location) == ("mine", "me/pairs")
    assert (flags.config.optim.lr, flags.config.optim.warmup_steps) == (2e-3, 5)
    assert flags.config.optim.schedule == "constant"  # the script's


def test_flags_of_the_script_win_over_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("optim: {lr: 1e-3}\n")
    flags = parse([*NAMED, "--recipe", str(tmp_path / "r.yaml"), "--learning_rate=7e-3"])
    assert flags.config.optim.lr == 7e-3


def test_what_the_script_resolves_reads_back_as_a_recipe(tmp_path: Path) -> None:
    config = parse([*NAMED, "--lr_scheduler=polynomial", "--report_to", "none"]).config
    (tmp_path / "run.yaml").write_text(dump(config))
    assert parse(["--recipe", str(tmp_path / "run.yaml")]).config == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train_data_dir=x"], "--pretrained_model_name_or_path is required: a hub id"),
        (["--pretrained_model_name_or_path=b"], "--train_data_dir or --dataset_name is required: a folder"),
        ([*NAMED, "--dataset_name=d"], "two datasets are given, by --train_data_dir and --dataset_name; keep one"),
        ([*NAMED, "--proportion_empty_prompts=1.5"], "--proportion_empty_prompts 1.5: allowed is a share from 0 to 1"),
        ([*NAMED, "--proportion_empty_prompts=-.1"], "--proportion_empty_prompts -0.1: allowed"),
        ([*NAMED, "--validation_prompt", "a"], "--validation_prompt is given without --validation_image"),
        ([*NAMED, "--validation_image", "a"], "--validation_image is given without --validation_prompt"),
        ([*NAMED, "--validation_image", "a", "b", "--validation_prompt", "1", "2", "3"], "has 3 entries"),
        ([*NAMED, "--train_batch_size", "abc"], "--train_batch_size 'abc': allowed is a whole number"),
        ([*NAMED, "--train_batch_size", "2.5"], "--train_batch_size '2.5': allowed is a whole number"),
        ([*NAMED, "--learning_rate", "fast"], "--learning_rate 'fast': allowed is a number"),
        ([*NAMED, "--learning_rate", "0"], "--learning_rate 0.0: allowed is a number above 0"),
        ([*NAMED, "--seed"], "--seed: needs a value; allowed is a whole number"),
        ([*NAMED, "--validation_prompt"], "--validation_prompt: needs a value; allowed is a list"),
        ([*NAMED, "--push_to_hub=True"], "--push_to_hub=True: a switch takes no value; write --push_to_hub"),
        ([*NAMED, "--mixed_precision=fp8"], "--mixed_precision 'fp8': allowed is one of no, fp16, bf16"),
        ([*NAMED, "--mixed_precision=None"], "--mixed_precision 'None': allowed is one of"),
        ([*NAMED, "--lr_scheduler=cosin"], "did you mean cosine?"),
        ([*NAMED, "--learning_rat=1"], "--learning_rat=1: no such flag; did you mean --learning_rate=1?"),
        ([*NAMED, "--train_batch", "4"], "--train_batch: no such flag; did you mean --train_batch_size?"),
        ([*NAMED, "--lr", "4"], "--lr: no such flag; did you mean --optim.lr?"),
        ([*NAMED, "--optim.warmup", "4"], "--optim.warmup: no such flag; did you mean --optim.warmup_steps?"),
        ([*NAMED, "---seed=4"], "---seed=4: no such flag; did you mean --seed=4?"),
        ([*NAMED, "--seed", "3", "stray"], "'stray' belongs to no flag"),
        ([*NAMED, "-seed", "3"], "'-seed' belongs to no flag"),
        ([*NAMED, "--optim.betas", "0.9", "x"], "--optim.betas ['0.9', 'x']: allowed is 2 items, each a number"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert said in shown.err


def test_dead_flags_are_said_out_loud_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dead = ["--tokenizer_name", "t", "--detection_resolution=512", "--set_grads_to_none"]
    assert parse([*NAMED, *dead]) == parse(NAMED)
    monkeypatch.delenv("RANK", raising=False)
    _warn_of_idle_flags([*NAMED, *dead])
    told = capsys.readouterr().err
    assert told == "accepted, no effect: --tokenizer_name, --detection_resolution, --set_grads_to_none\n"
    monkeypatch.setenv("RANK", "1")  # as torchrun and accelerate set it for the second process
    _warn_of_idle_flags([*NAMED, *dead])
    monkeypatch.setenv("RANK", "0")
    _warn_of_idle_flags(NAMED)
    assert capsys.readouterr().err == ""


def test_script_runs_from_a_checkout_without_the_package(tmp_path: Path) -> None:
    """-I -S: no site-packages, so neither the installed package nor its dependencies but those named here."""
    import yaml

    libraries = str(Path(yaml.__file__).parents[1])
    code = f"""
import sys, runpy
class Hidden:  # the editable install's own finder is not there under -S; the libraries are added by hand
    pass
sys.path.append({libraries!r})
sys.argv = [{str(SCRIPT)!r}, "----seed=4"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr == "error: ----seed=4: no such flag; did you mean --seed=4?\n"


def test_script_answers_before_anything_heavy_loads(tmp_path: Path) -> None:
    """A mistake and --help both; 2 s is far above what they take (0.3 s) and below what torch alone takes."""
    for word, code in (("--help", 0), ("----gradient_accumulation_steps=4", 2)):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(SCRIPT), word], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.returncode == code, done.stderr
        assert time.monotonic() - start < 2
        assert "--gradient_accumulation_steps" in (done.stdout or done.stderr)
