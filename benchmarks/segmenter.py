"""Measures the error of the evaluation's segmenter: IoU of its masks of true renders with the scenes' exact masks.

    python benchmarks/segmenter.py

IoU for each kind of background, for the renders themselves and for soft ones: blurred by 0.8 px with smooth noise,
about as a small VAE decodes them. It prints a table and writes the result file.
"""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from common import make_parser, write_result

from t2i_adapter.data.shapes import render, sample_scene, visible_masks
from t2i_adapter.evaluation.foreground import foreground_mask
from t2i_adapter.evaluation.metrics import iou

SIZE, SCENES, SEED = 128, 400, 11
BLUR, NOISE = 0.8, 12.0


def soft(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H,W,3) uint8 -> (H,W,3) uint8, blurred, with noise that is smooth over 1.5 px."""
    noise = cv2.GaussianBlur(rng.normal(0, NOISE, picture.shape).astype(np.float32), (0, 0), 1.5)
    return np.clip(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), BLUR) + noise, 0, 255).astype(np.uint8)


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """background -> "true" and "soft" -> scenes, mean, worst."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"true": [], "soft": []})
    for index in range(SCENES):
        scene = sample_scene(SEED, index)
        picture, mask = np.asarray(render(scene, SIZE)), visible_masks(scene, SIZE).any(axis=0)
        rows = found[scene.background.pattern]
        rows["true"].append(iou(foreground_mask(picture), mask))
        rows["soft"].append(iou(foreground_mask(soft(picture, rng)), mask))
    return {
        pattern: {
            name: {"scenes": len(values), "mean": round(float(np.mean(values)), 4), "worst": round(min(values), 4)}
            for name, values in rows.items()
        }
        for pattern, rows in sorted(found.items())
    }


def main() -> None:
    options = make_parser(__doc__).parse_args()
    result = measure()
    settings = {"size": SIZE, "scenes": SCENES, "seed": SEED, "blur": BLUR, "noise": NOISE}
    write_result("segmenter", {"settings": settings, "iou": result}, options.out)
    print("| background | scenes | mean | worst | soft: mean | soft: worst |\n|---|---|---|---|---|---|")
    for pattern, rows in result.items():
        true, blurred = rows["true"], rows["soft"]
        cells = [true["mean"], true["worst"], blurred["mean"], blurred["worst"]]
        print(f"| {pattern} | {true['scenes']} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
