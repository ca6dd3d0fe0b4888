"""Every file and folder that a command writes has the permissions that the user's umask leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import train_words

from t2i_adapter.cli import main


@pytest.fixture(params=[0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The strictest and the laxest usual one: a fixed permission differs from one of them at least."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Permissions of everything below a folder, by its name."""
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*")}


def test_what_train_generate_annotate_and_make_data_write(tiny_base: Path, tmp_path: Path, umask: int):
    data, run, cache = tmp_path / "made", tmp_path / "run", tmp_path / "cache"
    assert main(["make-data", "shapes", "--out", str(data), "--num=4", "--num_test=1", "--size=64"]) == 0
    picture = str(data / "test" / "00000_cond.png")
    validation = ["--validation.prompts=circle", f"--validation.images={picture}", "--validation.num_images=1"]
    more = [*validation, "--validation.steps=1", f"--data.prepared_dir={cache}", "--tracking.report_to=tensorboard"]
    assert main(train_words(tiny_base, data, run, *more, "--checkpoint.every=1", "--train.profile")) == 0
    words = ["--adapter", str(run), "--prompt", "circle", "--image", picture, "--steps", "1"]
    assert main(["generate", *words, "--out", str(tmp_path / "pictures")]) == 0
    assert main(["annotate", "canny", "--data", str(data), "--out", str(tmp_path / "maps"), "--workers=0"]) == 0
    found = modes(tmp_path)
    for name in ("made", "run/diffusion_pytorch_model.safetensors", "run/checkpoint-1/training.safetensors"):
        assert name in found
    assert any(name.endswith(".shard") for name in found)
    wanted = {True: oct(0o777 & ~umask), False: oct(0o666 & ~umask)}
    wrong = {name: mode for name, mode in found.items() if mode != wanted[(tmp_path / name).is_dir()]}
    assert not wrong
