"""What a command sets before libraries are loaded, and that the user's own settings stay."""

import os
import sys

import pytest

from t2i_adapter.environment import set_defaults
from t2i_adapter.exits import guarded


def test_threads_sleep_soon_unless_the_user_has_decided() -> None:
    ours: dict[str, str] = {}
    set_defaults(ours)
    assert ours["GOMP_SPINCOUNT"] == "1000"
    own = {"GOMP_SPINCOUNT": "7"}
    set_defaults(own)
    assert own["GOMP_SPINCOUNT"] == "7"
    by_policy = {"OMP_WAIT_POLICY": "active"}
    set_defaults(by_policy)
    assert "GOMP_SPINCOUNT" not in by_policy


def test_cudas_memory_grows_in_place_unless_the_user_has_decided() -> None:
    if sys.platform != "linux":
        pytest.skip("CUDA has expandable segments on Linux only")
    ours: dict[str, str] = {}
    set_defaults(ours)
    assert ours["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        own = {name: "max_split_size_mb:128"}
        set_defaults(own)
        assert {key: own[key] for key in own if "ALLOC" in key} == {name: "max_split_size_mb:128"}


def test_a_command_sets_them_before_it_does_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen: list[str] = []
    assert guarded(lambda: seen.append(os.environ["GOMP_SPINCOUNT"])) == 0
    assert seen == ["1000"]
