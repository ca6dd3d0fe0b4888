"""A person's condition picture, or photo to make one of, cut to size as training cuts its own."""

from __future__ import annotations

from PIL import Image

from t2i_adapter.annotators.registry import Annotator, annotate, open_annotator, open_recorded
from t2i_adapter.data import geometry
from t2i_adapter.data.pair import CONDITION_FILTER, IMAGE_FILTER
from t2i_adapter.data.picture import StoredPicture, decode, read_file
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path
from t2i_adapter.models.record import Metadata


def read_condition(path: str, flag: str = "--image") -> Image.Image:
    """The picture in a file: RGB, upright. Raises UserError naming the flag and the file."""
    file = user_path(path)
    return decode(StoredPicture(f"{flag} {path}", read_file(file, flag)))


def fit_condition(picture: Image.Image, size: tuple[int, int], channels: int) -> Image.Image:
    """A condition as the adapter takes it: 1 (grey) or 3 channels, scaled to cover `size` (height, width), its centre
    cut out."""
    return fit(picture.convert("L" if channels == 1 else "RGB"), size, CONDITION_FILTER)


def make_condition(photo: Image.Image, size: tuple[int, int], channels: int, annotator: Annotator) -> Image.Image:
    """The condition of a photo at `size` (height, width), made as in training: the photo is cut first, and nothing is
    left to chance."""
    cut = fit(photo, size, IMAGE_FILTER)
    return annotate(annotator, cut).convert("L" if channels == 1 else "RGB")


def find_annotator(named: str | None, metadata: Metadata | None, adapter: str) -> Annotator:
    """What makes an adapter's conditions: what is `named`, or else what its record tells. Raises UserError."""
    if named:
        return open_annotator(named)
    if metadata is None or not metadata.condition.get("name"):
        raise UserError(
            f"--condition is needed: {adapter} does not tell what made the conditions of its training. "
            "Name a kind of `t2i-adapter conditions`, or give the condition itself with --image."
        )
    return open_recorded(metadata.condition)


def fit(picture: Image.Image, size: tuple[int, int], resample: geometry.Resample) -> Image.Image:
    """Scaled so that it covers `size` (height, width), and its centre cut out."""
    return geometry.apply(picture, geometry.cover((picture.height, picture.width), size), resample)
