"""Makes a user's condition picture, or photo, into a condition that the adapter takes, exactly as training does."""

from __future__ import annotations

from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator, open_recorded
from t2i_adapter.data import geometry
from t2i_adapter.data.pair import CONDITION_FILTER, IMAGE_FILTER
from t2i_adapter.data.picture import StoredPicture, decode, read_file
from t2i_adapter.errors import UserError, flag
from t2i_adapter.files import user_path
from t2i_adapter.models.record import Metadata


def read_condition(path: str, place: str = flag("image")) -> Image.Image:
    """Reads a condition picture's file: RGB, upright, its numbers as they are stored (no colour profile is applied).

    Raises UserError that begins with `place` and the file's name.
    """
    return decode(_stored(path, place))


def read_photo(path: str, place: str = flag("photo")) -> Image.Image:
    """Reads a photo's file, as training reads its images: RGB, upright, in sRGB. Raises UserError as above."""
    return decode(_stored(path, place), is_photo=True)


def _stored(path: str, place: str) -> StoredPicture:
    return StoredPicture(f"{place} {path}", read_file(user_path(path), place))


def fit_condition(picture: Image.Image, size: tuple[int, int], channels: int) -> Image.Image:
    """Returns a condition of 1 (grey) or 3 channels, fitted to `size` (height, width)."""
    return fit(picture.convert("L" if channels == 1 else "RGB"), size, CONDITION_FILTER)


def make_condition(photo: Image.Image, size: tuple[int, int], channels: int, annotator: Annotator) -> Image.Image:
    """Returns the condition of a photo at `size` (height, width).

    As in training the photo is cropped first; the annotator makes no random choices.
    """
    crop = fit(photo, size, IMAGE_FILTER)
    return annotate(annotator, crop).convert("L" if channels == 1 else "RGB")


def find_annotator(named: str | None, metadata: Metadata | None, adapter: str) -> Annotator:
    """Opens the annotator that is `named`, or else the one in the adapter's record. Raises UserError."""
    if named:
        return open_annotator(named)
    if metadata is None or not metadata.condition.get("name"):
        raise UserError(
            f"is needed: {adapter} does not record how the conditions of its training were made. Name a kind of "
            f"`t2i-adapter conditions`, or set the condition picture itself with {flag('image')}.",
            option="condition",
        )
    return open_recorded(metadata.condition)


def fit(picture: Image.Image, size: tuple[int, int], resample: geometry.Resample) -> Image.Image:
    """Scales the picture until it covers `size` (height, width), and crops its centre."""
    return geometry.apply(picture, geometry.cover((picture.height, picture.width), size), resample)
