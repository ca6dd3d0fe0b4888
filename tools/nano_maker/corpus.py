"""The training samples of the base, by number: scenes of shapes, and the emoji whose names are not held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano_maker import captions, pictures
from nano_maker.cache import Picture
from t2i_adapter.data import emoji, shapes
from t2i_adapter.errors import UserError
from t2i_adapter.files import move_atomic

_EMOJI_SHARE = 0.10  # of the UNet's samples: too varied for a network of this size to learn well
_CIRCLE_SHARE = 0.23  # of the UNet's scenes: one circle, as in fill50k, to be learned first and best
_EMOJI_TEXT_SHARE = 0.2  # of the captions: more than of the pictures, because names are rare words
_WHITE_SHARE = 0.5  # of the emoji: on white, as in `make-data emoji`; the others on a random colour
_SEED = 11  # of the scenes; the measurements use the default seed of make-data, 0


@dataclass(frozen=True)
class Corpus:
    """Any number of scenes, and the emoji: rgba[i], (n,n,4) uint8, is icons[i] rendered."""

    icons: list[emoji.Icon]
    rgba: np.ndarray

    def picture(self, index: int) -> Picture:
        """Returns the UNet's training sample with this number."""
        rng = np.random.default_rng([_SEED, index])
        view, size = pictures.sample_view(rng, pictures.NATIVE), pictures.NATIVE
        if rng.random() < _EMOJI_SHARE:
            i = rng.integers(len(self.icons))
            color = "white" if rng.random() < _WHITE_SHARE else captions.any_color(rng)
            image = pictures.emoji_picture(self.rgba[i], color, view, size)
            return Picture(image, emoji.caption(self.icons[i], color), view.time_ids(size))
        circle = {"max_shapes": 1, "kinds": ("circle",)} if rng.random() < _CIRCLE_SHARE else {}
        scene = shapes.sample_scene(_SEED, index, **circle)
        return Picture(pictures.scene_picture(scene, view, size), scene.caption, view.time_ids(size))

    def targets(self, index: int) -> captions.Targets:
        """Returns the text encoders' training sample with this number."""
        rng = np.random.default_rng([_SEED, 1, index])
        if rng.random() < _EMOJI_TEXT_SHARE:
            i = rng.integers(len(self.icons))
            return captions.emoji_targets(self.icons[i], self.rgba[i], captions.any_color(rng))
        return captions.scene_targets(shapes.sample_scene(_SEED, index))

    @staticmethod
    def caption_of_scene(index: int) -> str:
        return shapes.sample_scene(_SEED, index).caption


def plain_icons(package: Path) -> list[emoji.Icon]:
    """Returns all icons except the skin tones, whose names are almost equal."""
    return [icon for icon in emoji.read_icons(package) if not icon.is_toned]


def load(work: Path, package: Path) -> Corpus:
    """Returns the corpus. Renders the emoji once and caches them in work/emoji.npy."""
    icons = [icon for icon in plain_icons(package) if icon.split == "train"]
    cached = work / "emoji.npy"
    if not cached.exists():
        work.mkdir(parents=True, exist_ok=True)
        temporary = work / "emoji.tmp.npy"
        np.save(temporary, np.stack([np.asarray(emoji.render(icon, pictures.NATIVE, None)) for icon in icons]))
        move_atomic(temporary, cached)
    rgba = np.load(cached, mmap_mode="r")
    if len(rgba) != len(icons):
        raise UserError(f"{cached} holds {len(rgba)} emoji, but {package} has {len(icons)}. Remove {cached}.")
    return Corpus(icons, rgba)
