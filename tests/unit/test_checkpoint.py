from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file

from t2i_adapter.errors import UserError
from t2i_adapter.export import adapter as export
from t2i_adapter.tensors import write_tensors
from t2i_adapter.training import checkpoint, saving
from t2i_adapter.training.checkpoint import KeepPolicy, TrainingState
from t2i_adapter.training.saving import Saver

PLAN = {"seed": 0, "global_batch": 2, "samples": 8}


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


def snapshot(step: int) -> checkpoint.Snapshot:
    adapter = small_adapter(step)
    tensors, numbers = checkpoint.pack_optimizer(trained(adapter, 1))
    return checkpoint.snapshot(adapter, TrainingState(tensors, state_of(step, numbers)))


def state_of(step: int, numbers: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "plan": PLAN, "numbers": numbers, "scaler": {}, "options": {}, "versions": {}}


def write(folder: Path, step: int) -> Path:
    return checkpoint.write(folder, snapshot(step))


def test_an_optimiser_goes_on_to_the_bit(tmp_path: Path):
    straight = small_adapter()
    trained(straight, 1)
    stopped = small_adapter()
    optimizer = trained(stopped, 1)
    tensors, numbers = checkpoint.pack_optimizer(optimizer)
    folder = checkpoint.write(tmp_path, checkpoint.snapshot(stopped, TrainingState(tensors, state_of(1, numbers))))
    weights, training = checkpoint.load(folder)
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


def test_the_adapter_of_a_checkpoint_opens_by_itself(tmp_path: Path):
    opened = T2IAdapter.from_pretrained(write(tmp_path, 5) / "t2iadapter", local_files_only=True)
    written = small_adapter(5)
    trained(written, 1)
    for name, value in written.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name


def test_a_snapshot_shares_nothing_with_what_trains_on():
    adapter = small_adapter()
    taken = checkpoint.snapshot(adapter, TrainingState({}, state_of(1, {})))
    [(_, weights)] = taken.adapters
    before = {name: value.clone() for name, value in weights.items()}
    trained(adapter, 1)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (KeepPolicy(2), None, [15, 100]),
        (KeepPolicy(), None, [5, 10, 15, 100]),
        (KeepPolicy(1, every=10), None, [10, 100]),
        (KeepPolicy(1), 5, [5, 100]),
    ],
)
def test_the_newest_the_kth_and_the_best_are_kept(tmp_path: Path, keep: KeepPolicy, best: int | None, left: list[int]):
    for step in (5, 10, 15, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, keep, [best] if best else ())
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == left


def test_what_comes_after_where_a_run_goes_on_is_set_aside(tmp_path: Path):
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    lines = checkpoint.set_aside_after(tmp_path, 5)
    assert len(lines) == 2 and "checkpoint-10.set-aside" in lines[0]
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5]
    assert (tmp_path / "checkpoint-15.set-aside").is_dir()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "checkpoint-2").mkdir()
    checkpoint.rotate(run, KeepPolicy(1))
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert (elsewhere / "precious").is_file()


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path):
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_foreign_names_are_skipped(tmp_path: Path):
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


@pytest.mark.parametrize("resume", ["checkpoint-2", "auto"])
def test_a_newer_schema_is_refused_whatever_older_ones_there_are(tmp_path: Path, resume: str):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    state = {**json.loads((folder / "state.json").read_text()), "schema": 99}
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    with pytest.raises(UserError, match="checkpoint-2: a newer version .*schema 99.*update the package"):
        checkpoint.find(tmp_path, resume)


@pytest.mark.parametrize(
    "change", [{"schema": 3}, {"step": 7}, {"plan": {**PLAN, "seed": 1}}, {"numbers": {"optimizer.0.step": 1.0}}]
)
def test_a_changed_number_in_the_state_is_found(tmp_path: Path, change: dict[str, Any]):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}, indent=1))
    assert checkpoint.damage(folder) == "state.json does not have the checksum it was written with"


def test_what_is_no_plain_file_of_a_checkpoint_is_not_read(tmp_path: Path):
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    state["files"]["/dev/zero"] = ""
    (folder / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    assert "files lists other files" in str(checkpoint.damage(folder))

    linked = write(tmp_path, 2)
    file = linked / "training.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is not a regular file" in str(checkpoint.damage(linked))


def test_a_save_does_not_write_through_a_link(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    (tmp_path / ".checkpoint-1.writing").symlink_to(elsewhere)
    write(tmp_path, 1)
    assert checkpoint.find(tmp_path, "auto")[0] == tmp_path / "checkpoint-1"
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_our_tensor_file_is_one_of_the_library(tmp_path: Path):
    tensors = {
        "a": torch.rand(3, 5),
        "scalar": torch.tensor(2.5),
        "half": torch.rand(7).half(),
        "brain": torch.rand(2, 2).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(5),
        "none": torch.empty(0, 4),
        "turned": torch.rand(4, 6).T,
    }
    digest = write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


# Saving beside the training ------------------------------------------------------------------------------------------


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, told: list[str]) -> Saver:
    return Saver(tmp_path / "run", KeepPolicy(1), told.append)


def test_saving_returns_before_the_file_is_there_and_the_next_waits(saver: Saver, monkeypatch: pytest.MonkeyPatch):
    gate, whole = threading.Event(), checkpoint.write

    def slowly(folder: Path, taken: checkpoint.Snapshot) -> Path:
        assert gate.wait(20)
        return whole(folder, taken)

    monkeypatch.setattr(checkpoint, "write", slowly)
    saver.output_dir.mkdir()
    saver.save(snapshot(1))
    assert saver.saved is None
    gate.set()
    saver.save(snapshot(2))
    saver.close()
    assert saver.saved == 2
    assert checkpoint.list_checkpoints(saver.output_dir) == [(2, saver.output_dir / "checkpoint-2")]


def test_without_room_the_older_one_stays_and_the_bytes_are_named(saver: Saver, told: list[str]):
    """A file in the folder's place is what a full disk is here: nothing can be written, and OSError says so."""
    saver.output_dir.mkdir()
    saver.save(snapshot(1))
    saver.wait()
    shutil.move(saver.output_dir, saver.output_dir.with_name("away"))
    saver.output_dir.write_text("")
    saver.save(snapshot(2))
    while not told:
        time.sleep(0.01)
    assert "checkpoint-2 could not be written" in told[0] and "next try in" in told[0]
    saver.output_dir.unlink()
    shutil.move(saver.output_dir.with_name("away"), saver.output_dir)
    saver.close()  # tries once more, and there is room now
    assert saver.saved == 2


def test_no_room_is_told_in_bytes_before_anything_is_written(tmp_path: Path):
    class Huge(checkpoint.Snapshot):
        nbytes = 1 << 60

    taken = snapshot(1)
    with pytest.raises(OSError, match=r"No space left.*1,152,921,504,606,846,976 bytes are needed and [\d,]+ are free"):
        saving._check_room(tmp_path, Huge(taken.adapters, taken.training))
    assert not list(tmp_path.iterdir())


def test_a_save_that_waits_for_room_gives_way_to_the_next(saver: Saver, told: list[str]):
    saver.output_dir.write_text("")
    saver.save(snapshot(1))
    while not told:
        time.sleep(0.01)
    saver.output_dir.unlink()
    saver.output_dir.mkdir()
    saver.save(snapshot(2))
    saver.close()
    assert [step for step, _ in checkpoint.list_checkpoints(saver.output_dir)] == [2]


def test_a_mistake_of_ours_in_the_writer_surfaces(saver: Saver):
    saver.output_dir.mkdir()
    taken = snapshot(1)
    saver.save(checkpoint.Snapshot((("{}", {"x": torch.zeros(1, dtype=torch.complex64)}),), taken.training))
    with pytest.raises(KeyError, match="complex64"):
        saver.close()
    assert not list(saver.output_dir.iterdir())


def test_what_the_disk_holds_is_compared_with_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that keeps something else than it was given: here the file is changed once it is written."""

    def spoilt(path: Path, *rest: Any) -> str:
        digest = write_tensors(path, *rest)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return digest

    write(tmp_path, 1)
    monkeypatch.setattr(export, "write_tensors", spoilt)
    with pytest.raises(OSError, match="it was written, but .* does not have the checksum"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_best_is_kept_through_rotation_and_remembered(saver: Saver):
    saver.output_dir.mkdir()
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
        saver.save(snapshot(step))
        if saver.best is None or score > saver.best[1]:
            saver.keep_as_best(step, score)
    saver.close()
    assert [step for step, _ in checkpoint.list_checkpoints(saver.output_dir)] == [2, 4]
    assert saving.read_best(saver.output_dir) == (2, 0.9)
    shutil.rmtree(saver.output_dir / "checkpoint-2")
    assert saving.read_best(saver.output_dir) is None
