"""Mistakes of users: each prints one line that names the file, row, flag or column, exits with 2 and harms no file.

All commands run in this process, because a process of its own would spend seconds on imports.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.runs import train_words

from t2i_adapter import script as compat
from t2i_adapter.cli import main
from t2i_adapter.models.adapter import T2IAdapter

Rows = list[Any]
Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Runs a command that must end with a user error; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, script: bool = False) -> str:
        capsys.readouterr()
        assert (compat.main if script else main)([str(word) for word in words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Read only."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(train_words(tiny_base, tiny_data, out)) == 0
    return out


def spoilt_data(source: Path, folder: Path, spoil: Callable[[Path, Rows], Rows | None]) -> Path:
    """A copy of a dataset whose train/ folder and rows `spoil` has changed."""
    shutil.copytree(source, folder)
    table = folder / "train" / "metadata.jsonl"
    rows: Rows = [json.loads(line) for line in table.read_text().splitlines()]
    changed = spoil(folder / "train", rows)
    rows = rows if changed is None else changed
    table.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder


def sets(column: str, value: Any) -> Callable[[Path, Rows], None]:
    def spoil(_: Path, rows: Rows) -> None:
        rows[3][column] = value

    return spoil


def lacks(column: str) -> Callable[[Path, Rows], None]:
    def spoil(_: Path, rows: Rows) -> None:
        del rows[3][column]

    return spoil


def holds(name: str, content: bytes) -> Callable[[Path, Rows], None]:
    def spoil(folder: Path, _: Rows) -> None:
        (folder / name).write_bytes(content)

    return spoil


def removes(name: str) -> Callable[[Path, Rows], None]:
    def spoil(folder: Path, _: Rows) -> None:
        (folder / name).unlink()

    return spoil


def truncates(name: str) -> Callable[[Path, Rows], None]:
    def spoil(folder: Path, _: Rows) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:60])

    return spoil


def resizes(name: str, size: tuple[int, int]) -> Callable[[Path, Rows], None]:
    def spoil(folder: Path, _: Rows) -> None:
        Image.new("RGB", size).save(folder / name)

    return spoil


CONDITION = "conditioning_image_file_name"
SPOILT: dict[str, tuple[Callable[[Path, Rows], Rows | None], list[str]]] = {
    "null caption": (sets("text", None), ["metadata.jsonl, line 4, column text", "no caption"]),
    "missing caption": (lacks("text"), ["metadata.jsonl, line 4, column text", "no caption"]),
    "caption of another type": (sets("text", 3), ["line 4, column text", "int", "a string or a list of strings"]),
    "no caption in the list": (sets("text", []), ["line 4, column text", "empty list"]),
    "missing picture": (removes("00003.png"), ["line 4, column image", "00003.png: no such file"]),
    "missing condition": (removes("00003_outline.png"), ["line 4, column conditioning_image", "no such file"]),
    "null condition": (sets(CONDITION, None), ["line 4, column conditioning_image", "no picture"]),
    "no condition": (lacks(CONDITION), ["line 4, column conditioning_image", "no picture"]),
    "no picture at all": (holds("00003.png", b"hello"), ["00003.png", "not a picture"]),
    "empty picture": (holds("00003.png", b""), ["00003.png", "empty"]),
    "cut off condition": (truncates("00003_outline.png"), ["00003_outline.png", "truncated"]),
    "folder as a picture": (sets(CONDITION, "."), ["line 4, column conditioning_image", "is a folder"]),
    "another aspect": (
        resizes("00003_outline.png", (64, 32)),
        ["line 4", "00003.png", "64x32", "64x64", "another aspect"],
    ),
    "a line that is no JSON": (lambda _, rows: [*rows[:3], '{"file_name":', *rows[4:]], ["line 4", "not JSON"]),
    "a line that is no object": (lambda _, rows: [*rows[:3], "[1]", *rows[4:]], ["line 4", "object"]),
    "no rows": (lambda _, rows: [], ["metadata.jsonl", "no rows"]),
    "a path out of the folder": (sets(CONDITION, "../../../etc/passwd"), ["line 4", "leaves the data folder"]),
    "an absolute path": (sets("file_name", "/etc/passwd"), ["line 4", "leaves the data folder"]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_faulty_data(fails: Fails, tiny_base: Path, tiny_data: Path, tmp_path: Path, name: str) -> None:
    spoil, expected = SPOILT[name]
    data = spoilt_data(tiny_data, tmp_path / "data", spoil)
    line = fails(*train_words(tiny_base, data, "out"))
    assert all(words in line for words in expected), line
    assert not list(Path("out").glob("**/*.safetensors"))


MISTAKES = {
    "image column": (
        ["--data.image_column=picture"],
        ["--data.image_column picture", "image, conditioning_image, text"],
    ),
    "condition column": (["--data.conditioning_image_column=c"], ["--data.conditioning_image_column c", "there are"]),
    "caption column": (["--data.caption_column=caption"], ["--data.caption_column caption", "there are", "text"]),
    "split": (["--data.split=val"], ["split 'val'", "test, train"]),
    "data folder": (["--data=none"], ["--data", "none", "no such folder"]),
    "base": (["--base.name=/no/base"], ["--base.name /no/base", "nano"]),
    "VAE": (["--base.vae=/no/vae"], ["--base.vae /no/vae"]),
    "variant": (["--base.variant=fp8"], ["variant fp8"]),
    "adapter": (["--adapter.init_from=/no/adapter"], ["/no/adapter"]),
    "resolution": (["--data.resolution=136"], ["--data.resolution 136", "multiples of 16", "128 or 144"]),
    "checkpoint": (["--checkpoint.resume=/no/checkpoint"], ["--checkpoint.resume /no/checkpoint", "no such folder"]),
    "tracker": (["--tracking.report_to=wandbb"], ["--tracking.report_to wandbb", "tensorboard", "wandb"]),
    "validation picture": (
        ["--validation.prompts=a", "--validation.images=no.png"],
        ["--validation.images", "no.png: no such file"],
    ),
    "counts of prompts and pictures": (
        ["--validation.prompts", "a", "b", "c", "--validation.images", "x", "y"],
        ["--validation.prompts has 3 entries and --validation.images 2"],
    ),
    "prompts alone": (["--validation.prompts=a"], ["--validation.prompts is given without --validation.images"]),
    "token": (["--hub.push"], ["--hub.push"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_with_missing_or_wrong_names(fails: Fails, tiny_base: Path, tiny_data: Path, name: str) -> None:
    words, expected = MISTAKES[name]
    line = fails(*train_words(tiny_base, tiny_data, "out", *words))
    assert all(word in line for word in expected), line
    assert not list(Path().glob("out/**/*.safetensors"))


def test_the_script_names_its_own_flags(fails: Fails, tiny_base: Path, tiny_data: Path) -> None:
    named = [f"--pretrained_model_name_or_path={tiny_base}", f"--train_data_dir={tiny_data}", "--report_to=none"]
    line = fails(*named, "--resolution=136", script=True)
    assert line.startswith("--resolution 136:") and "128 or 144" in line
    assert "--caption_column c" in fails(*named, "--resolution=64", "--caption_column=c", script=True)
    assert fails(*named[1:], "--pretrained_model_name_or_path=/no/b", script=True).startswith("--pretrained_model_name")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_base_of_no_known_family(fails: Fails, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(tiny_base, tmp_path / "older"))
    edit_json(older / "unet" / "config.json", addition_embed_type=None)
    line = fails(*train_words(older, tiny_data, "out"))
    assert str(older) in line and "neither an SDXL base nor a base of Stable Diffusion 1 or 2" in line
    edit_json(older / "unet" / "config.json", addition_embed_type="text_time")
    shutil.rmtree(older / "text_encoder_2")
    line = fails(*train_words(older, tiny_data, "out"))
    assert str(older) in line and "text_encoder_2" in line
    (tmp_path / "x.safetensors").write_bytes(b"junk" * 50)
    assert "x.safetensors" in fails(*train_words(tmp_path / "x.safetensors", tiny_data, "out"))
    (tmp_path / "x.ckpt").write_bytes(b"junk")
    assert "x.ckpt" in fails(*train_words(tmp_path / "x.ckpt", tiny_data, "out"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channels": [32, 64, 128, 128]}, "does not fit the base"),
        ({"channels": [16, 32, 64], "adapter_type": "light_adapter"}, "does not fit the base"),
        ({"downscale_factor": 8, "adapter_type": "full_adapter"}, "does not fit the base"),
        ({"in_channels": 1}, "--adapter.in_channels 1"),
    ],
)
def test_an_adapter_that_does_not_fit(
    fails: Fails, tiny_base: Path, tiny_data: Path, changes: dict[str, Any], expected: str
) -> None:
    fitting = {"in_channels": 3, "channels": [16, 32, 64, 64], "num_res_blocks": 2, "downscale_factor": 16}
    T2IAdapter(**{**fitting, "adapter_type": "full_adapter_xl", **changes}).save_pretrained("other")
    assert expected in fails(*train_words(tiny_base, tiny_data, "out", "--adapter.init_from=other"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_folder_that_holds_a_run_is_not_harmed(fails: Fails, tiny_base: Path, tiny_data: Path, trained: Path) -> None:
    before = snapshot(trained)
    assert "--checkpoint.resume auto" in fails(*train_words(tiny_base, tiny_data, trained))
    fails(*train_words(tiny_base, tiny_data, trained, "--checkpoint.resume=latest", "--data.resolution=136"))
    fails(*train_words(tiny_base, tiny_data, trained, "--checkpoint.resume=latest", "--data.caption_column=c"))
    assert snapshot(trained) == before


def test_a_damaged_checkpoint_is_named(fails: Fails, tiny_base: Path, tiny_data: Path, trained: Path) -> None:
    copy = Path(shutil.copytree(trained, "copy"))
    (checkpoint,) = copy.glob("checkpoint-*")
    weights = checkpoint / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = fails(*train_words(tiny_base, tiny_data, copy, "--checkpoint.resume", checkpoint))
    assert "training.safetensors" in line and checkpoint.name in line
    (checkpoint / "state.json").write_text("{")
    assert "state.json" in fails(*train_words(tiny_base, tiny_data, copy, "--checkpoint.resume", checkpoint))


@pytest.fixture
def another_run() -> Iterator[Path]:
    """The output folder `busy`, locked by another process."""
    code = "import sys, time; from pathlib import Path; from t2i_adapter.runs.lock import lock\n"
    code += "held = lock(Path('busy')); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin and other.stdout and other.stdout.readline() == b"held\n"
    yield Path("busy")
    other.stdin.close()
    other.wait(30)


def test_a_folder_in_use(fails: Fails, another_run: Path, tiny_base: Path, tiny_data: Path) -> None:
    assert "busy is in use by another run" in fails(*train_words(tiny_base, tiny_data, another_run))


def test_folders_that_cannot_be_written(fails: Fails, tiny_base: Path, tiny_data: Path) -> None:
    Path("file").write_text("mine")
    for out in ("file", "file/below"):
        assert f"--output_dir {out}" in fails(*train_words(tiny_base, tiny_data, out))
    line = fails(*train_words(tiny_base, tiny_data, "out", "--data.prepared_dir=file"))
    assert "--data.prepared_dir" in line
    assert Path("file").read_text() == "mine"


def test_no_space(fails: Fails, tiny_base: Path, tiny_data: Path) -> None:
    """The disk has no room even for the options: the run ends before training with an error."""
    Path("out").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "out"], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk is a small tmpfs, which needs root: {mounted.stderr.strip()}")
    try:
        line = fails(*train_words(tiny_base, tiny_data, "out"))
        assert os.strerror(errno.ENOSPC) in line
        assert not list(Path("out").glob("**/*.safetensors"))
    finally:
        subprocess.run(["umount", "out"], check=True)


def test_fp16_without_a_gpu_warns_and_continues(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    words = train_words(tiny_base, tiny_data, tmp_path / "out", "--train.mixed_precision=fp16", "--dry_run")
    assert main(words) == 0
    assert capsys.readouterr().out.count("fp16 needs a GPU") == 1
    assert not (tmp_path / "out").exists()


def test_generate_evaluate_and_push(fails: Fails, tiny_base: Path, tiny_data: Path, trained: Path) -> None:
    Path("junk.png").write_text("x")
    picture = tiny_data / "train" / "00000_outline.png"
    generate = ["generate", "--adapter", trained, "--prompt", "a", "--steps=1", "--image"]
    for words, expected in (
        ([*generate, "none.png"], "none.png: no such file"),
        ([*generate, "junk.png"], "junk.png: not a picture"),
        ([*generate, picture, picture, "--prompt", "a", "b", "c"], "--prompt has 3 entries and --image 2"),
        ([*generate, picture, "--width=136"], "--width 136"),
        ([*generate, picture, "--base=/no/base"], "--base /no/base"),
        ([*generate, picture, "--device=cuda:77"], "--device cuda:77"),
        ([*generate, picture, "--out=junk.png"], "--out junk.png"),
        ([*generate, picture, "--adapter=none"], "none"),
        (["evaluate", "--adapter", trained, "--data", tiny_data, "--num=64"], "4 pairs in its split test; use --num 4"),
        (["evaluate", "--adapter", trained, "--data", tiny_data, "--num=3", "--split=val"], "no split 'val'"),
        (["evaluate", "--adapter", trained, "--data", "none", "--num=3"], "none"),
        (
            ["evaluate", "--adapter", trained, "--data", tiny_data, "--num=3", "--caption_column=c"],
            "--caption_column c",
        ),
        (["push", "--folder", "none"], "none: no such folder"),
    ):
        assert expected in fails(*words)
    assert not list(Path().glob("pictures/*"))
