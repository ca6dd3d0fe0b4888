"""What each part of the picture is, or where its parts end: one flat colour each."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from t2i_adapter.annotators.mirror import Kind
from t2i_adapter.annotators.pretrained import open_model, pin
from t2i_adapter.annotators.registry import Polarity
from t2i_adapter.annotators.runtime import exactly
from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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
"""Colours of ADE20K's 150 classes, wall first, as segmentation adapters know them (Zhou et al., 2017)."""
PALETTE = np.frombuffer(bytes.fromhex(ADE20K), np.uint8).reshape(-1, 3)

SAM_BATCH = 64
"""Points that SAM's decoder is asked about together."""
SAM_SAME = 0.7
"""Masks whose boxes overlap more are one; the surest is kept."""
GOLDEN = 0.618034
"""Share of the colour circle between one mask and the next: neighbours in size differ, and no hue returns."""


class Segmentation:
    """Classes of ADE20K (wall, sky, tree, person, ...) in its colours, by SegFormer."""

    @dataclass(frozen=True)
    class Options:
        """`model`: hub id or folder of a semantic segmentation model with ADE20K's classes. `revision`: its commit;
        empty takes the one that is known here."""

        model: str = "nvidia/segformer-b0-finetuned-ade-512-512"
        revision: str = ""

        def __post_init__(self) -> None:
            pin(self, "segmentation")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "labels"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "NVIDIA Source Code License, research only (SegFormer)"
    weights = "hub: nvidia/segformer-b0-finetuned-ade-512-512"
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        import torch.nn.functional as F

        model, revision = self._options.model, self._options.revision
        processor, network = open_model("AutoModelForSemanticSegmentation", model, revision, "segmentation")
        if network.config.num_labels > len(PALETTE):
            raise UserError(
                f"segmentation: model={model}: has {network.config.num_labels} classes, and ADE20K has {len(PALETTE)}."
            )
        with exactly():
            logits = network(processor(images=image, return_tensors="pt")["pixel_values"]).logits
            size = image.height, image.width
            classes = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)[0]
        return Image.fromarray(PALETTE[classes.numpy()])


class Sam:
    """Parts of the picture, whatever they are, by Segment Anything; each has a colour by its rank in size."""

    @dataclass(frozen=True)
    class Options:
        """`points`: the picture is asked about at a grid of this many points a side. `sure`: masks are kept whose
        overlap with the truth the network puts at this or more. `stable`: and of which this share stays when the
        network's threshold is moved. `model`, `revision`: hub id or folder of a SAM, and its commit; empty takes the
        one known here."""

        points: int = 32
        sure: float = 0.88
        stable: float = 0.95
        model: str = "facebook/sam-vit-base"
        revision: str = ""

        def __post_init__(self) -> None:
            if not 1 <= self.points <= 128:
                raise UserError(f"sam: points={self.points}; allowed is 1 to 128 a side.")
            pin(self, "sam")

    version = 1
    channels: Literal[1, 3] = 3
    kind: Kind = "labels"
    polarity: Polarity = "none"
    levels: Literal[2, 256] = 256
    licence = "Apache-2.0"
    weights = "hub: facebook/sam-vit-base"
    needs = ""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        options = self._options
        processor, network = open_model("AutoModelForMaskGeneration", options.model, options.revision, "sam")
        with exactly():
            inputs = processor(images=image, return_tensors="pt")
            logits, scores = _ask(network, inputs, options)
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            masks = [
                processor.post_process_masks([logits[number][None, None]], *sizes)[0][0, 0].numpy()
                for number in distinct(logits, scores)
            ]
        return Image.fromarray(paint(masks, image.height, image.width))


def _ask(network: Any, inputs: Any, options: Sam.Options) -> tuple[Tensor, Tensor]:
    """(N,h,w) logits of the good masks at the grid's points, three a point at most, and the trust in each (N,)."""
    import torch

    height, width = inputs["reshaped_input_sizes"][0].tolist()
    steps = (torch.arange(options.points) + 0.5) / options.points
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], dim=1)
    seen = network.get_image_embeddings(inputs["pixel_values"])
    kept = []
    for part in grid.split(SAM_BATCH):
        answer = network(image_embeddings=seen, input_points=part[None, :, None], multimask_output=True)
        logits, scores = answer.pred_masks[0].flatten(0, 1), answer.iou_scores[0].flatten()
        good = is_good(logits, scores, options.sure, options.stable)
        kept.append((logits[good], scores[good]))  # the others alone would fill a GB
    return torch.cat([logits for logits, _ in kept]), torch.cat([scores for _, scores in kept])


def is_good(logits: Tensor, scores: Tensor, sure: float, stable: float) -> Tensor:
    """(N,) bool: which masks (N,h,w) are sure, stable and not empty."""
    steady = (logits > 1).sum(dim=(1, 2)) / (logits > -1).sum(dim=(1, 2)).clamp(min=1)
    return (scores >= sure) & (steady >= stable) & (logits > 0).flatten(1).any(dim=1)


def distinct(logits: Tensor, scores: Tensor) -> list[int]:
    """Numbers of the masks (N,h,w), none empty, that are not the same as a surer one, the surest first."""
    order = scores.argsort(descending=True, stable=True).tolist()
    boxes = {number: _box(logits[number] > 0) for number in order}
    kept: list[int] = []
    for number in order:
        if all(_overlap(boxes[number], boxes[other]) <= SAM_SAME for other in kept):
            kept.append(number)
    return kept


def paint(masks: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Masks (H,W) bool -> (H,W,3) u8, the largest below all others, black where there is none."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for rank, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True)):
        colour = colorsys.hsv_to_rgb(rank * GOLDEN % 1, 0.75, 1.0)
        canvas[mask] = [round(255 * channel) for channel in colour]
    return canvas


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of a mask that is not empty; the last two are the first pixels outside it."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0) * max(width, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared)
