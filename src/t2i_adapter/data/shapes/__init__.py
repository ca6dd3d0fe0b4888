"""Synthetic scenes: flat shapes on plain or patterned backgrounds, with captions and exact condition maps.

A seed and an index determine a scene; there is no last index.
"""

from .dataset import SPLITS, TEST_START, kinds_caption, split_start, write_dataset
from .pixels import CONDITIONS, SEGMENTATION_COLORS, background_mask, condition, render, visible_masks
from .sample import MAX_TURN, default_accent, sample_scene
from .scene import COLORS, KINDS, PATTERNS, SPACED, Background, Scene, Shape

__all__ = [
    "COLORS",
    "CONDITIONS",
    "KINDS",
    "MAX_TURN",
    "PATTERNS",
    "SEGMENTATION_COLORS",
    "SPACED",
    "SPLITS",
    "TEST_START",
    "Background",
    "Scene",
    "Shape",
    "background_mask",
    "condition",
    "default_accent",
    "kinds_caption",
    "render",
    "sample_scene",
    "split_start",
    "visible_masks",
    "write_dataset",
]
