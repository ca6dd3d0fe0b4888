"""Datasets with several conditions for each picture: every condition is the one that a run of its own would take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.tiny import write_circles

from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.dataset import CachedDataset
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.records import pack_condition, unpack_condition
from t2i_adapter.config.tree import BaseOptions, DataOptions
from t2i_adapter.data.joined import Part
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.open import open_base
from t2i_adapter.types import ImageRecord

OUTLINE, INVERTED = "column:conditioning_image", "column:inverted"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Circles with two condition columns: the outline, and its negative."""
    folder = write_circles(tmp_path_factory.mktemp("data") / "circles", num=6)
    add_inverted(folder / "train")
    return folder


def add_inverted(split: Path) -> None:
    table = split / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows:
        row["inverted_file_name"] = row["file_name"].replace(".png", "_inverted.png")
        outline = Image.open(split / row["conditioning_image_file_name"])
        ImageOps.invert(outline.convert("RGB")).save(split / row["inverted_file_name"])
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options_of(data: Path, **more: object) -> DataOptions:
    return replace(DataOptions(location=str(data), resolution=64), **more)


def parts_of(*origins: str, channels: Sequence[int] = (3, 1, 3)) -> tuple[Part, ...]:
    return tuple(Part(origin, count) for origin, count in zip(origins, channels, strict=False))


def crops(source: Source, transform: PairTransform, view: int = 0) -> list[np.ndarray]:
    return [transform.crop(source[number], view).condition for number in range(len(source))]


def test_the_conditions_are_those_of_runs_of_their_own(data: Path) -> None:
    options, parts = options_of(data), parts_of(OUTLINE, INVERTED, "canny")
    source = open_source(options, 0, parts)
    joint = crops(source, PairTransform.of(options, 3, source.annotate, source.parts))
    alone = []
    for part in parts:
        own = open_source(part.options(options), 0)
        alone.append(crops(own, PairTransform.of(part.options(options), part.channels, own.annotate)))
    for together, *each in zip(joint, *alone, strict=True):
        assert together.shape == (7, 64, 64) and not together.flags.writeable
        assert np.array_equal(together, np.concatenate(each))
    assert not np.array_equal(joint[0][:1], joint[0][3:4]), "the conditions differ"


def test_mirroring_mirrors_every_condition(data: Path) -> None:
    options = options_of(data, flip=True)
    source = open_source(options, 0, parts_of(OUTLINE, INVERTED))
    transform = PairTransform.of(options, 3, None, source.parts)
    plain, mirrored = crops(source, transform, 0), crops(source, transform, 1)
    assert np.array_equal(mirrored[0], plain[0][:, :, ::-1])


def test_a_pose_exchanges_its_sides_and_its_neighbour_does_not(data: Path) -> None:
    pose = replace(parts_of(OUTLINE)[0], kind="pose")
    options = options_of(data, flip=True)
    source = open_source(options, 0, (pose, *parts_of(INVERTED)))
    transform = PairTransform.of(options, 3, None, source.parts)
    assert [transform.kind, transform.others[0].kind] == ["pose", "map"]


def test_a_random_condition_is_drawn_and_the_others_stay(data: Path) -> None:
    options = options_of(data)
    source = open_source(options, 0, parts_of("canny,low=20,high=60,vary=1", OUTLINE, channels=(1, 3)))
    transform = PairTransform.of(options, 3, None, source.parts)
    pair = transform.crop(source[0], 0)
    assert pair.condition.shape == (6, 64, 64) and np.array_equal(pair.condition[:3], pair.image)
    drawn = transform.random_condition(ImageRecord(None, pair.condition, pair.geometry), "5/7").condition
    assert drawn.shape == (4, 64, 64) and np.array_equal(drawn[1:], pair.condition[3:])
    alone = open_source(parts_of("canny,low=20,high=60,vary=1")[0].options(options), 0)
    single = PairTransform.of(options, 1, alone.annotate)
    own = single.crop(alone[0], 0)
    record = single.random_condition(ImageRecord(None, own.condition, own.geometry), "5/7")
    assert np.array_equal(drawn[:1], record.condition)


def test_stacked_conditions_are_packed_without_loss(data: Path) -> None:
    source = open_source(options_of(data), 0, parts_of(OUTLINE, INVERTED, channels=(3, 3)))
    [condition, *_] = crops(source, PairTransform.of(options_of(data), 3, None, source.parts))
    packed = pack_condition(condition)
    assert np.array_equal(unpack_condition(packed.stored, packed.packing), condition)


def test_the_cache_holds_them_apart_from_those_of_one_condition(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    options = options_of(data, prepared_dir=str(tmp_path))

    def cached(*parts: Part) -> CachedDataset:
        context = PrepareContext(
            open_base(BaseOptions(name=str(tiny_base))), "cpu", torch.float32, tmp_path, quiet=True
        )
        dataset = prepare(open_source(options, 0, parts), options, context, in_channels=3)
        assert isinstance(dataset, CachedDataset)
        return dataset

    single, joint = cached(), cached(*parts_of(OUTLINE, "canny"))
    assert single.fetch(0, 0).condition.shape == (3, 64, 64)
    assert joint.fetch(0, 0).condition.shape == (4, 64, 64)
    assert np.array_equal(joint.fetch(0, 0).condition[:3], single.fetch(0, 0).condition)
    a, b = single.fetch(0, 0).moments, joint.fetch(0, 0).moments
    assert a is not None and b is not None and np.array_equal(a, b)
    assert (
        len({cached(*parts_of(*pair)).transform.fingerprint("") for pair in ((OUTLINE, "canny"), ("canny", OUTLINE))})
        == 2
    )


def test_a_change_of_any_condition_is_noticed(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    parts = parts_of(OUTLINE, INVERTED)

    def facts() -> tuple[str, str | None]:
        source = open_source(options_of(copy), 0, parts)
        return source.identify(0).digest, source.stamp(0)

    before = facts()
    Image.new("RGB", (64, 64), "grey").save(copy / "train" / "00000_inverted.png")
    after = facts()
    assert before[0] != after[0] and before[1] != after[1]
    single = open_source(options_of(copy), 0)
    assert single.stamp(0) != after[1], "the stamp of one condition names another digest"


def test_a_missing_condition_names_its_row(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "train" / "00003_inverted.png").unlink()
    source = open_source(options_of(copy), 0, parts_of(OUTLINE, INVERTED))
    with pytest.raises(UserError, match=r"00003_inverted\.png"):
        source[3]


def test_a_condition_of_another_aspect_is_refused(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    Image.new("RGB", (64, 32)).save(copy / "train" / "00002_inverted.png")
    source = open_source(options_of(copy), 0, parts_of(OUTLINE, INVERTED))
    with pytest.raises(UserError, match="another aspect"):
        source[2]


@pytest.fixture
def photos(data: Path, tmp_path: Path) -> Path:
    """A folder of pictures in images/ with two folders of conditions."""
    folder = tmp_path / "photos"
    for name in ("images", "control", "inverted"):
        (folder / name).mkdir(parents=True)
    for row in map(json.loads, (data / "train" / "metadata.jsonl").read_text().splitlines()):
        shutil.copy(data / "train" / row["file_name"], folder / "images")
        (folder / "images" / row["file_name"]).with_suffix(".txt").write_text(row["text"])
        shutil.copy(data / "train" / row["conditioning_image_file_name"], folder / "control" / row["file_name"])
        shutil.copy(data / "train" / row["inverted_file_name"], folder / "inverted" / row["file_name"])
    return folder


def test_folders_of_conditions_are_joined(data: Path, photos: Path) -> None:
    options = options_of(photos)
    source = open_source(options, 0, parts_of("folder:control", "folder:inverted", channels=(3, 3)))
    wanted = open_source(options_of(data), 0, parts_of(OUTLINE, INVERTED, channels=(3, 3)))
    transform = PairTransform.of(options, 3, None, source.parts)
    for ours, theirs in zip(crops(source, transform), crops(wanted, transform), strict=True):
        assert np.array_equal(ours, theirs)


def test_an_origin_that_a_layout_cannot_have_is_refused(data: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="which has none; name a folder"):
        open_source(options_of(photos), 0, parts_of("folder:control", "column:inverted"))
    with pytest.raises(UserError, match="which has none; name a column"):
        open_source(options_of(data), 0, parts_of(OUTLINE, "folder:inverted"))
    with pytest.raises(UserError, match="name one of its maps"):
        open_source(options_of(data, location="shapes:8"), 0, parts_of("outline", "column:inverted"))


def test_the_maps_of_drawn_scenes_are_joined() -> None:
    options = DataOptions(location="shapes:8", resolution=64)
    source = open_source(options, 0, parts_of("outline", "palette", channels=(3, 3)))
    drawn = [open_source(replace(options, condition=kind), 0)[0].condition for kind in ("outline", "palette")]
    sample = source[0]
    for ours, theirs in zip((sample.condition, *sample.others), drawn, strict=True):
        assert ours is not None and theirs is not None and np.array_equal(np.asarray(ours), np.asarray(theirs))
