"""Every page in the browser: axe in both themes, narrow and wide windows, the keyboard, a link that only shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.browser import Server, Window, audit, overflow
from support.studio_root import write_root

from t2i_adapter.runs.lock import lock
from t2i_adapter.studio.places import Places

PAGES = {
    "runs": "/",
    "data": "/data",
    "dataset": "/data/{circles}",
    "new": "/new",
    "run": "/runs/{learned}",
    "running": "/runs/{running}",
    "failed": "/runs/{failed}",
    "killed": "/runs/{killed}",
    "compare": "/compare?runs={learned},{killed}",
    "compare-none": "/compare",
    "try": "/try/{learned}",
    "release": "/release/{learned}",
    "unknown-run": "/runs/nothing-00000000",
    "unknown-job": "/jobs/20260101-000000-000000",
    "unknown-page": "/nothing",
}
MISSING_PAGES = ("unknown-run",)
"""Pages whose request is answered by 404, which the browser's console reports."""
SETTLED = {"dataset": ".tile img", "run": ".chart canvas", "running": ".chart canvas", "killed": ".chart canvas"}
SETTLED |= {"new": "[data-option]", "compare": ".chart canvas", "try": "canvas", "release": "text=Publish on the hub"}
SETTLED |= {"unknown-run": "[role=alert]", "unknown-job": "[role=alert]", "unknown-page": "[role=alert]"}
"""What a page shows when it has everything."""
FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex='0']"


class Site:
    """The server of the module, and windows of it that are opened once."""

    def __init__(self, root: Path, browser: Browser) -> None:
        self.server, self._browser = Server(root), browser
        self.server.start()
        places = Places(root, "runs")
        self.ids = {folder.name: run for run, folder in places.run_folders().items()}
        self._windows: dict[tuple[str, str], Window] = {}

    def window(self, theme: str = "light", role: str = "owner") -> Window:
        if (theme, role) not in self._windows:
            link = self.server.link(*(["--read_only"] if role == "reader" else []))
            window = self._windows[theme, role] = Window(self._browser, link, color_scheme=theme)
            window.allowed += ["404"]  # the tests open pages of runs that do not exist
        return self._windows[theme, role]

    def open(self, name: str, theme: str = "light", role: str = "owner", width: int = 1280) -> Page:
        page = self.window(theme, role).open(PAGES[name].format(**self.ids))
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_selector(SETTLED.get(name, "h1"))
        return page

    def close(self) -> None:
        for window in self._windows.values():
            window.close()
        self.server.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Site]:
    root = write_root(tmp_path_factory.mktemp("studio"))
    with lock(root / "runs" / "running"):
        site = Site(root, browser)
        page = site.window().open("/data", "form")
        page.get_by_label("Where it is").fill("data/circles")
        page.get_by_role("button", name="Open", exact=True).click()
        page.wait_for_url(re.compile("/data/circles-"))
        site.ids["circles"] = page.url.rpartition("/")[2]
        page.close()
        yield site
        site.close()


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(site: Site, name: str, theme: str, width: int):
    page = site.open(name, theme, width=width)
    assert audit(page) == []
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_no_page_scrolls_sideways(site: Site, name: str):
    page = site.open(name)
    for width in (360, 600, 800, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(50)
        assert overflow(page) == [], f"at {width} px"
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_the_tab_key_reaches_everything_and_the_focus_is_seen(site: Site, name: str):
    page = site.open(name)
    page.evaluate(
        f"() => [...document.querySelectorAll(`{FOCUSABLE}`)].filter(one => one.checkVisibility() && !one.disabled && "
        "one.tabIndex >= 0).forEach((one, n) => one.dataset.stop = n)"
    )
    wanted = page.evaluate("() => [...document.querySelectorAll('[data-stop]')].map(one => one.dataset.stop)")
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    reached, unseen = set(), []
    for _ in range(len(wanted) + 4):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const one = document.activeElement;
              const shown = one.classList.contains("hidden-file") ? one.parentElement : one;
              return [one.dataset.stop, getComputedStyle(shown).outlineStyle, one.outerHTML.slice(0, 100)];
            }"""
        )
        reached.add(found[0])
        if found[0] is not None and found[1] == "none":
            unseen.append(found[2])
    missed = page.evaluate(
        "(missed) => missed.map(stop => document.querySelector(`[data-stop='${stop}']`).outerHTML.slice(0, 120))",
        sorted(set(wanted) - reached),
    )
    assert missed == [] and unseen == []
    page.close()


def test_arrow_keys_move_between_tabs(site: Site):
    page = site.open("run")
    page.get_by_role("tab", name="Curves").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Pictures")).to_be_focused()
    expect(page.get_by_role("tab", name="Pictures")).to_have_attribute("aria-selected", "true")
    page.get_by_label("Step", exact=True).focus()
    page.keyboard.press("Home")
    expect(page.locator("output")).to_have_text("step 0")
    page.get_by_label("Wipe against").select_option("condition")
    expect(page.locator(".stacked img")).to_have_count(4)
    page.close()


def test_the_grid_and_a_pair_are_used_by_keyboard(site: Site):
    page = site.open("dataset")
    page.locator("[data-place='0']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-place='1']")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => Number(document.activeElement.dataset.place) > 1")
    place = page.evaluate("() => document.activeElement.dataset.place")
    page.keyboard.press("Enter")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    expect(page.locator(f"[data-place='{place}']")).to_be_focused()
    page.close()


def test_the_tools_of_the_canvas_have_keys(site: Site):
    page = site.open("try")
    page.locator("canvas").focus()
    page.keyboard.press("f")
    expect(page.get_by_role("button", name="Fill")).to_have_attribute("aria-pressed", "true")
    before = page.get_by_text(re.compile(r"^Width .*px"), exact=False).first.inner_text()
    page.keyboard.press("]")
    expect(page.get_by_text(re.compile(r"^Width .*px"), exact=False).first).not_to_have_text(before)
    expect(page.get_by_text("With a keyboard, send a map or a photo instead")).to_be_visible()
    page.get_by_label("Size").select_option(index=1)
    box = page.locator("canvas").evaluate("one => [one.width, one.height]")
    assert box[0] > box[1]
    page.close()


def test_the_theme_that_was_chosen_is_kept(site: Site):
    page = site.open("runs")
    page.get_by_label("Theme").select_option("dark")
    page.reload()
    page.wait_for_selector("h1")
    assert page.evaluate("() => getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.get_by_label("Theme").select_option("auto")
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_reader_sees_every_page_and_has_nothing_to_change_it(site: Site, name: str):
    page = site.open(name, role="reader")
    verbs = re.compile("^(Pause|Resume|Trash|Save|Open$|Check |Measure|Publish|Cancel|Forget|ComfyUI|Draw)")
    for button in page.locator("main button:visible").filter(has_text=verbs).all():
        assert button.is_disabled(), button.inner_text()
    for button in page.locator("main button[type=submit]:visible").all():
        assert button.is_disabled(), button.inner_text()
    page.close()


def test_a_readers_requests_to_change_something_are_refused(site: Site):
    page = site.open("runs", role="reader")
    site.window(role="reader").allowed += ["403"]
    statuses = page.evaluate(
        """async () => {
          const paths = [["POST", "/api/jobs"], ["PUT", "/api/drafts/new-run"], ["POST", "/api/plan"], ["POST", "/api/data"]];
          const sent = paths.map(([method, path]) => fetch(path, {method, body: "{}", headers: {"content-type": "application/json"}}));
          return (await Promise.all(sent)).map(answer => answer.status);
        }"""  # noqa: E501
    )
    assert statuses == [403] * 4
    page.close()


def test_without_a_link_a_browser_is_told_how_to_get_one(site: Site, browser: Browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.server.base)
    expect(page.locator("body")).to_contain_text("t2i-adapter studio --link")
    context.close()


def test_a_reader_can_follow_a_run_that_an_owner_watches(site: Site):
    """Two windows at once, of two roles: both get the same live rows."""
    pages = [site.open("runs"), site.open("runs", role="reader")]
    for page in pages:
        expect(page.locator("tr[data-run] .badge", has_text="running")).to_have_count(1)
        page.close()
