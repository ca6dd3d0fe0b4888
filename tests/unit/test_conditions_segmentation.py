"""Segmentation in ADE20K's colours, and SAM's parts, with tiny random models of the real classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.processors import loads_processors

from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.annotators.segmentation import PALETTE, distinct, is_good, paint
from t2i_adapter.errors import UserError


def write_segformer(folder: Path, classes: int = 150) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[8, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    torch.manual_seed(0)
    network = SegformerForSemanticSegmentation(config)
    torch.nn.init.normal_(network.decode_head.classifier.weight, std=1.0)
    network.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def write_sam(folder: Path) -> Path:
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 16,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 64,
            "patch_size": 8,
            "image_embedding_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 8,
        },
    )
    torch.manual_seed(0)
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segformer(tmp_path_factory.mktemp("models") / "segformer")


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam(tmp_path_factory.mktemp("models") / "sam")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@loads_processors
@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 61), (1, 1)])
def test_every_pixel_has_a_colour_of_ade20k(segformer: Path, width: int, height: int):
    annotator = open_annotator(f"segmentation,model={segformer}")
    first, second = (annotate(annotator, noise(width, height)) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", (width, height))
    assert first.tobytes() == second.tobytes()
    colours = {tuple(colour) for colour in PALETTE.tolist()}
    found = {tuple(pixel) for pixel in np.asarray(first).reshape(-1, 3).tolist()}
    assert found <= colours
    assert width == 1 or len(found) > 1


@loads_processors
def test_colours_are_the_models_own_classes(segformer: Path):
    """Against transformers' own post-processing."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessorPil

    image = noise(80, 48)
    processor = SegformerImageProcessorPil.from_pretrained(segformer)
    network = SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    with torch.inference_mode():
        outputs = network(**processor(images=image, return_tensors="pt"))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 80)])[0]
    drawn = np.asarray(annotate(open_annotator(f"segmentation,model={segformer}"), image))
    np.testing.assert_array_equal(drawn, PALETTE[classes.numpy()])


def test_the_palette_is_ade20ks():
    assert PALETTE.shape == (150, 3)
    known = {0: (120, 120, 120), 2: (6, 230, 230), 3: (80, 50, 50), 12: (150, 5, 61)}
    for number, colour in known.items():  # wall, sky, floor, person
        assert tuple(PALETTE[number]) == colour
    twins = np.unique(PALETTE, axis=0, return_counts=True)[1]
    assert (twins > 1).sum() == 1  # road and computer share a grey in the dataset itself


@loads_processors
def test_a_model_of_more_classes_is_refused(tmp_path: Path):
    folder = write_segformer(tmp_path / "many", classes=151)
    with pytest.raises(UserError, match="has 151 classes"):
        annotate(open_annotator(f"segmentation,model={folder}"), noise(16, 16))


@loads_processors
@pytest.mark.parametrize(("width", "height"), [(64, 48), (31, 57), (1, 1)])
def test_sam_draws_parts_of_the_image(sam: Path, width: int, height: int):
    annotator = open_annotator(f"sam,points=4,sure=-100,stable=0,model={sam}")
    first, second = (annotate(annotator, noise(width, height)) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", (width, height))
    assert first.tobytes() == second.tobytes()
    if width > 1:
        assert np.asarray(first).any()


@loads_processors
def test_sam_without_good_masks_is_black(sam: Path):
    drawn = annotate(open_annotator(f"sam,points=2,sure=1000,model={sam}"), noise(24, 24))
    assert not np.asarray(drawn).any()


def disc(size: int, x: float, y: float, radius: float, slope: float = 10.0) -> torch.Tensor:
    """Logits of a disc: positive inside, `slope` a pixel at its edge."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return slope * (radius - ((rows - y) ** 2 + (columns - x) ** 2).sqrt())


def test_sure_stable_and_different_masks_are_chosen():
    masks = torch.stack(
        [
            disc(64, 20, 20, 10),
            disc(64, 20.5, 20, 10),  # nearly the first, with a higher score
            disc(64, 45, 45, 8),
            disc(64, 10, 50, 8, slope=0.2),  # its size depends on the threshold
            disc(64, 50, 10, 8),  # low score
            torch.full((64, 64), -9.0),  # empty
        ]
    )
    scores = torch.tensor([0.90, 0.95, 0.97, 0.99, 0.50, 0.99])
    assert is_good(masks, scores, 0.88, 0.9).tolist() == [True, True, True, False, False, False]
    assert is_good(masks, scores, 0.96, 0.9).tolist() == [False, False, True, False, False, False]
    assert distinct(masks[:3], scores[:3]) == [2, 1]


def test_small_parts_lie_on_large_ones():
    masks = [disc(32, 16, 16, radius).numpy() > 0 for radius in (4, 12)]
    drawn = paint(masks, 32, 32)
    assert len({tuple(drawn[place]) for place in ((16, 16), (16, 6), (0, 0))}) == 3
    assert not drawn[0, 0].any()
