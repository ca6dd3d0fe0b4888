"""Between two log entries the host reads no number from the device: on a GPU each read waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.runs import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_adapter.training import nonfinite
from t2i_adapter.training.setup import make_trainer, set_up

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "equal"}
"""Operations whose answer the host needs before it can go on."""


class Listener(TorchDispatchMode):
    """Counts what is asked while updates are made; building batches happens on the host anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ASKS:
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def asked(tiny_base: Path, tiny_data: Path, folder: Path, *, steps: int) -> int:
    changes = {"data.num_workers": 1, "train.max_steps": steps, "train.cpu_threads": 1, "train.ema_decay": 0.9}
    config = tiny_config(tiny_base, tiny_data, folder, {**changes, "tracking.log_every": steps})
    folder.mkdir()
    setup = set_up(config)
    trainer = make_trainer(setup, setup.prepare_data())
    with Listener() as listener:
        trainer.fit()
    return listener.asked.total()


def test_the_host_asks_no_more_in_many_steps_than_in_few(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    often = asked(tiny_base, tiny_data, tmp_path / "cpu", steps=6)
    # As on a GPU; on a CPU the answer to whether a gradient is finite costs nothing, and is asked for at each step.
    monkeypatch.setattr(nonfinite, "supports_found_inf", lambda optimizer: True)
    many = asked(tiny_base, tiny_data, tmp_path / "many", steps=6)
    few = asked(tiny_base, tiny_data, tmp_path / "few", steps=2)
    assert many == few
    assert often >= many + 6, "the listener hears"
