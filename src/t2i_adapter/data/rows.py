"""What every dataset layout provides, by row number: stored bytes, captions, a key, a name for messages, a stamp.

Each layout of `formats.LAYOUTS` implements `Rows`; `source.Source` makes decoded samples of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_adapter.data.picture import StoredPicture
from t2i_adapter.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row as it is stored; nothing is decoded or checked. `condition` is None if an annotator makes it.

    others: the further conditions of a row with several (`joined.JoinedRows`).
    """

    image: StoredPicture
    condition: StoredPicture | None
    captions: Any
    meta: Mapping[str, Any]
    others: tuple[StoredPicture | None, ...] = ()


class Rows(ABC):
    """The rows of one dataset. A result depends on the row's number alone, and any thread may call.

    Rows can be pickled for loader processes.

    Attributes:
        place: where the data is, for messages.
        shards: number of rows of each stored shard, in order; they sum to the number of rows.
        annotate: the annotator that makes the conditions; None if the data has condition pictures.
        notes: lines for the plan about what was found and is not used, or is read in a way that may surprise.
        captions_are_remote: whether reading captions may download the pictures too.
    """

    place: str
    shards: tuple[int, ...]
    annotate: str | None
    notes: tuple[str, ...] = ()
    captions_are_remote: bool = False

    def __len__(self) -> int:
        return sum(self.shards)

    @abstractmethod
    def key(self, index: int) -> str:
        """A unique name of the row, for lists and reports. A row that cannot be read has one too."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The row's file and its place in it, for messages."""

    def caption_cell(self, index: int) -> str:
        """The place of the row's caption, for messages."""
        return self.where(index)

    @abstractmethod
    def row(self, index: int) -> Row:
        """Reads the row. Raises UserError that names the row or file."""

    @abstractmethod
    def captions(self, index: int) -> Any:
        """Reads the captions of `row(index)` without its pictures. Raises UserError."""

    def write_captions(self, index: int, captions: tuple[str, ...]) -> None:
        """Stores other captions of a row. The rows must be opened again afterwards. Raises UserError of kind
        "read_only" if this layout does not allow it."""
        raise UserError(
            f"{self.where(index)}: captions of this layout are not edited here; edit the file, or train on a folder of "
            "pictures with a .txt beside each.",
            kind="read_only",
        )

    def stamp(self, index: int) -> str | None:
        """A text that changes when the row's stored bytes change, found without reading them; None if unknown.

        It holds each file's absolute path, size and modification time; in a shard, the shard's and the row's number.
        """
        return None

    def local_files(self, index: int) -> list[str]:
        """Paths of the local files that the row is read from, links not resolved, found without reading them; of a
        shard none."""
        lines = (self.stamp(index) or "").split("\n")
        paths = [line.partition("\0")[0] for line in lines if "\0" in line]
        return [path for path in paths if "://" not in path]

    def caption_files(self, index: int) -> list[str]:
        """Those of `local_files` that the row's captions are read from, or more of them if that is not known."""
        return self.local_files(index)

    def file_name(self, index: int) -> str | None:
        """Name of the row's picture file, for captions made of it; None if the picture has no name."""
        return None


def read_caption(path: Path) -> str:
    """The whole text of a file, without white space around it. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as fault:
        text = f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})."
        raise UserError(text, kind="caption") from fault
    except OSError as fault:
        raise UserError(f"{path}: cannot be read: {fault.strerror}.", kind="caption") from fault
