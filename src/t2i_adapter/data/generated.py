"""Pairs that are drawn when they are asked for: Fluent Emoji from its package, and scenes of shapes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import emoji, shapes
from t2i_adapter.data.picture import StoredPicture, color
from t2i_adapter.data.rows import Row
from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path

NUM_SHAPES = 2000
SHAPES_FORM = re.compile(r"shapes(?::(\d+))?")
_VERSION = 1
_DEFAULT = "outline"


def open_emoji(location: str, options: DataOptions) -> EmojiRows:
    """A package (.tgz, folder or icons.json). Raises UserError."""
    package = user_path(location)
    icons = [icon for icon in emoji.read_icons(package) if icon.split == options.split]
    if options.split not in emoji.SPLITS or not icons:
        raise UserError(f"{location} has no split {options.split!r}; there are: {', '.join(emoji.SPLITS)}.")
    return EmojiRows(location, icons, emoji.read_categories(package), options)


def open_shapes(location: str, options: DataOptions) -> ShapesRows:
    """`shapes`, or `shapes:5000` for so many. Raises UserError."""
    form = SHAPES_FORM.fullmatch(location)
    count = int(form.group(1) or NUM_SHAPES) if form else 0
    if not 1 <= count < shapes.TEST_START:
        raise UserError(f"--train_data_dir {location}: the form is shapes, or shapes:5000 for so many pairs.")
    return ShapesRows(location, count, options)


class EmojiRows:
    """Icons of a split at the training size, over the background's colour. Captions: in full, the name, and the name
    with the emoji's category as tags."""

    def __init__(self, place: str, icons: list[emoji.Icon], categories: dict[str, str], options: DataOptions) -> None:
        self.place, self.shards = place, (len(icons),)
        self.annotate = None if options.condition in (None, _DEFAULT) else options.condition
        self._icons, self._categories, self._size = icons, categories, options.resolution
        self._background, self._ground = options.background, color(options.background)

    def __len__(self) -> int:
        return len(self._icons)

    def key(self, index: int) -> str:
        return self._icons[index].name

    def where(self, index: int) -> str:
        return f"{self.place}, icon {self.key(index)}"

    def caption_cell(self, index: int) -> str:
        return self.where(index)

    def row(self, index: int) -> Row:
        icon = self._icons[index]
        recipe = "emoji", _VERSION, self._size, self._ground, icon.svg

        def draw() -> Image.Image:
            picture = emoji.render(icon, self._size, None)
            ground = Image.new("RGBA", picture.size, self._ground)
            return Image.alpha_composite(ground, picture).convert("RGB")

        image = drawn(self.where(index), recipe, draw)
        condition = None
        if self.annotate is None:
            condition = drawn(image.name, (_DEFAULT,), lambda: emoji.condition(draw(), _DEFAULT))
        return Row(image, condition, self.captions(index), {"name": icon.name})

    def captions(self, index: int) -> Any:
        icon = self._icons[index]
        tags = [icon.words, *filter(None, [self._categories.get(icon.name)]), "flat emoji"]
        background = self._background if self._background in shapes.COLORS else None
        return [emoji.caption(icon, background), icon.words, ", ".join(tags)]

    def stamp(self, index: int) -> str | None:
        return None


class ShapesRows:
    """Scenes by number at the training size, the same as `make-data shapes` draws with its seed 0."""

    def __init__(self, place: str, count: int, options: DataOptions) -> None:
        self.place, self.shards = place, (count,)
        own = options.condition is None or options.condition in shapes.CONDITIONS
        self.annotate = None if own else options.condition
        self._kind = options.condition or _DEFAULT
        self._start, self._size = shapes.split_start(options.split), options.resolution

    def __len__(self) -> int:
        return self.shards[0]

    def key(self, index: int) -> str:
        return f"scene {self._start + index}"

    def where(self, index: int) -> str:
        return f"{self.place}, {self.key(index)}"

    def caption_cell(self, index: int) -> str:
        return self.where(index)

    def row(self, index: int) -> Row:
        scene, size, kind = self._scene(index), self._size, self._kind
        plain = scene.to_dict()
        image = drawn(self.where(index), ("shapes", _VERSION, size, plain), lambda: shapes.render(scene, size))
        condition = None
        if self.annotate is None:
            condition = drawn(image.name, (kind,), lambda: shapes.condition(scene, size, kind))
        return Row(image, condition, scene.caption, {"shapes": shapes.kinds_caption(scene), "scene": json.dumps(plain)})

    def captions(self, index: int) -> Any:
        return self._scene(index).caption

    def stamp(self, index: int) -> str | None:
        return None

    def _scene(self, index: int) -> shapes.Scene:
        return shapes.sample_scene(0, self._start + index)


def drawn(name: str, recipe: Any, draw: Callable[[], Image.Image]) -> StoredPicture:
    """A picture whose recipe stands in for its bytes: plain JSON types that decide every pixel."""
    return StoredPicture(name, hashlib.sha256(json.dumps(recipe).encode()).digest(), draw)
