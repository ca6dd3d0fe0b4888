"""NaN or inf from an encoder is an error that names the picture or the caption, and nothing of it is cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.runs import train_words
from support.tiny import write_circles

from t2i_adapter.cache.context import PrepareContext
from t2i_adapter.cache.prepare import prepare
from t2i_adapter.cache.shards import Shards
from t2i_adapter.cli import main
from t2i_adapter.config.tree import BaseOptions, DataOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError
from t2i_adapter.models.open import open_base

Weights = dict[str, torch.Tensor]
ROWS = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_circles(tmp_path / "data", num=ROWS, size=80)


def spoil(base: Path, folder: Path, part: str, change: Callable[[Weights], Any]) -> Path:
    """A copy of a base with changed weights of one part."""
    shutil.copytree(base, folder)
    [file] = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def is_nan(name: str, value: float = float("nan")) -> Callable[[Weights], Any]:
    return lambda weights: weights[name].fill_(value)


VAE = "encoder.conv_in.weight"


def prepared(data: Path, base: Path, root: Path, **options: Any) -> Any:
    options = DataOptions(location=str(data), resolution=64, **options)
    context = PrepareContext(open_base(BaseOptions(name=str(base))), "cpu", torch.float32, root, progress=False)
    return prepare(open_source(options, 0), options, context, in_channels=3)


def count_records(root: Path, kind: str) -> int:
    return sum(len(Shards(folder)) for folder in root.glob(f"{kind}/*"))


def text_weight(base: Path) -> str:
    """The name of a weight that every caption needs; it depends on the version of transformers."""
    [file] = (base / "text_encoder_2").glob("*.safetensors")
    return next(name for name in load_file(file) if name.endswith("layers.0.mlp.fc1.weight"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_vae_is_named_with_the_first_picture(
    data: Path, tiny_base: Path, tmp_path: Path, value: float
) -> None:
    base = spoil(tiny_base, tmp_path / "base", "vae", is_nan(VAE, value))
    expected = r"train/00000\.png \(line 1\): the VAE returned NaN, inf .* name another with --base\.vae"
    with pytest.raises(UserError, match=expected):
        prepared(data, base, tmp_path / "root")
    assert count_records(tmp_path / "root", "images") == 0


def overflowing(base: Path, data: Path, folder: Path) -> tuple[Path, int]:
    """A base whose VAE exceeds 65504 for one picture only, and the number of that picture."""
    encoder = open_base(BaseOptions(name=str(base))).latent_encoder("cpu")
    files = [data / "train" / f"{number:05d}.png" for number in range(ROWS)]
    crops = [np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BICUBIC)) for file in files]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    peaks = encoder.encode(pixels)[:, :4].abs().amax(dim=(1, 2, 3))
    second, first = peaks.sort().values[-2:].tolist()
    factor = 65504 / ((first + second) / 2)

    def scale(weights: Weights) -> None:
        for name in ("quant_conv.weight", "quant_conv.bias"):
            weights[name][:4] *= factor

    return spoil(base, folder, "vae", scale), int(peaks.argmax())


def test_one_picture_of_a_batch_that_overflows_is_named(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """All six pictures are encoded in one batch."""
    base, number = overflowing(tiny_base, data, tmp_path / "base")
    with pytest.raises(UserError, match=rf"train/{number:05d}\.png \(line {number + 1}\): the VAE returned"):
        prepared(data, base, tmp_path / "root")
    assert count_records(tmp_path / "root", "images") == number, "the pictures before it are stored, itself is not"


def test_a_picture_that_overflows_can_be_skipped(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    base, number = overflowing(tiny_base, data, tmp_path / "base")
    listed = tmp_path / "bad.jsonl"
    options = DataOptions(location=str(data), resolution=64, on_bad_sample="skip", max_bad_share=0.2)
    context = PrepareContext(
        open_base(BaseOptions(name=str(base))), "cpu", torch.float32, tmp_path / "root", progress=False
    )
    dataset = prepare(open_source(options, 0), options, context, in_channels=3, bad_list=listed)
    assert [dataset.key(place) for place in range(len(dataset))] == [
        f"train/{n:05d}.png (line {n + 1})" for n in range(ROWS) if n != number
    ]
    assert count_records(tmp_path / "root", "images") == ROWS - 1
    [line] = listed.read_text().splitlines()
    assert "the VAE returned NaN" in json.loads(line)["reason"]
    with pytest.raises(UserError, match="1 of 6 rows cannot be used, .* the VAE returned"):
        prepared(data, spoil(tiny_base, tmp_path / "all", "vae", is_nan(VAE)), tmp_path / "root", on_bad_sample="skip")


def test_a_damaged_text_encoder_is_named_with_the_caption(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = spoil(tiny_base, tmp_path / "base", "text_encoder_2", is_nan(text_weight(tiny_base)))
    with pytest.raises(
        UserError, match="caption '': the text encoders returned NaN, inf .* --train.mixed_precision bf16"
    ):
        prepared(data, base, tmp_path / "root")
    assert count_records(tmp_path / "root", "texts") == 0


def test_one_caption_of_a_batch_is_named(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The embedding of one word is NaN."""
    lines = [json.loads(line) for line in (data / "train" / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = "a purple square" if number == 4 else f"a red circle {'on brown ' * number}"
    (data / "train" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tokenizer = open_base(BaseOptions(name=str(tiny_base))).tokenizers()[0]
    token = tokenizer("purple").input_ids[1]

    def change(weights: Weights) -> None:
        [name] = [name for name in weights if name.endswith("token_embedding.weight")]
        weights[name][token] = float("inf")

    base = spoil(tiny_base, tmp_path / "base", "text_encoder", change)
    with pytest.raises(UserError, match="caption 'a purple square': the text encoders returned NaN"):
        prepared(data, base, tmp_path / "root")


@pytest.mark.parametrize(
    ("part", "words", "expected"),
    [
        ("vae", ["--data.cache", "none"], "the VAE returned NaN, inf or numbers beyond 65504. Its weights are damaged"),
        (
            "text_encoder_2",
            ["--data.text_cache", "live"],
            "the text encoders returned NaN, inf or numbers beyond 65504",
        ),
    ],
)
def test_encoders_that_run_within_the_step_are_named_too(
    part: str,
    words: list[str],
    expected: str,
    data: Path,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The learning rate, which the advice on NaN in the loss names, is not at fault."""
    change = is_nan(VAE if part == "vae" else text_weight(tiny_base))
    base = spoil(tiny_base, tmp_path / "base", part, change)
    assert main([*train_words(base, data, tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and "--optim.lr" not in error
