"""Depth maps, with tiny random models of the real classes, and pinning."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processors import loads_processors

from t2i_adapter.annotators.depth import INVERSE, METRIC, _padding, to_grey
from t2i_adapter.annotators.pretrained import PINNED, UNUSED
from t2i_adapter.annotators.registry import annotate, open_annotator, open_recorded
from t2i_adapter.errors import UserError


def write_depth_anything(folder: Path, seed: int = 0) -> Path:
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessorPil

    backbone = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "out_features": ["stage1", "stage2"],
        "reshape_hidden_states": False,
    }
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        patch_size=14,
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[2, 1],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    torch.manual_seed(seed)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    processor = DPTImageProcessorPil(size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True)
    processor.save_pretrained(folder)
    return folder


def write_dpt(folder: Path) -> Path:
    import torch
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    torch.manual_seed(0)
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_zoedepth(folder: Path) -> Path:
    import torch
    from transformers import ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessorPil

    backbone = {
        "model_type": "beit",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "reshape_hidden_states": False,
        "use_relative_position_bias": True,
    }
    config = ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        bin_embedding_dim=8,
        num_relative_features=4,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        num_patch_transformer_layers=1,
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=8,
        patch_transformer_num_attention_heads=2,
    )
    torch.manual_seed(0)
    network = ZoeDepthForDepthEstimation(config)
    for weight in network.parameters():
        if weight.dim() > 1:  # with the initial weights, depth is nearly constant
            torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ZoeDepthImageProcessorPil(size=size, ensure_multiple_of=16, keep_aspect_ratio=True).save_pretrained(folder)
    return folder


WRITERS = {"depth_anything": write_depth_anything, "dpt": write_dpt, "zoedepth": write_zoedepth}


@pytest.fixture(scope="module", params=list(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write: Callable[[Path], Path] = WRITERS[request.param]
    return write(tmp_path_factory.mktemp("models") / request.param)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@loads_processors
@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 61), (40, 90), (1, 1)])
def test_each_model_returns_a_map_of_the_image(model: Path, width: int, height: int):
    annotator = open_annotator(f"depth,model={model}")
    first, second = (annotate(annotator, noise(width, height)) for _ in range(2))
    assert (first.mode, first.size) == ("L", (width, height))
    assert first.tobytes() == second.tobytes()
    if width > 1:
        assert first.getextrema() == (0, 255)
        assert annotate(annotator, noise(width, height, seed=1)).tobytes() != first.tobytes()


@loads_processors
def test_maps_do_not_depend_on_the_number_of_threads(model: Path):
    import torch

    annotator, image = open_annotator(f"depth,model={model}"), noise(64, 48)
    maps = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            maps.append(annotate(annotator, image).tobytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert maps[0] == maps[1]


def test_the_border_that_zoedepth_adds_is_removed():
    from transformers import DPTImageProcessorPil, ZoeDepthImageProcessorPil

    processor = ZoeDepthImageProcessorPil()
    padded = processor.pad_image(np.zeros((3, 50, 98), np.float32))
    assert padded.shape == (3, 50 + 2 * _padding(processor, 50), 98 + 2 * _padding(processor, 98))
    assert padded.shape != (3, 50, 98)
    assert _padding(ZoeDepthImageProcessorPil(do_pad=False), 50) == 0
    assert _padding(DPTImageProcessorPil(), 50) == 0


def test_near_is_white():
    disparity = np.linspace(1, 9, 100).reshape(10, 10)
    assert to_grey(disparity, INVERSE)[0, 0] == 0
    assert to_grey(disparity, INVERSE)[-1, -1] == 255
    metres = to_grey(disparity, METRIC)
    assert metres[0, 0] == 255
    assert metres[-1, -1] == 0
    assert np.all(np.diff(metres.ravel().astype(int)) <= 0)


def test_a_far_outlier_does_not_compress_the_rest():
    metres = np.linspace(1, 2, 1000).reshape(20, 50)
    metres[-1, -10:] = 1000.0
    assert np.unique(to_grey(metres, METRIC)).size > 200


def test_a_flat_picture_is_black():
    assert not to_grey(np.full((4, 4), 3.0), INVERSE).any()
    assert not to_grey(np.full((4, 4), 3.0), METRIC).any()


def test_default_models_are_pinned_to_a_commit():
    for kind in ("depth", "segmentation", "sam"):
        options = open_annotator(kind).options
        assert options["revision"] == PINNED[options["model"]]
        assert len(options["revision"]) == 40


def test_a_folder_is_identified_by_its_content(tmp_path: Path):
    first = open_annotator(f"depth,model={write_depth_anything(tmp_path / 'a')}")
    other = open_annotator(f"depth,model={write_depth_anything(tmp_path / 'b', seed=1)}")
    again = open_annotator(f"depth,model={write_depth_anything(tmp_path / 'c')}")
    assert first.options["revision"] == again.options["revision"] != other.options["revision"]
    assert open_recorded(first.record()).fingerprint == first.fingerprint


def test_a_folder_whose_weights_changed_is_refused(tmp_path: Path):
    folder = write_depth_anything(tmp_path / "a")
    with pytest.raises(UserError, match="and revision=.* is another"):
        open_annotator(f"depth,model={folder},revision=sha256:0")


def without(folder: Path, start: str) -> Path:
    """Removes the weights whose names begin with a prefix from a model's folder."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(start)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@loads_processors
def test_midas_without_its_unused_weights_is_accepted(tmp_path: Path):
    whole, published = write_dpt(tmp_path / "whole"), without(write_dpt(tmp_path / "published"), UNUSED)
    maps = [annotate(open_annotator(f"depth,model={folder}"), noise(40, 40)) for folder in (whole, published)]
    assert maps[0].tobytes() == maps[1].tobytes()


@loads_processors
def test_a_model_without_other_weights_is_refused(tmp_path: Path):
    folder = without(write_dpt(tmp_path / "headless"), "head.")
    with pytest.raises(UserError, match="weights are missing, first head"):
        annotate(open_annotator(f"depth,model={folder}"), noise(8, 8))


def test_a_missing_folder_is_not_searched_on_the_hub(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder; needed is the folder whose content is sha256:0"):
        open_annotator(f"depth,model={tmp_path / 'gone'},revision=sha256:0")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/nothing", "revision=COMMIT"),
        ("EMPTY", "has no weights"),
        pytest.param("SEGFORMER", "cannot be loaded", marks=loads_processors),
    ],
)
def test_a_wrong_model_is_one_line(model: str, message: str, tmp_path: Path):
    (tmp_path / "EMPTY").mkdir()
    if model == "SEGFORMER":
        from test_conditions_segmentation import write_segformer

        write_segformer(tmp_path / "SEGFORMER")
    name = str(tmp_path / model) if model.isupper() else model
    with pytest.raises(UserError, match=message) as caught:
        annotate(open_annotator(f"depth,model={name}"), noise(8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_package_is_one_line(tmp_path: Path):
    """The processor needs torchvision with transformers before 5.22; with all versions this network needs timm."""
    folder = write_depth_anything(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"] = {"model_type": "timm_backbone", "backbone": "resnet18"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"not installed \(.*(Torchvision|timm) library.*Install that package"
    ) as caught:
        annotate(open_annotator(f"depth,model={folder}"), noise(8, 8))
    assert "\n" not in str(caught.value)


@loads_processors
def test_a_commit_that_was_downloaded_needs_no_hub(tmp_path: Path):
    from huggingface_hub.constants import HF_HUB_CACHE

    commit = "0123456789abcdef0123456789abcdef01234567"
    place = Path(HF_HUB_CACHE) / "models--someone--dpt" / "snapshots" / commit
    write_dpt(place)
    there = annotate(open_annotator(f"depth,model={write_dpt(tmp_path / 'dpt')}"), noise(40, 40))
    cached = annotate(open_annotator(f"depth,model=someone/dpt,revision={commit}"), noise(40, 40))
    assert cached.tobytes() == there.tobytes()


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        annotate(open_annotator("depth"), noise(8, 8))
    assert "\n" not in str(caught.value)
