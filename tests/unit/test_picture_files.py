"""Picture files as programs and phones write them: PNG with megabytes of text, HEIC, and 16-bit grey."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.icc import rgb_profile

from t2i_adapter.data.picture import StoredPicture, decode, narrow_range, notes_of
from t2i_adapter.errors import UserError

LONG = "x" * 3_000_000
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def wide() -> Image.Image:
    """64 x 32 pixels, left half red and right half blue."""
    picture = Image.new("RGB", (64, 32), "blue")
    picture.paste("red", (0, 0, 32, 32))
    return picture


def png(texts: PngInfo, **options: Any) -> bytes:
    buffer = io.BytesIO()
    wide().save(buffer, "PNG", pnginfo=texts, **options)
    return buffer.getvalue()


def read(data: bytes) -> Image.Image:
    return decode(StoredPicture("x", data), is_photo=True)


def texts_of(*texts: tuple[str, str], packed: bool = False) -> PngInfo:
    info = PngInfo()
    for keyword, text in texts:
        info.add_text(keyword, text, zip=packed)
    return info


def late_text() -> bytes:
    """A PNG with its text after the pixels."""
    data, whole = png(PngInfo()), png(texts_of(("workflow", LONG), packed=True))
    start = whole.index(b"zTXt") - 4
    chunk = whole[start : whole.index(b"IDAT") - 4]
    return data[:-12] + chunk + data[-12:]


@pytest.mark.parametrize(
    "data",
    [
        png(texts_of(("parameters", LONG))),
        png(texts_of(("workflow", LONG), packed=True)),
        png(texts_of(("prompt", "\N{SNOWMAN}" + LONG), packed=True)),
        png(texts_of(*((f"text {n}", LONG) for n in range(25)))),
        late_text(),
        late_text()[:-12],
    ],
    ids=["tEXt", "zTXt", "iTXt", "75 MB in all", "after the pixels", "after the pixels, without an end"],
)
def test_texts_of_any_size_are_ignored(data: bytes) -> None:
    assert np.array_equal(np.asarray(read(data)), np.asarray(wide()))


def test_the_orientation_is_read_from_every_place_where_pngs_have_it() -> None:
    """Beside large texts, which must not take it along."""
    exif = Image.Exif()
    exif[0x112] = 6
    raw = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    upright = wide().transpose(Image.Transpose.ROTATE_270)
    long = ("workflow", LONG)
    chunk = png(texts_of(long, packed=True), exif=exif)
    by_xmp = texts_of(long, packed=True)
    by_xmp.add_itxt("XML:com.adobe.xmp", XMP)
    by_packed_xmp = texts_of(long, packed=True)
    by_packed_xmp.add_itxt("XML:com.adobe.xmp", XMP, zip=True)
    old = texts_of(long, ("Raw profile type exif", raw), packed=True)
    for data in (chunk, png(by_xmp), png(by_packed_xmp), png(old)):
        assert np.array_equal(np.asarray(read(data)), np.asarray(upright))


def test_damaged_pixels_beside_a_text_are_still_an_error() -> None:
    data = png(texts_of(("workflow", LONG), packed=True))
    for spoilt in (data[: data.index(b"IDAT") + 20], data[: data.index(b"zTXt") + 20], data[:20]):
        with pytest.raises(UserError, match="damaged picture|not a picture"):
            read(spoilt)


def heic(picture: Image.Image, **options: Any) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs sdxl-t2i-adapter[heif]")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture).save(buffer, quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_pictures_are_read(brand: bytes) -> None:
    data = heic(wide())
    picture = read(data[:8] + brand + data[12:])
    assert picture.size == (64, 32)
    assert picture.getpixel((10, 10)) == pytest.approx((255, 0, 0), abs=8)
    assert picture.getpixel((50, 10)) == pytest.approx((0, 0, 255), abs=8)


def test_heic_pictures_are_upright_and_in_srgb() -> None:
    flat = Image.new("RGB", (64, 32), (200, 60, 60))
    flat.info["icc_profile"] = rgb_profile()
    exif = Image.Exif()
    exif[0x112] = 6
    picture = read(heic(flat, exif=exif.tobytes()))
    assert picture.size == (32, 64)
    assert picture.getpixel((10, 10)) == pytest.approx((219, 37, 49), abs=4)


def test_of_several_heic_stills_the_primary_one_is_read() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs sdxl-t2i-adapter[heif]")
    file = pillow_heif.from_pillow(Image.new("RGB", (32, 32), "red"))
    file.add_from_pillow(Image.new("RGB", (48, 16), "blue"))
    for number, size in ((0, (32, 32)), (1, (48, 16))):
        buffer = io.BytesIO()
        file.save(buffer, quality=95, primary_index=number)
        assert read(buffer.getvalue()).size == size


def test_damaged_heic_is_an_error_of_one_line() -> None:
    data = heic(wide())
    for spoilt in (data[:40], data[: len(data) // 2], data[:60] + bytes(40) + data[100:]):
        with pytest.raises(UserError, match="damaged HEIC picture, as the extra|not a picture"):
            read(spoilt)


def test_heic_without_the_extra_names_the_command_that_installs_it(tmp_path: Path) -> None:
    """In a process of its own, whose import of the package fails as if it were not installed."""
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('not installed')\n")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from t2i_adapter.data.picture import StoredPicture, decode\n"
        f"decode(StoredPicture('row 3', Path({str(tmp_path / 'a.heic')!r}).read_bytes()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "UserError: row 3: a HEIC or HEIF picture needs an extra" in done.stderr
    assert "pip install 'sdxl-t2i-adapter[heif]'" in done.stderr


def test_the_doctor_names_that_command_too(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "pillow_heif.py").write_text("raise ImportError('not installed')\n")
    folder = tmp_path / "data"
    folder.mkdir()
    wide().save(folder / "a.png")
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    for stem in "ab":
        (folder / f"{stem}.txt").write_text("a caption")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'package')!r})\n"
        "from t2i_adapter.cli import main\n"
        f"main(['doctor', {str(folder)!r}, '--data.condition', 'canny', '--measure', '0', '--workers', '0',\n"
        "    '--data.resolution', '64'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "1 row (data/b.heic)" in line and "pip install 'sdxl-t2i-adapter[heif]'" in line


def test_other_pictures_do_not_import_the_heif_library(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(PngInfo()))
    code = (
        "import sys; from pathlib import Path\n"
        "from t2i_adapter.data.picture import StoredPicture, decode\n"
        f"decode(StoredPicture('a', Path({str(tmp_path / 'a.png')!r}).read_bytes()), is_photo=True)\n"
        "print('pillow_heif' in sys.modules, 'PIL.ImageCms' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False False\n", done.stderr


def test_the_stored_levels_of_16_bits_are_noted() -> None:
    """0 and 65535 mark pixels without a value."""
    values = np.linspace(500, 8000, 64 * 64).astype(np.uint16).reshape(64, 64)
    values[:8], values[-8:] = 0, 65535
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    low, high = int(values[8:-8].min()), int(values[8:-8].max())
    assert notes_of(read(buffer.getvalue())).levels == (low, high)
    assert notes_of(read(png(PngInfo()))).levels is None


def test_a_narrow_range_is_described_and_a_wide_one_is_not() -> None:
    text = narrow_range(500, 8000)
    assert "11% of the 16-bit range (500 to 8000 of 0 to 65535), so 30 of 256 grey levels remain (2 to 31)" in text
    assert "(value - 500) x 65535 / 7500" in text
    assert narrow_range(0, 65535) == narrow_range(20_000, 40_000) == ""
