"""DWPose with small networks that have the interface of the published files and known outputs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.annotators import dwpose
from t2i_adapter.annotators.pretrained import PINNED
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.annotators.skeleton import draw_people
from t2i_adapter.errors import UserError

pytestmark = pytest.mark.skipif(find_spec("onnx") is None, reason="needs onnx, to write small networks")
installed = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs sdxl-t2i-adapter[dwpose]")

PICTURE = (300, 400)  # height and width
PERSON = (100.0, 60.0, 220.0, 260.0)  # left, top, right, bottom
FAINT = (300.0, 50.0, 360.0, 150.0)
CELLS = 8400


def write(folder: Path, name: str, nodes: list[Any], values: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    """Writes a network with one input, "images"; `nodes` end in its named outputs."""
    from onnx import TensorProto, helper, numpy_helper, save

    produced = {name for node in nodes for name in node.output}
    used = {name for node in nodes for name in node.input}
    outputs = [name for node in nodes for name in node.output if name not in used]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, *shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name in produced],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    folder.mkdir(exist_ok=True)
    save(model, str(folder / name))


def write_detector(folder: Path, boxes: dict[tuple[float, ...], float]) -> None:
    """Writes a detector that finds these boxes, with these scores, in any picture of PICTURE's size with a blue pixel.
    Boxes have YOLOX's format, relative to a cell of its grids; blue is the first channel."""
    from onnx import helper

    rows = np.zeros((1, CELLS, 85), np.float32)
    scale = 640 / max(PICTURE)
    for number, (box, score) in enumerate(boxes.items()):
        left, top, right, bottom = (side * scale for side in box)
        column, row, stride = 3 + number, 2, 16  # any cell of the second grid
        at = 80 * 80 + row * 40 + column
        rows[0, at, :2] = (left + right) / 2 / stride - column, (top + bottom) / 2 / stride - row
        rows[0, at, 2:4] = np.log([(right - left) / stride, (bottom - top) / stride])
        rows[0, at, 4:6] = 1.0, score
        rows[0, at + 200, :6] = rows[0, at, :6]  # an equal box of another cell, with a lower score
        rows[0, at + 200, :2] -= 200 % 40, 200 // 40
        rows[0, at + 200, 5] *= 0.9
    nodes = [
        helper.make_node("Conv", ["images", "blue_less_red", "beyond"], ["blue"]),
        helper.make_node("ReduceMax", ["blue"], ["most"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Clip", ["most", "zero", "one"], ["on"]),
        helper.make_node("Mul", ["rows", "on"], ["found"]),
    ]
    known = {
        "rows": rows,
        "blue_less_red": np.array([1, 0, -1], np.float32).reshape(1, 3, 1, 1),
        "beyond": np.array([-50], np.float32),
        "zero": np.array(0, np.float32),
        "one": np.array(1, np.float32),
    }
    write(folder, dwpose.DETECTOR, nodes, known, (640, 640))


def write_points(folder: Path, points: np.ndarray, trust: np.ndarray) -> None:
    """Writes a network that returns these points (133,2), in pixels of its input, with these scores, for any input."""
    from onnx import helper

    rows = {"along_x": np.zeros((1, 133, 576), np.float32), "along_y": np.zeros((1, 133, 768), np.float32)}
    for number, (x, y) in enumerate(points):
        rows["along_x"][0, number, round(2 * x)] = trust[number]
        rows["along_y"][0, number, round(2 * y)] = 1.0
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["peak"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["peak", "nothing"], ["none"]),
        *(helper.make_node("Add", [name, "none"], [f"{name}_of_points"]) for name in rows),
    ]
    write(folder, dwpose.POINTS, nodes, rows | {"nothing": np.array(0, np.float32)}, (384, 288))


def write_finder(folder: Path) -> None:
    """Writes a network that returns the reddest pixel as every point."""
    from onnx import helper

    def column(axis: int, name: str) -> list[Any]:
        return [
            helper.make_node("ReduceMax", ["red"], [f"{name}_peaks"], axes=[1, axis], keepdims=0),
            helper.make_node("Unsqueeze", [f"{name}_peaks", "last"], [f"{name}_column"]),
            helper.make_node("Tile", [f"{name}_column", "twice"], [f"{name}_pairs"]),
            helper.make_node("Reshape", [f"{name}_pairs", "row"], [f"{name}_row"]),
            helper.make_node("Tile", [f"{name}_row", "all"], [name]),
        ]

    known = {
        "weights": np.array([1, -0.5, -0.5], np.float32).reshape(1, 3, 1, 1),
        "last": np.array([2]),
        "twice": np.array([1, 1, 2]),
        "row": np.array([1, 1, -1]),
        "all": np.array([1, 133, 1]),
    }
    red = [helper.make_node("Conv", ["images", "weights"], ["red"])]
    write(folder, dwpose.POINTS, [*red, *column(2, "along_x"), *column(3, "along_y")], known, (384, 288))


def picture(*, dot: tuple[int, int] | None = None) -> Image.Image:
    values = np.full((*PICTURE, 3), (90, 90, 200), np.uint8)
    if dot:
        values[dot[1] - 2 : dot[1] + 3, dot[0] - 2 : dot[0] + 3] = 255, 0, 0
    return Image.fromarray(values)


def people_of(folder: Path, image: Image.Image, spec: str = "") -> np.ndarray:
    return np.asarray(annotate(open_annotator(f"dwpose,model={folder}{spec}"), image))


def spread() -> np.ndarray:
    """Returns 133 different points (133,2) in whole pixels of 288 x 384."""
    numbers = np.arange(133)
    return np.stack([10 + (numbers % 12) * 22, 12 + (numbers // 12) * 31], axis=1).astype(float)


def to_picture(points: np.ndarray) -> np.ndarray:
    """Maps points of the crop of PERSON to the picture: its box is 120 x 200, so 187.5 x 250 with the margin."""
    return np.array([160 - 187.5 / 2, 160 - 250 / 2]) + points * 187.5 / 288


@installed
def test_a_person_is_found_where_the_detector_says_and_only_once(tmp_path: Path):
    write_detector(tmp_path, {PERSON: 0.9, FAINT: 0.2})
    session = dwpose.open_onnx(tmp_path / dwpose.DETECTOR, "dwpose")
    (box,) = dwpose._find_boxes(session, np.asarray(picture()))
    np.testing.assert_allclose(box, PERSON, atol=0.01)
    assert not len(dwpose._find_boxes(session, np.asarray(picture())[..., ::-1])), "red is not blue"
    write_detector(tmp_path / "two", {FAINT: 0.5, PERSON: 0.9})
    session = dwpose.open_onnx(tmp_path / "two" / dwpose.DETECTOR, "dwpose")
    np.testing.assert_allclose(dwpose._find_boxes(session, np.asarray(picture())), [PERSON, FAINT], atol=0.01)


@installed
def test_points_are_mapped_back_to_the_picture(tmp_path: Path):
    """The second network's input is the box, upright and to scale, with the colours of its training."""
    write_finder(tmp_path)
    session = dwpose.open_onnx(tmp_path / dwpose.POINTS, "dwpose")
    for dot in ((160, 160), (130, 80), (199, 241)):
        points, _ = dwpose._find_points(session, np.asarray(picture(dot=dot)), np.array(PERSON))
        assert points.shape == (133, 2)
        # the dot is 5 pixels wide, and its first pixel of the crop is the one that is found
        assert np.abs(points - dot).max() <= 3.5


@installed
def test_the_skeleton_is_the_known_points_drawn_as_openpose_does(tmp_path: Path):
    points, trust = spread(), np.ones(133)
    trust[[9, 95]] = 0.2  # the left wrist and a knuckle are not visible
    write_detector(tmp_path, {PERSON: 0.9})
    write_points(tmp_path, points, trust)
    seen = np.where(trust[:, None] >= 0.3, to_picture(points), np.nan)
    names = "nose neck sho_r elb_r wri_r sho_l elb_l wri_l hip_r kne_r ank_r hip_l kne_l ank_l eye_r eye_l ear_r ear_l"
    coco = "nose eye_l eye_r ear_l ear_r sho_l sho_r elb_l elb_r wri_l wri_r hip_l hip_r kne_l kne_r ank_l ank_r"
    place = {name: seen[number] for number, name in enumerate(coco.split())}
    place["neck"] = (place["sho_l"] + place["sho_r"]) / 2
    person: Any = SimpleNamespace(
        body=np.stack([place[name] for name in names.split()]),
        hands=(seen[91:112], seen[112:133]),
        face=seen[23:91],
    )
    assert np.isnan(person.body).any(axis=1).sum() == 1
    assert np.array_equal(people_of(tmp_path, picture()), draw_people([person], *PICTURE))
    bare: Any = SimpleNamespace(body=person.body, hands=(None, None), face=None)
    assert np.array_equal(people_of(tmp_path, picture(), ",hands=false,face=false"), draw_people([bare], *PICTURE))


@installed
def test_without_people_the_map_is_black(tmp_path: Path):
    write_detector(tmp_path, {FAINT: 0.1})
    write_points(tmp_path, spread(), np.ones(133))
    for size in ((1, 1), (7, 300), (301, 40)):
        drawn = people_of(tmp_path, Image.new("RGB", size, "grey"))
        assert drawn.shape == (size[1], size[0], 3) and not drawn.any()


@installed
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (400, 300)])
def test_random_weights_make_equal_maps_of_any_picture_twice(size: tuple[int, int], tmp_path: Path):
    rng = np.random.default_rng(0)
    write_detector(tmp_path, {tuple(np.sort(rng.uniform(0, 300, (2, 2)), axis=0).reshape(-1)): 0.8 for _ in range(4)})
    write_finder(tmp_path)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    first, second = (people_of(tmp_path, image, ",visible=0") for _ in range(2))
    assert first.shape == (size[1], size[0], 3) and np.array_equal(first, second)


def test_faults_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"dwpose: people=0; allowed is 1 or more"):
        open_annotator("dwpose,people=0")
    with pytest.raises(UserError, match=r"dwpose: visible=2; allowed is 0 to 1"):
        open_annotator("dwpose,visible=2")
    with pytest.raises(UserError, match=r"has no weights \(\*\.onnx\)"):
        open_annotator(f"dwpose,model={tmp_path}")


@installed
def test_a_broken_file_is_named(tmp_path: Path):
    for name in (dwpose.DETECTOR, dwpose.POINTS):
        (tmp_path / name).write_bytes(b"no network")
    with pytest.raises(UserError, match=r"dwpose: .*yolox_l.onnx: cannot be loaded") as caught:
        people_of(tmp_path, picture())
    assert "\n" not in str(caught.value)


def test_weights_of_the_hub_are_pinned_and_folders_identified_by_content(tmp_path: Path):
    assert open_annotator("dwpose").options["revision"] == PINNED["yzd-v/DWPose"]
    write_detector(tmp_path, {PERSON: 0.9})
    first = open_annotator(f"dwpose,model={tmp_path}").fingerprint
    write_points(tmp_path / "other", spread(), np.ones(133))
    assert open_annotator(f"dwpose,model={tmp_path / 'other'}").fingerprint != first
