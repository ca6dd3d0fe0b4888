"""A whole evaluation on the tiny base: columns, files, escaping, and errors that name the cause."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.push_hub import card_faults
from support.tiny import write_adapter

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.evaluate import evaluate
from t2i_adapter.evaluation.headline import typical_pairs
from t2i_adapter.evaluation.metrics import bootstrap
from t2i_adapter.evaluation.pairs import make_pair, read_pairs
from t2i_adapter.evaluation.processes import find_processes
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.release import make_release
from t2i_adapter.flags import command_line, parse_flags
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
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_base)


@pytest.fixture(scope="module")
def another(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the same training."""
    return write_adapter(tmp_path_factory.mktemp("another"), tiny_base, seed=1)


def generated(out: Path) -> dict[str, bytes]:
    """The generated pictures and the conditions of an evaluation: their files' content by their names."""
    files = sorted(file for file in (out / "pictures").glob("*/*.png") if file.parent.name != "target")
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def options(adapter: Path, data: Path, /, **changes: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"adapter": (str(adapter),), "data": str(data), "num": 4, "steps": 1, **changes})


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
        run(options(trained, shapes, num=2, defaults=defaults, out=str(tmp_path / "out"), overwrite=True))
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


def test_several_pictures_of_a_pair_count_as_their_mean(adapter: Path, shapes: Path, tiny_base: Path) -> None:
    base = open_base(BaseOptions(name=str(tiny_base)))
    pipeline = base.pipeline(build_adapter(AdapterOptions(), base.unet_config), "cpu", torch.float32)
    pairs = read_pairs(open_dataset(options(adapter, shapes)), 64, channels=3)
    one = evaluate(pipeline, pairs, sampling=SamplingOptions(steps=1))
    three = evaluate(pipeline, pairs, sampling=SamplingOptions(steps=1), pictures=3)
    assert one.repeats == 1 and three.repeats == 3
    for metric, columns in three.singles.items():
        for column, rows in columns.items():
            assert {len(row) for row in rows} == {1 if column == "target" else 3}
            assert [row[0] for row in rows] == one.values[metric][column], "the first picture does not depend on K"
            means = [np.mean([v for v in row if v is not None]) for row in rows]
            assert three.values[metric][column] == pytest.approx(means)
    assert any(len(set(row)) > 1 for row in three.singles["background_color"]["adapter"]), "other noise"
    content = three.to_json()
    assert content["pictures"] == 3 and "pictures" not in one.to_json()
    for index, pair in enumerate(content["pairs"]):
        assert pair["pictures"]["iou"]["adapter"] == three.singles["iou"]["adapter"][index]
        assert len(set(pair["seeds"])) == 3 and pair["seeds"][0] == pair["seed"] == one.seeds[index]
    # The interval is over pairs: that of the pairs' means.
    means = [value for value in three.values["iou"]["adapter"] if value is not None]
    assert len(means) == len(three.pairs) and three.estimates["iou"]["adapter"] == bootstrap(means, 0)


def test_a_second_call_takes_the_pictures_that_are_there(
    adapter: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(**changes: Any) -> str:
        run(options(adapter, shapes, out=str(tmp_path), batch_size=2, **changes))
        return capsys.readouterr().err

    assert "already" not in call()
    whole = generated(tmp_path)
    assert len(whole) == 4 + 3 * 4
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    # An interruption leaves some pictures; a file that is damaged counts as missing.
    gone = "pictures/adapter/00000-0.png", "pictures/no_adapter/00003-0.png"
    (tmp_path / gone[0]).unlink()
    (tmp_path / gone[1]).write_bytes(whole[gone[1]][:-20])
    assert "8 of 12 pictures are there already" in call()
    assert generated(tmp_path) == whole, "a picture is the same bits in an interrupted evaluation"
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in whole if name not in gone}
    assert kept == {name: time for name, time in times.items() if name not in gone}, "they are not written again"
    assert "12 of 12" in call(judge="canny"), "a judge looks at the pictures that are there"
    assert "12 of 24" in call(pictures=2)
    more = generated(tmp_path)
    assert len(more) == 4 + 3 * 8 and all(more[name] == whole[name] for name in whole)


def test_the_card_takes_the_typical_pairs_of_an_evaluation(adapter: Path, shapes: Path, tmp_path: Path) -> None:
    """With their targets, which `evaluate` writes for it; an evaluation of other pairs leaves none behind."""
    stale = tmp_path / "pictures" / "target" / "00009.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    [found] = run(options(adapter, shapes, out=str(tmp_path)))
    release = make_release(adapter, "me/x", evaluation=tmp_path)  # checks that these weights were measured
    files = {file.name: file.content for file in release.files}
    assert {f"images/pair_{n:02d}_{name}.png" for n in range(4) for name in ("condition", "adapter", "target")} < set(
        files
    )
    best, _ = typical_pairs(found)[0]
    content = files["images/pair_00_target.png"]
    assert isinstance(content, bytes)
    assert Image.open(io.BytesIO(content)).tobytes() == found.pairs[best].target.tobytes()
    assert not stale.exists()
    card = files["README.md"]
    assert isinstance(card, bytes) and card_faults(card.decode()) == []


def test_a_folder_with_pictures_of_other_settings_is_refused(
    adapter: Path, another: Path, shapes: Path, tmp_path: Path
) -> None:
    run(options(adapter, shapes, out=str(tmp_path)))
    whole = generated(tmp_path)
    for changes, named in [
        ({"num": 3}, "--num 4, now 3"),
        ({"seed": 1}, "--seed 0, now 1"),
        ({"condition": "canny"}, "--condition null, now canny"),
        ({"guidance": 2.0}, "settings: --guidance 5.0, now 2.0. Name"),
        ({"adapter": (str(another),)}, "adapter_sha256 "),
    ]:
        with pytest.raises(UserError, match=f"{re.escape(named)}.*--out.*--overwrite") as refused:
            run(options(adapter, shapes, out=str(tmp_path), **changes))
        assert refused.value.kind == "other_settings"
    assert generated(tmp_path) == whole
    # A change of the dataset is seen although its place is the same.
    changed = tmp_path / "changed"
    shutil.copytree(shapes, changed)
    run(options(adapter, changed, out=str(tmp_path), guidance=2.0, num=3, overwrite=True))
    assert set(generated(tmp_path)) < set(whole) and generated(tmp_path) != whole
    for picture in (changed / "test").glob("*.png"):
        Image.open(picture).rotate(90).save(picture)
    with pytest.raises(UserError, match="pairs_sha256 [0-9a-f]+[.]{3}, now"):
        run(options(adapter, changed, out=str(tmp_path), guidance=2.0, num=3))


def test_several_adapters_are_compared_on_the_same_pairs_and_noise(
    adapter: Path, another: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = adapter.parent / "x", adapter.parent / "y"
    for source, target in zip((adapter, another), both, strict=True):
        shutil.copytree(source, target, dirs_exist_ok=True)
    first, second = run(options(adapter, shapes, adapter=tuple(map(str, both)), out=str(tmp_path), pictures=2))
    printed = capsys.readouterr().out
    assert "Ranking by iou" in printed and "needs" in printed
    (alone,) = run(options(both[1], shapes, out=str(tmp_path / "alone"), pictures=2))
    assert alone.values == second.values != first.values, "as if the adapter were measured alone"
    content = json.loads((tmp_path / "adapter-y" / "evaluation.json").read_text())
    expected = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert all(content[key] == expected[key] for key in ("num", "metrics", "pairs", "differences"))
    assert content["settings"]["adapter_sha256"] == expected["settings"]["adapter_sha256"]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    columns = {f"{kind}-{name}" for kind in ("adapter", "other_condition") for name in "xy"}
    assert set(content["metrics"]["iou"]) == {*columns, "no_adapter", "target"}
    assert content["adapters"]["y"] == {
        "adapter": str(both[1]),
        "columns": {"adapter": "adapter-y", "other_condition": "other_condition-y"},
    }
    ranking = content["comparison"]["ranking"]
    assert {row["name"] for row in ranking} == {"x", "y"} and ranking[0]["difference_to_first"] is None
    worse, better = ranking[1]["name"], ranking[0]["name"]
    means = {name: content["metrics"]["iou"][f"adapter-{name}"]["mean"] for name in "xy"}
    assert ranking[1]["difference_to_first"]["mean"] == pytest.approx(means[worse] - means[better])
    assert len(list((tmp_path / "pictures" / "no_adapter").glob("*.png"))) == 8, "generated once"
    page = (tmp_path / "report.html").read_text()
    assert page.count('data-column="adapter-x"') == page.count('data-column="adapter-y"') == 4
    assert {'href="adapter-x/report.html"', 'href="adapter-y/report.html"'} <= set(re.findall('href="[^"]*"', page))


def test_adapters_may_stand_without_their_flag() -> None:
    def adapters(words: str) -> tuple[str, ...]:
        return parse_flags(EvaluateOptions, [*words.split(), "--num", "4"], "t2i-adapter").adapter

    assert adapters("a b --data d") == adapters("--data d a b") == adapters("--adapter a b --data d") == ("a", "b")
    assert adapters("a --adapter b --data d") == ("a", "b")
    with pytest.raises(UserError, match="--adapter: required"):
        adapters("--data d")


def test_adapters_of_different_conditions_are_not_compared(
    adapter: Path, another: Path, shapes: Path, tmp_path: Path
) -> None:
    record = json.loads((another / "t2i_adapter.json").read_text())
    canny = {"name": "canny", "options": {"low": 100, "high": 200}, "version": 1, "channels": 3}
    for changes, named in [
        ({"condition": canny}, "the condition column, and canny.*--condition"),
        ({"resolution": 128}, "64 and 128 pixels.*--resolution"),
        ({"base": {"name": "nano"}}, "other bases.*nano.*--base"),
        ({"training": {"max_tokens": 150}}, "75 and 150 tokens.*--max_tokens"),
    ]:
        other = tmp_path / "other"
        shutil.copytree(another, other, dirs_exist_ok=True)
        (other / "t2i_adapter.json").write_text(json.dumps(record | changes))
        if changes.get("base"):
            network = build_adapter(AdapterOptions(), open_base(BaseOptions(name="nano")).unet_config)
            save_adapter(network, other, metadata=record | changes, fp16=False)
        with pytest.raises(
            UserError, match=f"--adapter {re.escape(str(adapter))} and {re.escape(str(other))}.*{named}"
        ):
            run(options(adapter, shapes, adapter=(str(adapter), str(other)), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="given twice"):
        run(options(adapter, shapes, adapter=(str(adapter), str(adapter)), out=str(tmp_path / "out")))


def test_two_processes_make_the_same_pictures_as_one(
    adapter: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = options(adapter, shapes, out=str(tmp_path / "two"), batch_size=1)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "t2i_adapter", *shlex.split(command_line("evaluate", shared))[1:]]
    ranks = os.environ | environment | {"RANK": "1", "LOCAL_RANK": "1"}
    with subprocess.Popen(command, env=ranks, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        for name, value in (environment | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            (together,) = run(shared)
            said = other.communicate(timeout=120)
            for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
                monkeypatch.delenv(name)
            (alone,) = run(options(adapter, shapes, out=str(tmp_path / "one"), batch_size=1))
        finally:
            torch.set_num_threads(threads)
    assert other.returncode == 0 and said[0] == "", said
    assert generated(tmp_path / "two") == generated(tmp_path / "one")
    assert together.values == alone.values


def test_a_process_whose_partner_dies_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    code = "from t2i_adapter.evaluation.processes import Processes; import os; Processes(1, 2).meet(); os._exit(1)"
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (ranks | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | ranks | {"RANK": "1"}):
        processes = find_processes()
        try:
            processes.meet()
            with pytest.raises(UserError, match="process 0 of 2 stops because another process has ended"):
                processes.meet()
        finally:
            processes.leave()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]
