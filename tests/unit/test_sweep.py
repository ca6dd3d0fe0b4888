"""A sweep on the tiny base: its files, what it recommends, and the record that it writes; and errors of its options."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.data.shapes import write_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.evaluation.halving import Comparison, Search
from t2i_adapter.evaluation.sweep import Schedule, Sweep, make_goal
from t2i_adapter.evaluation.sweep_options import SweepOptions, make_points, point_values
from t2i_adapter.evaluation.sweep_values import ValueFile
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import write_card
from t2i_adapter.flags import parse_flags
from t2i_adapter.generation.options import RequestedSampling, SamplingOptions
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import describe_measurement, read_metadata, write_sampling
from t2i_adapter.statistics import Interval
from t2i_adapter.verbs.evaluate import EvaluateOptions, run
from t2i_adapter.verbs.sweep import write_record

DEFAULT = SamplingOptions(guidance=5.0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, num=6, split="test", size=64)
    return folder


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    folder = tmp_path / "adapter"
    save_adapter(network, folder, metadata={"base": {"name": str(tiny_base)}, "resolution": 64}, fp16=False)
    return folder


def options(adapter: Path, data: Path, **changes: Any) -> EvaluateOptions:
    small: dict[str, Any] = {
        "sweep_scale": (1.0, 0.0),
        "sweep_guidance": (3.0,),
        "sweep_control_guidance": (1.0,),
        "sweep_condition_factor": (1.0,),
    }
    common: dict[str, Any] = {"adapter": (str(adapter),), "data": str(data), "num": 3, "steps": 2, "guidance": 3.0}
    return EvaluateOptions(**{**common, **small, "sweep": True, **changes})


class Tags(HTMLParser):
    """Counts opening and closing tags; SVG shapes close themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_sweep_writes_its_files_and_keeps_the_default_if_nothing_is_confirmed(
    adapter: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (adapter / "t2i_adapter.json").read_bytes()
    asked = options(adapter, shapes, out=str(tmp_path / "out"))
    run(asked)
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["metric"] == "iou"
    assert set(content["margins"]) == {"object_color", "background_color", "saturation", "clipped"}
    assert [(point["scale"], point["pairs"]) for point in content["points"]] == [(1.0, 3), (0.0, 3)]
    assert content["rungs"] == [{"pairs": 3, "points": 2}]
    assert content["points"][0]["against_default"]["gain"]["mean"] == 0
    assert len(content["bands"]) == 8
    extra = len(content["confirmation"]) + bool(content["schedule"]["scale_schedule"])
    assert content["pictures"] == 2 * 3 + (1 + extra) * 3
    assert content["recommended"]["is_default"], "an adapter of random weights does not control"
    rows = [json.loads(line) for line in (tmp_path / "out" / "sweep-values.jsonl").read_text().splitlines()[1:]]
    parts = [row["key"].rpartition(" ")[2] for row in rows]
    assert parts == ["0-3"] * 2 + ["3-6"] * (1 + extra), "two points on choosing pairs, then the others on fresh pairs"
    shown = capsys.readouterr().out
    assert "2 points on 3 pairs" in shown and "minutes" in shown and "3 fresh pairs" in shown
    assert (adapter / "t2i_adapter.json").read_bytes() == before
    # The command on the page sets the same options, and the page is well formed and loads nothing.
    page = (tmp_path / "out" / "sweep.html").read_text()
    (command,) = re.findall('<code id="command">(.*?)</code>', page)
    words = shlex.split(unescape(command))
    assert parse_flags(EvaluateOptions, words[2:], "t2i-adapter") == asked
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "http" not in re.sub(r"<code>.*?</code>", "", page).replace("http-equiv", "")
    assert " style=" not in page


def test_measurements_of_an_earlier_call_are_taken(
    adapter: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"num": 2, "sweep_bands": False, "out": str(tmp_path), "write": False}
    run(options(adapter, shapes, **few))
    first = json.loads((tmp_path / "sweep.json").read_text())
    lines = (tmp_path / "sweep-values.jsonl").read_text().splitlines()
    # A process that was killed while it wrote the last line.
    (tmp_path / "sweep-values.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20]]) + "\n")
    capsys.readouterr()
    run(options(adapter, shapes, **few, sweep_scale=(1.0, 0.0, 0.5)))
    assert "has measurements of these settings" in capsys.readouterr().out
    again = json.loads((tmp_path / "sweep.json").read_text())
    assert again["points"][:2] == first["points"]
    stored = (tmp_path / "sweep-values.jsonl").read_text().splitlines()
    assert stored[: len(lines) - 1] == lines[:-1] and len(stored) > len(lines)
    run(options(adapter, shapes, **few, overwrite=True))
    assert "has measurements" not in capsys.readouterr().out
    run(options(adapter, shapes, **few, seed=1))
    other = (tmp_path / "sweep-values.jsonl").read_text().splitlines()
    assert other[0] != lines[0], "another seed has other pairs and noise"


def test_a_damaged_value_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "values.jsonl"
    path.write_text('[1]\n{"settings": "a"\n')
    values = ValueFile(path, "a")
    assert values.count == 0
    values.put("point", {"iou": [0.5, None]})
    assert ValueFile(path, "a").get("point") == {"iou": [0.5, None]}
    assert ValueFile(path, "b").count == 0


def test_the_choosing_and_the_fresh_pairs_are_different_ones(adapter: Path, shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num 4 needs 8 pairs.*6 pairs.*--num 3 or less"):
        run(options(adapter, shapes, num=4, out=str(tmp_path)))


def result(*, gain: float, schedule: str | None = None) -> Sweep:
    """A sweep of two points whose second one has this gain on fresh pairs, within `gain` +- 0.01."""
    goal = make_goal(["iou", "object_color"])
    rows = {n: {"iou": [0.5 + n * gain] * 4, "object_color": [2.0] * 4} for n in (0, 1)}
    search = Search(goal, 0, {n: {k: list(v) for k, v in row.items()} for n, row in rows.items()}, [(4, [0, 1])])
    compared = Comparison(Interval(gain, gain - 0.01, gain + 0.01), {"object_color": Interval(0, -0.5, 0.5)}, 4)
    kept = Schedule([], schedule, compared, rows[1]) if schedule else None
    points = make_points(SweepOptions(sweep_scale=(1.25,), sweep_guidance=(5.0,)), DEFAULT)
    recommended = int(compared.is_confirmed)
    return Sweep(points, search, [1], [compared], recommended, rows, {}, kept, [], [], [], 16, 1.0)


def test_a_confirmed_point_is_written_and_used_by_default(adapter: Path) -> None:
    record = read_metadata(adapter)
    assert record is not None
    write_card(adapter, metadata=record, repo_id="me/my-adapter")
    found = result(gain=0.05)
    assert "Recommended: scale 1.25" in found.answer() and "+0.050" in found.answer()
    assert "by default" in write_record(found, str(adapter), "abc", is_wanted=True)
    record = read_metadata(adapter)
    assert record is not None and record.sampling["scale"] == 1.25
    assert record.sampling["from"]["default"] == 0.5 and record.sampling["from"]["pairs"] == 4
    assert RequestedSampling().settle(record.sampling) == found.points[1]
    assert RequestedSampling(scale=0.7).settle(record.sampling).scale == 0.7
    assert RequestedSampling(defaults="plain").settle(record.sampling) == DEFAULT
    sentence = "On 4 held-out pairs that took no part in the choice, iou is 0.550 with these values and 0.500 with"
    assert record.sampling["from"]["default_point"]["scale"] == 1.0
    assert sentence in (describe_measurement(record.sampling) or "")
    card = (adapter / "README.md").read_text()
    assert "scale 1.25" in card.replace("\\", "") and sentence in card.replace("\\", "")


def test_a_confirmed_schedule_is_part_of_the_point(adapter: Path) -> None:
    found = result(gain=0.05, schedule="187:0.8,937:1.1")
    write_record(found, str(adapter), "abc", is_wanted=True)
    record = read_metadata(adapter)
    assert record is not None
    assert RequestedSampling().settle(record.sampling).scale_schedule == "187:0.8,937:1.1"


def test_the_record_is_unchanged_if_nothing_is_confirmed_or_nothing_may_be_written(
    adapter: Path, tmp_path: Path
) -> None:
    write_sampling(adapter, {"scale": 0.9})
    before = (adapter / "t2i_adapter.json").read_bytes()
    unconfirmed = result(gain=0.005)
    assert unconfirmed.is_default and "the default stays" in unconfirmed.answer()
    assert "unchanged" in write_record(unconfirmed, str(adapter), "abc", is_wanted=True)
    assert "--no_write" in write_record(result(gain=0.05), str(adapter), "abc", is_wanted=False)
    assert (adapter / "t2i_adapter.json").read_bytes() == before
    assert "no local folder" in write_record(result(gain=0.05), "someone/adapter", "abc", is_wanted=True)
    (tmp_path / "bare").mkdir()
    assert "has no t2i_adapter.json" in write_record(result(gain=0.05), str(tmp_path / "bare"), "abc", is_wanted=True)


@pytest.mark.parametrize("sampling", [{}, {"scale": 1.5}, {"from": "a sweep"}, {"from": {"metric": "iou", "pairs": 4}}])
def test_a_record_without_a_whole_measurement_has_no_sentence(sampling: dict[str, Any]) -> None:
    assert describe_measurement(sampling) is None


def test_the_grid_has_the_default_first_and_no_point_twice() -> None:
    points = make_points(SweepOptions(), DEFAULT)
    assert points[0] == DEFAULT and len(points) == len({str(point) for point in points}) == 4 * 2 * 3 * 2
    assert {point.guidance for point in points} == {5.0, 3.0}
    assert all(replace(point, scale_schedule="none") == point for point in points)
    # A control guidance above the guidance has no meaning in two passes: such points are skipped.
    few = make_points(SweepOptions(), SamplingOptions(guidance=2.0))
    assert {(p.guidance, p.control_guidance) for p in few} == {(2.0, 1.0), (2.0, 1.5), (2.0, 2.0), (1.2, 1.0)}
    assert set(point_values(points[0])) == {
        *("scale", "guidance", "control_guidance", "control_passes", "condition_factor", "scale_schedule")
    }


def test_errors_name_the_option(adapter: Path, shapes: Path, tmp_path: Path) -> None:
    single: dict[str, Any] = {"sweep_scale": (1.0,)}
    for changes, named in [
        (single, "--sweep_scale has no point but the default"),
        ({"sweep_metric": "sharpness"}, "--sweep_metric sharpness: allowed are .*iou, edge_f1"),
        ({"sweep_metric": "saturation"}, "--sweep_metric saturation"),
    ]:
        with pytest.raises(UserError, match=named):
            run(options(adapter, shapes, out=str(tmp_path / "out"), **changes))
    for changes, named in [
        ({"sweep_scale": (-1.0,)}, "--sweep_scale -1.0: allowed is 0 or more"),
        ({"sweep_scale": ()}, "--sweep_scale no value"),
        ({"sweep_condition_factor": (1.5,)}, "--sweep_condition_factor 1.5"),
    ]:
        with pytest.raises(UserError, match=named):
            options(adapter, shapes, **changes)
