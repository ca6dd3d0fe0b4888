"""Every error of a row or picture is one message that names the row or picture."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny import write_circles

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import picture
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "data", num=4)


def open_folder(folder: Path, **options: Any) -> Source:
    return open_source(DataOptions(location=str(folder), **options), seed=0)


def edit_rows(data: Path, change: Any) -> None:
    """Applies `change(rows)` to the list of metadata rows."""
    metadata = data / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    change(rows)
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fault_of(data: Path, **options: Any) -> str:
    """The message of the error from opening the folder or reading row 2."""
    with pytest.raises(UserError) as fault:
        open_folder(data, **options)[2]
    return str(fault.value)


def png(array: Any, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_options_without_a_dataset_are_refused() -> None:
    with pytest.raises(UserError, match="--data names no dataset"):
        open_source(DataOptions(), seed=0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "nowhere") == f"--data {tmp_path / 'nowhere'}: no such folder."


def test_a_split_that_is_not_there(data: Path) -> None:
    assert "has no split 'test'; there are: train." in fault_of(data, split="test")
    assert "has no split 'test'; there are: train." in fault_of(data / "train", split="test")


@pytest.mark.parametrize("flag", ["image_column", "conditioning_image_column", "caption_column"])
def test_a_missing_column_names_flag_and_columns(data: Path, flag: str) -> None:
    message = fault_of(data, **{flag: "nope"})
    assert message.startswith(f"--data.{flag} nope: {data}/train/metadata.jsonl has no such column")
    column = {"image_column": "image", "conditioning_image_column": "conditioning_image", "caption_column": "text"}[
        flag
    ]
    assert message.endswith(f"there are: image, conditioning_image, text. Perhaps: --data.{flag} {column}.")


def test_a_bad_json_line_is_named(data: Path) -> None:
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([*lines[:2], "{oops", "", *lines[3:]]))
    assert fault_of(data).startswith(f"{metadata}, line 3: not JSON")
    others = open_folder(data)
    assert [others.key(i) for i in range(4)] == [
        "train/00000.png (line 1)",
        "train/00001.png (line 2)",
        "train/line 3",
        "train/00003.png (line 5)",
    ]
    assert others[3].key == "train/00003.png (line 5)"
    metadata.write_text('"a string"\n')
    assert "line 1: holds str; each line is one object" in fault_of(data)
    metadata.write_bytes(b'{"file_name": "\xff.png"}\n')
    assert "not UTF-8" in fault_of(data)
    metadata.write_text("")
    assert "there are no rows" in fault_of(data)


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        (None, "there is no caption"),
        (7, "holds int"),
        ([], "an empty list"),
        (["a", None], "there is no caption"),
        ([["a"]], "holds list"),
    ],
)
def test_a_bad_caption_is_found_by_reading_or_identifying_its_row_alone(data: Path, caption: Any, part: str) -> None:
    edit_rows(data, lambda rows: rows[2].update(text=caption))
    source = open_folder(data)
    for read in (source.__getitem__, source.identify, lambda number: source.identify(number, "known")):
        with pytest.raises(UserError, match=part) as fault:
            read(2)
        assert f"{data}/train/metadata.jsonl, line 3, column text" in str(fault.value)
        read(1)
    assert source.key(2) == "train/00002.png (line 3)"


def test_a_missing_caption_key(data: Path) -> None:
    edit_rows(data, lambda rows: rows[2].pop("text"))
    assert "line 3, column text: there is no caption" in fault_of(data)


def test_a_row_without_condition(data: Path) -> None:
    edit_rows(data, lambda rows: rows[2].pop("conditioning_image_file_name"))
    assert "line 3, column conditioning_image: there is no picture" in fault_of(data)


def test_a_missing_file_is_named(data: Path) -> None:
    (data / "train" / "00002_outline.png").unlink()
    message = fault_of(data)
    assert "line 3, column conditioning_image" in message
    assert f"{data}/train/00002_outline.png: no such file" in message


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/passwd", "sub/../../../x.png"])
def test_a_path_may_not_leave_the_folder(data: Path, path: str) -> None:
    edit_rows(data, lambda rows: rows[2].update(file_name=path))
    message = fault_of(data)
    assert "line 3, column image" in message
    assert "leaves the data folder" in message


def test_an_address_is_not_fetched(data: Path) -> None:
    edit_rows(data, lambda rows: rows[2].update(file_name="http://127.0.0.1:9/x.png"))
    assert "is an address; only files are read" in fault_of(data)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"not an image"), "not a picture that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "damaged picture"),
        (lambda path: Image.new("F", (8, 8)).save(path, "TIFF"), "floating point"),
        (lambda path: Image.new("I", (8, 8), 70000).save(path, "TIFF"), "grey levels 70000..70000"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(data: Path, spoil: Any, part: str) -> None:
    path = data / "train" / "00002.png"
    spoil(path)
    message = fault_of(data)
    assert message.startswith(str(path))
    assert part in message


def test_an_animation_is_refused(data: Path) -> None:
    path = data / "train" / "00002.png"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    assert fault_of(data) == f"{path}: animated, several frames; save one frame as a still picture."


def test_a_decompression_bomb_is_refused_by_its_header(data: Path) -> None:
    path = data / "train" / "00002.png"
    whole = path.read_bytes()
    for side, part in ((11_000, "11000x11000 pixels; at most 100,000,000"), (30_000, "too large to decode")):
        header = b"IHDR" + struct.pack(">II", side, side) + whole[24:29]
        path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
        message = fault_of(data)
        assert message.startswith(str(path))
        assert part in message


def test_a_strip_is_refused_by_its_header(data: Path) -> None:
    path = data / "train" / "00002.png"
    Image.new("1", (30_000, 2)).save(path)
    assert fault_of(data) == f"{path}: 30000x2 pixels; a side has at most 16,384. Scale it down, or crop it."


def test_another_aspect_names_row_and_sizes(data: Path) -> None:
    path = data / "train" / "00002_outline.png"
    Image.open(path).resize((128, 64)).save(path)
    message = fault_of(data)
    assert "line 3 (train/00002.png (line 3)): the condition is 128x64 and its image 64x64" in message


@pytest.mark.parametrize("size", [(128, 128), (63, 64), (512, 513)])
def test_another_size_at_the_same_aspect_is_fine(data: Path, size: tuple[int, int]) -> None:
    path = data / "train" / "00002_outline.png"
    Image.open(path).resize(size).save(path)
    condition = open_folder(data)[2].condition
    assert condition is not None
    assert condition.size == size


def decoded(data: bytes) -> np.ndarray:
    result = picture.decode(picture.StoredPicture("x", data))
    assert result.mode == "RGB"
    return np.asarray(result)


def test_transparency_is_laid_over_white() -> None:
    clear, half, full = (200, 0, 0, 0), (200, 0, 0, 128), (200, 0, 0, 255)
    pixels = decoded(png(np.array([[clear, half, full]], np.uint8)))[0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert np.abs(pixels[1].astype(int) - [227, 127, 127]).max() <= 1  # 200*.502+255*.498, to rounding
    assert pixels[2].tolist() == [200, 0, 0]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7, 1, 2, 3])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert decoded(buffer.getvalue()).tolist() == [[[255, 255, 255]]]


def test_every_mode_becomes_the_same_rgb() -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    expected = np.repeat(grey[..., None], 3, axis=-1)
    assert (decoded(png(grey)) == expected).all()
    assert (decoded(png(grey, "P")) == expected).all()
    assert (decoded(png(grey, "LA")) == expected).all()
    assert (decoded(png(grey.astype(np.uint16) * 257)) == expected).all(), "16 bits are scaled, not cut off"
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    assert np.abs(decoded(buffer.getvalue())[4, 4].astype(int) - [255, 0, 0]).max() <= 4  # JPEG's own loss


def test_exif_orientation_is_applied() -> None:
    sideways = Image.new("RGB", (4, 2), "red")
    sideways.paste("blue", (0, 0, 2, 2))
    exif = sideways.getexif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    upright = decoded(buffer.getvalue())
    assert upright.shape == (4, 2, 3)
    assert upright[0, 0].tolist() == [0, 0, 255]
    assert upright[3, 0].tolist() == [255, 0, 0]


def test_the_folder_itself_its_parent_and_dataset_name_are_the_same_data(data: Path) -> None:
    sources = [open_folder(data), open_folder(data / "train"), open_source(DataOptions(location=str(data)), 0)]
    assert [len(source) for source in sources] == [4, 4, 4]
    assert len({source[1].digest for source in sources}) == 1
    assert sources[0][1].key == "train/00001.png (line 2)"
    assert sources[0].describe() == f"4 pairs from {data}/train/metadata.jsonl, read as an image folder"


def test_a_picture_in_two_rows_has_two_keys(data: Path) -> None:
    edit_rows(data, lambda rows: rows[2].update(file_name="00001.png"))
    source = open_folder(data)
    assert [source[i].key for i in range(4)] == [
        "train/00000.png (line 1)",
        "train/00001.png (line 2)",
        "train/00001.png (line 3)",
        "train/00003.png (line 4)",
    ]


def test_identify_agrees_with_the_sample_and_follows_the_bytes(data: Path) -> None:
    source = open_folder(data)
    sample, identity = source[1], source.identify(1)
    assert (sample.captions, sample.digest) == (identity.captions, identity.digest)
    shutil.copy(data / "train" / "00000_outline.png", data / "train" / "00001_outline.png")
    assert source.identify(1).digest != identity.digest


def test_captions_may_be_lists_and_other_columns_are_kept(data: Path) -> None:
    edit_rows(data, lambda rows: [row.update(text=[row["text"], ""], scene="{}", box=[1]) for row in rows])
    sample = open_folder(data)[0]
    assert len(sample.captions) == 2
    assert sample.captions[1] == ""
    assert sample.meta == {"scene": "{}"}


def test_max_train_samples_are_chosen_by_the_seed(tmp_path: Path) -> None:
    folder = write_circles(tmp_path, num=30, size=16)

    def keys(seed: int, most: int = 10) -> list[str]:
        source = open_source(DataOptions(location=str(folder), max_train_samples=most), seed)
        return [source.key(i) for i in range(len(source))]

    assert len(set(keys(1))) == 10
    assert keys(1) == keys(1)
    assert keys(1) != keys(2)
    assert len(keys(1, most=99)) == 30
