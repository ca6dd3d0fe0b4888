"""Pictures made to exhaust memory or time are refused by their headers, before decoding, wherever a picture is read."""

from __future__ import annotations

import io
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.icc import rgb_profile
from support.runs import train_words

from t2i_adapter.cli import main
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.picture import MAX_BYTES, StoredPicture, decode
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, rows: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """30,000 x 30,000 pixels in 3 MB: 2.7 GB decoded."""
    packer = zlib.compressobj(9)
    row = b"\0" + bytes(3 * 30_000)
    data = b"".join(packer.compress(row) for _ in range(3_000)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A comment of 200 MB in 200 KB."""
    return png(8, 8, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9)), rows=bytes(8 * 25))


def late_text_bomb() -> bytes:
    """The same comment after the pixels, which Pillow reads when it decodes."""
    data = png(8, 8, rows=bytes(8 * 25))
    return data[:-12] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 * 2**20), 9)) + data[-12:]


def orientation_bomb() -> bytes:
    """1,000 texts under the names that orientation is read from, each unpacking to 200 MB."""
    packed = zlib.compress(bytes(200 * 2**20), 9)
    texts = [
        chunk(b"zTXt", b"Raw profile type exif\0\0" + packed),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        chunk(b"zTXt", b"exif\0\0" + packed),
    ]
    return png(8, 8, *texts * 30, *[chunk(b"tEXt", b"exif\0" + bytes(2**20))] * 70, rows=bytes(8 * 25))


def many_chunks() -> bytes:
    """2,000,000 empty texts."""
    return png(8, 8, chunk(b"tEXt", b"") * 2_000_000, rows=bytes(8 * 25))


def unknown_chunks() -> bytes:
    return png(8, 8, chunk(b"abCd", b"") * 190_000, rows=bytes(8 * 25))


def huge_profile() -> bytes:
    """A TIFF with a colour profile of 60 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF", icc_profile=rgb_profile() + bytes(60 * 2**20))
    return buffer.getvalue()


def profile_of_tags() -> bytes:
    """A profile that claims 2^32 - 1 tags, and a table whose curves claim 2^32 - 1 points."""
    profile = bytearray(rgb_profile())
    struct.pack_into(">I", profile, 128, 2**32 - 1)
    curves = rgb_profile().replace(b"curv\0\0\0\0\0\0\0\1", b"curv\0\0\0\0\xff\xff\xff\xff")
    packed = [zlib.compress(bytes(one)) for one in (profile, curves)]
    return png(8, 8, *(chunk(b"iCCP", b"p\0\0" + one) for one in packed), rows=bytes(8 * 25))


def profile_bomb() -> bytes:
    return png(8, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200 * 2**20), 9)), rows=bytes(8 * 25))


def exif_bomb() -> bytes:
    """An EXIF table whose header claims 65,535 entries of 4 GB each."""
    entries = b"".join(struct.pack("<HHII", 274 + n, 7, 2**32 - 1, 8) for n in range(5_000))
    exif = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 65_535) + entries
    return png(8, 8, chunk(b"eXIf", exif), rows=bytes(8 * 25))


def endless_gif() -> bytes:
    """100,000 frames of 65,535 x 1,500 pixels in 2 MB."""
    head = b"GIF89a" + struct.pack("<HHBBB", 65_535, 1_500, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * 100_000 + b"\x3b"


def small_gif() -> bytes:
    """100,000 frames of 8 x 8 pixels: small, but animated."""
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * 100_000 + b"\x3b"


def tiff_loop() -> bytes:
    """A TIFF whose next directory is the first one again."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    return bytes(data)


def postscript() -> bytes:
    """A file that Pillow would start Ghostscript for."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch /tmp/x) (w) file\n%%EOF\n"


def icon() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "ICO")
    return buffer.getvalue()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "30,000 x 30,000 pixels": (bomb, "900000000 pixels"),
    "a strip": (lambda: png(2**31 - 1, 1), "pixels"),
    "no rows": (lambda: png(9_000, 9_000), "damaged picture"),
    "a comment of 200 MB": (text_bomb, "None"),
    "a comment of 200 MB after the pixels": (late_text_bomb, "None"),
    "orientations of 200 MB": (orientation_bomb, "None"),
    "2,000,000 chunks": (many_chunks, "damaged picture: more than 200,000 chunks"),
    "190,000 unknown chunks": (unknown_chunks, "None"),
    "a profile of 200 MB": (profile_bomb, "None"),
    "a profile of 60 MB, not packed": (huge_profile, "None"),
    "a profile of 2^32 tags": (profile_of_tags, "None"),
    "an EXIF table of gigabytes": (exif_bomb, "damaged picture|None"),
    "a huge GIF of 100,000 frames": (endless_gif, "65535x1500 pixels"),
    "a GIF of 100,000 frames": (small_gif, "animated"),
    "a TIFF that goes round": (tiff_loop, "animated|damaged picture|None"),
    "PostScript": (postscript, "not a picture that can be read"),
    "an icon of pictures": (icon, "not a picture that can be read"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="1e9" height="1e9"/>', "not a picture"),
}

MEASURED = """
import resource, sys, time
from pathlib import Path
from t2i_adapter.errors import UserError
from t2i_adapter.data.picture import StoredPicture, decode
decode(StoredPicture("warm", Path(sys.argv[1]).read_bytes()), is_photo=True)
for name in sys.argv[2:]:
    data = Path(name).read_bytes()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        print(decode(StoredPicture("x", data), is_photo=True) and None, end="\\t")
    except UserError as fault:
        print(fault, end="\\t")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - start, sep="\\t")
"""


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bombs")
    made = {}
    for number, (name, (make, _)) in enumerate(BOMBS.items()):
        made[name] = folder / f"{number}.png"
        made[name].write_bytes(make())
    return made


def test_each_bomb_is_bounded_in_memory_and_time(tmp_path: Path, bombs: dict[str, Path]):
    """Measures in its own process the growth of the peak memory in MiB and the CPU seconds."""
    Image.new("RGB", (64, 64)).save(tmp_path / "warm.png", icc_profile=rgb_profile())
    files = [str(file) for file in bombs.values()]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "warm.png"), *files],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip("\n").split("\n")
    assert len(lines) == len(BOMBS)
    for line, (name, (_, expected)) in zip(lines, BOMBS.items(), strict=True):
        printed, grown, seconds = line.split("\t")
        assert any(part in printed for part in expected.split("|")), (name, printed)
        assert float(grown) < 400, (name, grown)
        assert float(seconds) < 5, (name, seconds)


def test_the_size_in_a_heif_header_is_checked_and_must_be_true():
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs sdxl-t2i-adapter[heif]")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (3000, 3000))).save(buffer, quality=10)
    data = buffer.getvalue()
    size = data.index(b"ispe") + 8
    for side, message in ((30_000, "30000x30000 pixels; at most"), (64, "damaged HEIC picture")):
        claimed = data[:size] + struct.pack(">II", side, side) + data[size + 8 :]
        with pytest.raises(UserError, match=message):
            decode(StoredPicture("x", claimed))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    """A sparse file needs no room on the disk, but in memory."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    with (folder / "x.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    row = {"file_name": "x.png", "conditioning_image_file_name": "x.png", "text": "a"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"column image: .*x\.png: 536,870,913 bytes; a picture's file has at most"):
        open_source(DataOptions(location=str(tmp_path / "data")), seed=0)[0]


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "run"
    assert main(train_words(tiny_base, tiny_data, out)) == 0
    return out


WAYS: dict[str, Callable[[Path, Path, Path, Path], list[str]]] = {
    "training data": lambda base, data, adapter, file: [
        *("train", "--base.name", str(base), "--data", str(spoilt(data, file))),
        *("--data.resolution", "64", "--train.max_steps", "1", "--output_dir", str(file.parent / "out")),
    ],
    "validation picture": lambda base, data, adapter, file: [
        *("train", "--base.name", str(base), "--data", str(data), "--data.resolution", "64"),
        *("--validation.prompts", "a", "--validation.images", str(file), "--output_dir", str(file.parent / "out")),
    ],
    "generate --image": lambda base, data, adapter, file: [
        *("generate", "--adapter", str(adapter), "--prompt", "a", "--image", str(file), "--out", str(file.parent)),
    ],
    "generate --photo": lambda base, data, adapter, file: [
        *("generate", "--adapter", str(adapter), "--prompt", "a", "--photo", str(file), "--condition", "canny"),
        *("--out", str(file.parent)),
    ],
    "annotate a picture": lambda base, data, adapter, file: [
        *("annotate", "canny", str(file), "--out", str(file.parent / "map.png")),
    ],
    "annotate a dataset": lambda base, data, adapter, file: [
        *("annotate", "canny", "--data", str(spoilt(data, file)), "--out", str(file.parent / "maps"), "--workers", "0"),
    ],
    "evaluate": lambda base, data, adapter, file: [
        *("evaluate", "--adapter", str(adapter), "--data", str(spoilt(data, file)), "--split", "train", "--num", "8"),
        *("--out", str(file.parent / "out")),
    ],
    "conditions --sheet": lambda base, data, adapter, file: [
        *("conditions", "--photo", str(file), "--sheet", str(file.parent / "sheet.png")),
    ],
}


def spoilt(data: Path, file: Path) -> Path:
    folder = file.parent / "data"
    shutil.copytree(data, folder, dirs_exist_ok=True)
    shutil.copy(file, folder / "train" / "00003.png")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_refuses_a_bomb_with_one_line(
    way: str, tiny_base: Path, tiny_data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb())
    start = time.monotonic()
    assert main(WAYS[way](tiny_base, tiny_data, adapter, file)) == 2
    captured = capsys.readouterr()
    assert "(900000000 pixels)" in captured.err + captured.out and "Traceback" not in captured.err
    assert len([line for line in captured.err.splitlines() if line.startswith("error: ")]) == 1
    assert time.monotonic() - start < 120


def test_the_doctor_counts_bombs_and_goes_on(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb())
    with pytest.raises(SystemExit):  # exit code for faulty rows
        main(["doctor", str(spoilt(tiny_data, file)), "--data.resolution", "64", "--workers", "0"])
    printed = capsys.readouterr()
    assert "too many pixels to decode" in printed.out
    assert "Traceback" not in printed.err


def test_the_sheet_of_an_evaluation_is_checked_too(tmp_path: Path):
    """`push --evaluation` puts a picture from somebody's folder into the card."""
    from t2i_adapter.export.measured import read_evaluation

    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    numbers = {"num": 1, "metrics": {"iou": {"adapter": {"mean": 0.5, "ci95": [0.4, 0.6]}}}}
    (evaluation / "evaluation.json").write_text(json.dumps(numbers))
    (evaluation / "sheet.png").write_bytes(bomb())
    with pytest.raises(UserError, match="900000000 pixels"):
        read_evaluation(evaluation)


def test_a_good_picture_is_read():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "PNG")
    assert decode(StoredPicture("x", buffer.getvalue())).size == (64, 48)
