"""The reader of files of `torch.save`: equal tensors, nothing else, and one error for every damaged file."""

from __future__ import annotations

import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_adapter.export.torch_file import TorchFileError, read_torch_file

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a, b.detach())
    if isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def content() -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.arange(24.0).view(2, 3, 4)
    return {
        "kinds": [torch.ones(2, 3).to(kind) for kind in KINDS],
        "views": (base, base[:, 1], base.transpose(0, 2), base[1, 2, 3], base[:0], torch.zeros(())),
        "module": OrderedDict(torch.nn.Conv2d(3, 2, 1).state_dict()),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "numbers": {"epoch": 3, "rate": 1e-4, "big": 2**70, "negative": -5, "is": True, "not": False, "none": None},
        "text": "Straße",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_reads_what_was_saved(tmp_path: Path, protocol: int) -> None:
    torch.save(content(), tmp_path / "a.pth", pickle_protocol=protocol)
    assert equal(read_torch_file(tmp_path / "a.pth"), content())


def test_a_state_dict_with_its_versions(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert equal(read_torch_file(tmp_path / "a.pth"), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (lambda: {"a": print}, "builtins.print|instruction GLOBAL|Name"),
        (lambda: {"a": Path("x")}, "another kind"),
        (lambda: {1, 2}, "another kind"),
        (lambda: torch.device("cpu"), "torch.device"),
    ],
)
def test_other_objects_are_refused(tmp_path: Path, made: Callable[[], Any], message: str) -> None:
    torch.save(made(), tmp_path / "a.pth")
    try:
        found = read_torch_file(tmp_path / "a.pth")
    except TorchFileError:
        return
    assert "print" not in str(type(found["a"])), "a name is never looked up"
    assert type(found["a"]).__name__ == "_Name"


def test_a_file_of_the_old_form_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match="since version 1.6"):
        read_torch_file(tmp_path / "a.pth")


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_numbers_that_are_missing_or_compressed_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "a.pth")
    cut = rewritten(tmp_path / "a.pth", tmp_path / "cut.pth", lambda name, b: b[:-4] if "/data/" in name else b)
    with pytest.raises(TorchFileError, match="larger than its numbers"):
        read_torch_file(cut)
    packed = rewritten(tmp_path / "a.pth", tmp_path / "packed.pth", lambda _, b: b, zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="compressed"):
        read_torch_file(packed)


def test_damaged_instructions_give_one_error_and_no_other(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.pth")
    choices = random.Random(0)
    whole = read_torch_file(tmp_path / "a.pth")
    refused = 0
    for number in range(400):

        def damage(name: str, stored: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return stored
            changed = bytearray(stored)
            for _ in range(choices.randint(1, 4)):
                changed[choices.randrange(len(changed))] = choices.randrange(256)
            return bytes(changed)

        file = rewritten(tmp_path / "a.pth", tmp_path / f"{number}.pth", damage)
        try:
            read_torch_file(file)
        except TorchFileError:
            refused += 1
        file.unlink()
    assert refused > 200 and equal(whole, content())
