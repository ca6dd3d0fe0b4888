"""Skeletons of the people in the picture, drawn as OpenPose draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mediapipe.landmarks import find_people
from t2i_adapter.annotators.mediapipe.skeleton import draw_people
from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.errors import UserError


class Pose:
    """18 body joints, both hands and the face, on black; nobody in the picture gives a black one."""

    @dataclass(frozen=True)
    class Options:
        """`people`: how many at most, the surest first. `hands`, `face`: draw them too. `visible`: joints are drawn
        that are visible with at least this probability."""

        people: int = 4
        hands: bool = True
        face: bool = True
        visible: float = 0.5

        def __post_init__(self) -> None:
            if self.people < 1:
                raise UserError(f"pose: people={self.people}; needed is 1 or more.")
            if not 0 <= self.visible <= 1:
                raise UserError(f"pose: visible={self.visible:g}; needed is a probability, 0 to 1.")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "pose"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (MediaPipe)"
    weights = "mediapipe 0.10.21: python -m t2i_adapter.annotators.weights pose"
    needs = "sdxl-t2i-adapter[pose]"

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        picture = np.asarray(image)
        people = find_people(picture, options.people, options.hands, options.face, options.visible)
        return Image.fromarray(draw_people(people, *picture.shape[:2]))
