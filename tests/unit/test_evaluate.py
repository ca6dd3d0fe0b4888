"""A whole evaluation on the tiny base: columns, files, escaping, and errors that name the cause."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.evaluate import evaluate
from t2i_adapter.evaluation.pairs import make_pair, read_pairs
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.flags import parse_flags
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.reports.sheet import WIDTH
from t2i_adapter.types import Sample
from t2i_adapter.verbs.evaluate import EvaluateOptions, open_dataset, run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, num=5, split="test", size=64)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    save_adapter(network, folder, metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False)
    return folder


def options(adapter: Path, data: Path, **changes: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"adapter": str(adapter), "data": str(data), "num": 4, "steps": 1, **changes})


def test_the_verb_writes_the_agreed_files(
    adapter: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options(adapter, shapes, out=str(tmp_path)))
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["num"] == 4
    assert set(content["metrics"]) == {"iou", "edge_f1", "object_color", "background_color", "clipped", "saturation"}
    for columns in content["metrics"].values():
        assert set(columns) == {"adapter", "other_condition", "no_adapter", "target"}
        for estimate in columns.values():
            low, high = estimate["ci95"]
            assert low <= estimate["mean"] <= high
    assert content["metrics"]["iou"]["target"]["mean"] > 0.9, "true pictures through the same measure"
    assert content["metrics"]["object_color"]["target"]["mean"] < 3
    assert content["metrics"]["background_color"]["target"]["mean"] < 3
    assert len(content["pairs"]) == 4
    assert all(pair["other_condition_key"] != pair["key"] for pair in content["pairs"])
    assert content["settings"]["base"]["name"] and len(content["settings"]["adapter_sha256"]) == 64
    assert content["settings"]["edge_tolerance_px"] == 1
    assert Image.open(tmp_path / "sheet.png").width == WIDTH
    assert "no adapter" in capsys.readouterr().out
    # The command on the page sets the same options.
    page = (tmp_path / "report.html").read_text()
    (shown,) = re.findall('<code id="command">(.*?)</code>', page)
    words = shlex.split(unescape(shown))
    assert words[:2] == ["t2i-adapter", "evaluate"]
    assert parse_flags(EvaluateOptions, words[2:], "t2i-adapter") == options(adapter, shapes, out=str(tmp_path))
    # A second run gives the same numbers.
    run(options(adapter, shapes, out=str(tmp_path / "again")))
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["metrics"] == content["metrics"]


def test_evaluate_takes_what_the_record_recommends_and_says_so(
    adapter: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    record = json.loads((trained / "t2i_adapter.json").read_text())
    (trained / "t2i_adapter.json").write_text(json.dumps({**record, "sampling": {"scale": 0.5}}))
    for defaults, scale in [("recommended", 0.5), ("plain", 1.0)]:
        run(options(trained, shapes, num=2, defaults=defaults, out=str(tmp_path / "out")))
        settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]
        assert (settings["scale"], settings["guidance"], settings["defaults"]) == (scale, 5.0, defaults)
        assert ("sampling: scale 0.5, as the adapter's record" in capsys.readouterr().out) is (scale == 0.5)


def test_no_adapter_is_the_base_alone_and_a_trained_one_could_win(adapter: Path, shapes: Path, tiny_base: Path) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    network = build_adapter(AdapterOptions(), base.unet_config)
    pipeline = base.pipeline(network, "cpu", torch.float32)
    pairs = read_pairs(open_dataset(options(adapter, shapes)), 64, channels=3)
    sampling = SamplingOptions(steps=1)
    everything = evaluate(pipeline, pairs, sampling=sampling)
    one_column = evaluate(pipeline, pairs, sampling=sampling, columns=("adapter",))
    assert set(one_column.pictures) == {"adapter"}
    assert one_column.values["iou"]["adapter"] == everything.values["iou"]["adapter"], (
        "columns do not influence each other"
    )
    for parameter in network.parameters():
        parameter.data.zero_()
    silent = evaluate(pipeline, pairs, sampling=sampling)
    for i in range(len(pairs)):
        without = np.asarray(everything.pictures["no_adapter"][i])
        assert np.array_equal(np.asarray(silent.pictures["adapter"][i]), without)
        assert np.array_equal(np.asarray(silent.pictures["other_condition"][i]), without)
        assert not np.array_equal(np.asarray(everything.pictures["adapter"][i]), without)


def test_pairs_without_a_scene_take_the_pictures_own_foreground(adapter: Path, tiny_data: Path) -> None:
    pairs = read_pairs(open_dataset(options(adapter, tiny_data)), 64, channels=1)
    assert {pair.truth_from for pair in pairs} == {"picture"}
    assert all(pair.truth.mask.any() and pair.truth.background is None for pair in pairs)
    assert {pair.condition.mode for pair in pairs} == {"L"}


def test_errors_name_the_cause(adapter: Path, shapes: Path, tiny_data: Path, tmp_path: Path) -> None:
    for changes, named in [
        ({"num": 9}, "--num 9.*5 pairs.*--num 5"),
        ({"split": "validation"}, "validation"),
        ({"caption_column": "words"}, "--data.caption_column words"),
        ({"resolution": 72}, "72.*64 or 80"),
    ]:
        with pytest.raises(UserError, match=named):
            run(options(adapter, shapes, out=str(tmp_path / "out"), **changes))
    with pytest.raises(UserError, match="--num 1: 2 or more"):
        options(adapter, shapes, num=1)
    (adapter / "t2i_adapter.json").rename(tmp_path / "kept")
    try:
        with pytest.raises(UserError, match="--base is needed"):
            run(options(adapter, shapes, out=str(tmp_path / "out")))
        base = json.loads((tmp_path / "kept").read_text())["base"]["name"]
        with pytest.raises(UserError, match="--resolution is needed"):
            run(options(adapter, shapes, out=str(tmp_path / "out"), base=base))
    finally:
        (tmp_path / "kept").rename(adapter / "t2i_adapter.json")
    grey = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match=r"row 7.*'scene'.*JSON"):
        make_pair(Sample("row 7", grey, grey, ("x",), "0", {"scene": "{"}), 64, 3)
    with pytest.raises(UserError, match=r"row 7.*condition"):
        make_pair(Sample("row 7", grey, None, ("x",), "0"), 64, 3)
