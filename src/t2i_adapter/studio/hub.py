"""Events for the pages: one stream for each open page, with numbers, so that a page that was away misses nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from t2i_adapter.studio.encode import to_json

MOST_KEPT = 4000
"""Events that are kept for pages that come back."""
MOST_WAITING = 4000
"""Events that wait for a slow page; a page that is slower begins anew."""
MOST_PAGES = 8
"""Open streams at most; a browser itself allows six to one server."""
PAUSE = 15.0
"""Seconds of silence after which a line keeps the connection open."""


class Event(NamedTuple):
    """number: larger than that of every earlier event. data: JSON text."""

    number: int
    name: str
    data: str

    def encode(self) -> str:
        return f"id: {self.number}\nevent: {self.name}\ndata: {self.data}\n\n"


class _Page:
    """One open stream. Events are put by threads and taken by the server's loop."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.is_late = False
        self.loop = asyncio.get_running_loop()
        self.wake = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self.events) >= MOST_WAITING:
            self.is_late = True
            self.events.clear()
        self.events.append(event)
        self.loop.call_soon_threadsafe(self.wake.set)


class Hub:
    """Publishes events to all open pages. Any thread may publish."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # From the clock, so that a page which saw events of an earlier server begins anew.
        self._number = int(time.time() * 1000)
        self._kept: deque[Event] = deque(maxlen=MOST_KEPT)
        self._pages: set[_Page] = set()
        self._is_closed = False

    def publish(self, name: str, data: Any) -> None:
        text = to_json(data)
        with self._lock:
            self._number += 1
            event = Event(self._number, name, text)
            self._kept.append(event)
            for page in self._pages:
                page.put(event)

    @property
    def number(self) -> int:
        """Number of the last event."""
        return self._number

    def is_full(self) -> bool:
        return len(self._pages) >= MOST_PAGES

    def close(self) -> None:
        """Ends all streams."""
        self._is_closed = True
        with self._lock:
            for page in self._pages:
                page.loop.call_soon_threadsafe(page.wake.set)

    async def stream(self, after: int | None) -> AsyncIterator[str]:
        """The events after a number as text/event-stream, then those to come. If some of them are not kept any more,
        a `reset` comes first: the page must read everything again. Ends at once if too many pages are open."""
        page = _Page()
        with self._lock:
            if self.is_full():
                return  # another page was quicker since the request was answered
            missed = [event for event in self._kept if after is not None and event.number > after]
            is_lost = after is not None and after != self._number and (not missed or missed[0].number != after + 1)
            page.events.extend([] if is_lost else missed)
            self._pages.add(page)
            yield_first = f"id: {self._number}\nevent: {'reset' if is_lost else 'hello'}\ndata: {{}}\n\n"
        try:
            yield "retry: 1000\n\n"
            if is_lost or after is None:
                yield yield_first
            while not self._is_closed:
                if not page.events:
                    page.wake.clear()
                    if page.events:
                        continue
                    try:
                        await asyncio.wait_for(page.wake.wait(), PAUSE)
                    except TimeoutError:
                        yield ": still here\n\n"
                    continue
                if page.is_late:
                    page.is_late = False
                    yield f"id: {page.events[0].number}\nevent: reset\ndata: {{}}\n\n"
                count = len(page.events)
                yield "".join(page.events.popleft().encode() for _ in range(count))
        finally:
            with self._lock:
                self._pages.discard(page)
