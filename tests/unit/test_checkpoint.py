from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter

from t2i_adapter.errors import UserError
from t2i_adapter.training import checkpoint


def small_adapter(seed: int = 0) -> T2IAdapter:
    torch.manual_seed(seed)
    return T2IAdapter(3, [8, 16, 16, 16], 1, 16, "full_adapter_xl")


def trained(adapter: T2IAdapter, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    for step in range(steps):
        torch.manual_seed(step)
        sum(f.square().mean() for f in adapter(torch.rand(1, 3, 64, 64))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def write(folder: Path, step: int, keep: int | None = None) -> Path:
    adapter = small_adapter(step)
    tensors, numbers = checkpoint.pack_optimizer(trained(adapter, 1))
    state = {"step": step, "seed": 0, "numbers": numbers}
    return checkpoint.save(folder, adapter, checkpoint.TrainingState(tensors, state), keep)


def test_an_optimiser_goes_on_to_the_bit(tmp_path: Path):
    straight = small_adapter()
    trained(straight, 1)
    stopped = small_adapter()
    optimizer = trained(stopped, 1)
    tensors, numbers = checkpoint.pack_optimizer(optimizer)
    folder = checkpoint.save(
        tmp_path, stopped, checkpoint.TrainingState(tensors, {"step": 1, "numbers": numbers}), None
    )
    weights, training = checkpoint.load(folder, torch.device("cpu"))
    resumed = small_adapter(seed=9)
    resumed.load_state_dict(weights)
    fresh = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    checkpoint.unpack_optimizer(fresh, {**training.tensors, **training.state["numbers"]})
    for model, optim in ((stopped, optimizer), (resumed, fresh)):
        torch.manual_seed(7)
        sum(f.square().mean() for f in model(torch.rand(1, 3, 64, 64))).backward()
        optim.step()
    for a, b in zip(stopped.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_newest_are_kept_and_the_adapter_opens_by_itself(tmp_path: Path):
    for step in (5, 10, 15, 100):
        folder = write(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [15, 100]
    T2IAdapter.from_pretrained(folder / "t2iadapter", local_files_only=True)


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path):
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_foreign_names_are_passed_over(tmp_path: Path):
    (tmp_path / "checkpoint-foo").mkdir()
    (tmp_path / "checkpoint-7.bak").mkdir()
    write(tmp_path, 3)
    assert checkpoint.find(tmp_path, "latest") == (tmp_path / "checkpoint-3", [])


@pytest.mark.parametrize("spoil", ["truncate", "flip", "remove", "half-written"])
def test_latest_takes_the_one_before_a_damaged_one_and_says_so(tmp_path: Path, spoil: str):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / "training.safetensors"
    data = bytearray(file.read_bytes())
    if spoil == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif spoil == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif spoil == "remove":
        file.unlink()
    else:
        (bad / "state.json").unlink()
    found, skipped = checkpoint.find(tmp_path, "latest")
    assert found == good
    assert len(skipped) == 1 and "checkpoint-2" in skipped[0]
    with pytest.raises(UserError, match=r"checkpoint-2.*(checksum|missing)"):
        checkpoint.find(tmp_path, "checkpoint-2")


def test_resume_names_what_there_is(tmp_path: Path):
    write(tmp_path, 4)
    with pytest.raises(UserError, match="checkpoint-9: no such folder.*checkpoint-4"):
        checkpoint.find(tmp_path, "checkpoint-9")
    elsewhere = write(tmp_path / "other", 8)
    assert checkpoint.find(tmp_path, str(elsewhere)) == (elsewhere, [])
    assert checkpoint.find(tmp_path / "empty", "latest") == (None, [])


def test_a_newer_schema_is_refused(tmp_path: Path):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "schema": 99}))
    with pytest.raises(UserError, match="newer version"):
        checkpoint.find(tmp_path, "checkpoint-1")


def test_a_save_that_fails_leaves_the_older_ones_and_nothing_half_written(tmp_path: Path):
    write(tmp_path, 1)

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, Full(), checkpoint.TrainingState({}, {"step": 2}), keep=1)
    assert checkpoint.find(tmp_path, "latest") == (tmp_path / "checkpoint-1", [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
