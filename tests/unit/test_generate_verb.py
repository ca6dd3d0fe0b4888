"""The verb `generate`: conditions equal training's, a record generates its picture again, errors name the option.

Also: files of prompts, the parameters in the PNG files, prompts of more than 75 tokens.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny import write_adapter

from t2i_adapter.config.tree import AdapterOptions
from t2i_adapter.data.geometry import Framing
from t2i_adapter.data.pair import PairTransform
from t2i_adapter.errors import UserError
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.flags import parse_flags
from t2i_adapter.generation.condition import fit_condition
from t2i_adapter.generation.prompts import Picture
from t2i_adapter.generation.several import EACH
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.types import Sample
from t2i_adapter.verbs.generate import GenerateOptions, Job, make_jobs, run


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_base)


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("condition") / "my condition.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


def options(folder: Path, picture: Path, **changes: Any) -> GenerateOptions:
    given = {"adapter": (str(folder),), "prompt": ("red circle",), "image": (str(picture),), "steps": 1}
    changes |= {name: (changes[name],) for name in (*EACH, "condition") if name in changes}
    return GenerateOptions(**{**given, **changes})


@pytest.mark.parametrize("original", [(90, 120), (120, 90), (64, 64), (33, 500)])
def test_a_square_is_cropped_as_in_training(original: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*original, 3), np.uint8))
    for channels in (1, 3):
        trained = PairTransform(Framing(64), channels).crop(Sample("x", picture, picture, ("",), "0"), 0).condition
        ours = np.asarray(fit_condition(picture, (64, 64), channels)).reshape(64, 64, -1).transpose(2, 0, 1)
        assert np.array_equal(ours, trained)


def test_a_record_generates_its_picture_again(adapter: Path, condition: Path, tmp_path: Path) -> None:
    prompts = ('a "red" circle', "cyan circle")
    run(options(adapter, condition, prompt=prompts, num=2, seed=5, out=str(tmp_path / "a"), negative="blue, grün"))
    records = [json.loads((tmp_path / "a" / f"{i:05d}.json").read_text()) for i in range(4)]
    assert [record["options"]["seed"] for record in records] == [5, 6, 5, 6]
    assert [record["options"]["prompt"][0] for record in records] == [prompts[0]] * 2 + [prompts[1]] * 2
    words = shlex.split(records[1]["command"])
    assert words[:2] == ["t2i-adapter", "generate"]
    again = parse_flags(GenerateOptions, words[2:], "t2i-adapter generate")
    run(again)
    first, second = Image.open(tmp_path / "a" / "00001.png"), Image.open(tmp_path / "a" / "00004.png")
    # One picture instead of four at once: see tests/numerics/test_generate.py for the rounding.
    assert abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
    assert json.loads((tmp_path / "a" / "00004.json").read_text()) == records[1]


def test_sizes(adapter: Path, condition: Path, tmp_path: Path) -> None:
    def size(**changes: Any) -> tuple[int, int]:
        run(options(adapter, condition, out=str(tmp_path), **changes))
        return Image.open(sorted(tmp_path.glob("*.png"))[-1]).size

    assert size() == (64, 64), "the training resolution"
    assert size(width=96, height=48) == (96, 48)
    (adapter / "t2i_adapter.json").rename(tmp_path / "kept")
    try:
        base = json.loads((tmp_path / "kept").read_text())["base"]["name"]
        with pytest.raises(UserError, match=r"--height 90: .*80 or 96"):
            size(base=base)
        assert size(base=base, height=80, width=112) == (112, 80)
    finally:
        (tmp_path / "kept").rename(adapter / "t2i_adapter.json")


def test_errors_name_the_option(adapter: Path, condition: Path, tiny_base: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    network = build_adapter(AdapterOptions(), {"block_out_channels": (16, 32, 128), "addition_embed_type": "text_time"})
    save_adapter(network, wide, metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False)
    broken = tmp_path / "broken.png"
    broken.write_text("not a picture")
    for changes, named in [
        ({"image": ("missing.png",)}, r"--image.*missing\.png"),
        ({"image": (str(broken),)}, r"broken\.png"),
        ({"width": 70}, r"--width 70: .*64 or 80"),
        ({"adapter": (str(tmp_path / "none"),)}, "no adapter found"),
        ({"adapter": (str(wide),)}, "does not fit"),
        ({"base": str(tmp_path)}, "not a base in diffusers layout"),
        ({"device": "cuda:9"}, "--device"),
        ({"device": "abacus"}, "--device abacus"),
        ({"offload": "model", "device": "cpu"}, "--offload model"),
        ({"xformers": True}, "--xformers"),
        ({"out": str(broken)}, "--out"),
    ]:
        with pytest.raises(UserError, match=named):
            run(options(adapter, condition, **{"out": str(tmp_path / "out"), **changes}))
    for changes, named in [
        ({"prompt": ("a", "b"), "image": ("1", "2", "3")}, "--prompt has 2 entries and --image 3"),
        ({"prompt": ()}, "neither --prompt nor --prompt_file is set"),
        ({"prompt_file": "x"}, "--prompt and --prompt_file are both set"),
        ({"image": ()}, "neither --image nor --photo is set"),
        ({"photo": ("x",)}, "--image and --photo are both set"),
        ({"condition": "canny"}, "--condition canny: only --photo needs it"),
        ({"prompt": ("caf\udce9",)}, "--prompt 'caf.*': is not UTF-8"),
        ({"negative": "caf\udce9"}, "--negative 'caf.*': is not UTF-8"),
        ({"condition_factor": 1.5}, "--condition_factor"),
        ({"steps": 0}, "--steps"),
        ({"num": 0}, "--num"),
        ({"seed": -1}, "--seed"),
    ]:
        with pytest.raises(UserError, match=named):
            options(adapter, condition, **changes)


# Files of prompts ---------------------------------------------------------------------------------------------------


def jobs(file: Path, **changes: Any) -> list[Job]:
    return make_jobs(GenerateOptions(adapter=("a",), prompt_file=str(file), **changes))


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred circle\r\n\r\n  blau, grün 你好 \n# 1\n".encode())
    assert jobs(file, image=("a.png",), num=2, seed=7) == [
        Job(prompt, (Picture("a.png"),), seed, row=row)
        for row, prompt in enumerate(("red circle", "blau, grün 你好", "# 1"))
        for seed in (7, 8)
    ]
    assert [job.pictures[0].file for job in jobs(file, photo=("a", "b", "c"))] == ["a", "b", "c"]
    assert all(job.pictures[0].is_photo for job in jobs(file, photo=("a",)))


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.CSV"])
def test_a_table_names_pictures_and_seeds(tmp_path: Path, name: str) -> None:
    rows = [
        {"prompt": 'a "red", round circle', "image": "maps/1.png", "seed": 5},
        {"prompt": "two\nlines", "photo": "/photos/2.jpg"},
        {"prompt": "blue"},
    ]
    file = tmp_path / name
    if name.endswith("jsonl"):
        file.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        file.write_text(
            'prompt,image,photo,seed\n"a ""red"", round circle",maps/1.png,,5\n"two\nlines",,/photos/2.jpg,\nblue,,,\n'
        )
    assert jobs(file, image=("rest.png",), seed=3) == [
        Job('a "red", round circle', (Picture(str(tmp_path / "maps" / "1.png")),), 5, row=0),
        Job("two\nlines", (Picture("/photos/2.jpg", is_photo=True),), 3, row=1),
        Job("blue", (Picture("rest.png"),), 3, row=2),
    ]
    with pytest.raises(UserError, match=r"prompts\..*, line \d: names no picture; add a column image or photo, or set"):
        jobs(file)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"a\nb\xe9\n", "line 2 is not UTF-8"),
        ("p.txt", "red".encode("utf-16"), "line 1 is not UTF-8"),
        ("p.txt", b"a\nb\n", "--prompt_file has 2 entries and --image 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt":', "line 2: not JSON"),
        ("p.jsonl", b'["a"]', "line 1: must be an object"),
        ("p.jsonl", b'{"prompt": "a", "sed": 1}', "unknown column 'sed'; allowed are prompt, image, photo, init_image"),
        ("p.jsonl", b'{"image": "a"}', "line 1: has no prompt"),
        ("p.jsonl", b'{"prompt": ["a"]}', "prompt is"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}', "seed is -1"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "seed is True"),
        ("p.jsonl", b'{"prompt": "a", "image": "b", "photo": "c"}', "sets both image and photo"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        ("p.csv", b"prompt,seed\na,1.5\n", "seed is '1.5'"),
        ("p.csv", b"prompt,seed\na, b,1\n", "line 2: has more cells than the header"),
        ("p.csv", b'prompt\n"a', "line 2: not CSV"),
        ("p.csv", b"text\na\n", "unknown column 'text'"),
        ("none.txt", None, "none.txt: cannot be read (No such file"),
    ],
)
def test_a_bad_file_of_prompts_is_one_line(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as fault:
        jobs(file, image=("1", "2", "3"))
    message = str(fault.value)
    assert expected in message
    assert "\n" not in message
    assert "--prompt_file" in message


def test_a_condition_kind_needs_a_photo_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,image\na,1.png\n")
    with pytest.raises(UserError, match="--condition canny: only --photo needs it"):
        jobs(file, condition=("canny",))


def test_pictures_of_a_file_of_prompts(adapter: Path, condition: Path, tmp_path: Path) -> None:
    """Each has its own seed and picture in its record, and the record needs the file no more."""
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "--red circle", "image": str(condition), "seed": 9}) + '\n{"prompt": "blue circle"}'
    )
    given = GenerateOptions(
        adapter=(str(adapter),),
        prompt_file=str(tmp_path / "p.jsonl"),
        image=(str(condition),),
        steps=1,
        out=str(tmp_path),
    )
    run(given)
    records = [json.loads((tmp_path / f"{index:05d}.json").read_text()) for index in range(2)]
    assert [record["options"]["seed"] for record in records] == [9, 0]
    assert [record["options"]["prompt"] for record in records] == [["--red circle"], ["blue circle"]]
    for record in records:
        again = parse_flags(GenerateOptions, shlex.split(record["command"])[2:], "t2i-adapter generate")
        assert again.prompt_file is None
        assert list(again.prompt) == record["options"]["prompt"]
        assert again.image == (str(condition),)


# Parameters in the PNG file -----------------------------------------------------------------------------------------


def read_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields, read as A1111 reads them: the last line holds "Name: value" between commas,
    quoted as JSON where needed; the negative prompt begins with its name."""
    *lines, last = text.split("\n")
    found = re.findall(r'([\w /-]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last)
    assert len(found) >= 3, "with fewer A1111 takes the line for a part of the prompt"
    fields = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    start = next((n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:start]), negative, fields


def png_parameters(file: Path) -> str:
    picture: Any = Image.open(file)
    return picture.text["parameters"]


def test_the_png_carries_its_parameters(adapter: Path, condition: Path, tmp_path: Path) -> None:
    prompt, negative = "red circle,\nsecond: line 你好 🙂", "blue, grün"
    changes = {"negative": negative, "seed": 5, "guidance": 4.5, "scale": 0.8, "out": str(tmp_path)}
    run(options(adapter, condition, prompt=(prompt,), **changes))
    text, record = png_parameters(tmp_path / "00000.png"), json.loads((tmp_path / "00000.json").read_text())
    fields = {
        "Steps": "1",
        "Sampler": "Euler a",
        "CFG scale": "4.5",
        "Seed": "5",
        "Size": "64x64",
        "Model": "tiny",
        "RNG": "CPU",
        "T2I-Adapter": adapter.name,
        "T2I-Adapter hash": record["adapter_sha256"][0][:10],
        "T2I-Adapter scale": "0.8",
        "T2I-Adapter end": "1.0",
        "T2I-Adapter picture": condition.name,
        "Version": f"sdxl-t2i-adapter {record['versions']['sdxl-t2i-adapter']}",
    }
    assert read_parameters(text) == (prompt, negative, fields)
    assert str(adapter.parent) not in text, "no folder's name"


@pytest.mark.parametrize(("prompt", "chunk"), [("a circle, grün", b"tEXtparameters\0"), ("圆", b"iTXtparameters\0")])
def test_the_text_chunk_is_of_the_kind_that_the_text_needs(
    adapter: Path, condition: Path, tmp_path: Path, prompt: str, chunk: bytes
) -> None:
    run(options(adapter, condition, prompt=(prompt,), out=str(tmp_path)))
    stored = (tmp_path / "00000.png").read_bytes()
    assert chunk in stored
    assert (prompt.encode() if chunk.startswith(b"iTXt") else prompt.encode("latin-1")) in stored


def test_a_value_with_a_comma_is_one_value(adapter: Path, condition: Path, tmp_path: Path) -> None:
    photo = tmp_path / 'a, "b": c.png'
    photo.write_bytes(condition.read_bytes())
    run(options(adapter, photo, image=(), photo=(str(photo),), condition="canny,low=50", out=str(tmp_path / "out")))
    _, negative, fields = read_parameters(png_parameters(tmp_path / "out" / "00000.png"))
    assert negative == ""
    assert fields["T2I-Adapter picture"] == photo.name
    assert fields["T2I-Adapter condition"].startswith("canny,low=50")
    assert fields["Size"] == "64x64"


def test_printed_paths_can_be_pasted(
    adapter: Path, condition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's mine"
    run(options(adapter, condition, out=str(out)))
    [line] = capsys.readouterr().out.splitlines()
    assert shlex.split(line) == [str(out / "00000.png")]


# Long prompts -------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_cut_off_costs_one_line_of_ours(
    adapter: Path, condition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    long, longer = "red circle " * 50, "blue circle " * 150
    run(options(adapter, condition, prompt=(long, "red", longer), negative=long, out=str(tmp_path)))
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokens" in line]
    assert lines == [
        "2 of 3 prompts are cut off; the longest has 300 tokens, of which 75 are read. What is cut off begins with "
        '"circle blue circle blue circle blue circle blue circle blue ". --max_tokens 225 reads more of it.',
        "The negative prompt has 100 tokens, of which 75 are read. What is cut off begins with "
        '"circle red circle red circle red circle red circle red circl". --max_tokens 150 reads all of it.',
    ]
    assert not [record for record in caplog.records if "token" in record.getMessage()]
    run(options(adapter, condition, prompt=(long,), max_tokens=150, out=str(tmp_path)))
    assert "tokens;" not in capsys.readouterr().err


def test_prompts_are_read_as_in_the_adapters_training(
    adapter: Path, condition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the record of the training, unless the option says otherwise; what was read stands in the picture's record."""
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    record = json.loads((trained / "t2i_adapter.json").read_text())
    (trained / "t2i_adapter.json").write_text(json.dumps({**record, "training": {"max_tokens": 150}}))
    long = "red circle " * 60

    def picture(folder: Path, **changes: Any) -> tuple[bytes, int]:
        out = tmp_path / f"{folder.name} {changes}"
        run(options(folder, condition, prompt=(long,), steps=2, out=str(out), **changes))
        return Image.open(out / "00000.png").tobytes(), json.loads((out / "00000.json").read_text())["options"][
            "max_tokens"
        ]

    by_record, limit = picture(trained)
    assert limit == 150
    assert (
        "prompts: up to 150 tokens are read, in chunks of 75, as in the adapter's training" in capsys.readouterr().out
    )
    assert picture(adapter, max_tokens=150) == (by_record, 150)
    assert "in chunks of 75\n" in capsys.readouterr().out
    plain, limit = picture(adapter)
    assert limit == 75
    assert "chunks" not in capsys.readouterr().out
    assert plain != by_record
    assert picture(trained, max_tokens=75) == (plain, 75)


# What the adapter's record recommends -------------------------------------------------------------------------------


def test_generate_takes_what_the_record_recommends(
    adapter: Path, condition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless an option is given. The picture's record has the values used, and needs the adapter's no more."""
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    file = trained / "t2i_adapter.json"
    plain_record = json.loads(file.read_text())
    point = {"scale": 0.5, "control_guidance": 2.0, "control_passes": 3, "scale_schedule": "200:1,800:1.5"}

    def picture(folder: Path, **changes: Any) -> tuple[bytes, dict[str, Any], dict[str, str]]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run(options(folder, condition, steps=2, out=str(out), **changes))
        record = json.loads((out / "00000.json").read_text())
        _, _, fields = read_parameters(png_parameters(out / "00000.png"))
        return Image.open(out / "00000.png").tobytes(), record, fields

    file.write_text(json.dumps({**plain_record, "sampling": point}))
    pixels, record, fields = picture(trained)
    assert {name: record["options"][name] for name in point} == {
        name: [value] if name in EACH else value for name, value in point.items()
    }
    assert {
        name: value for name, value in fields.items() if name.startswith("T2I-Adapter ") and "pict" not in name
    } == {
        "T2I-Adapter hash": record["adapter_sha256"][0][:10],
        "T2I-Adapter scale": "0.5",
        "T2I-Adapter end": "1.0",
        "T2I-Adapter guidance": "2.0",
        "T2I-Adapter passes": "3",
        "T2I-Adapter schedule": "200:1,800:1.5",
    }
    assert "scale 0.5, control_guidance 2.0, control_passes 3, scale_schedule 200:1,800:1.5" in capsys.readouterr().out
    assert picture(adapter, **point)[0] == pixels, "as if the options were given"
    plain, plain_options, _ = picture(adapter)
    assert plain != pixels
    assert picture(trained, defaults="plain")[0] == plain
    assert "recommends" not in capsys.readouterr().out
    # A picture that was generated without a recommendation is the same after the record has one.
    again = parse_flags(GenerateOptions, shlex.split(plain_options["command"])[2:], "t2i-adapter generate")
    run(replace(again, adapter=(str(trained),), out=str(tmp_path / "again")))
    assert Image.open(tmp_path / "again" / "00000.png").tobytes() == plain
