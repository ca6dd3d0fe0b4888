"""Pictures that a browser sends or gets: decoded by the library's own decoder and its limits, and encoded again."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

from t2i_adapter.errors import UserError
from t2i_adapter.studio.faults import UNREADABLE
from t2i_adapter.studio.files import new_id
from t2i_adapter.studio.places import Places

if TYPE_CHECKING:
    from PIL.Image import Image

_SEVERAL = threading.Semaphore(2)
"""Pictures that are decoded at a time: each may take hundreds of megabytes."""
MOST_UPLOADS = 200
FORMATS = ("PNG", "JPEG", "WEBP")


def store_upload(places: Places, data: bytes) -> tuple[str, int, int]:
    """(id, width, height) of a picture, stored as PNG without anything but its pixels.

    Raises UserError of kind "unreadable".
    """
    with _SEVERAL:
        picture = decode_upload(data)
        folder = places.own_folder("uploads")
        for old in sorted(folder.glob("*.png"))[: -MOST_UPLOADS + 1]:
            old.unlink(missing_ok=True)
        name = new_id()
        picture.save(folder / f"{name}.png")
    return name, picture.width, picture.height


def decode_upload(data: bytes) -> Image:
    """A picture as RGB, upright. Raises UserError of kind "unreadable"."""
    import PIL.Image

    from t2i_adapter.data.picture import decode
    from t2i_adapter.data.rows import StoredPicture

    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            frames = getattr(opened, "n_frames", 1)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        raise UserError("This is no PNG, JPEG or WebP picture that can be read.", kind=UNREADABLE) from None
    if frames > 1:
        raise UserError("This picture is animated; send a still one.", kind=UNREADABLE)
    try:
        return decode(StoredPicture("the picture", data), is_photo=True)
    except UserError as fault:
        raise UserError(str(fault), kind=UNREADABLE) from None


def to_webp(picture: Image, side: int) -> bytes:
    """A small form of a picture, `side` pixels at most, as WebP."""
    with _SEVERAL:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
