"""The tiny base and data that other tests use: they load, have SDXL's properties, and tests reach loopback only."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


def test_the_tiny_base_loads_and_generates(tiny_base: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    ids = pipeline.tokenizer_2("red circle", padding="max_length", max_length=6).input_ids
    assert len(set(ids[:4])) == 4, "each word must be one token"
    assert ids[4:] == [0, 0], "the second tokenizer must pad with '!', id 0, as SDXL's does"
    images = pipeline("red circle", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_the_circles_lie_on_their_outlines(tiny_data: Path) -> None:
    picture = Image.open(tiny_data / "train" / "00000.png")
    outline = Image.open(tiny_data / "train" / "00000_outline.png")
    left, top, right, bottom = outline.getbbox()
    assert picture.size == outline.size == (64, 64)
    corner, centre = picture.getpixel((0, 0)), picture.getpixel(((left + right) // 2, (top + bottom) // 2))
    assert corner != centre


def test_tests_reach_loopback_only() -> None:
    import socket

    with pytest.raises(OSError, match="loopback only"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
