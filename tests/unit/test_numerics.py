"""The precision that a device gets, lines about options that it lacks, and torch's switches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import losses, tiny_config, train_words

from t2i_adapter.abilities import Hardware
from t2i_adapter.cli import main
from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.script import parse
from t2i_adapter.training.accelerator import check_processes, make_accelerator
from t2i_adapter.training.numerics import (
    WORKSPACE,
    choose_precision,
    idle_options,
    is_exact,
    prepare_deterministic,
    restored_switches,
    set_switches,
)
from t2i_adapter.verbs.train import run

TURING, A100, ADA = (Hardware("cuda", version) for version in ((7, 5), (8, 0), (8, 9)))
CPU, MPS, AMD = Hardware("cpu"), Hardware("mps", (15, 1)), Hardware("rocm")


def config(**changes: Any) -> Config:
    return with_values(Config(), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("wanted", "hardware", "precision"),
    [
        (None, A100, "bf16"),
        (None, AMD, "bf16"),
        (None, CPU, "no"),
        (None, MPS, "no"),
        ("no", A100, "no"),
        ("fp16", TURING, "fp16"),
        ("bf16", CPU, "bf16"),
        ("bf16", A100, "bf16"),
    ],
)
def test_the_precision_of_a_device(wanted: str | None, hardware: Hardware, precision: str) -> None:
    assert choose_precision(wanted, hardware) == (precision, [])


def test_an_old_card_computes_in_fp32_and_the_line_names_fp16() -> None:
    precision, (line,) = choose_precision(None, TURING)
    assert precision == "no"
    assert line.startswith(
        "This GPU (compute capability 7.5) cannot compute in bf16, which needs 8.0: this run computes"
    )
    assert "--train.mixed_precision fp16" in line


def test_bf16_on_too_old_a_card_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^--train.mixed_precision bf16: this GPU .*7\.5.* needs 8\.0; use fp16 or no"):
        choose_precision("bf16", TURING)
    with pytest.raises(UserError, match=r"^--train.mixed_precision bf16: mps \(macOS 13.1\).*; use no\.$"):
        choose_precision("bf16", Hardware("mps", (13, 1)))


@pytest.mark.parametrize("hardware", [CPU, MPS])
def test_fp16_without_a_card_for_it_computes_in_fp32(hardware: Hardware) -> None:
    precision, (line,) = choose_precision("fp16", hardware)
    assert precision == "no" and "fp16 needs a GPU" in line


@pytest.mark.parametrize(
    ("changes", "hardware", "words"),
    [
        ({"train__allow_tf32": True}, TURING, "--train.allow_tf32 has no effect: this GPU (compute capability 7.5)"),
        ({"train__allow_tf32": True}, CPU, "--train.allow_tf32 has no effect: a CPU cannot"),
        (
            {"base__quantize": "float8"},
            A100,
            "--base.quantize float8 saves memory and no time: this GPU (compute capab",
        ),
        ({"train__compile": "on"}, Hardware("cuda", (6, 1)), "--train.compile on will not work: this GPU"),
        ({"train__compile": "graphs"}, CPU, "--train.compile graphs compiles without graphs: a CPU cannot replay"),
    ],
)
def test_an_option_that_the_device_lacks_is_one_line(changes: Any, hardware: Hardware, words: str) -> None:
    (line,) = idle_options(config(**changes), hardware)
    assert line.startswith(words) and "\n" not in line


def test_on_a_card_that_has_it_all_nothing_is_said() -> None:
    full = config(train__allow_tf32=True, base__quantize="float8", train__compile="graphs")
    assert idle_options(full, ADA) == []
    assert idle_options(config(base__quantize="float8"), CPU) == []


def test_deterministic_and_xformers_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"^--train.deterministic xFormers.*omit --train.xformers"):
        idle_options(config(train__deterministic=True, train__xformers=True), A100)


def test_what_is_promised_to_the_bit() -> None:
    assert is_exact(CPU, deterministic=False) and is_exact(A100, deterministic=True)
    assert not is_exact(A100, deterministic=False) and not is_exact(AMD, deterministic=False)


def switches() -> tuple[object, ...]:
    backends = torch.backends
    return (
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cuda.cudnn_sdp_enabled()),
        *(backends.cuda.matmul.allow_tf32, torch.utils.deterministic.fill_uninitialized_memory),  # pyright: ignore[reportAttributeAccessIssue]
    )


def test_switches_follow_the_options_and_are_put_back() -> None:
    before = switches()
    with restored_switches():
        set_switches(config(train__deterministic=True, train__allow_tf32=True))
        assert switches() == (True, False, True, False, False, True, False)
        set_switches(config())
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32, "an earlier run's option stays"
        set_switches(config(data__buckets="sdxl"))
        assert not torch.backends.cudnn.benchmark, "each size would be timed"
    assert switches() == before


def test_an_operation_without_a_deterministic_form_is_one_line() -> None:
    before = switches()
    with (
        pytest.raises(UserError, match=r"^--train.deterministic an operation .*put_ .*; omit it\.$") as fault,
        restored_switches(),
    ):
        set_switches(config(train__deterministic=True))
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    assert "\n" not in str(fault.value) and switches() == before


def test_another_error_passes_through() -> None:
    with pytest.raises(RuntimeError, match="^mine$"), restored_switches():
        raise RuntimeError("mine")


def test_the_workspace_of_cublas_is_set_and_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    prepare_deterministic(config())
    assert WORKSPACE not in os.environ
    if not torch.cuda.is_initialized():
        prepare_deterministic(config(train__deterministic=True))
        assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    prepare_deterministic(config(train__deterministic=True))
    assert os.environ[WORKSPACE] == ":16:8"


def test_the_script_computes_in_fp32_without_accelerates_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' script does, on any device; our own default is the device's."""
    words = ["--pretrained_model_name_or_path=nano", "--train_data_dir=pairs"]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert parse(words).config.train.mixed_precision == "no"
    assert parse([*words, "--mixed_precision=bf16"]).config.train.mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert parse(words).config.train.mixed_precision is None, "make_accelerator reads the variable"
    assert Config().train.mixed_precision is None


def test_on_a_cpu_deterministic_changes_no_bit_and_leaves_torch_as_it_was(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    before = switches()
    plain = tiny_config(tiny_base, tiny_data, tmp_path / "plain", {"train.max_steps": 2, "train.device": "cpu"})
    run(plain)
    run(with_values(plain, {"train.deterministic": True, "output_dir": str(tmp_path / "exact")}))
    assert losses(tmp_path / "exact") == losses(tmp_path / "plain")
    assert switches() == before


def test_a_gpu_that_is_not_there_is_one_line(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(train_words(tiny_base, tiny_data, tmp_path / "out", "--train.device=cuda", "--dry_run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --train.device cuda: no CUDA GPU ") and line.endswith(
        "use --train.device cpu or auto."
    )
    assert not (tmp_path / "out").exists()


def test_a_cpu_run_beside_a_gpu_that_torch_cannot_use_says_so(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    words = train_words(tiny_base, tiny_data, tmp_path / "out", "--dry_run")
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for more, times in (((), 1), (("--train.device=cpu",), 0)):
        command = [sys.executable, "-m", "t2i_adapter", *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
        assert done.stdout.count("train.device auto: no CUDA GPU") == times


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:1", r"^--train.device cuda:1: names one device for 2 processes; use cuda, and each takes its own\.$"),
        ("cuda", r"^--train.device cuda: no CUDA GPU"),
    ],
)
def test_processes_and_devices_that_do_not_fit_are_one_line(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=words):
        make_accelerator(config(train__device=name))


def test_more_processes_than_gpus_are_one_line() -> None:
    check_processes(4, "cuda", 4)
    with pytest.raises(
        UserError, match=r"^--train.device cuda: 2 processes on this machine and 1 cuda device: start 1, "
    ):
        check_processes(2, "cuda", 1)
