"""Several machines prepare one dataset: in a folder that they share, each its own, in parts, on object storage.

A "machine" here is a process with local rank 0 and a view of the cache of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.object_store import as_user, serve_s3
from support.processes import Run, finish, ranks, until
from support.runs import losses
from support.tiny import write_circles

from t2i_adapter.cache import crew, shards
from t2i_adapter.cache.shard_file import pack
from t2i_adapter.cache.shards import Shards
from t2i_adapter.data import source
from t2i_adapter.types import Sample

PAIRS = 24


pytestmark = pytest.mark.usefixtures("nothing_is_left_running")


@pytest.fixture(scope="module")
def work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml, its data, and alone/, the cache that one process makes."""
    folder = tmp_path_factory.mktemp("shared")
    write_circles(folder / "data", num=PAIRS, size=64)
    (folder / "run.yaml").write_text(f"""
base: {{name: {tiny_base}}}
data: {{location: data, resolution: 64, num_workers: 0}}
train: {{max_steps: 3, seed: 5, batch_size: 2, cpu_threads: 1}}
tracking: {{report_to: none, log_every: 1}}
validation: {{budget: 0, split: none}}
""")
    finish(folder, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", "alone")
    return folder


def machines(world: int) -> list[dict[str, str]]:
    """The environment of the only process on each of the `world` machines of one run."""
    return [{**env, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for env in ranks(world)]


def start(work: Path, env: dict[str, str], cache: str, *more: str, verb: str = "prepare", seconds: float = 0.0) -> Run:
    """A verb on one machine; each read of a pair takes `seconds`, and a process is dead after 2 s."""
    words = (verb, "--recipe", "run.yaml", "--data.prepared_dir", cache, *more)
    return Run(work, *words, env=env, before=lambda: slow_down(seconds))


def slow_down(seconds: float) -> None:
    """In a process of its own: pairs are read slowly, and each record is a shard of its own."""
    read = source.Source.__getitem__

    def read_slowly(self: source.Source, index: int) -> Sample:
        time.sleep(seconds)
        return read(self, index)

    source.Source.__getitem__ = read_slowly
    crew.BEAT_SECONDS, crew.DEAD_SECONDS = 0.2, 2.0
    if seconds:
        shards.SHARD_BYTES = 1


def records(cache: Path, kind: str = "images") -> dict[str, bytes]:
    """The bytes of each record of a cache by its key. Fails if a record is stored twice."""
    [folder] = [path for path in (cache / kind).iterdir() if list(path.glob("*.shard"))]
    table = Shards(folder)
    found = {table._index["key"][row].tobytes().hex(): b"".join(pack(table.read(row))) for row in range(len(table))}
    assert len(found) == len(table), "a record is stored twice"
    return found


def digests(cache: Path, kind: str = "images") -> dict[str, str]:
    return {key: hashlib.sha256(data).hexdigest() for key, data in records(cache, kind).items()}


def new_shards(cache: Path) -> int:
    return len(list(cache.glob("images/*/*.shard")))


def said_new(run: Run) -> int:
    """How many pairs were missing when the process looked."""
    found = re.search(r"prepared: \d+ pairs \((\d+) new\)", run.said())
    assert found, run.said()
    return int(found[1])


# A folder that machines share, or not ---------------------------------------------------------------------------------


def test_machines_that_share_a_folder_make_each_record_once(work: Path) -> None:
    runs = [start(work, env, "both", seconds=0.5) for env in machines(2)]
    for run in runs:
        assert run.wait() == 0, run.said()
    assert "cache: 2 machines share both: each encodes a part" in runs[0].said()
    assert digests(work / "both") == digests(work / "alone")
    assert digests(work / "both", "texts").keys() == digests(work / "alone", "texts").keys()
    assert new_shards(work / "both") == PAIRS
    notes = [path.name for path in (work / "both" / "notes").glob("*/images-*.*.0")]
    owners = {path.read_text() for path in (work / "both" / "notes").glob("*/images-*.*.0")}
    assert len(notes) == PAIRS and owners == {"0", "1"}, "both have worked"


def test_machines_that_do_not_share_make_all_records_each(work: Path) -> None:
    runs = [start(work, env, f"own{number}") for number, env in enumerate(machines(2))]
    for run in runs:
        assert run.wait() == 0, run.said()
    assert "cache: 2 machines do not share own0: each encodes all" in runs[0].said()
    for number in (0, 1):
        assert digests(work / f"own{number}") == digests(work / "alone")


def test_two_machines_share_and_a_third_has_its_own(work: Path) -> None:
    """Training on all three finds every record on each of them."""
    caches = ("some", "other", "some")
    more = ("--output_dir", "some-run", "--train.batch_size", "1")
    runs = [start(work, env, caches[n], *more, verb="train") for n, env in enumerate(machines(3))]
    for run in runs:
        assert run.wait() == 0, run.said()
    assert re.search(
        r"the machines see 2 caches at some, and each is filled by those that see it: 0 \(.*\), 2 \(.*\); 1 \(",
        runs[0].said(),
    )
    assert digests(work / "some") == digests(work / "other") == digests(work / "alone")
    assert len(losses(work / "some-run")) == 3


def test_the_others_make_what_a_killed_machine_has_taken(work: Path) -> None:
    """The machine that is killed is so slow that it has not made a record by then."""
    pace = zip(machines(2), (0.05, 30.0), strict=True)
    survivor, killed = (start(work, env, "survivors", seconds=seconds) for env, seconds in pace)
    notes = work / "survivors" / "notes"

    def has_begun() -> bool:
        return new_shards(work / "survivors") > 4 and any(p.read_text() == "1" for p in notes.glob("*/images-*.*.0"))

    until(has_begun)
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.said()
    assert new_shards(work / "survivors") < PAIRS, "it was killed while it worked"
    assert survivor.wait() == 0, survivor.said()
    assert digests(work / "survivors") == digests(work / "alone")
    assert list(notes.glob("*/images-*.*.1")), "parts were taken over"
    assert not list((work / "survivors").glob("images/*/*.tmp"))


def test_a_start_after_all_were_killed_makes_the_rest(work: Path) -> None:
    pace = zip(machines(2), (0.05, 30.0), strict=True)
    runs = [start(work, env, "killed", seconds=seconds) for env, seconds in pace]
    until(lambda: new_shards(work / "killed") > 3)
    for run in runs:
        run.send(signal.SIGKILL)
        run.wait()
    found = new_shards(work / "killed")
    assert 3 < found < PAIRS
    again = [start(work, env, "killed") for env in machines(2)]
    for run in again:
        assert run.wait() == 0, run.said()
    assert said_new(again[0]) == PAIRS - found
    assert digests(work / "killed") == digests(work / "alone")


def test_a_machine_that_cannot_write_its_cache_is_named_by_all(work: Path) -> None:
    (work / "file").write_text("no folder")
    runs = [start(work, env, cache) for env, cache in zip(machines(2), ("fine", "file"), strict=True)]
    codes = [run.wait() for run in runs]
    assert codes == [2, 2], [run.said() for run in runs]
    for run in runs:
        assert "file/notes/" in run.said() and "Name a folder that every machine can write to" in run.said()
    assert "process 1 on " in runs[0].said()


def test_a_prepared_folder_that_only_one_machine_sees_is_found_out(work: Path) -> None:
    """With `on_missing fail` the machine that does not see it stops; otherwise it makes the records itself."""
    fail = ("--data.on_missing", "fail")
    here, there = (start(work, env, cache, *fail) for env, cache in zip(machines(2), ("alone", "empty"), strict=True))
    assert (here.wait(), there.wait()) == (0, 2), here.said() + there.said()
    assert "cache: 2 machines do not share alone: each encodes all" in here.said()
    assert f"--data.on_missing fail: {PAIRS} of {PAIRS} pictures have no record at empty" in there.said()


def test_machines_with_other_data_do_not_take_each_other_s_digests(work: Path) -> None:
    """Of one name, the pairs of the second machine lie in another order. Both share one cache."""
    for name, seed in (("left", 1), ("right", 2)):
        write_circles(work / name, num=8, size=64, seed=seed)
        (work / f"{name}.yaml").write_text(
            (work / "run.yaml").read_text().replace("location: data", f"location: {name}")
        )
    metadata = work / "right" / "train" / "metadata.jsonl"
    metadata.write_text("".join(reversed(metadata.read_text().splitlines(keepends=True))))
    runs = [
        Run(
            work,
            "prepare",
            "--recipe",
            f"{name}.yaml",
            "--data.prepared_dir",
            "mixed",
            env=env,
            before=lambda: slow_down(0),
        )
        for name, env in zip(("left", "right"), machines(2), strict=True)
    ]
    for run in runs:
        assert run.wait() == 0, run.said()
    assert len(records(work / "mixed")) == 16
    for name in ("left", "right"):
        said = finish(work, "prepare", "--recipe", f"{name}.yaml", "--data.prepared_dir", "mixed")
        assert "8 pairs (0 new)" in said


def test_a_bad_row_that_one_machine_finds_ends_all(work: Path) -> None:
    data = write_circles(work / "bad-data", num=PAIRS, size=64)
    (data / "train" / "00020.png").write_bytes(b"no picture")
    more = ("--data", "bad-data")
    runs = [start(work, env, "bad", *more) for env in machines(2)]
    assert [run.wait() for run in runs] == [2, 2], [run.said() for run in runs]
    assert all("00020.png" in run.said() for run in runs)
    runs = [
        start(work, env, "bad", *more, "--data.on_bad_sample", "skip", "--data.max_bad_share", "0.1")
        for env in machines(2)
    ]
    assert [run.wait() for run in runs] == [0, 0], [run.said() for run in runs]
    assert len(records(work / "bad")) == PAIRS - 1


# Parts of an array job ------------------------------------------------------------------------------------------------


def test_parts_need_nothing_of_each_other_and_training_finds_them_whole(work: Path) -> None:
    jobs = [start(work, {}, "parts", "--data.part", f"{number}/3", seconds=0.05) for number in (3, 1, 2)]
    for job in jobs:
        assert job.wait() == 0, job.said()
    assert digests(work / "parts") == digests(work / "alone")
    said = finish(work, "train", "--recipe", "run.yaml", "--data.prepared_dir", "parts", "--output_dir", "parts-run")
    assert f"prepared: {PAIRS} pairs (0 new)" in said and "(0 new) in" in said
    finish(work, "train", "--recipe", "run.yaml", "--data.prepared_dir", "alone", "--output_dir", "alone-run")
    assert losses(work / "parts-run") == losses(work / "alone-run")


def test_missing_parts_are_named_and_training_makes_them_or_stops(work: Path) -> None:
    for number in (1, 4):
        finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", "holes", "--data.part", f"{number}/4")
    fail = ("--data.on_missing", "fail")
    for verb in ("prepare", "train"):
        run = start(work, {}, "holes", *fail, "--output_dir", "holes-run", verb=verb)
        assert run.wait() == 2, run.said()
        assert re.search(
            r"--data.on_missing fail: 12 of 24 pictures have no record at .*holes, of part 2/4, 3/4; "
            r"`t2i-adapter prepare` makes them with --data.part 2/4\.",
            run.said(),
        ), run.said()
    assert new_shards(work / "holes") == 2, "nothing was encoded"
    other = start(work, {}, "holes", *fail, "--data.resolution", "32")
    assert other.wait() == 2
    assert "4 parts were prepared with other options: resolution 64, here 32" in other.said()
    fewer = start(work, {}, "holes", *fail, "--data.max_train_samples", "20")
    assert fewer.wait() == 2
    assert "4 parts were prepared of 24 pairs, and this run has 20: choose rows by equal options" in fewer.said()
    said = finish(work, "train", "--recipe", "run.yaml", "--data.prepared_dir", "holes", "--output_dir", "holes-run")
    assert "pictures: 12 of 24 have no record, of part 2/4, 3/4" in said
    assert digests(work / "holes") == digests(work / "alone")
    finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", "holes", *fail)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.part", "65/64"), "--data.part 65/64: allowed is 1/64 to 64/64"),
        (("--data.part", "3"), "--data.part 3: allowed is K/N, from 1/N to N/N, such as 3/64"),
        (("--data.part", "1/2", "--data.on_missing", "fail"), "--data.on_missing fail: looks for the records of all"),
        (("--data.prepared_dir", "gs://x/y"), "--data.prepared_dir gs://x/y: a folder, or s3://BUCKET/PREFIX"),
        (("--data.prepared_dir", "s3://"), "--data.prepared_dir s3://: a folder, or s3://BUCKET/PREFIX"),
        (("--data.local_gb", "0"), "--data.local_gb 0.0: allowed is a number above 0"),
    ],
)
def test_bad_options_are_one_line(work: Path, words: tuple[str, ...], message: str) -> None:
    run = start(work, {}, "never", *words)
    assert run.wait() == 2
    assert message in run.said()


def test_training_refuses_a_part(work: Path) -> None:
    run = start(work, {}, "never", "--data.part", "1/2", "--output_dir", "part-run", verb="train")
    assert run.wait() == 2
    assert "--data.part 1/2: `prepare` alone encodes a part" in run.said()


def test_more_parts_than_pairs_leave_some_empty(work: Path) -> None:
    said = finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", "many", "--data.part", "1/100")
    assert "part 1/100 has no pair" in said


# Object storage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    pytest.importorskip("s3fs", reason="the extra [s3] is not installed")
    with serve_s3(tmp_path_factory.mktemp("empty")) as env:
        yield env


def local(work: Path, name: str, env: dict[str, str]) -> dict[str, str]:
    """The environment of a machine with a local cache of its own."""
    return {**env, "T2I_ADAPTER_CACHE": str(work / name)}


def test_a_cache_on_object_storage_is_written_once_and_read_through_copies(work: Path, s3: dict[str, str]) -> None:
    where = "s3://pairs/one"
    jobs = [
        start(work, local(work, f"node{number}", s3), where, "--data.part", f"{number}/2", seconds=0.01)
        for number in (1, 2)
    ]
    for job in jobs:
        assert job.wait() == 0, job.said()
    for number in (1, 2):
        assert not list((work / f"node{number}").rglob("*.shard")), "the local files go when they are uploaded"
    # A machine that has seen nothing trains from it: no record is made, and the losses are those of a local cache.
    words = ("--recipe", "run.yaml", "--data.prepared_dir", where)
    said = finish(work, "train", *words, "--output_dir", "s3-run", env=local(work, "node3", s3))
    assert f"prepared: {PAIRS} pairs (0 new)" in said and f"at {where}" in said
    finish(work, "train", "--recipe", "run.yaml", "--data.prepared_dir", "alone", "--output_dir", "s3-alone")
    assert losses(work / "s3-run") == losses(work / "s3-alone")
    assert list((work / "node3").rglob("fetched/*"))


def test_copies_are_bounded(work: Path, s3: dict[str, str]) -> None:
    """Each record is a shard of its own of about 2 KB, and 10 KB may be held."""
    where, node = "s3://pairs/bounded", local(work, "bounded", s3)
    job = start(work, node, where, seconds=0.01)
    assert job.wait() == 0, job.said()
    words = ("--recipe", "run.yaml", "--data.prepared_dir", where, "--data.local_gb", "0.00001")
    finish(work, "train", *words, "--train.max_steps", "24", "--output_dir", "bounded-run", env=node)
    held = [path.stat().st_size for path in (work / "bounded").rglob("fetched/*") if not path.name.startswith(".")]
    assert 0 < sum(held) <= 10_000 < sum(map(len, records(work / "alone").values()))
    assert len(losses(work / "bounded-run")) == 24


def test_machines_share_the_work_on_object_storage_too(work: Path, s3: dict[str, str]) -> None:
    where = "s3://pairs/both"
    runs = [
        start(work, {**env, **local(work, f"both{number}", s3)}, where, seconds=0.1)
        for number, env in enumerate(machines(2))
    ]
    for run in runs:
        assert run.wait() == 0, run.said()
    assert f"cache: 2 machines share {where}: each encodes a part" in runs[0].said()
    said = finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", where, env=local(work, "both2", s3))
    assert f"prepared: {PAIRS} pairs (0 new)" in said
    indices = list((work / "both2").rglob("images/*/*.index"))
    assert len(indices) == PAIRS, "each record was made once"


def test_missing_parts_on_object_storage_are_named(work: Path, s3: dict[str, str]) -> None:
    where, node = "s3://pairs/holes", local(work, "holes3", s3)
    words = ("prepare", "--recipe", "run.yaml", "--data.prepared_dir", where)
    finish(work, *words, "--data.part", "1/2", env=node)
    run = start(work, node, where, "--data.on_missing", "fail")
    assert run.wait() == 2
    assert f"12 of 24 pictures have no record at {where}, of part 2/2" in run.said()
    other = start(work, node, where, "--data.on_missing", "fail", "--data.resolution", "32")
    assert other.wait() == 2
    assert "2 parts were prepared with other options: resolution 64, here 32" in other.said()


def test_faults_of_a_bucket_are_one_line_before_anything_is_encoded(work: Path, s3: dict[str, str]) -> None:
    node = local(work, "faults", s3)

    def said(env: dict[str, str], where: str) -> str:
        run = start(work, env, where)
        assert run.wait() == 2, run.said()
        lines = [line for line in run.said().splitlines() if line.startswith("error")]
        assert len(lines) == 1 and "Traceback" not in run.said(), run.said()
        assert "encoding" not in run.said() and "prepared" not in run.said()
        return lines[0]

    assert "s3://nobody/x" in said(node, "s3://nobody/x") and "no such bucket" in said(node, "s3://nobody/x")
    with as_user(s3) as refused:
        line = said({**node, **refused}, "s3://pairs/refused")
        assert "The bucket refuses these credentials. Allow them to list" in line
        unknown = said({**node, "AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "s3://pairs/refused")
        assert "The bucket refuses these credentials" in unknown


def test_who_may_only_read_can_train_and_not_prepare(work: Path, s3: dict[str, str]) -> None:
    where = "s3://pairs/read-only"
    finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", where, env=local(work, "writer", s3))
    # Another date, so that the files are read again and their stamps are new, which cannot be stored.
    os.utime(work / "data" / "train" / "00003.png")
    with as_user(s3, "s3:GetObject", "s3:ListBucket") as reader:
        node = local(work, "reader", {**s3, **reader})
        words = ("train", "--recipe", "run.yaml", "--data.prepared_dir", where, "--output_dir", "reader-run")
        assert f"prepared: {PAIRS} pairs (0 new)" in finish(work, *words, env=node)
        run = start(work, node, where, "--data.resolution", "32")
        assert run.wait() == 2, run.said()
        assert "cannot be written (1 try)" in run.said() and "The bucket refuses these credentials" in run.said()


def test_a_copy_that_was_damaged_in_transit_is_named(work: Path, s3: dict[str, str]) -> None:
    import boto3

    where, node = "s3://pairs/damaged", local(work, "damaged", s3)
    finish(work, "prepare", "--recipe", "run.yaml", "--data.prepared_dir", where, env=node)
    client: Any = boto3.client(
        "s3",
        endpoint_url=s3["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    listed = client.list_objects_v2(Bucket="pairs", Prefix="damaged/images/")["Contents"]
    [key] = [one["Key"] for one in listed if one["Key"].endswith(".shard")]
    data = np.frombuffer(client.get_object(Bucket="pairs", Key=key)["Body"].read(), np.uint8).copy()
    data[len(data) // 3 : len(data) // 2] ^= 1
    client.put_object(Bucket="pairs", Key=key, Body=data.tobytes())
    run = start(work, local(work, "damaged2", s3), where, "--output_dir", "damaged-run", verb="train")
    assert run.wait() == 2, run.said()
    assert f"s3://pairs/{key}: a record of the cache cannot be read" in run.said()
