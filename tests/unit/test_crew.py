"""Processes that see one cache divide its work: each part is taken once, and that of a dead process by another."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from t2i_adapter.cache import crew as crew_module
from t2i_adapter.cache.crew import Crew
from t2i_adapter.cache.parts import cut, rows_of
from t2i_adapter.cache.texts import MAX_AUTO_BYTES, choose_captions
from t2i_adapter.config.tree import DataOptions, Part, part_of
from t2i_adapter.data.notes import NOTES, FolderNotes, sweep_notes
from t2i_adapter.errors import UserError
from t2i_adapter.files import cache_root
from t2i_adapter.training.sharing import _Process, describe, machine_numbers, mutual, unique


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(crew_module, "DEAD_SECONDS", 0.5)


def crew_of(folder: Path, rank: int, world: int) -> Crew:
    return Crew(FolderNotes(folder), rank, world)


def test_each_part_is_taken_once_by_threads_that_race(tmp_path: Path) -> None:
    world, items, taken = 4, list(range(400)), Counter[int]()

    def work(rank: int) -> None:
        with crew_of(tmp_path / "notes", rank, world) as crew:
            for item in crew.share("images", items, lambda item: item // 10, 40):
                taken[item] += 1
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == Counter(items)


def test_each_process_begins_at_a_place_of_its_own(tmp_path: Path) -> None:
    starts = [crew_of(tmp_path, rank, 4).order(8) for rank in range(4)]
    assert [order[0] for order in starts] == [0, 2, 4, 6]
    assert all(sorted(order) == list(range(8)) for order in starts)


def test_a_single_process_writes_no_notes(tmp_path: Path) -> None:
    with crew_of(tmp_path / "notes", 0, 1) as crew:
        assert list(crew.share("images", [1, 2, 3], lambda item: item, 3)) == [1, 2, 3]
    assert not (tmp_path / "notes").exists()


def test_the_parts_of_a_dead_process_are_taken_over_once(tmp_path: Path, quick: None) -> None:
    """Process 0 takes all parts, makes half of them, and dies, which stops its count."""
    made = Counter[int]()
    with crew_of(tmp_path, 0, 3) as dead:
        share = dead.share("images", range(10), lambda item: item, 10)
        assert list(share) == list(range(10))
        made.update(range(5))

    def work(rank: int) -> None:
        with crew_of(tmp_path, rank, 3) as crew:
            assert not list(crew.share("images", range(5, 10), lambda item: item, 10)), "all are taken"

            def make(items: Sequence[int]) -> None:
                made.update(items)

            crew.complete(
                "images", lambda: [n for n in range(10) if not made[n]], lambda n: n, make, timeout=20, what="cache"
            )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 2)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == Counter(range(10)), "each once"
    assert time.monotonic() - started > 0.4, "not before the process must be dead"


def test_a_process_that_lives_keeps_its_parts_and_waiting_ends(tmp_path: Path, quick: None) -> None:
    with crew_of(tmp_path, 0, 2) as slow, crew_of(tmp_path, 1, 2) as other:
        assert slow.take("images", 0)
        with pytest.raises(UserError, match=r"cache: 1 records .* did not appear in 1 s"):
            other.complete("images", lambda: [0], lambda n: n, lambda items: pytest.fail("taken"), 1.0, "cache")


def test_a_single_process_does_not_wait_for_others() -> None:
    with Crew(None) as crew, pytest.raises(UserError, match="cache: 1 records were written but cannot be found"):
        crew.complete("images", lambda: [0], lambda n: n, lambda items: None, 1000, "cache")


def test_a_note_that_was_cut_off_belongs_to_nobody(tmp_path: Path, quick: None) -> None:
    """A process was killed between creating the note and writing its number."""
    (tmp_path / "images.0.0").write_bytes(b"")
    made = list[int]()
    with crew_of(tmp_path, 1, 2) as crew:
        crew.complete("images", lambda: [] if made else [0], lambda n: n, made.extend, 20, "cache")
    assert made == [0]


def test_notes_of_old_runs_are_removed(tmp_path: Path) -> None:
    import os

    for name in ("old", "new"):
        FolderNotes(tmp_path / NOTES / name).write("images.0.0", b"0")
    old = time.time() - 2 * 86400
    os.utime(tmp_path / NOTES / "old", (old, old))
    sweep_notes(tmp_path)
    assert [path.name for path in (tmp_path / NOTES).iterdir()] == ["new"]


def test_an_address_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the local folder, which is also needed if `data.prepared_dir` is an address."""
    monkeypatch.setenv("T2I_ADAPTER_CACHE", "s3://bucket/x")
    with pytest.raises(UserError, match="s3://bucket/x: T2I_ADAPTER_CACHE names a local folder"):
        cache_root(None)
    monkeypatch.setenv("T2I_ADAPTER_CACHE", "/local")
    assert str(cache_root("s3://bucket/x")) == "/local"


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [(24,), (10, 10, 10), (1000, 5, 7, 988), (3,) * 1000, (0, 5, 0, 1)], ids=len)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_parts_are_all_rows_once_and_of_about_equal_size(shards: tuple[int, ...], count: int) -> None:
    parts = [rows_of(shards, Part(number + 1, count)) for number in range(count)]
    total = sum(shards)
    assert np.concatenate(parts).tolist() == list(range(total))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= 1.5 * total / count + 1
    assert min(sizes) >= total // (2 * count) - 1


def test_parts_end_where_stored_shards_end(shards: tuple[int, ...] = (100, 110, 90, 105, 95)) -> None:
    assert cut(shards, 5).tolist() == [0, 100, 210, 300, 405, 500]
    assert cut((500,), 4).tolist() == [0, 125, 250, 375, 500], "a single shard is cut"


@pytest.mark.parametrize("text", ["65/64", "0/4", "3", "a/b", "1/0", "-1/4", "1/2/3"])
def test_a_part_out_of_range_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="allowed is") as fault:
        DataOptions(part=text)
    assert fault.value.option == "data.part"
    assert ("1/64 to 64/64" in str(fault.value)) == (text == "65/64")


def test_parts_are_written_from_1() -> None:
    assert part_of("3/64") == (3, 64)
    assert str(part_of("64/64")) == "64/64"


def test_a_part_decides_about_captions_as_the_whole_would() -> None:
    """Otherwise 64 jobs would store states that the run, which has 64 times as many captions, does not read."""
    captions, each = [str(number) for number in range(10)], MAX_AUTO_BYTES // 20
    for parts, stored in ((1, True), (2, True), (3, False), (64, False)):
        found, _ = choose_captions(captions, DataOptions(), each, parts)
        assert (found is not None) == stored, parts


# Who sees whose cache -------------------------------------------------------------------------------------------------


def lines_of(machines: Sequence[int], seen: Sequence[Sequence[int]]) -> str:
    local = [list(machines[:place]).count(machine) for place, machine in enumerate(machines)]
    processes = [_Process(f"node{machine}", rank, "t", "") for machine, rank in zip(machines, local, strict=True)]
    assert machine_numbers(local) == list(machines)
    groups = unique([mutual(seen, rank) for rank in range(len(seen))])
    return describe([sorted({machines[one] for one in group}) for group in groups], processes, machines)


def all_see(*groups: Sequence[int]) -> Iterator[Sequence[int]]:
    where = {one: group for group in groups for one in group}
    return (where[one] for one in sorted(where))


@pytest.mark.parametrize(
    ("machines", "groups", "line"),
    [
        ([0, 0, 0], [[0, 1, 2]], ""),
        ([0, 0, 1, 1], [[0, 1, 2, 3]], "2 machines share {where}: each encodes a part"),
        ([0, 0, 1, 1], [[0, 1], [2, 3]], "2 machines do not share {where}: each encodes all"),
        (
            [0, 1, 2],
            [[0, 2], [1]],
            "2 caches at {where}, and each is filled by those that see it: 0 (node0), 2 (node2); ",
        ),
    ],
    ids=["one machine", "shared", "not shared", "partly"],
)
def test_the_line_about_machines(machines: list[int], groups: list[list[int]], line: str) -> None:
    found = lines_of(machines, list(all_see(*groups)))
    assert line in found if line else not found


def test_a_process_that_sees_the_others_without_being_seen_is_alone() -> None:
    seen = [[0, 1], [0, 1], [0, 1, 2]]
    assert unique([mutual(seen, rank) for rank in range(3)]) == [[0, 1], [2]]
