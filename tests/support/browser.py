"""The studio in a real browser: its server in a process of its own, Chromium, and what no page may do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium was found; `apt-get install chromium` installs it"
AXE = Path(__file__).parents[1] / "assets" / "axe" / "axe.min.js"
PATIENCE = 60_000
"""Milliseconds that a page may take for what it is asked; the machine may be busy with other tests."""


class Server:
    """`t2i-adapter studio ROOT` on a free port of the loopback address. `start` it again after `stop` or `kill`."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.port = root, "", 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Starts the server, on the port of before if there was one; returns the link that it prints."""
        words = [sys.executable, "-m", "t2i_adapter", "studio", str(self.root), "--no_open_browser"]
        self._process = subprocess.Popen([*words, "--port", str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"(http://[^/]+:(\d+))/\S+", line):
                self.base, self.port = found[1], int(found[2])
                return found[0]
        raise AssertionError(f"the studio ended with code {self._process.wait()}")

    def link(self, *more: str) -> str:
        """A new link, as `studio --link` prints it."""
        words = [sys.executable, "-m", "t2i_adapter", "studio", str(self.root), "--link", *more]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ends the server by a signal. Its jobs go on."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.communicate(timeout=60)

    def end_jobs(self) -> None:
        """Kills the jobs that still run, so that no test leaves a process behind."""
        for file in (self.root / ".studio" / "jobs").glob("*/process.json"):
            if not (file.parent / "exit.json").exists():
                try:
                    os.killpg(json.loads(file.read_text())["pid"], signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser without a window."""
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Window:
    """A browser window with cookies of its own. `faults`: errors of the console and of pages, and foreign requests."""

    def __init__(self, browser: Browser, link: str, **options: Any) -> None:
        """link: opens the studio. options: of `Browser.new_context`, such as `viewport`."""
        self.base = link.partition("/?")[0]
        self.faults: list[str] = []
        self.allowed: list[str] = []
        """Parts of console errors that a test causes on purpose, such as "412"."""
        self.context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE)
        self.context.on("console", self._on_console)
        self.context.on("weberror", lambda found: self.faults.append(f"error in the page: {found.error}"))
        self.context.on("request", self._on_request)
        page = self.context.new_page()
        page.goto(link)
        page.wait_for_selector("h1")
        page.close()

    def open(self, path: str = "/", wait_for: str = "h1") -> Page:
        """A new tab at an address of the studio."""
        page = self.context.new_page()
        page.goto(self.base + path)
        page.wait_for_selector(wait_for)
        return page

    def close(self) -> None:
        """Closes all tabs. Fails if a page did what none may do."""
        self.context.close()
        assert not self.faults, "\n".join(self.faults)

    def _on_console(self, message: ConsoleMessage) -> None:
        is_wanted = any(part in message.text for part in self.allowed)
        if message.type in ("error", "warning") and not is_wanted:
            self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.base}/", f"blob:{self.base}/")):
            self.faults.append(f"foreign request: {request.url}")


def audit(page: Page) -> list[str]:
    """What axe finds that is serious or critical in a page, a line for each rule and its first places."""
    if not page.evaluate("() => !!window.axe"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        "() => axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', "
        "'wcag22aa', 'best-practice']}).then(found => found.violations)"
    )
    return [
        f"{one['impact']}: {one['id']}: {one['help']}: "
        + "; ".join(f"{node['html'][:160]} {node['failureSummary'][:200]}" for node in one["nodes"][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def overflow(page: Page) -> list[str]:
    """Elements that make the page wider than its window, unless a box around them scrolls."""
    return page.evaluate(
        """() => {
          const root = document.documentElement;
          if (root.scrollWidth <= root.clientWidth) return [];
          const scrolls = (node) => node && node !== document.body && (getComputedStyle(node).overflowX !== "visible" || scrolls(node.parentElement));
          const wide = [...document.querySelectorAll("main *, nav *")].filter((node) => node.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(node.parentElement));
          return [`${root.scrollWidth} px in ${root.clientWidth} px`, ...wide.slice(0, 4).map((node) => node.outerHTML.slice(0, 120))];
        }"""  # noqa: E501
    )
