"""The device is chosen in one place, and one that this machine does not have is one line."""

from __future__ import annotations

import pytest
import torch

from t2i_adapter.devices import choose_device
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
    with pytest.raises(UserError, match=rf"--device {kind}: no .* found; use --device cpu or auto") as fault:
        choose_device(kind)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:one", ""])
def test_what_is_no_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"--device .*allowed are auto, cpu, cuda, cuda:1, xpu, mps"):
        choose_device(name)
