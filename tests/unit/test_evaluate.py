"""A whole evaluation on the tiny base: columns, files, escaping, and errors that name the cause."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.evaluate import Evaluation, evaluate
from t2i_adapter.evaluation.metrics import Truth, bootstrap
from t2i_adapter.evaluation.pairs import Pair, make_pair, read_pairs
from t2i_adapter.evaluation.report import make_report
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.generation.options import SamplingOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.reports.sheet import SheetRow, make_sheet
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
    assert set(content["metrics"]) == {"iou", "edge_f1", "object_color", "background_color"}
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
    assert Image.open(tmp_path / "sheet.png").width > 4 * 64
    assert "no adapter" in capsys.readouterr().out
    # A second run gives the same numbers.
    run(options(adapter, shapes, out=str(tmp_path / "again")))
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["metrics"] == content["metrics"]


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


def small_evaluation(prompt: str) -> Evaluation:
    picture = Image.new("RGB", (40, 40), "blue")
    pair = Pair("row 0", prompt, picture, picture, Truth(np.ones((40, 40), bool)), "picture")
    values: dict[str, list[float | None]] = {column: [0.5, 0.5] for column in ("adapter", "target")}
    estimates = {column: bootstrap([0.5, 0.5], 0) for column in values}
    return Evaluation([pair, pair], [1, 2], [1, 0], {"adapter": [picture] * 2}, {"iou": values}, {"iou": estimates})


def test_the_report_escapes_and_needs_nothing_else() -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(1)">&amp;'
    page = make_report(small_evaluation(hostile), {"adapter": hostile, hostile: 1})
    assert "<script" not in page
    assert "onerror=&quot;" in page and 'onerror="' not in page
    assert "&lt;script&gt;" in page and "&amp;amp;" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in page
    assert "0.500 <small>[0.500, 0.500]</small>" in page


def test_the_size_of_a_sheet_and_the_places_of_its_pictures() -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 200)
    rows = [SheetRow([red, blue], "a caption that is much too long for two small pictures " * 3)] * 5
    sheet = make_sheet(["one", "two"], rows, blocks=2)
    assert sheet.size == (2 * (2 * 38 + 12) + 6, 16 + 12 + 3 * (32 + 16 + 6))
    assert sheet.getpixel((12 + 5, 28 + 5)) == (255, 0, 0)
    assert sheet.getpixel((12 + 38 + 5, 28 + 5)) == (200, 200, 200)
    big = make_sheet(["one"], [SheetRow([Image.new("RGB", (1024, 512))], "x")])
    assert big.height == 16 + 12 + 128 + 16 + 6, "large pictures are scaled down"
