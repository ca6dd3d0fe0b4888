"""Every changed byte and every cut of a checkpoint is detected; every state.json is read or refused with one line."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.runs import train_words
from test_fuzz_files import HOSTILE, JSON, SPOILS, spoil, times

from t2i_adapter.cli import main
from t2i_adapter.errors import UserError
from t2i_adapter.training import checkpoint


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoint-1 and checkpoint-2. Read only."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["--train.max_steps", "2", "--train.batch_size", "1", "--checkpoint.every", "1"]
    assert main(train_words(tiny_base, tiny_data, out, *words)) == 0
    return out


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@given(choice=st.integers(0, 10), spoils=SPOILS)
@settings(max_examples=times(1.5))
def test_any_spoilt_byte_is_detected_and_the_checkpoint_before_is_used(run: Path, choice: int, spoils: tuple[int, int]):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        shutil.copytree(run, out)
        last = out / "checkpoint-2"
        name = names(last)[choice % len(names(last))]
        content = (last / name).read_bytes()
        (last / name).write_bytes(spoil(content, *spoils))
        if name == "state.json" and is_same_json((last / name).read_bytes(), content):
            return  # only white space changed
        assert checkpoint.damage(last), f"{name} is damaged but passes the check"
        found, skipped = checkpoint.find(out, "latest")
        assert found == out / "checkpoint-1"
        assert len(skipped) == 1 and "checkpoint-2" in skipped[0]


def is_same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_state_is_damage(run: Path, tmp_path: Path, hostile: bytes):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "state.json").write_bytes(hostile)
    assert checkpoint.damage(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2"):
        checkpoint.find(tmp_path, "latest")


@given(key=st.sampled_from(["schema", "step", "files", "options", "plan", "numbers", "scaler", "sha256"]), value=JSON)
@example("schema", 10**300)
@example("schema", True)
@example("schema", -1)
@example("step", -1)
@example("files", {"/dev/zero": "x"})
def test_any_other_value_in_a_state_is_damage(run: Path, key: str, value: Any):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkpoint-2"
        shutil.copytree(run / "checkpoint-2", copy)
        state = json.loads((copy / "state.json").read_text())
        if state.get(key) == value:
            return
        (copy / "state.json").write_text(json.dumps({**state, key: value}))
        assert checkpoint.damage(copy)
