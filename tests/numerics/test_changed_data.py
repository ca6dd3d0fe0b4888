"""A run does not resume with other data: pictures, captions or an order of rows that changed under the same name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.runs import tiny_config
from support.sources import open_at
from support.tiny import write_circles

from t2i_adapter.cache.texts import CaptionTable
from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import Config
from t2i_adapter.errors import UserError
from t2i_adapter.training import checkpoint, data_record
from t2i_adapter.training.data_record import Column, DataRecord, compare
from t2i_adapter.verbs.train import run


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Config:
    """A run of two updates on three pairs, with a cache of its own."""
    data = write_circles(tmp_path / "data", num=3)
    changes = {"train.max_steps": 2, "data.prepared_dir": str(tmp_path / "prepared")}
    return tiny_config(tiny_base, data, tmp_path / "run", changes)


def resumed(config: Config, **changes: object) -> Config:
    options = {"train.max_steps": 3, "checkpoint.resume": "auto"}
    return with_values(config, {**options, **{name.replace("__", "."): value for name, value in changes.items()}})


def rows_of(config: Config) -> Path:
    return Path(str(config.data.location)) / "train" / "metadata.jsonl"


def edit_pictures(config: Config) -> None:
    for file in rows_of(config).parent.glob("*.png"):
        Image.eval(Image.open(file), lambda value: 255 - value).save(file)


def edit_captions(config: Config) -> None:
    rows_of(config).write_text(rows_of(config).read_text().replace("circle", "square"))


def edit_one_caption(config: Config) -> None:
    first, *rest = rows_of(config).read_text().splitlines()
    rows_of(config).write_text("\n".join([first, *rest[:-1], rest[-1].replace("circle", "square")]) + "\n")


def reverse_rows(config: Config) -> None:
    rows_of(config).write_text("\n".join(reversed(rows_of(config).read_text().splitlines())) + "\n")


def delete_a_picture(config: Config) -> None:
    (rows_of(config).parent / "00001.png").unlink()


EDITS: dict[str, tuple[Callable[[Config], None], str]] = {
    "pictures": (edit_pictures, r"3 of 3 pairs have changed \(pictures 3, captions 0\), first train/00000.png"),
    "captions": (edit_captions, r"3 of 3 pairs have changed \(pictures 0, captions 3\), first train/00000.png"),
    "one caption": (edit_one_caption, r"1 of 3 pairs have changed \(pictures 0, captions 1\), first train/00002.png"),
    "order": (reverse_rows, r"2 of 3 pairs have changed .*the same pairs in another order"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_data_is_refused_with_what_changed(config: Config, edit: str, capsys: pytest.CaptureFixture[str]):
    run(config)
    change, words = EDITS[edit]
    change(config)
    with pytest.raises(UserError, match=words) as refused:
        run(resumed(config))
    assert refused.value.option == "checkpoint.resume"
    capsys.readouterr()
    run(resumed(config, checkpoint__allow_changed=True))
    assert "Changed since checkpoint-2: " in (said := capsys.readouterr().out)
    assert "pairs have changed" in said
    assert (Path(config.output_dir) / "checkpoint-3").is_dir()


def test_pictures_and_captions_are_counted_together_before_anything_is_encoded(config: Config):
    run(config)
    edit_pictures(config), edit_captions(config)
    prepared = Path(str(config.data.prepared_dir))
    before = sorted(prepared.rglob("*.shard"))
    with pytest.raises(UserError, match=r"3 of 3 pairs have changed \(pictures 3, captions 3\)"):
        run(resumed(config))
    assert sorted(prepared.rglob("*.shard")) == before


def test_unchanged_data_adds_no_line_even_if_its_files_have_new_dates(
    config: Config, capsys: pytest.CaptureFixture[str]
):
    run(config)
    for file in rows_of(config).parent.iterdir():
        file.touch()
    capsys.readouterr()
    run(resumed(config))
    assert "pairs have" not in (said := capsys.readouterr().out) and "compared" not in said and "record" not in said


def test_a_row_that_is_skipped_now_is_another_number_of_pairs(config: Config):
    config = with_values(config, {"data.on_bad_sample": "skip", "data.max_bad_share": 0.5})
    run(config)
    delete_a_picture(config)
    with pytest.raises(UserError, match="the number of usable pairs 3 -> 2"):
        run(resumed(config))


def test_without_a_cache_captions_are_compared_and_new_dates_of_pictures_are_named(
    config: Config, capsys: pytest.CaptureFixture[str]
):
    config = with_values(config, {"data.cache": "none"})
    run(config)
    edit_pictures(config)
    capsys.readouterr()
    run(resumed(config))
    assert "The files of 3 of 3 pairs have another date, size or path" in capsys.readouterr().out
    edit_captions(config)
    with pytest.raises(UserError, match=r"3 of 3 pairs have changed \(captions 3\)"):
        run(resumed(config, train__max_steps=4))


def test_without_a_cache_pictures_that_are_sorted_by_size_are_compared(config: Config):
    config = with_values(config, {"data.cache": "none", "data.buckets": "generated", "data.bucket_step": 32})
    run(config)
    edit_pictures(config)
    with pytest.raises(UserError, match=r"3 of 3 pairs have changed \(pictures 3, captions 0\)"):
        run(resumed(config))


def test_a_cache_from_the_resume_on_is_said_not_to_be_compared(config: Config, capsys: pytest.CaptureFixture[str]):
    run(with_values(config, {"data.cache": "none"}))
    run(resumed(config))
    assert "The pictures are not compared with those of checkpoint-2: one of the two runs" in capsys.readouterr().out


def test_a_checkpoint_without_a_data_record_resumes_with_a_line(config: Config, capsys: pytest.CaptureFixture[str]):
    run(config)
    file = Path(config.output_dir) / "checkpoint-2" / checkpoint.STATE
    state = json.loads(file.read_text())
    del state["data"], state["sha256"]
    file.write_text(json.dumps({**state, "sha256": checkpoint._digest(state)}))
    run(resumed(config))
    assert "checkpoint-2 has no data record" in capsys.readouterr().out


def test_a_record_survives_its_checkpoint(config: Config, tmp_path: Path):
    run(config)
    folder = Path(config.output_dir) / "checkpoint-2"
    record = DataRecord.read(folder)
    assert record is not None and record.pairs == 3
    assert record.pictures is not None and record.pictures.kind == "bytes" and len(record.pictures.hashes) == 3
    shutil.move(folder, tmp_path / "moved")
    assert compare(record, DataRecord.read(tmp_path / "moved") or record, str, "it").difference == ""


def test_of_many_pairs_a_hash_covers_several_and_still_depends_on_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_record, "MOST_HASHES", 4)
    digests = np.random.default_rng(0).integers(0, 256, (10, 32), dtype=np.uint8)
    swapped = digests.copy()
    swapped[[7, 8]] = swapped[[8, 7]]
    before, after = (DataRecord(10, data_record.pictures_column(some), None) for some in (digests, swapped))
    assert before.pictures is not None and len(before.pictures.hashes) == 4
    found = compare(before, after, "pair {}".format, "checkpoint-1")
    assert found.difference == "at least 1 of 10 pairs have changed (pictures 1), first pair 6"


def test_of_many_pairs_without_a_cache_evenly_spread_runs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_record, "MOST_READ", 32)
    monkeypatch.setattr(data_record, "RUN", 4)
    lines = [json.dumps({"image": f"{n}.png", "conditioning_image": "c.png", "text": f"{n}"}) for n in range(500)]

    def record(lines: list[str]) -> DataRecord:
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        source, numbers = open_at(tmp_path / "rows.jsonl"), data_record._looked_at(500)
        return DataRecord(500, None, data_record.captions_column(source, numbers, 500))

    looked_at = data_record._looked_at(500)
    assert len(set(looked_at)) == 32 and looked_at[0] == 0 and looked_at[-1] == 499
    before = record(lines)
    assert before.captions is not None and before.captions.kind == "runs of texts"
    edited = [
        line.replace('"text": "', '"text": "new ') if n == looked_at[17] else line for n, line in enumerate(lines)
    ]
    found = compare(before, record(edited), "pair {}".format, "checkpoint-1")
    assert found.difference == f"at least 1 of 500 pairs have changed (captions 1), first pair {looked_at[17]}"
    assert compare(before, record(lines), str, "checkpoint-1").difference == ""
    older = replace(before, captions=Column("some texts", np.zeros(500, np.uint64)))  # type: ignore[arg-type]
    found = compare(older, before, str, "checkpoint-1")
    assert found.difference == "" and "an older version chose other pairs" in found.notes[-1]


def test_the_order_of_a_pairs_captions_counts_however_they_were_read():
    table = CaptionTable(("a", "b", "c"), np.array([0, 1, 1, 0, 2], np.int32), np.array([2, 4, 5]))
    joined = data_record._join(data_record._hashes(table.distinct)[table.numbers], table.ends)
    read = data_record._join(data_record._hashes("abbac"), np.array([2, 4, 5]))
    assert joined.tolist() == read.tolist() and len(set(joined.tolist())) == 3


def test_captions_that_would_be_downloaded_are_not_read(config: Config):
    class Remote:
        captions_are_remote = True

    source: object = Remote()
    assert data_record.captions_column(source, np.arange(3), 3) is None  # type: ignore[arg-type]
    record = DataRecord(3, Column("stamps", np.zeros(3, np.uint64)), None)
    found = compare(record, replace(record, captions=Column("texts", np.zeros(3, np.uint64))), str, "checkpoint-1")
    assert found.difference == "" and "would download" in found.notes[0]
