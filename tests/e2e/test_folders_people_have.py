"""Folders and files as people have them: each is read with the right pixels and captions, or refused by one line.

CASES is the table. `doctor` and `prepare`, which reads rows as `train` does, must agree about every case.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from t2i_adapter.cli import main
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError

COLORS = {"a": (200, 40, 40), "b": (40, 200, 60), "c": (50, 60, 210)}
SIZE = 96


def image_of(name: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), COLORS[name])
    ImageDraw.Draw(picture).ellipse([30, 30, 60, 60], fill="white")
    return picture


def condition_of(name: str) -> Image.Image:
    """A grey level for each name, so that a wrong pairing is seen."""
    return Image.new("L", (SIZE, SIZE), 50 * (1 + list(COLORS).index(name)))


def save(path: Path, picture: Image.Image, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix.lower() in (".webp", ".avif") else {}
    picture.save(path, **lossless, **more)


def write_pictures(folder: Path, captions: str = ".txt", ending: str = ".png", names: str = "abc") -> None:
    for name in names:
        save(folder / f"{name}{ending}", image_of(name))
        if captions:
            (folder / f"{name}{captions}").write_text(f"picture {name}\n", encoding="utf-8")


def write_conditions(folder: Path, ending: str = ".webp", names: str = "abc") -> None:
    for name in names:
        save(folder / f"{name}{ending}", condition_of(name))


@dataclass(frozen=True)
class Case:
    """What a folder holds, and what must come of it.

    Attributes:
        write: fills the folder.
        captions: of the rows in order; None if the folder is refused.
        options: beside the location.
        paired: whether rows have condition pictures; otherwise canny makes them.
        says: texts that the plan's lines, or the error, must hold.
        place: what --data names, below the folder.
        rows: names of the rows' pictures, in order.
    """

    write: Callable[[Path], Any]
    captions: Sequence[str] | None = ("picture a", "picture b", "picture c")
    options: dict[str, Any] = field(default_factory=dict)
    paired: bool = False
    says: tuple[str, ...] = ()
    place: str = ""
    rows: str = "abc"

    def data_options(self, folder: Path) -> DataOptions:
        made = {} if self.paired else {"condition": "canny"}
        return DataOptions(location=str(folder / self.place), resolution=64, **{**made, **self.options})

    def words(self, folder: Path) -> list[str]:
        made = {} if self.paired else {"condition": "canny"}
        options = {**made, **self.options}
        words = ["--data", str(folder / self.place), "--resolution", "64"]
        return words + [word for name, value in options.items() for word in (f"--data.{name}", str(value))]


def beside(control: str, ending: str = ".webp") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_pictures(folder / "img")
        write_conditions(folder / control, ending)

    return write


def sd_scripts(folder: Path) -> None:
    write_pictures(folder / "train", ending=".jpg")
    write_conditions(folder / "masks" / "canny", ".png")


def subfolders(folder: Path) -> None:
    write_pictures(folder / "one", names="a")
    write_pictures(folder / "two" / "deep", names="bc")


def nested_pairs(folder: Path) -> None:
    for inner, names in (("x", "a"), ("y", "bc")):
        write_pictures(folder / inner, names=names)
        write_conditions(folder / "control" / inner, names=names)


def repeats(folder: Path) -> None:
    write_pictures(folder / "img" / "10_cats", names="ab")
    write_pictures(folder / "img" / "3_dogs", names="c")
    (folder / "log").mkdir()


def capital_endings(folder: Path) -> None:
    for name in "abc":
        save(folder / "images" / f"{name}.PNG", image_of(name))
        (folder / "images" / f"{name}.TXT").write_text(f"picture {name}")
        save(folder / "conditions" / f"{name}.Webp", condition_of(name))


def many_formats(folder: Path) -> None:
    for name, ending in zip("abc", (".avif", ".gif", ".jp2"), strict=True):
        save(folder / f"{name}{ending}", image_of(name))
        (folder / f"{name}.txt").write_text(f"picture {name}")


def unicode_forms(folder: Path) -> None:
    for name, form in zip("abc", ("NFC", "NFD", "NFC"), strict=True):
        other = "NFD" if form == "NFC" else "NFC"
        file = f"{name}\u00fc\u7d75 \U0001f600"
        save(folder / "images" / f"{unicodedata.normalize(form, file)}.png", image_of(name))
        (folder / "images" / f"{unicodedata.normalize(other, file)}.txt").write_text(f"picture {name}")
        save(folder / "conditions" / f"{unicodedata.normalize(other, file)}.png", condition_of(name))


def litter(folder: Path) -> None:
    write_pictures(folder)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/a.png", "@eaDir/b.png", ".hidden/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not a picture")


def a_loop(folder: Path) -> None:
    write_pictures(folder)
    (folder / "again").symlink_to(folder, target_is_directory=True)


def dots(folder: Path) -> None:
    for name in "abc":
        save(folder / f"{name}.v1.2.png", image_of(name))
        (folder / f"{name}.v1.2.txt").write_text(f"picture {name}")


def byte_order_marks(folder: Path) -> None:
    write_pictures(folder, "")
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"picture {name}\r\n", encoding="utf-8-sig")


def unlike_captions(folder: Path) -> None:
    write_pictures(folder, "", names="abc")
    (folder / "a.txt").write_text("picture a")
    (folder / "b.caption").write_text("picture b")
    (folder / "c.txt").write_text("picture c")
    (folder / "c.caption").write_text("the .txt wins")


def table(name: str, header: Sequence[str] = ("image", "text"), **dialect: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_pictures(folder, "")
        with (folder / name).open("w", encoding=dialect.pop("encoding", "utf-8-sig"), newline="") as file:
            writer = csv.writer(file, **dialect)
            writer.writerow(header)
            writer.writerows([f"{one}.png", f'"{one}",\nin two lines; \U0001f600'] for one in "abc")

    return write


IN_TWO_LINES = [f'"{one}",\nin two lines; \U0001f600' for one in "abc"]


def other_columns(folder: Path) -> None:
    write_pictures(folder, "")
    lines = [json.dumps({"id": 1, "img_path": f"{one}.png", "prompt": f"picture {one}"}) for one in "abc"]
    (folder / "pairs.jsonl").write_text("\n".join(lines))


def absolute_paths(folder: Path) -> None:
    write_pictures(folder, "")
    lines = [json.dumps({"image": str(folder.resolve() / f"{one}.png"), "text": f"picture {one}"}) for one in "abc"]
    (folder / "pairs.jsonl").write_text("\n".join(lines))


def absolute_metadata(folder: Path) -> None:
    write_pictures(folder.parent / "elsewhere", "")
    place = folder.parent.resolve() / "elsewhere"
    lines = [json.dumps({"file_name": str(place / f"{one}.png"), "text": f"picture {one}"}) for one in "abc"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def images_alone(folder: Path) -> None:
    write_pictures(folder)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"image": f"{one}.png"}) for one in "abc"))


def metadata_csv(folder: Path) -> None:
    table("metadata.csv", ("file_name", "text"), encoding="utf-8")(folder)


def controlnet(folder: Path) -> None:
    write_pictures(folder / "target", "")
    write_conditions(folder / "source", ".png")
    lines = [
        {"source": f"source/{one}.png", "target": f"target/{one}.png", "prompt": f"picture {one}"} for one in "abc"
    ]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))


CONTROLNET = {"image_column": "target", "conditioning_image_column": "source", "caption_column": "prompt"}


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / "my data.zip", "w") as archive:
        for name in "abc":
            save(folder / f"{name}.png", image_of(name))
            archive.write(folder / f"{name}.png", f"{name}.png")
            (folder / f"{name}.png").unlink()
            archive.writestr(f"{name}.txt", f"picture {name}")


def heic(folder: Path) -> None:
    write_pictures(folder)
    (folder / "d.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    (folder / "d.txt").write_text("picture d")


def unread_formats(folder: Path) -> None:
    write_pictures(folder)
    for name in ("d.jxl", "e.JXL", "f.psd", "notes.md"):
        (folder / name).write_bytes(b"x")


def not_all_captioned(folder: Path) -> None:
    write_pictures(folder)
    (folder / "b.txt").unlink()


def lone_caption(folder: Path) -> None:
    write_pictures(folder)
    (folder / "z.txt").write_text("picture z")


def extra_condition(folder: Path) -> None:
    beside("control")(folder)
    save(folder / "control" / "z.webp", condition_of("a"))


def missing_condition(folder: Path) -> None:
    beside("control")(folder)
    (folder / "control" / "b.webp").unlink()


def suffixed_conditions(folder: Path) -> None:
    write_pictures(folder / "img")
    for name in "abc":
        save(folder / "control" / f"{name}_canny.png", condition_of(name))


def two_splits(folder: Path) -> None:
    write_pictures(folder / "train", names="ab")
    write_pictures(folder / "test", names="c")


def held_out_beside(folder: Path) -> None:
    write_pictures(folder, names="ab")
    write_pictures(folder / "test", names="c")


NONE = {"captions": "none"}
CASES = {
    "captions in .txt": Case(write_pictures),
    "captions in .caption": Case(lambda folder: write_pictures(folder, ".caption")),
    "captions in .txt and .caption": Case(unlike_captions),
    "captions with another ending": Case(lambda folder: write_pictures(folder, ".tags"), options={"captions": ".tags"}),
    "captions with a byte order mark": Case(byte_order_marks),
    "no captions": Case(
        lambda folder: write_pictures(folder, ""), None, says=("--data.captions none", "--data.captions filename")
    ),
    "no captions, none": Case(
        lambda folder: write_pictures(folder, ""), ("", "", ""), NONE, says=("without captions",)
    ),
    "no captions, filename": Case(lambda folder: write_pictures(folder, ""), ("a", "b", "c"), {"captions": "filename"}),
    "not every picture has one": Case(not_all_captioned, None, says=("b.png: has no caption", ".txt or .caption")),
    "subfolders": Case(subfolders),
    "folders of repeats": Case(repeats, says=("10_cats, 3_dogs", "plain folders")),
    "no conditions": Case(
        write_pictures, None, paired=True, says=("--data.condition canny", "control/", "--data.conditioning_dir")
    ),
    **{
        f"img and {name}": Case(beside(name), paired=True)
        for name in (
            "control",
            "conditioning",
            "cond",
            "conditions",
            "Conditioning_Images",
            "condition_images",
            "control1",
        )
    },
    "img and a folder of another name": Case(
        beside("canny"), None, paired=True, says=("--data.conditioning_dir (canny?)",)
    ),
    "img and a folder of another name, named": Case(
        beside("canny"), paired=True, options={"conditioning_dir": "canny"}
    ),
    "pairs in subfolders": Case(nested_pairs, paired=True),
    "conditions by option": Case(
        sd_scripts, paired=True, options={"conditioning_dir": "masks/canny"}, says=("a folder of pictures",)
    ),
    "conditions by a wrong option": Case(
        sd_scripts,
        None,
        {"conditioning_dir": "nowhere"},
        paired=True,
        says=("--data.conditioning_dir nowhere: no such",),
    ),
    "conditions with other names": Case(
        suffixed_conditions, None, paired=True, says=("such as a_canny.png", "such as a.png", "Rename them")
    ),
    "a caption too many": Case(lone_caption, says=("1 caption file without a picture",)),
    "a condition too many": Case(extra_condition, paired=True, says=("1 condition", "not used")),
    "a condition too few": Case(missing_condition, None, paired=True, says=("b.png: has no condition",)),
    "endings in capitals": Case(capital_endings, paired=True),
    "avif, gif, jpeg 2000": Case(many_formats),
    "both Unicode forms": Case(unicode_forms, paired=True),
    "litter of systems": Case(litter),
    "a link to itself": Case(a_loop, says=("again", "a link to a folder that contains it")),
    "dots in names": Case(dots),
    "formats that are not read": Case(unread_formats, says=("2 .jxl, 1 .psd",)),
    "heic": Case(heic, None, says=("d.heic",)),
    "splits": Case(two_splits, ("picture c",), {"split": "test"}, rows="c"),
    "a split that is not there": Case(write_pictures, None, {"split": "test"}, says=("--data.split test", "train")),
    "held-out pictures beside": Case(held_out_beside, ("picture a", "picture b"), rows="ab"),
    "csv with semicolons": Case(table("pairs.csv", delimiter=";"), IN_TWO_LINES, place="pairs.csv"),
    "csv with tabs": Case(table("pairs.tsv", delimiter="\t"), IN_TWO_LINES, place="pairs.tsv"),
    "csv in its folder": Case(table("pairs.csv", delimiter=";"), IN_TWO_LINES, says=("pairs.csv, read as a manifest",)),
    "metadata.csv": Case(metadata_csv, IN_TWO_LINES, says=("an image folder",)),
    "other columns": Case(
        other_columns,
        None,
        says=("img_path, prompt", "--data.image_column img_path", "--data.caption_column prompt"),
    ),
    "other columns, named": Case(other_columns, options={"image_column": "img_path", "caption_column": "prompt"}),
    "absolute paths in a manifest": Case(absolute_paths, place="pairs.jsonl"),
    "absolute paths in metadata.jsonl": Case(
        absolute_metadata, None, says=("may hold absolute paths: --data FOLDER/metadata.jsonl",)
    ),
    "absolute paths in metadata.jsonl, named": Case(absolute_metadata, place="metadata.jsonl"),
    "ControlNet's prompt.json": Case(controlnet, options=CONTROLNET, paired=True, place="prompt.json"),
    "a table of pictures, captions beside": Case(images_alone, options={"captions": ".txt"}, place="pairs.jsonl"),
    "a table of pictures, captions of names": Case(
        images_alone, ("a", "b", "c"), {"captions": "filename"}, place="pairs.jsonl"
    ),
    "a table of pictures, no captions": Case(
        images_alone, None, place="pairs.jsonl", says=("--data.caption_column text", "--data.captions none")
    ),
    "a table beside captions": Case(images_alone, says=("tables and archives", "pairs.jsonl")),
    "zip": Case(zipped, None, place="my data.zip", says=("Unpack it: python3 -m zipfile -e",)),
    "zip in a folder": Case(zipped, None, says=("1 archive", "python3 -m zipfile -e")),
    "an empty folder": Case(
        lambda folder: None, None, says=("0 pictures, 0 texts", "a.jpg, a.txt", "pairs.jsonl", "metadata.jsonl")
    ),
    "only texts": Case(
        lambda folder: (folder / "a.txt").write_text("x"), None, says=("0 pictures, 1 text", "pictures with captions")
    ),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    folder = tmp_path / "my data"
    folder.mkdir()
    case.write(folder)
    return folder


def test_each_gives_its_rows_or_its_line(case: Case, folder: Path) -> None:
    if case.captions is None:
        with pytest.raises(UserError) as fault:
            read_all(open_source(case.data_options(folder), seed=0))
        told = str(fault.value)
        assert "\n" not in told
    else:
        source = open_source(case.data_options(folder), seed=0)
        told = source.describe()
        check_rows(case, source)
    assert all(text in told for text in case.says), told


def read_all(source: Source) -> None:
    for number in range(len(source)):
        source[number]


def check_rows(case: Case, source: Source) -> None:
    assert case.captions is not None
    assert len(source) == len(case.captions) == len(case.rows)
    for number, (name, caption) in enumerate(zip(case.rows, case.captions, strict=True)):
        sample = source[number]
        assert sample.captions == (caption,)
        levels = np.asarray(sample.image, int)[3, 3]
        assert np.abs(levels - COLORS[name]).max() <= 12, (name, levels)  # a lossy format
        if case.paired:
            assert sample.condition is not None
            assert sample.condition.convert("L").getpixel((3, 3)) == condition_of(name).getpixel((0, 0))


def test_doctor_and_prepare_agree(
    case: Case,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = case.words(folder)
    cache = ["--data.prepared_dir", str(tmp_path / "cache")]
    doctor = code_of(["doctor", *words, "--measure", "0", "--workers", "0", *cache])
    looked = capsys.readouterr()
    prepared = code_of(["prepare", *words, *cache])
    made = capsys.readouterr()
    assert (doctor != 0) == (prepared != 0) == (case.captions is None), (looked, made)
    if case.captions is None:
        assert made.err.startswith("error: ") and made.err.count("\n") == 1
        assert all(text in made.err for text in case.says), made.err
        assert looked.err == made.err or "error: " in looked.out  # the dataset is refused, or a row is listed
    else:
        first = made.out.splitlines()[0]
        assert looked.out.startswith(f"{first}: read in ")


def code_of(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as stop:  # doctor's, if rows have errors
        return int(str(stop.code))


def test_the_command_that_unpacks_a_zip_works_and_the_folder_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zipped(tmp_path)
    assert main(["doctor", "--data", str(tmp_path / "my data.zip")]) == 2
    command = capsys.readouterr().err.partition("Unpack it: ")[2].strip()
    subprocess.run(shlex.split(command), check=True, timeout=60)
    shown = [
        "--data.condition",
        "canny",
        "--data.resolution",
        "64",
        "--train.max_steps",
        "1",
        "--train.batch_size",
        "2",
    ]
    out = ["--output_dir", str(tmp_path / "adapter"), "--tracking.report_to", "none"]
    assert main(["train", "--data", str(tmp_path / "my data"), *shown, *out]) == 0
    assert (tmp_path / "adapter" / "diffusion_pytorch_model.safetensors").is_file()


def test_the_former_flags_and_the_short_ones_name_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path)
    ways = [
        ["train", "--data", str(tmp_path), "--condition", "canny", "--resolution", "64", "--captions", "filename"],
        ["train", "--data.location", str(tmp_path), "--data.condition", "canny", "--data.resolution", "64",
         "--data.captions", "filename"],
        ["train", "--data.train_data_dir", str(tmp_path), "--data.condition=canny", "--resolution=64",
         "--captions=filename"],
    ]  # fmt: skip
    shown = []
    for words in ways:
        assert main([*words, "--train.seed", "0", "--dry_run"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2] and "captions from the files' names" in shown[0]
    assert main(["train", "--data", "x", "--data.dataset_name", "y"]) == 2
    assert "two datasets are given, by --data and --data.dataset_name" in capsys.readouterr().err
