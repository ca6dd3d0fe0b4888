"""The two domains of the base as training samples by number: scenes, and emoji whose names are not held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano_maker import captions, pictures
from nano_maker.cache import Drawn
from t2i_adapter.data import emoji, shapes

_EMOJI_SHARE = 0.10  # of the UNet's samples: a side domain, too varied for so small a network to master
_CIRCLE_SHARE = 0.23  # of the UNet's scenes: one circle, as in fill50k, which are to be learned first and best
_EMOJI_TEXT_SHARE = 0.2  # of the captions: names are rare words
_WHITE_SHARE = 0.5  # of the emoji: on white, as `make-data emoji` writes them; the others on any colour
_SEED = 11  # of the scenes; make-data's default seed, from which the measures draw, is another


@dataclass(frozen=True)
class Corpus:
    """Scenes without end, and a bank of emoji: icons[i] is drawn in rgba[i], (n,n,4) uint8."""

    icons: list[emoji.Icon]
    rgba: np.ndarray

    def drawn(self, index: int) -> Drawn:
        """The picture with this number, as the UNet and its VAE see it."""
        rng = np.random.default_rng([_SEED, index])
        view, size = pictures.sample_view(rng, pictures.NATIVE), pictures.NATIVE
        if rng.random() < _EMOJI_SHARE:
            i = rng.integers(len(self.icons))
            color = "white" if rng.random() < _WHITE_SHARE else captions.any_color(rng)
            image = pictures.emoji_picture(self.rgba[i], color, view, size)
            return Drawn(image, emoji.caption(self.icons[i], color), view.time_ids(size))
        circle = {"max_shapes": 1, "kinds": ("circle",)} if rng.random() < _CIRCLE_SHARE else {}
        scene = shapes.sample_scene(_SEED, index, **circle)
        return Drawn(pictures.scene_picture(scene, view, size), scene.caption, view.time_ids(size))

    def facts(self, index: int) -> captions.PairDataset:
        """The caption with this number and what it says, as the text encoders see it."""
        rng = np.random.default_rng([_SEED, 1, index])
        if rng.random() < _EMOJI_TEXT_SHARE:
            i = rng.integers(len(self.icons))
            return captions.emoji_facts(self.icons[i], self.rgba[i], captions.any_color(rng))
        return captions.scene_facts(shapes.sample_scene(_SEED, index))

    @staticmethod
    def caption_of_scene(index: int) -> str:
        return shapes.sample_scene(_SEED, index).caption


def plain_icons(package: Path) -> list[emoji.Icon]:
    """All icons but the skin tones, which their names hardly tell apart."""
    return [icon for icon in emoji.read_icons(package) if not icon.is_toned]


def load(work: Path, package: Path) -> Corpus:
    """The corpus, with the emoji drawn once and kept in work/emoji.npy."""
    icons = [icon for icon in plain_icons(package) if icon.split == "train"]
    bank = work / "emoji.npy"
    if not bank.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.save(bank, np.stack([np.asarray(emoji.render(icon, pictures.NATIVE, None)) for icon in icons]))
    rgba = np.load(bank, mmap_mode="r")
    if len(rgba) != len(icons):
        raise ValueError(f"{bank} holds {len(rgba)} emoji, {package} has {len(icons)}: remove the former")
    return Corpus(icons, rgba)
