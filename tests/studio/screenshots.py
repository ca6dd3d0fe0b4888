"""Writes pictures of the studio's pages for the documentation.

    python tests/studio/screenshots.py ROOT          ROOT: a studio's folder with finished runs and a dataset
    python tests/studio/screenshots.py ROOT --out docs/studio

The pages are those of ROOT's runs, the one that began last first; pages without content are taken from an empty folder.
Each picture is a PNG of 48 colours, so that it is small.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page
from support.browser import Server, Window, chromium

from t2i_adapter.studio.places import Places

COLOURS = 48
LARGE, SMALL = {"width": 1280, "height": 860}, {"width": 360, "height": 740}


class Album:
    """The folder of the pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, page: Page, name: str) -> None:
        page.wait_for_timeout(400)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        file = self._folder / f"{name}.png"
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} KB")


def draw(page: Page) -> None:
    """A square, by the mouse."""
    box = page.locator("canvas.board").bounding_box()
    assert box is not None
    corners = [(0.3, 0.3), (0.66, 0.3), (0.66, 0.66), (0.3, 0.66), (0.3, 0.3)]
    at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def visit(page: Page, window: Window, path: str, wait_for: str) -> None:
    """Shows an address in a tab that is open."""
    page.goto(window.base + path)
    page.wait_for_selector(wait_for)


def shoot(window: Window, album: Album, runs: list[str], suffix: str) -> None:
    """The pages of a studio with content."""
    page = window.open("/", "tr[data-run]")
    album.take(page, f"runs{suffix}")
    visit(page, window, f"/runs/{runs[0]}", ".chart canvas")
    album.take(page, f"run{suffix}")
    page.get_by_role("tab", name="Pictures").click()
    page.wait_for_selector(".shot img")
    album.take(page, f"run-pictures{suffix}")
    visit(page, window, f"/compare?runs={','.join(runs[:3])}", ".chart canvas")
    album.take(page, f"compare{suffix}")
    visit(page, window, "/new", "[data-option]")
    album.take(page, f"new{suffix}")
    visit(page, window, f"/release/{runs[0]}", "text=Publish on the hub")
    album.take(page, f"release{suffix}")
    visit(page, window, "/data", "form")
    if page.locator(".plain-list a").count():
        page.locator(".plain-list a").first.click()
        page.wait_for_selector(".tile img")
        album.take(page, f"data{suffix}")
        page.locator(".tile").nth(1).click()
        page.wait_for_selector("dialog img")
        album.take(page, f"data-pair{suffix}")
    page.close()  # a browser opens few connections to one server, and each tab holds one


def shoot_once(window: Window, album: Album, runs: list[str], server: Server) -> None:
    """States that are taken in one theme only."""
    page = window.open(f"/try/{runs[0]}", "canvas")
    draw(page)
    page.get_by_label("Prompt", exact=True).fill("a purple square on a blue background")
    page.get_by_label("Guidance", exact=True).fill("3")
    page.get_by_label("Show").select_option("strengths")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".result img")
    album.take(page, "try")
    page.locator(".result").first.scroll_into_view_if_needed()
    album.take(page, "try-result")
    visit(page, window, "/new", "[data-option]")
    page.locator('[data-option="optim.lr"] input').fill("-1")
    page.wait_for_selector(".field-error")
    page.locator('[data-option="optim.lr"]').scroll_into_view_if_needed()
    album.take(page, "new-error")
    page.get_by_role("button", name="Clear", exact=True).click()
    page.wait_for_timeout(1500)
    visit(page, window, "/runs/nothing-00000000", "[role=alert]")
    album.take(page, "run-unknown")
    visit(page, window, "/", "tr[data-run]")
    server.stop()
    page.wait_for_selector("text=The studio does not answer")
    album.take(page, "lost")


def shoot_empty(browser: Browser, album: Album) -> None:
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        server = Server(Path(folder))
        try:
            window = Window(browser, server.start(), viewport=LARGE)
            for name, path in {"runs": "/", "data": "/data", "compare": "/compare", "try": "/try"}.items():
                page = window.open(path, ".empty")
                album.take(page, f"{name}-empty")
                page.close()
            context = browser.new_context(viewport=SMALL)
            page = context.new_page()
            page.goto(server.base)
            album.take(page, "no-access")
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/studio"))
    options = parser.parse_args()
    album, server = Album(options.out), Server(options.root)
    with chromium() as browser:
        link = server.start()
        try:
            runs = [
                run
                for run, folder in Places(options.root, "runs").run_folders().items()
                if (folder / "control").is_dir()
            ]
            window = Window(browser, link, viewport=LARGE)
            shoot(window, album, runs, "")
            dark = Window(browser, server.link(), viewport=LARGE, color_scheme="dark")
            shoot(dark, album, runs, "-dark")
            phone = Window(browser, server.link(), viewport=SMALL, color_scheme="dark")
            album.take(phone.open(f"/runs/{runs[0]}", ".chart canvas"), "run-phone")
            album.take(phone.open(f"/try/{runs[0]}", "canvas"), "try-phone")
            album.take(phone.open("/", "tr[data-run]"), "runs-phone")
            shoot_once(window, album, runs, server)
        finally:
            server.stop()
        shoot_empty(browser, album)


if __name__ == "__main__":
    main()
