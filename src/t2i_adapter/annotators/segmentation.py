"""Maps of regions: the main object (mask), people (person), classes (segmentation), parts (sam)."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from t2i_adapter.annotators.pretrained import open_model, pin
from t2i_adapter.annotators.registry import Facts
from t2i_adapter.annotators.runtime import deterministic, open_tflite, run_tflite
from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MASK_LONGEST = 256
"""Longer side in pixels at which GrabCut runs; its time grows with the area."""
MASK_LEAST_SIDE = 8
"""Pixels; smaller images have an empty mask."""
MASK_ROUNDS = 3
MASK_SEED = 0
"""Seed of OpenCV's generator, which initialises GrabCut's mixture models."""

PERSON_SIDE = 256
"""Sides in pixels of the square that the selfie segmentation network takes."""

ADE20K = (
    "787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 "
    "ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff "
    "08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff "
    "eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff "
    "0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad "
    "0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 "
    "00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa "
    "8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 "
    "ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff "
    "00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff"
)
"""Colours of ADE20K's 150 classes in its order (wall is first), as segmentation adapters use (Zhou et al., 2017)."""
PALETTE = np.frombuffer(bytes.fromhex(ADE20K), np.uint8).reshape(-1, 3)

SAM_BATCH = 64
"""Points of one call of SAM's decoder."""
SAM_SAME = 0.7
"""Intersection over union of two boxes above which their masks count as one; the one with the higher score is used."""
GOLDEN = 0.618034
"""Step on the colour circle from one mask to the next: neighbours in size differ, and no hue repeats."""


@dataclass(frozen=True)
class Mask:
    """Silhouette of the object in the middle, by GrabCut (Rother et al., 2004); black if there is none.

    `margin`, relative to each side of the image, is the border that counts as background at the start.
    """

    facts = Facts(polarity="white on black", levels=2, licence="Apache-2.0 (OpenCV)")
    margin: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.margin < 0.5:
            raise UserError(f"margin={self.margin:g}; allowed is between 0 and 0.5.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        small = image.copy()
        small.thumbnail((MASK_LONGEST, MASK_LONGEST))
        if min(small.size) < MASK_LEAST_SIDE:
            return Image.new("L", image.size)
        inside = Image.fromarray(_grab_cut(np.asarray(small), self.margin))
        grown = inside.resize(image.size, Image.Resampling.BILINEAR)
        return grown.point([0] * 128 + [255] * 128)


def _grab_cut(values: np.ndarray, margin: float) -> np.ndarray:
    """(H,W,3) u8 -> (H,W) u8, 255 on the object."""
    height, width = values.shape[:2]
    top, left = max(1, round(margin * height)), max(1, round(margin * width))
    labels = np.zeros((height, width), np.uint8)
    box = left, top, width - 2 * left, height - 2 * top
    cv2.setRNGSeed(MASK_SEED)
    cv2.grabCut(values, labels, box, np.zeros((1, 65)), np.zeros((1, 65)), MASK_ROUNDS, cv2.GC_INIT_WITH_RECT)
    return np.where((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class Person:
    """Mask of people, by MediaPipe's selfie segmentation network, which is made for people near the camera.

    Pixels whose probability reaches `threshold` are white; 0 returns the probability itself as grey.
    """

    facts = Facts(
        polarity="white on black",
        licence="Apache-2.0 (MediaPipe)",
        weights="mediapipe 0.10.21: python -m t2i_adapter.annotators.weights person",
        needs="sdxl-t2i-adapter[pose]",
    )
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold={self.threshold:g}; allowed is 0 up to, but not including, 1.")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        network = open_tflite("selfie_segmentation.tflite")
        square = np.asarray(image.resize((PERSON_SIDE, PERSON_SIDE), Image.Resampling.BILINEAR), np.float32) / 255
        (probability,) = run_tflite(network, square).values()
        probability = cv2.resize(probability[..., 0], image.size, interpolation=cv2.INTER_LINEAR)
        is_person = np.where(probability >= self.threshold, 255, 0)
        return Image.fromarray((is_person if self.threshold else np.rint(probability * 255)).astype(np.uint8))


@dataclass(frozen=True)
class Segmentation:
    """Classes of ADE20K (wall, sky, tree, person, ...) in its colours, by SegFormer.

    `model`: hub id or folder of a semantic segmentation model with ADE20K's classes. `revision`: its commit; if empty,
    the commit that this package knows.
    """

    facts = Facts(
        channels=3,
        kind="labels",
        licence="NVIDIA Source Code License, research only (SegFormer)",
        weights="hub: nvidia/segformer-b0-finetuned-ade-512-512",
    )
    model: str = "nvidia/segformer-b0-finetuned-ade-512-512"
    revision: str = ""

    def __post_init__(self) -> None:
        pin(self)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        import torch.nn.functional as F

        processor, network = open_model("AutoModelForSemanticSegmentation", self.model, self.revision)
        if network.config.num_labels > len(PALETTE):
            raise UserError(
                f"model={self.model}: has {network.config.num_labels} classes; allowed is at most {len(PALETTE)}, "
                "the classes of ADE20K."
            )
        with deterministic():
            logits = network(processor(images=image, return_tensors="pt")["pixel_values"]).logits
            size = image.height, image.width
            classes = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)[0]
        return Image.fromarray(PALETTE[classes.numpy()])


@dataclass(frozen=True)
class Sam:
    """Parts of the image, of whatever class, by Segment Anything; each part's colour depends on its rank in size.

    `points`: SAM is prompted at a grid of this many points a side. Masks count if the network predicts an intersection
    over union with the true mask of `sure` or more, and if a share `stable` of their area remains when the threshold
    of the logits moves by 1. `model`, `revision`: hub id or folder of a SAM, and its commit; if empty, the commit that
    this package knows.
    """

    facts = Facts(channels=3, kind="labels", licence="Apache-2.0", weights="hub: facebook/sam-vit-base")
    points: int = 32
    sure: float = 0.88
    stable: float = 0.95
    model: str = "facebook/sam-vit-base"
    revision: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.points <= 128:
            raise UserError(f"points={self.points}; allowed is 1 to 128 a side.")
        pin(self)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        processor, network = open_model("AutoModelForMaskGeneration", self.model, self.revision)
        with deterministic():
            inputs = processor(images=image, return_tensors="pt")
            logits, scores = _predict_masks(network, inputs, self)
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            masks = [
                processor.post_process_masks([logits[number][None, None]], *sizes)[0][0, 0].numpy()
                for number in distinct(logits, scores)
            ]
        return Image.fromarray(paint(masks, image.height, image.width))


def _predict_masks(network: Any, inputs: Any, options: Sam) -> tuple[Tensor, Tensor]:
    """Returns the logits (N,h,w) of the good masks, at most three a point of the grid, and their scores (N,)."""
    import torch

    height, width = inputs["reshaped_input_sizes"][0].tolist()
    steps = (torch.arange(options.points) + 0.5) / options.points
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], dim=1)
    embeddings = network.get_image_embeddings(inputs["pixel_values"])
    found = []
    for part in grid.split(SAM_BATCH):
        output = network(image_embeddings=embeddings, input_points=part[None, :, None], multimask_output=True)
        logits, scores = output.pred_masks[0].flatten(0, 1), output.iou_scores[0].flatten()
        good = is_good(logits, scores, options.sure, options.stable)
        found.append((logits[good], scores[good]))  # the others would take 1 GB
    return torch.cat([logits for logits, _ in found]), torch.cat([scores for _, scores in found])


def is_good(logits: Tensor, scores: Tensor, sure: float, stable: float) -> Tensor:
    """Returns (N,) bool: which masks (N,h,w) have a high score, are stable and not empty."""
    steady = (logits > 1).sum(dim=(1, 2)) / (logits > -1).sum(dim=(1, 2)).clamp(min=1)
    return (scores >= sure) & (steady >= stable) & (logits > 0).flatten(1).any(dim=1)


def distinct(logits: Tensor, scores: Tensor) -> list[int]:
    """Returns the indices of the masks (N,h,w) that differ from every mask with a higher score, highest score first.
    No mask may be empty."""
    order = scores.argsort(descending=True, stable=True).tolist()
    boxes = {number: _box(logits[number] > 0) for number in order}
    found: list[int] = []
    for number in order:
        if all(_overlap(boxes[number], boxes[other]) <= SAM_SAME for other in found):
            found.append(number)
    return found


def paint(masks: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Masks (H,W) bool -> (H,W,3) u8. Smaller masks cover larger ones; pixels without a mask are black."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for rank, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True)):
        colour = colorsys.hsv_to_rgb(rank * GOLDEN % 1, 0.75, 1.0)
        canvas[mask] = [round(255 * channel) for channel in colour]
    return canvas


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a mask with at least one pixel; bottom and right are exclusive."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0) * max(width, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared)
