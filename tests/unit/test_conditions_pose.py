"""Poses: joints of a known figure, and the drawing of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from t2i_adapter.annotators import weights
from t2i_adapter.annotators.mirror import HUES, JOINT_TWINS, LIMB_BRIGHTNESS, exchange_sides
from t2i_adapter.annotators.pose import MESH_68, Region, _anchors, _around, _groups, _hand, find_people
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.annotators.skeleton import FINGERS, KNUCKLE, LIMBS, Skeleton, draw_people
from t2i_adapter.errors import UserError

pytest.importorskip("ai_edge_litert", reason="needs sdxl-t2i-adapter[pose]")
with_weights = pytest.mark.skipif(not weights.have("pose"), reason=f"the networks are not here: {weights.COMMAND} pose")

ASTRONAUT = Path(__file__).parents[1] / "assets" / "astronaut.jpg"  # NASA, public domain
JOINTS = {
    0: (0.441, 0.240),
    1: (0.402, 0.473),
    2: (0.205, 0.453),
    5: (0.598, 0.492),
    14: (0.396, 0.197),
    15: (0.484, 0.201),
}
"""Nose, neck, shoulders and eyes of the astronaut, x and y in [0,1], read off the picture by eye."""
FACE = {30: (0.441, 0.246), 48: (0.400, 0.275), 54: (0.477, 0.279), 68: (0.396, 0.197), 69: (0.484, 0.201)}
"""Tip of the nose, corners of the mouth, pupils."""


def astronaut(size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.open(ASTRONAUT).convert("RGB")
    return image if size is None else image.resize(size)


def distance(points: np.ndarray, truth: dict[int, tuple[float, float]], side: int) -> float:
    """Returns the largest distance, relative to the picture's side."""
    return max(float(np.hypot(*(points[n] / side - place))) for n, place in truth.items())


def mirrored(points: np.ndarray, width: float, twins: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Returns the points of the mirror image, with left and right exchanged."""
    order = list(range(len(points)))
    for right, left in twins:
        order[right], order[left] = left, right
    return points[order] * (-1, 1) + (width, 0)


@with_weights
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [320, 512])
def test_joints_of_a_known_figure_are_within_3_percent(side: int, flip: bool):
    image = astronaut((side, side))
    (person,) = find_people(np.asarray(ImageOps.mirror(image) if flip else image), 4, True, True, 0.5)
    body = mirrored(person.body, side, JOINT_TWINS) if flip else person.body
    assert distance(body, JOINTS, side) < 0.03
    assert np.isnan(body[[9, 10, 12, 13]]).all()  # knees and feet are not in the picture
    assert person.face is not None
    if not flip:
        assert distance(person.face, FACE, side) < 0.02


@with_weights
def test_a_figure_in_a_corner_of_a_wide_picture():
    wide = Image.new("RGB", (700, 320), (90, 120, 150))
    wide.paste(astronaut((320, 320)), (380, 0))
    (person,) = find_people(np.asarray(wide), 4, False, True, 0.5)
    head = {joint: JOINTS[joint] for joint in (0, 14, 15)}  # the chest seems to end at the photo's edge
    assert distance(person.body - (380, 0), head, 320) < 0.02
    assert person.face is not None
    assert distance(person.face - (380, 0), FACE, 320) < 0.02


@with_weights
def test_a_leaning_figure():
    leaning = astronaut((320, 320)).rotate(-25, Image.Resampling.BICUBIC, fillcolor=(120, 120, 120))
    (person,) = find_people(np.asarray(leaning), 4, False, True, 0.5)
    turn = np.radians(25)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    assert person.face is not None
    upright = (person.face - 160) @ rotation + 160
    assert distance(upright, FACE, 320) < 0.02


def drawn_hand() -> Image.Image:
    """A right hand's back, or a left hand's palm, fingers up, in 400 x 400."""
    canvas, skin = np.full((400, 400, 3), (70, 90, 110), np.uint8), (214, 162, 130)
    cv2.line(canvas, (200, 400), (200, 300), skin, 70)
    cv2.ellipse(canvas, (200, 260), (62, 75), 0, 0, 360, skin, -1)
    for root, tip in zip(ROOTS, TIPS, strict=True):
        cv2.line(canvas, root, tip, skin, 34 if root == ROOTS[0] else 28)
    canvas = cv2.GaussianBlur(canvas, (0, 0), 2)
    for tip in TIPS:
        cv2.ellipse(canvas, tip, (8, 10), 0, 0, 360, (235, 200, 185), -1)
    return Image.fromarray(canvas)


ROOTS = ((150, 270), (155, 210), (187, 195), (220, 200), (248, 220))
TIPS = ((95, 205), (140, 85), (190, 55), (240, 75), (285, 125))
PARTS = np.array(
    [(200, 370), (250, 215), (155, 210)], float
)  # wrist, little finger and index, as the body's network returns them


@with_weights
@pytest.mark.parametrize("degrees", [0, 35, -120, 180])
def test_fingers_of_a_drawn_hand_are_found_however_it_is_turned(degrees: float):
    ground = (70, 90, 110)
    wide = Image.new("RGB", (1000, 1000), ground)
    wide.paste(drawn_hand(), (300, 300))
    turned = wide.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=ground)  # clockwise
    turn = np.radians(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = _hand(np.asarray(turned), (PARTS - 200) @ rotation.T + 500)
    assert points is not None
    tips = ((points - 500) @ rotation + 200)[4::4]
    assert np.hypot(*(tips - TIPS).T).max() < 0.03 * 400


@with_weights
def test_no_hand_is_found_where_there_is_none():
    assert _hand(np.full((400, 400, 3), 110, np.uint8), PARTS) is None
    assert _hand(np.asarray(drawn_hand()), np.where([[True], [False], [False]], np.nan, PARTS)) is None


@with_weights
def test_two_people():
    wide = Image.new("RGB", (640, 320))
    wide.paste(astronaut((320, 320)), (0, 0))
    wide.paste(ImageOps.mirror(astronaut((320, 320))), (320, 0))
    people = find_people(np.asarray(wide), 4, False, False, 0.5)
    assert sorted(person.body[0, 0] > 320 for person in people) == [False, True]
    assert len(find_people(np.asarray(wide), 1, False, False, 0.5)) == 1


@with_weights
def test_without_people_the_map_is_black():
    gradient = np.broadcast_to(np.linspace(0, 255, 90, dtype=np.uint8)[:, None, None], (90, 120, 3))
    assert not np.asarray(annotate(open_annotator("pose"), Image.fromarray(gradient.copy()))).any()


@with_weights
@pytest.mark.parametrize(("width", "height"), [(161, 97), (1, 1), (1, 70)])
def test_any_size_and_the_same_each_time(width: int, height: int):
    first, second = (annotate(open_annotator("pose"), astronaut((width, height))) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@with_weights
def test_face_and_hands_can_be_left_out():
    whole = np.asarray(annotate(open_annotator("pose"), astronaut()))
    body = np.asarray(annotate(open_annotator("pose,face=false,hands=false"), astronaut()))
    assert (whole == 255).all(axis=2).sum() > 100  # points of the face are white
    assert not (body == 255).all(axis=2).any()
    assert body.any()


@pytest.fixture
def figure() -> np.ndarray:
    """18 joints of someone who waves, in a picture of 512."""
    return np.array(
        [(256, 90), (256, 150), (206, 152), (170, 230), (150, 300), (306, 152), (360, 110), (380, 40), (226, 300),
         (216, 390), (206, 480), (286, 300), (296, 390), (310, 482), (244, 78), (268, 78), (228, 86), (284, 86)],
        float,
    )  # fmt: skip


def test_joints_and_limbs_have_openposes_colours(figure: np.ndarray):
    drawn = draw_people([Skeleton(figure, (None, None), None)], 512, 512)
    for joint, (x, y) in enumerate(figure.astype(int)):
        assert hue_and_value(drawn[y, x]) == (joint, 1.0)
    for number, limb in enumerate(LIMBS[:13]):  # those of the head are shorter than the joints' dots are wide
        x, y = figure[list(limb)].mean(axis=0).astype(int)
        assert hue_and_value(drawn[y, x]) == (number, LIMB_BRIGHTNESS)
    assert not drawn[0].any()


def hue_and_value(pixel: np.ndarray) -> tuple[int, float]:
    hsv = cv2.cvtColor(pixel[None, None].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[0, 0]
    return round(float(hsv[0]) * HUES / 360) % HUES, round(float(hsv[2]), 1)


def test_a_mirrored_figure_is_the_mirrored_map_with_sides_exchanged(figure: np.ndarray):
    drawn = draw_people([Skeleton(figure, (None, None), None)], 512, 512)
    exchanged = np.asarray(ImageOps.mirror(exchange_sides(Image.fromarray(drawn), "pose")))
    other = Skeleton(mirrored(figure, 511, JOINT_TWINS), (None, None), None)
    redrawn = draw_people([other], 512, 512)
    differ = (np.abs(exchanged.astype(int) - redrawn) > 8).any(axis=2).sum() / redrawn.any(axis=2).sum()
    assert differ < 0.1  # at edges, where dots and limbs of the other side were drawn in another order
    plain = np.asarray(ImageOps.mirror(Image.fromarray(drawn)))
    assert (np.abs(plain.astype(int) - redrawn) > 8).any(axis=2).sum() / redrawn.any(axis=2).sum() > 0.5


def test_invisible_joints_are_not_drawn(figure: np.ndarray):
    figure[4] = np.nan
    drawn = draw_people([Skeleton(figure, (None, None), None)], 512, 512)
    assert not drawn[300, 150].any()
    assert not drawn[265, 160].any()
    assert drawn[230, 170].any()


def test_hands_have_twenty_bones_and_blue_knuckles():
    assert len(set(FINGERS)) == 20
    assert {end for _, end in FINGERS} == set(range(1, 21))
    points = np.array([(100 + 15 * (n % 5), 400 - 12 * n) for n in range(21)], float)
    body = np.full((18, 2), np.nan)
    drawn = draw_people([Skeleton(body, (points, None), None)], 512, 512)
    for x, y in points.astype(int):
        assert tuple(drawn[y, x]) == KNUCKLE


def test_a_skeleton_grows_with_the_picture(figure: np.ndarray):
    small = draw_people([Skeleton(figure, (None, None), None)], 512, 512)
    large = draw_people([Skeleton(figure * 2, (None, None), None)], 1024, 1024)
    assert large.any(axis=2).mean() == pytest.approx(small.any(axis=2).mean(), rel=0.1)


@pytest.mark.parametrize("turn", [0.0, 0.7, -2.5])
@pytest.mark.parametrize("side", [60.0, 900.0])
def test_a_region_is_cropped_at_its_place(turn: float, side: float):
    """A spot of the picture is found in the crop, and its position is mapped back to the picture."""
    picture = np.zeros((200, 300, 3), np.uint8)
    spot = np.array([140.0, 88.0])
    cv2.circle(picture, (140, 88), 6, (255, 255, 255), -1)
    region = Region(np.array([150.0, 100.0]), side, turn)
    seen = region.crop(picture, 128)[..., 0]
    rows, columns = np.indices(seen.shape) + 0.5
    centre = np.array([(seen * columns).sum(), (seen * rows).sum()]) / seen.sum() / 128
    assert np.hypot(*(region.to_picture(centre[None])[0] - spot - 0.5)) < 0.005 * side


def test_a_region_around_points_holds_them_upright():
    points = np.array([(10.0, 10.0), (110.0, 60.0), (60.0, 35.0)])
    region = _around(points, np.arctan2(50, 100), 1.5)
    assert region.side == pytest.approx(1.5 * np.hypot(100, 50))
    np.testing.assert_allclose(region.middle, (60, 35))
    np.testing.assert_allclose(region.to_picture(np.array([[0.5 - 1 / 3, 0.5]]))[0], (10, 10))


def test_anchors_are_the_middles_of_the_cells():
    anchors = _anchors()
    assert anchors.shape == (2254, 2)
    np.testing.assert_allclose(anchors[0], 0.5 / 28)
    np.testing.assert_allclose(anchors[1], anchors[0])
    np.testing.assert_allclose(anchors[2], (1.5 / 28, 0.5 / 28))
    np.testing.assert_allclose(anchors[-1], 6.5 / 7)


def test_detections_of_one_person_are_one():
    boxes = np.array([(0, 0, 1, 1), (2, 2, 3, 3), (0.1, 0, 1.1, 1), (0, 0.2, 1, 1.2)], float)
    groups = _groups(boxes, np.array([0.6, 0.8, 0.9, 0.7]))
    assert [sorted(group.tolist()) for group in groups] == [[0, 2, 3], [1]]
    assert groups[0][0] == 2
    assert _groups(boxes[:0], np.zeros(0)) == []


def test_the_faces_points_are_different_ones():
    assert len(MESH_68) == len(set(MESH_68)) == 68


def test_faults_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="people=0; allowed is 1 or more"):
        open_annotator("pose,people=0")
    with pytest.raises(UserError, match="visible=2; allowed is a probability"):
        open_annotator("pose,visible=2")
    monkeypatch.setenv(weights.FOLDER, str(tmp_path))
    from t2i_adapter.annotators.runtime import open_tflite

    open_tflite.cache_clear()
    with pytest.raises(UserError, match=r"pose: .*no such file; download it with `python -m .* pose`"):
        annotate(open_annotator("pose"), Image.new("RGB", (8, 8)))
