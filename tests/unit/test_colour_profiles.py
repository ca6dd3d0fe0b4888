"""Photos are converted to sRGB by their colour profile; condition maps keep their numbers."""

from __future__ import annotations

import io
import itertools
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.icc import (
    ADOBE_RGB,
    DISPLAY_P3,
    cmyk_profile,
    encode_srgb,
    grey_profile,
    lab_to_srgb,
    rgb_profile,
    srgb_profile,
    to_srgb,
)

from t2i_adapter.cli import main
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import profiles
from t2i_adapter.data.picture import StoredPicture, decode, notes_of
from t2i_adapter.data.source import open_source
from t2i_adapter.generation.condition import read_condition, read_photo

RED = (200, 60, 60)
P3 = rgb_profile(DISPLAY_P3)


def stored(picture: Image.Image, kind: str = "PNG", name: str = "x", **options: Any) -> StoredPicture:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return StoredPicture(name, buffer.getvalue())


def photo(picture: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    """The colour of the first pixel (3,) of a decoded photo."""
    return np.asarray(decode(stored(picture, kind, **options), is_photo=True))[0, 0].astype(int)


def flat(colour: Any = RED, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.fixture(autouse=True)
def warnings_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_warned", set())
    monkeypatch.setattr(profiles, "_count", itertools.count(1))


@pytest.mark.parametrize("matrix", [DISPLAY_P3, ADOBE_RGB])
@pytest.mark.parametrize("colour", [RED, (60, 140, 90), (0, 0, 0), (255, 255, 255), (17, 17, 17), (120, 110, 200)])
def test_a_photo_is_converted_as_the_definition_of_srgb_says(matrix: Any, colour: tuple[int, int, int]) -> None:
    assert photo(flat(colour), icc_profile=rgb_profile(matrix)) == pytest.approx(to_srgb(colour, matrix, 2.2), abs=2)


def test_the_case_that_phones_make() -> None:
    assert photo(flat(), icc_profile=P3).tolist() == pytest.approx([219, 37, 49], abs=1)


def test_a_condition_keeps_its_numbers() -> None:
    assert decode(stored(flat(), icc_profile=P3)).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_format_that_holds_profiles(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    assert photo(flat(), kind, icc_profile=P3, **options).tolist() == pytest.approx([219, 37, 49], abs=4)


def test_srgb_profiles_change_no_number() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    read = decode(stored(noise, icc_profile=srgb_profile()), is_photo=True)
    assert np.array_equal(np.asarray(read), np.asarray(noise))


def test_transparency_survives() -> None:
    """The background is sRGB already, so it is not converted."""
    background = (200, 60, 60)
    ready = decode(stored(flat((200, 60, 60, 0), "RGBA"), icc_profile=P3), background, is_photo=True)
    assert ready.getpixel((0, 0)) == background
    half = decode(stored(flat((*RED, 128), "RGBA"), icc_profile=P3), (0, 0, 0), is_photo=True)
    assert half.getpixel((0, 0)) == pytest.approx(to_srgb(RED, DISPLAY_P3, 2.2) * 128 / 255, abs=2)
    key = decode(stored(flat(), icc_profile=P3, transparency=RED), (1, 2, 3), is_photo=True)
    assert key.getpixel((0, 0)) == (1, 2, 3)


def test_palettes_and_grey_pictures_are_converted_and_one_bit_is_not() -> None:
    palette = flat().convert("P", palette=Image.Palette.ADAPTIVE)
    assert photo(palette, icc_profile=P3).tolist() == pytest.approx([219, 37, 49], abs=1)
    linear = 255 * encode_srgb(np.array(100 / 255))
    assert photo(flat(100, "L"), icc_profile=grey_profile(1.0)) == pytest.approx([linear] * 3, abs=1)
    assert photo(flat((100, 255), "LA"), icc_profile=grey_profile(1.0)) == pytest.approx([linear] * 3, abs=1)
    wide = Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))
    assert photo(wide, icc_profile=grey_profile(1.0)) == pytest.approx([linear] * 3, abs=1)
    bent = 255 * encode_srgb(np.array((100 / 255) ** 1.8))
    assert photo(flat(100, "L"), icc_profile=rgb_profile(DISPLAY_P3, 1.8)) == pytest.approx([bent] * 3, abs=1)
    assert photo(flat(1, "1"), icc_profile=grey_profile(1.0)).tolist() == [255, 255, 255]
    assert photo(flat(0, "1"), icc_profile=grey_profile(1.0)).tolist() == [0, 0, 0]


def test_inks_are_converted_by_their_profile() -> None:
    cyan = (60.0, -20.0, -30.0)
    profile = cmyk_profile(cyan)
    for kind in ("TIFF", "JPEG"):
        assert photo(flat((255, 0, 0, 0), "CMYK"), kind, icc_profile=profile) == pytest.approx(lab_to_srgb(cyan), abs=3)
    assert photo(flat((0, 0, 0, 0), "CMYK"), "TIFF", icc_profile=profile).tolist() == [255, 255, 255]
    assert photo(flat((0, 0, 0, 255), "CMYK"), "TIFF", icc_profile=profile).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("picture", "kind", "profile", "reason"),
    [
        (flat(), "PNG", b"no profile at all", "it is damaged"),
        (flat(), "JPEG", P3[:200], "it is damaged"),
        (flat(), "PNG", cmyk_profile((60, 0, 0)), "it is for CMYK pixels, the picture is RGB"),
        (flat(), "PNG", grey_profile(1.0), "it is for GRAY pixels, the picture is RGB"),
        (flat((9, 9, 9, 9), "CMYK"), "TIFF", P3, "it is for RGB pixels, the picture is CMYK"),
        (flat(), "PNG", P3.replace(b"mntrRGB XYZ ", b"mntrLab XYZ "), "its colour space Lab is unsupported"),
        (flat(), "TIFF", P3 + bytes(profiles.MAX_PROFILE_BYTES), "more than 4 MiB"),
        (flat(), "PNG", P3 + bytes(profiles.MAX_PROFILE_BYTES), "more than 4 MiB"),
    ],
)
def test_a_profile_that_does_not_fit_is_ignored_with_one_line(
    picture: Image.Image, kind: str, profile: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = stored(picture, kind, name="row 3", icc_profile=profile)
    read = decode(given, is_photo=True)
    assert np.array_equal(np.asarray(read), np.asarray(decode(given)))
    assert reason in notes_of(read).colours
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("row 3: its colour profile is ignored") and reason in line


def test_a_damaged_chunk_and_missing_segments_are_damaged_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow itself drops such a profile without a word."""
    png = stored(flat(), icc_profile=P3, name="png").data
    place = png.index(b"iCCP") + 4 + len(b"ICC Profile\0\0")
    jpeg = stored(flat(), "JPEG", icc_profile=P3 + bytes(70_000)).data
    second = jpeg.index(b"ICC_PROFILE\0\2\2")
    for name, data in (
        ("png", png[:place] + b"zz" + png[place + 2 :]),
        ("jpeg", jpeg.replace(jpeg[second : second + 14], b"ICC_PROFILX\0\2\2")),
    ):
        read = decode(StoredPicture(name, data), is_photo=True)
        assert read.getpixel((0, 0)) == pytest.approx(RED, abs=2)
        assert f"{name}: its colour profile is ignored" in capsys.readouterr().err


def test_warnings_name_the_first_pictures_and_count_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        for _ in range(2):  # a picture that is decoded again is not counted again
            decode(stored(flat(), name=f"row {number}", icc_profile=b"none"), is_photo=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["row 0", "row 1", "row 2"]
    assert lines[3:] == ["10 pictures so far have a colour profile that is ignored"]


def test_no_changed_byte_of_a_profile_stops_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for profile in (P3, grey_profile(1.8), cmyk_profile((60.0, -20.0, -30.0))):
        for _ in range(100):
            spoilt = bytearray(profile)
            for place in rng.integers(0, len(spoilt), 3):
                spoilt[place] = int(rng.integers(256))
            spoilt = spoilt[: int(rng.integers(len(spoilt)))] if rng.random() < 0.2 else spoilt
            assert decode(stored(flat(), icc_profile=bytes(spoilt)), is_photo=True).size == (16, 16)


def test_threads_share_a_transform() -> None:
    rng = np.random.default_rng(0)
    given = [stored(Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)), icc_profile=P3) for _ in range(8)]
    alone = [decode(one, is_photo=True).tobytes() for one in given]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: decode(one, is_photo=True).tobytes(), given * 8))
    assert together == alone * 8


def test_the_decoded_picture_has_no_profile() -> None:
    """Otherwise `annotate --data` would write sRGB numbers with the profile of other colours."""
    for is_photo in (False, True):
        buffer = io.BytesIO()
        decode(stored(flat(), icc_profile=P3), is_photo=is_photo).save(buffer, "PNG")
        assert "icc_profile" not in Image.open(buffer).info


def test_adobe_rgb_by_exif_alone_is_noted_and_not_converted() -> None:
    def exif(space: int, index: bytes) -> bytes:
        """Three directories of EXIF data: the main one, that of the camera, and that of interoperability."""
        main = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0)
        camera = struct.pack("<HHHIIHHIII", 2, 0xA001, 3, 1, space, 0xA005, 4, 1, 56, 0)
        return b"Exif\0\0II*\0" + struct.pack("<I", 8) + main + camera + struct.pack("<HHHI4sI", 1, 1, 2, 4, index, 0)

    read = decode(stored(flat(), "JPEG", exif=exif(0xFFFF, b"R03\0"), quality=95), is_photo=True)
    assert read.getpixel((0, 0)) == pytest.approx(RED, abs=2)
    assert "Adobe RGB" in notes_of(read).colours
    for other in (exif(1, b"R03\0"), exif(0xFFFF, b"R98\0"), exif(0xFFFF, b"R03\0")[:60]):
        assert not notes_of(decode(stored(flat(), "JPEG", exif=other), is_photo=True)).colours


def test_a_dataset_converts_images_and_not_conditions(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    flat().save(folder / "a.png", icc_profile=P3)
    row = {"file_name": "a.png", "conditioning_image_file_name": "a.png", "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    sample = open_source(DataOptions(location=str(tmp_path)), seed=0)[0]
    assert sample.image.getpixel((0, 0)) == pytest.approx((219, 37, 49), abs=1)
    assert sample.condition is not None and sample.condition.getpixel((0, 0)) == RED


def test_annotate_makes_the_map_of_a_photo_in_srgb(tmp_path: Path) -> None:
    flat().save(tmp_path / "a.png", icc_profile=P3)
    assert main(["annotate", "palette", str(tmp_path / "a.png"), "--out", str(tmp_path / "map.png")]) == 0
    assert Image.open(tmp_path / "map.png").convert("RGB").getpixel((0, 0)) == pytest.approx((219, 37, 49), abs=1)


def test_generate_reads_photos_and_conditions_as_training_does(tmp_path: Path) -> None:
    flat().save(tmp_path / "a.png", icc_profile=P3)
    assert read_photo(str(tmp_path / "a.png")).getpixel((0, 0)) == pytest.approx((219, 37, 49), abs=1)
    assert read_condition(str(tmp_path / "a.png")).getpixel((0, 0)) == RED
