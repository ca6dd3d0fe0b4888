"""The verb `annotate`, for one picture or a data set."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.errors import UserError
from t2i_adapter.generation.condition import read_condition
from t2i_adapter.verbs.annotate_folder import annotate_data
from t2i_adapter.verbs.annotate_options import AnnotateOptions


def run(options: AnnotateOptions) -> None:
    """Writes the map of `photo`, or those of all pictures of `data`."""
    if options.photo is None:
        annotate_data(options)
        return
    assert options.out is not None
    check_picture_file(options.out, "--out")
    photo = read_condition(str(options.photo), "PHOTO")
    annotate(open_annotator(options.kind), photo).save(options.out)
    print(options.out)


def check_picture_file(path: Path, flag: str) -> None:
    """Raises UserError where a picture cannot be saved under that name."""
    Image.init()
    if path.is_dir() or path.suffix.lower() not in Image.EXTENSION:
        raise UserError(f"{flag} {path}: is no picture file; its name ends in .png, .webp or .jpg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it first")
