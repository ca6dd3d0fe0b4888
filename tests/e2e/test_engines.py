"""Runs inside somebody else's process group and thread, and processes of a run that see different worlds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from support.processes import Forked, Run, ranks
from support.runs import losses, tiny_config, train_words

from t2i_adapter import train
from t2i_adapter.config.tree import Config

STEPS = 4
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """A folder with straight/, the run of two processes that a launcher has started."""
    folder = tmp_path_factory.mktemp("engines")
    assert run_two(folder, tiny_base, tiny_data, ["straight", "straight"]) == [0, 0]
    return folder


def options(base: Path, data: Path, out: Path) -> Config:
    changes = {"train.batch_size": 1, "train.max_steps": STEPS, "checkpoint.resume": "auto", "checkpoint.every": 2}
    return tiny_config(base, data, out, changes)


def run_two(
    work: Path,
    base: Path,
    data: Path,
    outs: list[str],
    *more: str,
    own: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    env: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    said: list[str] | None = None,
) -> list[int]:
    """Trains by two processes; the exit code of each. more: words of both. own, env: words and variables of each."""
    flags = ["--train.batch_size=1", f"--train.max_steps={STEPS}", "--train.seed=5", "--tracking.log_every=1"]
    flags += ["--checkpoint.resume=auto", "--checkpoint.every=2", *more]
    runs = [
        Run(work, *train_words(base, data, out, *flags, *words), env={**launched, **variables})
        for out, words, launched, variables in zip(outs, own, ranks(2), env, strict=True)
    ]
    codes = [run.wait() for run in runs]
    if said is not None:
        said += [run.said() for run in runs]
    return codes


# Inside an engine ---------------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    """What a run might leave changed in its process."""
    return {
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("KMP_")},
        "handlers": [str(signal.getsignal(number)) for number in SIGNALS],
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "words": list(sys.argv),
        "device": str(torch.get_default_device()),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        # tqdm keeps one thread for all bars of a process.
        "alive": sorted(thread.name for thread in threading.enumerate() if thread.name != "tqdm_monitor"),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between two states."""
    found = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    if "environment" in found:
        found["environment"] = set(before["environment"].items()) ^ set(after["environment"].items())
    return found


def in_thread(action: Callable[[], Any]) -> Any:
    """Runs `action` in a thread, as Ray Train does, and returns its result."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("called", ["in the main thread", "in a thread"])
def test_a_run_inside_a_process_group_leaves_it_as_it_was(work: Path, tiny_base: Path, tiny_data: Path, called: str):
    """The group has no launcher's environment: its two processes found each other by a file."""
    out = work / called
    place, results = work / f"{called}.store", [work / f"{called}-{rank}.json" for rank in range(2)]

    def host(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
        mine = dist.new_group([0, 1])
        before, steps = state(), list[int]()

        def run() -> bool:
            config = options(tiny_base, tiny_data, out)
            return train(config, callbacks=[lambda event: steps.append(event.step)]).is_finished

        ends = [in_thread(run) if called == "in a thread" else run() for _ in range(2)]
        after = state()
        assert changes(before, after) == {}
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        dist.all_reduce(total, group=mine)
        assert dist.is_initialized() and total.item() == 6
        results[rank].write_text(json.dumps({"ends": ends, "steps": sorted(set(steps))}))
        dist.destroy_process_group()

    members = [Forked(work, lambda rank=rank: host(rank)) for rank in range(2)]
    for member in members:
        assert member.wait() == 0, member.said()
    first, second = (json.loads(result.read_text()) for result in results)
    assert first == {"ends": [True, True], "steps": list(range(1, STEPS + 1))}
    assert second == {"ends": [True, True], "steps": []}
    assert "Finished already" in members[0].said()
    assert losses(out) == losses(work / "straight")


def test_a_run_that_fails_leaves_its_process_as_it_was_too(work: Path, tiny_base: Path, tiny_data: Path):
    """A callback raises: the launcher's group, which the run has made, is gone, and another run begins."""

    def host(env: Mapping[str, str]) -> None:
        os.environ.update(env)
        before = state()
        config = options(tiny_base, tiny_data, work / "raises")
        try:
            train(config, callbacks=[lambda event: 1 / 0])
        except Exception as fault:
            print(type(fault).__name__)
        assert not dist.is_initialized()
        after = state()
        assert changes(before, after) == {}

    members = [Forked(work, lambda env=env: host(env)) for env in ranks(2)]
    for member in members:
        assert member.wait() == 0, member.said()
    assert "ZeroDivisionError" in members[0].said()


def test_the_state_of_accelerate_belongs_to_the_program_around_a_run(work: Path, tiny_base: Path, tiny_data: Path):
    def host() -> None:
        own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        assert train(options(tiny_base, tiny_data, work / "beside")).is_finished
        assert own.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert own.gradient_state.num_steps == 3 and own.num_processes == 1

    member = Forked(work, host)
    assert member.wait() == 0, member.said()


# Different worlds ---------------------------------------------------------------------------------------------------


def test_machines_with_caches_and_folders_of_their_own_make_the_same_run(work: Path, tiny_base: Path, tiny_data: Path):
    """One cache is full and the other one empty, one output folder has files of somebody else."""
    outs = ["own-0", "own-1"]
    (work / "own-1").mkdir()
    (work / "own-1" / "notes.txt").write_text("not ours")
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env = ({**alone, "T2I_ADAPTER_CACHE": str(work / "cache-0")}, {**alone, "T2I_ADAPTER_CACHE": str(work / "cache-1")})
    first = run_two(work, tiny_base, tiny_data, ["fill", "fill"], env=(env[0], env[0]))
    said: list[str] = []
    assert [first, run_two(work, tiny_base, tiny_data, outs, env=env, said=said)] == [[0, 0], [0, 0]], said
    assert losses(work / "own-0") == losses(work / "straight")
    assert "(0 new)" in said[0] and "(8 new)" in said[1]
    assert not (work / "own-1" / "metrics.jsonl").exists()


def test_the_main_process_says_whether_the_run_is_finished(work: Path, tiny_base: Path, tiny_data: Path):
    """The second machine has a copy of the checkpoints and no adapter, so alone it would train."""
    shutil.copytree(work / "straight", work / "done-0")
    (work / "done-1").mkdir()
    for folder in (work / "straight").glob("checkpoint-*"):
        shutil.copytree(folder, work / "done-1" / folder.name)
    said: list[str] = []
    assert run_two(work, tiny_base, tiny_data, ["done-0", "done-1"], said=said) == [0, 0], said
    assert "Finished already" in said[0]


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            ("--optim.lr=1e-3",),
            "--optim.lr is not the same on all processes: process 0 on .* 0.0001, process 1 on .* 0.001",
        ),
        (("--data=fewer",), "--data the processes see different pairs: process 0 on .* 8 pairs, .* 7 pairs, "),
        (("--data=edited",), "--data the processes see different pictures: .*copy it again"),
        (("--data=reordered",), "--data the processes see different pairs: .*copy it again"),
        (("--base.name=nano",), "--base.name is not the same on all processes"),
        (("--train.mixed_precision=bf16",), "--train.mixed_precision is not the same on all processes"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_what_processes_must_share_is_compared(
    work: Path, tiny_base: Path, tiny_data: Path, own: tuple[str, ...], line: str
):
    _write_worlds(work, tiny_data)
    said: list[str] = []
    out = f"differs-{own[0].strip('-')}"
    codes = run_two(work, tiny_base, tiny_data, [out, out], own=((), own), said=said)
    assert codes == [2, 2], said
    for text in said:
        assert len([row for row in text.splitlines() if row.startswith("error: ")]) == 1
        assert re.search(f"^error: {line}", text, re.MULTILINE), text
    assert not list((work / out).glob("checkpoint-*"))


def _write_worlds(work: Path, data: Path) -> None:
    """fewer, edited, reordered: copies of the dataset with a row less, with another picture, with rows in another
    order."""
    if (work / "fewer").exists():
        return
    for name in ("fewer", "edited", "reordered"):
        shutil.copytree(data, work / name)
    table = work / "fewer" / "train" / "metadata.jsonl"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:-1]))
    picture = work / "edited" / "train" / "00003.png"
    Image.open(picture).rotate(90).save(picture)
    (work / "reordered" / "train" / "metadata.jsonl").write_text("".join(reversed(rows)))


# Exchange -----------------------------------------------------------------------------------------------------------


def test_validation_with_several_processes_ends(work: Path, tiny_base: Path, tiny_data: Path):
    """The others wait for the main process, which alone generates pictures."""
    Image.new("L", (64, 64)).save(work / "condition.png")
    more = ["--validation.prompts=a circle", "--validation.images=condition.png", "--validation.num_images=1"]
    more += ["--validation.steps=1", "--validation.every=2"]
    said: list[str] = []
    assert run_two(work, tiny_base, tiny_data, ["validates", "validates"], *more, said=said) == [0, 0], said
    assert losses(work / "validates") == losses(work / "straight")


def test_gradients_in_bf16_are_near_those_in_fp32(work: Path, tiny_base: Path, tiny_data: Path):
    said: list[str] = []
    assert run_two(work, tiny_base, tiny_data, ["bf16", "bf16"], "--train.exchange=bf16", said=said) == [0, 0], said
    norms = [[row["grad_norm"] for row in _metrics(work / name)] for name in ("straight", "bf16")]
    assert norms[1][0] == pytest.approx(norms[0][0], rel=4e-3)  # 8 bits of mantissa
    assert norms[1] != norms[0]


def test_the_profile_splits_compute_and_exchange(work: Path, tiny_base: Path, tiny_data: Path):
    more = ("--train.profile", "--train.max_steps=10")
    said: list[str] = []
    assert run_two(work, tiny_base, tiny_data, ["profiled", "profiled"], *more, said=said) == [0, 0], said
    page = (work / "profiled" / "profile" / "summary.md").read_text()
    shares = {
        row.split("|")[1].strip(): float(row.split("|")[3].strip(" %"))
        for row in page.splitlines()
        if row.startswith("| ") and "%" in row
    }
    assert shares["exchange of gradients, and waiting for other processes"] > 0.1
    assert shares["backward pass"] > 1 and sum(shares.values()) == pytest.approx(100, abs=1)
    assert losses(work / "profiled")[:STEPS] == losses(work / "straight")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "grad_norm" in row]
