"""The options by which verbs that do not train read a dataset. Importing this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from t2i_adapter.config.tree import DataOptions, Layout


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """How verbs that do not train read a dataset: the options of `DataOptions` that they need, under the same names.

    As in `train`, each flag may have its section in front: --split or --data.split.
    """

    data: str | None = None
    """The dataset, as training takes it: a folder of pictures, a manifest, shards or a hub id."""
    split: str = "train"
    """Split of the dataset."""
    layout: Layout = "auto"
    """Layout of the dataset; `auto` recognises it by its name and content."""
    image_column: str = "image"
    """Column of the target picture."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the condition picture."""
    caption_column: str = "text"
    """Column of the caption, or of a list of captions."""
    conditioning_dir: str | None = None
    """Folder of the condition pictures of a folder of pictures, as in training."""
    captions: str = "auto"
    """Where captions come from: auto, none, filename, or the ending of a file beside the picture, such as .caption."""
    skip: str | None = None
    """File of rows to skip, one key a line, as `doctor` writes it."""
    background: str = "white"
    """Colour behind transparent pixels: a colour's name or #rrggbb."""

    def dataset(self, **more: Any) -> DataOptions:
        """These options as those of a run; `more` are options of `DataOptions` beside them. Raises UserError."""
        return DataOptions(
            location=self.data,
            split=self.split,
            kind=self.layout,
            image_column=self.image_column,
            conditioning_image_column=self.conditioning_image_column,
            caption_column=self.caption_column,
            conditioning_dir=self.conditioning_dir,
            captions=self.captions,
            skip=self.skip,
            background=self.background,
            **more,
        )
