"""Pairs that are rendered when they are read: Fluent Emoji from their package, and scenes of shapes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data import emoji, shapes
from t2i_adapter.data.folder import no_split
from t2i_adapter.data.picture import StoredPicture, color
from t2i_adapter.data.rows import Row, Rows
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
        raise no_split(location, options.split, list(emoji.SPLITS))
    return EmojiRows(location, icons, emoji.read_categories(package), options)


def open_shapes(location: str, options: DataOptions) -> ShapesRows:
    """`shapes`, or `shapes:5000` for 5,000 pairs. Raises UserError."""
    form = SHAPES_FORM.fullmatch(location)
    count = int(form.group(1) or NUM_SHAPES) if form else 0
    if not 1 <= count < shapes.TEST_START:
        text = f"{location}: allowed is shapes, or for example shapes:5000 for 5,000 pairs."
        raise UserError(text, option="data.location")
    return ShapesRows(location, count, options)


class EmojiRows(Rows):
    """Icons of a split at the training size, over the background colour.

    Each has three captions: a sentence, its name, and its name and category as tags.
    """

    def __init__(self, place: str, icons: list[emoji.Icon], categories: dict[str, str], options: DataOptions) -> None:
        self.place, self.shards = place, (len(icons),)
        self.annotate = None if options.condition in (None, _DEFAULT) else options.condition
        self._icons, self._categories, self._size = icons, categories, options.resolution
        self._background, self._ground = options.background, color(options.background)

    def key(self, index: int) -> str:
        return self._icons[index].name

    def where(self, index: int) -> str:
        return f"{self.place}, icon {self.key(index)}"

    def row(self, index: int) -> Row:
        icon = self._icons[index]
        recipe = "emoji", _VERSION, self._size, self._ground, icon.svg

        def render() -> Image.Image:
            picture = emoji.render(icon, self._size, None)
            ground = Image.new("RGBA", picture.size, self._ground)
            return Image.alpha_composite(ground, picture).convert("RGB")

        image = rendered(self.where(index), recipe, render)
        condition = None
        if self.annotate is None:
            condition = rendered(image.name, (_DEFAULT,), lambda: emoji.condition(render(), _DEFAULT))
        return Row(image, condition, self.captions(index), {"name": icon.name})

    def captions(self, index: int) -> Any:
        icon = self._icons[index]
        tags = [icon.words, *filter(None, [self._categories.get(icon.name)]), "flat emoji"]
        background = self._background if self._background in shapes.COLORS else None
        return [emoji.caption(icon, background), icon.words, ", ".join(tags)]


class ShapesRows(Rows):
    """Scenes by number at the training size, the ones that `make-data shapes` writes with its seed 0."""

    def __init__(self, place: str, count: int, options: DataOptions) -> None:
        self.place, self.shards = place, (count,)
        own = options.condition is None or options.condition in shapes.CONDITIONS
        self.annotate = None if own else options.condition
        self._kind = options.condition or _DEFAULT
        self._start, self._size = shapes.split_start(options.split), options.resolution

    def key(self, index: int) -> str:
        return f"scene {self._start + index}"

    def where(self, index: int) -> str:
        return f"{self.place}, {self.key(index)}"

    def row(self, index: int) -> Row:
        scene, size, kind = self._scene(index), self._size, self._kind
        plain = scene.to_dict()
        image = rendered(self.where(index), ("shapes", _VERSION, size, plain), lambda: shapes.render(scene, size))
        condition = None
        if self.annotate is None:
            condition = rendered(image.name, (kind,), lambda: shapes.condition(scene, size, kind))
        return Row(image, condition, scene.caption, {"shapes": shapes.kinds_caption(scene), "scene": json.dumps(plain)})

    def captions(self, index: int) -> Any:
        return self._scene(index).caption

    def _scene(self, index: int) -> shapes.Scene:
        return shapes.sample_scene(0, self._start + index)


def rendered(name: str, recipe: Any, render: Callable[[], Image.Image]) -> StoredPicture:
    """A picture whose bytes are the hash of `recipe`: plain JSON types that determine every pixel."""
    return StoredPicture(name, hashlib.sha256(json.dumps(recipe).encode()).digest(), render)
