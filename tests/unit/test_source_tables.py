"""Tables in text as people write them: CSV of several dialects, JSON lines and arrays.

Each row is read, or one line names it and says why it is not.
"""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import delimited
from t2i_adapter.data.delimited import Dialect, find_records
from t2i_adapter.data.source import Source, open_source
from t2i_adapter.errors import UserError

HEADER = "image,conditioning_image,text\n"
ROW = "a.png,b.png,x\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    return tmp_path


def open_at(place: Path, **options: Any) -> Source:
    return open_source(DataOptions(location=str(place), kind="manifest", **options), seed=0)


def write(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def read(source: Source) -> list[str]:
    """The captions of all rows, each decoded; "!" and the message for a row that cannot be read."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].captions[0])
        except UserError as fault:
            assert "\n" not in str(fault)
            found.append(f"!{fault}")
    return found


def fault_of(place: Path, **options: Any) -> str:
    with pytest.raises(UserError) as fault:
        open_at(place, **options)
    assert "\n" not in str(fault.value)
    return str(fault.value)


CSV: dict[str, tuple[str | bytes, list[str]]] = {
    "commas": (HEADER + ROW, ["x"]),
    "semicolons": ("image;conditioning_image;text\na.png;b.png;x, y\n", ["x, y"]),
    "tabs": ("image\tconditioning_image\ttext\na.png\tb.png\tx, y; z\n", ["x, y; z"]),
    "a delimiter inside of the quoted header": ('image;conditioning_image;text;"a,b,c,d"\na.png;b.png;x;\n', ["x"]),
    "a quoted header": ('"image","conditioning_image","text"\n"a.png","b.png","x ""y"""\n', ['x "y"']),
    "spaces after the delimiter": ('image, conditioning_image, text\na.png, b.png, "x, y"\n', ["x, y"]),
    "names of files": ("file_name,conditioning_image_file_name,text\n" + ROW, ["x"]),
    "byte order mark and CRLF": (b"\xef\xbb\xbf" + (HEADER + ROW).replace("\n", "\r\n").encode(), ["x"]),
    "CR alone": ((HEADER + ROW * 2).replace("\n", "\r"), ["x", "x"]),
    "no line end": (HEADER + ROW.strip(), ["x"]),
    "empty rows": (HEADER + ROW + "\n" + ROW + "\n  \n,,\n\n", ["x", "x"]),
    "a quoted line break": (HEADER + 'a.png,b.png,"x\ny, ""z"""\n' + ROW, ['x\ny, "z"', "x"]),
    "a quoted line break of Windows": (HEADER + 'a.png,b.png,"x\r\ny"\r\n', ["x\r\ny"]),
    "a double quote in a plain text": (HEADER + 'a.png,b.png,a 5" disk\n' + ROW, ['a 5" disk', "x"]),
    "a separator of lines that is no line end": (HEADER + "a.png,b.png,x\u2028y\x0bz\n", ["x\u2028y\x0bz"]),
    "words for missing values": (HEADER + "a.png,b.png,NA\na.png,b.png,null\na.png,b.png,nan\n", ["NA", "null", "nan"]),
    "numbers": (HEADER + "a.png,b.png,007\na.png,b.png,1e5\na.png,b.png,true\n", ["007", "1e5", "true"]),
    "an empty caption": (HEADER + "a.png,b.png,\n", [""]),
    "a delimiter at the end": ("image,conditioning_image,text,\na.png,b.png,x,\n" + ROW, ["x", "x"]),
    "a column without a name": (",image,conditioning_image,text\n0,a.png,b.png,x\n", ["x"]),
    "an unused column twice": ("image,conditioning_image,text,z,z\na.png,b.png,x,1,2\n", ["x"]),
}
"""Way of writing -> the file, and the captions that are read."""


@pytest.mark.parametrize("way", CSV)
def test_a_csv_is_read_as_it_is_written(folder: Path, way: str) -> None:
    content, captions = CSV[way]
    assert read(open_at(write(folder, content))) == captions


def test_a_tsv_is_a_manifest(folder: Path) -> None:
    assert read(open_at(write(folder, CSV["tabs"][0], "rows.TSV"))) == ["x, y; z"]


WRONG_ROWS = {
    "too few fields": (
        "a.png,b.png\n",
        "line 3: has 2 fields, and the header has 3. A text that holds a comma or a line",
    ),
    "too many fields": ("a.png,b.png,red, round\n", "line 3: has 4 fields, and the header has 3."),
    "text after a quote": ('a.png,b.png,"x" y\n', "line 3: cannot be read as CSV: ',' expected after '\"'."),
    "not UTF-8": (b"a.png,b.png,caf\xe9 x\n", "line 3: not UTF-8 text (invalid continuation byte at byte 15)."),
    "no picture": (",b.png,x\n", "line 3, column image: there is no picture."),
    "backslashes": ("sub\\a.png,b.png,x\n", "no such file. It has backslashes; between folders stands /."),
}


@pytest.mark.parametrize("fault", WRONG_ROWS)
def test_a_wrong_row_of_a_csv_is_named_and_the_others_are_read(folder: Path, fault: str) -> None:
    row, line = WRONG_ROWS[fault]
    place = write(folder, (HEADER + ROW).encode() + (row if isinstance(row, bytes) else row.encode()) + ROW.encode())
    first, wrong, last = read(open_at(place))
    assert (first, last) == ("x", "x")
    assert wrong.startswith(f"!{place}, line 3") and line in wrong


WRONG_FILES: dict[str, tuple[str | bytes, str]] = {
    "UTF-16": ((HEADER + ROW).encode("utf-16"), "Convert it: iconv -f UTF-16 -t UTF-8 rows.csv > new_rows.csv"),
    "UTF-16 without a mark": ((HEADER + ROW).encode("utf-16-le"), "is UTF-16 text, or not text; UTF-8 is needed."),
    "a quote without end": (HEADER + 'a.png,b.png,"x\n' + ROW * 3, "line 2: a double quote opens a text that does not"),
    "a used column twice": ("image,conditioning_image,text,text\na.png,b.png,x,y\n", "has this column 2 times."),
    "a column under two names": ("image,file_name,conditioning_image,text\na,a,b,c\n", "has this column 2 times."),
    "an empty file": ("", "there are no rows, and no header row that names the columns."),
    "a header alone": (HEADER, "there are no rows."),
    "no header": (ROW * 2, "--data.image_column image: "),
}


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_a_wrong_csv_is_one_line(folder: Path, fault: str) -> None:
    content, line = WRONG_FILES[fault]
    assert line in fault_of(write(folder, content))


def test_a_text_without_end_is_refused_before_all_of_the_file_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_CHUNK", 64)
    monkeypatch.setattr(delimited, "_MAX_ROW", 200)
    place = write(folder, HEADER + 'a.png,b.png,"x\n' + ROW * 50 + 'a.png,b.png,y"\n')
    assert "line 2: a double quote opens a text that does not end." in fault_of(place)


def test_the_rows_of_a_csv_are_those_of_a_letter_by_letter_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of delimiters, double quotes and line breaks in any order, read in blocks of 1 to 1000 bytes."""
    pieces = ["a", ",", '"', '"', "\n", '""', '"\n', ',"', '",', "x,", " ", "\r\n"]
    is_unclosed = []
    for seed in range(3000):
        chance = random.Random(seed)
        text = "".join(chance.choices(pieces, k=chance.randrange(1, 40)))
        dialect = Dialect(",", b"\n", chance.random() < 0.3)
        monkeypatch.setattr(delimited, "_CHUNK", chance.choice([1, 2, 7, 1000]))
        expected = rows_letter_by_letter(text, dialect.skips_space)
        is_unclosed.append(expected is None)
        place = write(tmp_path, text)
        if expected is None:
            with pytest.raises(UserError, match="a double quote opens a text that does not end"):
                find_records(place, "x", dialect)
        else:
            spans = find_records(place, "x", dialect)
            found = [text[start:end] for start, end in zip(spans.starts, spans.ends, strict=True)]
            assert found == expected, (seed, text)
    assert 0.2 < sum(is_unclosed) / len(is_unclosed) < 0.8


def rows_letter_by_letter(text: str, skips_space: bool) -> list[str] | None:
    """The rows of a CSV that are not empty; None if a double quote does not end."""
    rows, row, state = [], "", "field"
    for letter in text + "\n" * (not text.endswith("\n")):
        if letter == "\n" and state != "quoted":
            rows.append(row)
            row, state = "", "field"
            continue
        row += letter
        if state == "quoted":
            state = "quote" if letter == '"' else "quoted"
        elif letter == ",":
            state = "field"
        elif letter == '"' and state in ("field", "quote"):
            state = "quoted"
        elif not (letter == " " and state == "field" and skips_space):
            state = "plain"
    return None if state == "quoted" else [row for row in rows if row.strip('", \t\r\n')]


ROWS = [
    {"image": "a.png", "conditioning_image": "b.png", "text": "one"},
    {"image": "b.png", "conditioning_image": "a.png", "text": "zw\u00f6lf \u7d75 \U0001f600 ]}"},
    {"image": "a.png", "conditioning_image": "b.png", "text": ["three", "3"]},
]
CAPTIONS = ["one", ROWS[1]["text"], "three"]
JSON = {
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "an array on one line": json.dumps(ROWS),
    "an array, indented": json.dumps(ROWS, indent=4),
    "an array of letters that are not ASCII": json.dumps(ROWS, ensure_ascii=False, indent=1),
    "an array after a byte order mark": "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False),
}


@pytest.mark.parametrize("way", JSON)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".JSON"])
def test_json_is_read_as_lines_and_as_an_array(folder: Path, way: str, ending: str) -> None:
    source = open_at(write(folder, JSON[way], f"rows{ending}"))
    assert read(source) == CAPTIONS
    unit = "line" if way == "lines" else "object"
    assert [source.key(i) for i in range(3)] == [f"{row['image']} ({unit} {i})" for i, row in enumerate(ROWS, 1)]


def test_a_key_of_an_array_may_be_skipped_without_its_number(folder: Path) -> None:
    (folder / "skip.txt").write_text("b.png\n")
    assert read(open_at(write(folder, JSON["an array, indented"], "rows.json"), skip=str(folder / "skip.txt"))) == [
        "one",
        "three",
    ]


def test_the_manifest_of_controlnets_fill50k_is_read(folder: Path) -> None:
    """Its source is the condition, and its target the image."""
    (folder / "source").mkdir()
    (folder / "target").mkdir()
    Image.new("RGB", (16, 16), "black").save(folder / "source" / "0.png")
    Image.new("RGB", (16, 16), "red").save(folder / "target" / "0.png")
    row = {"source": "source/0.png", "target": "target/0.png", "prompt": "pale circle"}
    place = write(folder, json.dumps(row) + "\n", "prompt.json")
    columns = {"image_column": "target", "conditioning_image_column": "source", "caption_column": "prompt"}
    sample = open_at(place, **columns)[0]
    assert sample.condition is not None
    assert (sample.image.getpixel((0, 0)), sample.condition.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 0))
    assert sample.captions == ("pale circle",)
    assert "there are: source, target, prompt." in fault_of(place)


WRONG_JSON = {
    "UTF-16": (json.dumps(ROWS[0]).encode("utf-16"), "Convert it: iconv -f UTF-16 -t UTF-8 rows.json > new_rows.json"),
    "an object over several lines": (json.dumps(ROWS[0], indent=1), "one object on one line, or one array of objects."),
    "an array of texts": (json.dumps(["a", "b"]), "object 1: holds str; each is one object"),
    "an empty array": ("[ ]", "there are no rows."),
    "an array without its end": (json.dumps(ROWS)[:-1], "not a JSON array, at or after its object 3: a comma or ]"),
    "a damaged object": (
        json.dumps(ROWS).replace('"text": ["', '"text" ["'),
        "not a JSON array, at or after its object 2",
    ),
    "text after the array": (json.dumps(ROWS) + "x", "object 3: text follows the array."),
}


@pytest.mark.parametrize("fault", WRONG_JSON)
def test_wrong_json_is_one_line(folder: Path, fault: str) -> None:
    content, line = WRONG_JSON[fault]
    assert line in fault_of(write(folder, content, "rows.json"))


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "metadata.jsonl"])
def test_a_files_name_may_have_another_unicode_form(
    folder: Path, stored: Literal["NFC", "NFD"], written: Literal["NFC", "NFD"], name: str
) -> None:
    inner = folder / unicodedata.normalize("NFD", "Bilder f\u00fcr")  # a folder above has a form of its own
    inner.mkdir()
    for file in folder.glob("*.png"):
        file.rename(inner / file.name)
    folder = inner
    on_disk, in_row = (unicodedata.normalize(form, "M\u00fcller.png") for form in (stored, written))
    (folder / "b.png").rename(folder / on_disk)
    row = {"image": "a.png", "conditioning_image": in_row, "text": "x"}
    content = json.dumps(row) if name.endswith("jsonl") else ",".join(row) + "\n" + ",".join(row.values())
    place = write(folder, content, name)
    source = open_source(DataOptions(location=str(folder if name == "metadata.jsonl" else place)), seed=0)
    assert read(source) == ["x"]
    assert source.stamp(0) is not None


def test_an_image_folders_absolute_path_names_the_way_to_read_it(folder: Path) -> None:
    row = {"file_name": str(folder / "a.png"), "conditioning_image_file_name": "b.png", "text": "x"}
    (folder / "train").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "train" / "b.png")
    write(folder / "train", json.dumps(row), "metadata.jsonl")
    with pytest.raises(UserError) as fault:
        open_source(DataOptions(location=str(folder)), seed=0)[0]
    assert str(fault.value).endswith(
        "Rows of a table that you name yourself may hold absolute paths: --data FOLDER/metadata.jsonl"
    )
    assert read(open_source(DataOptions(location=str(folder / "train" / "metadata.jsonl")), seed=0)) == ["x"]
