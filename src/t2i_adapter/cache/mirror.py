"""A folder of a cache that lies on object storage: what is written is uploaded, what is read is copied to the local
disk first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from t2i_adapter.data import remote
from t2i_adapter.data.addresses import Blob, base_name
from t2i_adapter.data.store import Store


@dataclass(frozen=True)
class Mirror:
    """A folder on object storage. Methods raise UserError that names the address.

    Attributes:
        url: its address, s3://BUCKET/PREFIX/...
        store: the local copies, bounded in size.
    """

    url: str
    store: Store

    def list(self, suffix: str) -> dict[str, Blob]:
        """The files with this ending by their names, sorted."""
        found = {base_name(blob.name): blob for blob in remote.list_files(self.url)}
        return {name: blob for name, blob in found.items() if name.endswith(suffix)}

    def beside(self, name: str) -> Iterator[Mirror]:
        """The folders beside this one that have a file of this name."""
        for blob in remote.find_all(f"{self.url.rpartition('/')[0]}/*/{name}"):
            url = blob.name.rpartition("/")[0]
            if url != self.url:
                yield replace(self, url=url)

    def tail(self, blob: Blob, count: int) -> bytes:
        """The last `count` bytes of a file, or all of it."""
        return remote.read_tail(blob, count)

    def local(self, blob: Blob) -> Path:
        """The path of a local copy. A copy that is not used for long is deleted, so open it at once."""
        return self.store.local(blob)

    def put(self, path: Path) -> None:
        """Uploads a local file under its own name."""
        remote.upload(path, f"{self.url}/{path.name}")

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is missing."""
        return remote.read(f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces a small file."""
        remote.write(f"{self.url}/{name}", data)

    def remove(self, name: str) -> None:
        remote.remove(f"{self.url}/{name}")
