"""In a step nothing makes the host wait for a GPU: no number is read, no tensor is made from Python's, and no shape
depends on data. Seen on a CPU by the operations' names; tests/emulated has a device that reports the waits themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import tiny_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_adapter.batches.encoders import Encoders
from t2i_adapter.training import data, nonfinite
from t2i_adapter.training.accumulate import Accumulation
from t2i_adapter.training.setup import make_trainer, set_up
from t2i_adapter.training.update import Update

DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""torch's tags of operations whose result, or its shape, the host has to read before it can go on."""
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor}
"""Functions that make a tensor from Python's numbers or the host's memory; on a GPU each is a copy that waits."""


class ReadByHost(TorchDispatchMode):
    """Counts the operations that depend on data."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # Of an index only a mask's result has a shape that depends on data.
        if DEPENDS_ON_DATA & set(func.tags) and (name != "index" or _has_mask(args[1])):
            self._found[name] += 1
        return func(*args, **(kwargs or {}))


class MadeFromPython(TorchFunctionMode):
    """Counts the tensors that are made from Python's numbers, also as an index: `tensor[[0, 2]]`."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if func in FROM_PYTHON or (is_index and _has_list(args[1])):
            self._found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    return any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in index)


def _has_list(index: Any) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


@contextmanager
def listening(found: Counter[str]) -> Iterator[None]:
    with MadeFromPython(found), ReadByHost(found):
        yield


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What was found in the parts of a step that run on the device, while the other parts run unheard: batches are
    built on the host."""
    found: Counter[str] = Counter()
    # As on a GPU. On a CPU the answer to whether a gradient is finite costs nothing, and is asked for at each step.
    monkeypatch.setattr(nonfinite, "supports_found_inf", lambda optimizer: True)
    for owner, name in (
        (data, "to_device"),
        (Encoders, "complete"),
        (Accumulation, "_add_micro_batch"),
        (Update, "_apply"),
    ):
        monkeypatch.setattr(owner, name, heard(getattr(owner, name), found))
    return found


def heard(part: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    """`part`, heard from its second call on: the first one loads the encoders, and checks what they return."""
    calls = count()

    def listened(*args: Any, **kwargs: Any) -> Any:
        with listening(found) if next(calls) else nullcontext():
            return part(*args, **kwargs)

    return listened


def train(base: Path, pairs: Path, folder: Path, changes: dict[str, Any], steps: int = 3) -> None:
    plain = {"train.max_steps": steps, "train.cpu_threads": 1, "tracking.log_every": steps, "validation.budget": 0}
    config = tiny_config(base, pairs, folder, {**plain, **changes})
    folder.mkdir(exist_ok=True)
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    trainer.fit()
    assert trainer.step == steps


SETS: dict[str, dict[str, Any]] = {
    "plain": {"data.num_workers": 1},
    "bf16, EMA": {"train.mixed_precision": "bf16", "train.ema_decay": 0.9},
    "draws, accumulation": {
        "train.noise_draws": 2,
        "train.gradient_accumulation_steps": 2,
        "objective.min_snr_gamma": 5.0,
    },
    "checkpointing": {"train.gradient_checkpointing": True},
    "large blocks": {"train.gradient_checkpointing": True, "train.checkpoint_blocks": "large"},
    "muon, NaN guard": {"optim.name": "muon", "train.on_nonfinite": "skip"},
    "buckets": {"data.buckets": "generated", "data.bucket_step": 64},
    "int8": {"base.quantize": "int8"},
    "float8": {"base.quantize": "float8"},
    "nf4": {"base.quantize": "nf4"},
}


@pytest.mark.parametrize("name", SETS)
def test_in_no_step_the_host_reads_or_makes_a_number(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, found: Counter[str], name: str
):
    train(tiny_base, tiny_data, tmp_path / "run", SETS[name])
    assert found == {}


@pytest.mark.parametrize("changes", [{"data.text_cache": "live"}, {"data.cache": "none", "data.max_tokens": 150}])
def test_encoding_makes_tensors_of_token_ids_only(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, found: Counter[str], changes: dict[str, Any]
):
    """One tensor for each of the two tokenizers and each batch with new captions, the second and the third;
    tests/emulated shows that `send` brings it to a GPU without a wait."""
    train(tiny_base, tiny_data, tmp_path / "run", changes)
    assert set(found) == {"tensor"} and found["tensor"] <= 2 * 2


def test_what_makes_the_host_wait_is_found():
    found: Counter[str] = Counter()
    x = torch.arange(4.0)
    with listening(found):
        x.sum().item()
        x.nonzero()
        x[x > 0]
        x[[0, 1]]
        torch.equal(x, x)
        x.new_tensor([1.0, 2.0])
        torch.tensor(3.0)
    names = {"_local_scalar_dense", "nonzero", "index", "__getitem__", "equal", "new_tensor", "tensor"}
    assert names <= set(found)


def test_a_guard_that_reads_is_found(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, found: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nonfinite, "supports_found_inf", lambda optimizer: False)
    train(tiny_base, tiny_data, tmp_path / "run", {})
    assert found["_local_scalar_dense"] >= 2
