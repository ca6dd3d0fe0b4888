"""The device is chosen in one place, and one that this machine does not have is one line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from t2i_adapter import devices
from t2i_adapter.devices import (
    choose_device,
    explain_no_cuda,
    has_driver,
    in_float64,
    memory_bytes,
    own_device,
    peak_bytes,
    release,
    reset_peak,
    start_fault,
)
from t2i_adapter.errors import UserError


def test_auto_is_a_gpu_if_there_is_one() -> None:
    gpus = [torch.cuda.is_available(), torch.xpu.is_available(), torch.backends.mps.is_available()]
    expected = next((kind for kind, has in zip(("cuda", "xpu", "mps"), gpus, strict=True) if has), "cpu")
    assert choose_device("auto") == choose_device() == expected
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("kind", "has"),
    [("cuda", torch.cuda.is_available), ("xpu", torch.xpu.is_available), ("mps", torch.backends.mps.is_available)],
)
def test_a_device_that_is_not_there_is_one_line(kind: str, has: object) -> None:
    if callable(has) and has():
        assert choose_device(kind) == kind
        with pytest.raises(UserError, match=rf"--device {kind}:99"):
            choose_device(f"{kind}:99")
        return
    with pytest.raises(UserError, match=rf"--device {kind}: no (?i:{kind}).*, or use --device cpu or auto") as fault:
        choose_device(kind)
    assert "\n" not in str(fault.value)


def test_the_option_that_names_the_device_is_in_the_line() -> None:
    with pytest.raises(UserError, match=r"^--train.device abacus: no such device"):
        choose_device("abacus", option="train.device")


def test_a_torch_without_cuda_beside_a_driver_is_the_fault_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for a GPU")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert has_driver()
    with pytest.raises(UserError, match="is a build without CUDA; install the CUDA build of torch from pytorch.org"):
        choose_device("cuda")


OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.parametrize(
    ("build", "driver", "visible", "warning", "expected"),
    [
        (None, False, None, "", r"a build without CUDA, and no NVIDIA driver was found; install the CUDA build"),
        (None, True, None, "", r"\(2.13.0\) is a build without CUDA; install the CUDA build of torch from pytorch.org"),
        ("13.0", False, None, "", r"no NVIDIA driver is here; install one, or start the container with its GPUs"),
        ("13.0", True, "", "", r"CUDA_VISIBLE_DEVICES='' hides them all; unset it"),
        ("13.0", True, "-1", "", r"CUDA_VISIBLE_DEVICES='-1' hides them all"),
        (
            "13.0",
            True,
            "0",
            OLD,
            r"built for CUDA 13.0 \(CUDA init.*too old.*\); install a newer driver, or a torch build",
        ),
        ("13.0", True, None, "", r"the driver does not work with this torch, built for CUDA 13.0; install a newer"),
    ],
)
def test_why_there_is_no_cuda(build: str | None, driver: bool, visible: str | None, warning: str, expected: str):
    line = explain_no_cuda("2.13.0", build, has_driver=driver, visible=visible, warning=warning)
    assert re.search(expected, line), line


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "another build from pytorch.org"),
        ("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 8 GiB", "end them, or choose"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "another program has it for itself"),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", "install a newer driver"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "look at `nvidia-smi`"),
    ],
)
def test_a_gpu_that_fails_at_its_first_use_is_one_line_with_what_to_do(text: str, remedy: str) -> None:
    line = start_fault(text)
    assert text in line and remedy in line and "\n" not in line


def test_memory_of_a_cpu_is_the_hosts_and_has_no_count_of_its_own() -> None:
    reset_peak("cpu")
    assert peak_bytes("cpu") is None and memory_bytes("cpu") is None
    release("cpu")


@pytest.mark.parametrize(
    ("count", "environment", "device"),
    [
        (8, {}, "cuda"),
        (8, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "cuda"),
        (8, {"WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"}, "cuda:3"),
        (2, {"WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "cuda:1"),
        (1, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda"),
    ],
)
def test_each_process_of_a_machine_takes_its_own(count: int, environment: dict[str, str], device: str) -> None:
    assert own_device("cuda", count, environment) == device


def test_no_other_file_looks_for_a_device_or_its_abilities() -> None:
    """The programs that `export` writes for others ask for themselves."""
    source = Path(devices.__file__).parent
    asks = re.compile(r"(cuda|xpu|mps)\.is_available|get_device_capability|is_bf16_supported|cuda\.device_count")
    found = {
        str(file.relative_to(source))
        for file in source.rglob("*.py")
        if file.parent.name != "export" and asks.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"devices.py"}


def test_float64_on_a_cpu_stays_there() -> None:
    assert in_float64(torch.ones(2)).dtype == torch.float64


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:one", ""])
def test_what_is_no_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"--device .*allowed are auto, cpu, cuda, cuda:1, xpu, mps"):
        choose_device(name)
