"""Datasets that the page Data shows: what was registered, opened when it is looked at.

A dataset is a file in the studio's folder with the options that read it. Opening one loads no torch; datasets of the
hub are not opened here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_adapter.config.read import with_values
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.errors import UserError
from t2i_adapter.files import write_atomic
from t2i_adapter.runs.metrics import read_file, read_json
from t2i_adapter.studio.faults import NotFoundError
from t2i_adapter.studio.pictures import to_webp
from t2i_adapter.studio.places import Places

if TYPE_CHECKING:
    from t2i_adapter.data.source import Source

_ID = re.compile(r"[a-z0-9-]{1,60}")
OPTIONS = (
    *("location", "kind", "split", "condition", "conditioning_dir", "captions", "image_column"),
    *("conditioning_image_column", "caption_column", "background", "condition_kind", "resolution"),
)
"""Options of data that a dataset is registered with."""
MOST_OPEN = 3
"""Datasets that are open at a time; the others are opened again when they are needed."""
MOST_SEARCHED = 200_000
"""Rows whose captions a search reads at most."""
SIDES = (160, 320, 1024)
"""Largest sides of pictures that a page may ask for, in pixels."""


class Datasets:
    """The registered datasets of one studio."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.folder, self._thumbs = places.own_folder("data"), places.own_folder("thumbs")
        self._open: OrderedDict[str, Source] = OrderedDict()
        self._captions: dict[str, list[str]] = {}
        # Opening a large dataset, or reading all its captions, takes seconds. Rows of open datasets are served
        # meanwhile: `_lock` is held for a moment only. A thread takes the locks in this order.
        self._searching, self._opening, self._lock = threading.Lock(), threading.RLock(), threading.Lock()

    def add(self, values: dict[str, Any]) -> str:
        """Registers the dataset with these options of data; returns its id. Raises UserError if it cannot be opened."""
        options = _options(values)
        location = str(options.location)
        slug = re.sub(r"[^a-z0-9]+", "-", Path(location).name.lower()).strip("-")[:40] or "data"
        content = json.dumps({"values": values}, sort_keys=True)
        name = f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        with self._opening:
            self._keep(name, self._open_source(options))
            write_atomic(self.folder / f"{name}.json", [content.encode()])
        return name

    def all(self) -> list[dict[str, Any]]:
        """The registered datasets, the last one first."""
        files = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        names = [file.stem for file in files if _ID.fullmatch(file.stem) and not file.stem.endswith("-doctor")]
        return [{"id": name, "values": self.values(name)} for name in names]

    def remove(self, name: str) -> None:
        """Forgets a dataset; its files stay."""
        self.values(name)
        with self._opening:
            self._forget(name)
            for file in (self.folder / f"{name}.json", self.report_file(name), self.skip_file(name)):
                file.unlink(missing_ok=True)

    def values(self, name: str) -> dict[str, Any]:
        """The options of a dataset. Raises NotFoundError."""
        found = read_json(self.folder / f"{name}.json").get("values") if _ID.fullmatch(name) else None
        if not isinstance(found, dict):
            raise NotFoundError(f"no dataset is called {name[:80]!r}")
        return found

    def source(self, name: str) -> Source:
        """The dataset, open. Raises NotFoundError and UserError."""
        values = self.values(name)
        found = self._opened(name)
        if found is not None:
            return found
        with self._opening:
            found = self._opened(name)  # another thread may have opened it meanwhile
            if found is not None:
                return found
            return self._keep(name, self._open_source(_options(values)))

    def _opened(self, name: str) -> Source | None:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
            return self._open.get(name)

    def _keep(self, name: str, source: Source) -> Source:
        with self._lock:
            self._open[name] = source
            self._open.move_to_end(name)
            self._captions.pop(name, None)
            while len(self._open) > MOST_OPEN:
                gone, _ = self._open.popitem(last=False)
                self._captions.pop(gone, None)
        return source

    def _open_source(self, options: DataOptions) -> Source:
        from t2i_adapter.data.formats import is_hub_dataset
        from t2i_adapter.data.source import open_source

        if is_hub_dataset(options) or options.kind == "hub":
            text = "a dataset of the hub is not shown here; a run can train on it, and `t2i-adapter doctor` reads it"
            raise UserError(text, option="data.location")
        return open_source(options, 0)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)
            self._captions.pop(name, None)

    # Rows ----------------------------------------------------------------------------------------------------------

    def rows(self, name: str, start: int, count: int, find: str, finding: str) -> dict[str, Any]:
        """`count` rows from a place on, of those whose caption holds `find` and that have the doctor's `finding`."""
        source = self.source(name)
        numbers = self._numbers(name, source, find, finding)
        chosen = numbers[start : start + count]
        skipped = self.skipped(name)
        return {"total": len(numbers), "of": len(source), "rows": [self._row(source, n, skipped) for n in chosen]}

    def _numbers(self, name: str, source: Source, find: str, finding: str) -> Any:
        numbers: Any = range(len(source))
        if finding:
            rows = [one for one in self.report(name).get("findings", ()) if one.get("kind") == finding]
            numbers = [row["number"] for one in rows for row in one["rows"] if row["number"] < len(source)]
        if find:
            captions = self._all_captions(name, source)
            word = find.casefold()
            numbers = [n for n in numbers if n < len(captions) and word in captions[n]]
        return numbers

    def _all_captions(self, name: str, source: Source) -> list[str]:
        with self._searching:
            found = self._captions.get(name)
            if found is None:
                count = min(len(source), MOST_SEARCHED)
                known = dict[str, bool]()
                found = [" ".join(self._row_captions(source, n, known)).casefold() for n in range(count)]
                with self._lock:
                    if self._open.get(name) is source:  # no caption was edited meanwhile
                        self._captions[name] = found
            return found

    def _row_captions(self, source: Source, number: int, known: dict[str, bool]) -> tuple[str, ...]:
        try:
            self._check_inside(source, number, source.caption_files(number), known)
            return source.identify(number, "").captions
        except UserError:
            return ()

    def _check_inside(
        self, source: Source, number: int, files: list[str] | None = None, known: dict[str, bool] | None = None
    ) -> None:
        """Raises UserError if a file of a row lies outside the root, where a link or a table's path may lead.

        files: those that are read; None is all of them. known: folder -> whether it lies inside, for a search, which
        would resolve the same ones 100,000 times.
        """
        known = {} if known is None else known
        for file in source.local_files(number) if files is None else files:
            folder, _, name = file.rpartition("/")
            if folder not in known:
                known[folder] = self._is_inside(folder)
            is_link = os.path.islink(file)  # noqa: PTH114 - a tenth of the time of the method of Path
            if not (self._is_inside(file) if is_link else known[folder]):
                raise UserError(f"{source.key(number)}: {name} lies outside the studio's folder; it is not shown.")

    def _is_inside(self, path: str) -> bool:
        """Whether a path lies in the root, links resolved."""
        return Path(path).resolve().is_relative_to(self._places.root)

    def _row(self, source: Source, number: int, skipped: set[str]) -> dict[str, Any]:
        key = source.key(number)
        row: dict[str, Any] = {"n": number, "key": key, "captions": [], "error": None, "skipped": key in skipped}
        try:
            self._check_inside(source, number)
            row["captions"] = list(source.identify(number, "").captions)
        except UserError as fault:
            row["error"] = fault.message()
        return row

    def picture(self, name: str, number: int, what: str, side: int) -> bytes:
        """The image or condition of a row as WebP, from the cache if its files have not changed. Raises UserError."""
        source = self.source(name)
        if not 0 <= number < len(source):
            raise NotFoundError(f"the dataset has rows 0 to {len(source) - 1:,}")
        self._check_inside(source, number)
        stamp = source.stamp(number) or f"{name} {number}"
        digest = hashlib.sha256(f"{name}\0{stamp}\0{what}\0{side}".encode()).hexdigest()
        cached = self._thumbs / digest[:2] / f"{digest}.webp"
        if found := read_file(cached, 8 << 20):
            return found
        sample = source[number]
        picture = sample.image if what == "image" else sample.condition
        if picture is None:
            picture = self._made_condition(source, sample.image, sample.key)
        data = to_webp(picture, side)
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cached, [data])
        return data

    def _made_condition(self, source: Source, image: Any, key: str) -> Any:
        """The condition as training makes it, of kinds that need no torch. Raises UserError."""
        from t2i_adapter.annotators.registry import annotate, open_annotator

        kind = str(source.annotate).partition(",")[0]
        if kind not in WITHOUT_TORCH:
            raise UserError(f"{key}: conditions of kind {kind} are made while a run prepares its data, not here.")
        return annotate(open_annotator(str(source.annotate)), image)

    def write_captions(self, name: str, number: int, captions: list[str], was: list[str]) -> dict[str, Any]:
        """Stores captions of a row that had `was`. Raises UserError."""
        with self._opening:
            source = self.source(name)
            if not 0 <= number < len(source):
                raise NotFoundError(f"the dataset has rows 0 to {len(source) - 1:,}")
            self._check_inside(source, number)
            source.write_captions(number, tuple(captions), tuple(was))
            self._forget(name)
            return self._row(self.source(name), number, self.skipped(name))

    # Doctor and skip list ------------------------------------------------------------------------------------------

    def report_file(self, name: str) -> Path:
        return self.folder / f"{name}-doctor.json"

    def report(self, name: str) -> dict[str, Any]:
        """What the doctor wrote; empty if it has not looked yet."""
        self.values(name)
        return read_json(self.report_file(name))

    def skip_file(self, name: str) -> Path:
        return self.folder / f"{name}-skip.txt"

    def skipped(self, name: str) -> set[str]:
        """Keys of the rows to skip."""
        return set(read_file(self.skip_file(name), 64 << 20).decode("utf-8", "replace").splitlines())

    def skip(self, name: str, keys: list[str], is_on: bool) -> int:
        """Adds rows to the list of those to skip, or takes them out; returns how many it holds."""
        with self._opening:
            present = self.skipped(name)
            present = present | set(keys) if is_on else present - set(keys)
            write_atomic(self.skip_file(name), ["".join(f"{key}\n" for key in sorted(present)).encode()])
            return len(present)


WITHOUT_TORCH = ("canny", "lineart", "sketch", "scribble", "lines", "palette", "grey", "tile", "blur", "mask")
"""Condition kinds that the server itself may make."""


def _options(values: dict[str, Any]) -> DataOptions:
    return with_values(Config(), {f"data.{name}": value for name, value in values.items()}).data
