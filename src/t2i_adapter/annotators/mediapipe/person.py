"""The people in the picture, white on black."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import open_tflite, run_tflite
from t2i_adapter.errors import UserError

SIDE = 256
"""What the network sees: the picture pressed to a square."""


class Person:
    """Person mask by the selfie segmentation network, which knows people near the camera."""

    @dataclass(frozen=True)
    class Options:
        """`threshold`: probability from which a pixel is a person's; 0 gives the probability itself, in grey."""

        threshold: float = 0.5

        def __post_init__(self) -> None:
            if not 0 <= self.threshold < 1:
                raise UserError(f"person: threshold={self.threshold:g}; needed is 0 up to, not including, 1.")

    version = 1
    channels: Literal[1, 3] = 1
    kind: Kind = "map"
    polarity: Polarity = "white on black"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0 (MediaPipe)"
    weights = "mediapipe 0.10.21: python -m t2i_adapter.annotators.weights person"
    needs = "sdxl-t2i-adapter[pose]"

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        network = open_tflite("selfie_segmentation.tflite", "person")
        square = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 255
        (likely,) = run_tflite(network, square).values()
        likely = cv2.resize(likely[..., 0], image.size, interpolation=cv2.INTER_LINEAR)
        threshold = self._options.threshold
        values = np.where(likely >= threshold, 255, 0) if threshold else np.rint(likely * 255)
        return Image.fromarray(values.astype(np.uint8))
