"""Scenes: seed and index determine them, their maps are exact, and captions name their shapes."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.data import shapes
from t2i_adapter.data.shapes import Background, Scene, Shape
from t2i_adapter.errors import UserError

PLAIN = Background("plain", "blue", "white")


def one(kind="circle", color="red", center=(0.5, 0.5), radius=0.25, angle=0.0):
    return Shape(kind, color, center, radius, angle)


def test_scene_is_a_function_of_seed_and_index():
    assert shapes.sample_scene(3, 7) == shapes.sample_scene(3, 7)
    assert shapes.sample_scene(3, 7) != shapes.sample_scene(3, 8)
    assert shapes.sample_scene(3, 7) != shapes.sample_scene(4, 7)


@pytest.mark.parametrize("index", range(40))
def test_dict_round_trip_through_json(index):
    scene = shapes.sample_scene(1, index)
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("caption"), "caption"),
        (lambda d: d.update(shapes="circle"), "shapes"),
        (lambda d: d["shapes"][0].update(kind="blob"), "blob"),
        (lambda d: d["shapes"][0].update(color="reddish"), "reddish"),
        (lambda d: d["shapes"][0].update(radius=0), "radius"),
        (lambda d: d["shapes"][0].update(radius="big"), "radius"),
        (lambda d: d["shapes"][0].update(center=[0.5]), "center"),
        (lambda d: d["shapes"][0].update(center=["a", "b"]), "center"),
        (lambda d: d["background"].update(pattern="tartan"), "tartan"),
        (lambda d: d["background"].pop("accent"), "accent"),
    ],
)
def test_an_error_in_a_dict_names_the_field(change, says):
    data = Scene((one(),), PLAIN, "red circle with blue background").to_dict()
    change(data)
    with pytest.raises(ValueError, match=says):
        Scene.from_dict(data)


def test_not_a_mapping():
    with pytest.raises(ValueError, match="mapping"):
        Scene.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_render_agrees_with_mask(kind):
    scene = Scene((one(kind),), PLAIN, "")
    picture = np.asarray(shapes.render(scene, 128))
    (mask,) = shapes.visible_masks(scene, 128)
    red, blue = (picture == (255, 0, 0)).all(-1), (picture == (0, 0, 255)).all(-1)
    assert 0.03 < mask.mean() < 0.25
    assert not (red & ~mask).any() and not (blue & mask).any()
    assert (~red & ~blue).mean() < 0.05  # antialiased rim


def test_circle_has_its_area_and_place():
    (mask,) = shapes.visible_masks(Scene((one(center=(0.25, 0.75), radius=0.125),), PLAIN, ""), 512)
    assert mask.mean() == pytest.approx(np.pi * 0.125**2, rel=0.01)
    np.testing.assert_allclose(np.argwhere(mask).mean(axis=0) + 0.5, (384, 128), atol=0.5)


def test_front_hides_back():
    back, front = one(center=(0.4, 0.5)), one("square", "lime", center=(0.6, 0.5))
    masks = shapes.visible_masks(Scene((back, front), PLAIN, ""), 128)
    assert not (masks[0] & masks[1]).any()
    alone = shapes.visible_masks(Scene((front,), PLAIN, ""), 128)[0]
    np.testing.assert_array_equal(masks[1], alone)
    background = shapes.background_mask(Scene((back, front), PLAIN, ""), 128)
    np.testing.assert_array_equal(background, ~masks.any(axis=0))


@pytest.mark.parametrize("kind", shapes.CONDITIONS)
@pytest.mark.parametrize("size", [64, 128, 200])
def test_conditions_are_rgb_of_the_picture_s_size(kind, size):
    condition = shapes.condition(shapes.sample_scene(0, 5), size, kind)
    assert condition.mode == "RGB" and condition.size == (size, size)
    assert np.asarray(condition).max() > 0


def test_outline_lies_on_the_rim():
    scene = Scene((one(),), PLAIN, "")
    lines = np.asarray(shapes.condition(scene, 128, "outline"))[..., 0] > 0
    y, x = np.nonzero(lines)
    distance = np.hypot(x + 0.5 - 64, y + 0.5 - 64)
    assert np.abs(distance - 32).max() < 1.5
    assert 0.8 * 2 * np.pi * 32 < lines.sum() < 1.6 * 2 * np.pi * 32


def test_depth_is_brighter_in_front():
    back, front = one(center=(0.3, 0.5), radius=0.2), one(center=(0.7, 0.5), radius=0.15)
    depth = np.asarray(shapes.condition(Scene((back, front), PLAIN, ""), 128, "depth"))[..., 0]
    assert depth[64, 90] > depth[64, 38] > depth[2, 2] > 0


def test_segmentation_has_one_colour_a_kind():
    scene = Scene((one("heart"),), PLAIN, "")
    pixels = np.asarray(shapes.condition(scene, 64, "segmentation"))
    assert tuple(pixels[32, 32]) == shapes.SEGMENTATION_COLORS["heart"]
    assert tuple(pixels[0, 0]) == (0, 0, 0)


def test_palette_has_eight_cells_a_side():
    pixels = np.asarray(shapes.condition(shapes.sample_scene(0, 5), 128, "palette"))
    cells = pixels[::16, ::16]
    np.testing.assert_array_equal(pixels, cells.repeat(16, axis=0).repeat(16, axis=1))


def test_unknown_condition():
    with pytest.raises(ValueError, match="outline"):
        shapes.condition(shapes.sample_scene(0, 0), 64, "pose")


def test_captions_name_colours_and_kinds():
    forms = set()
    for index in range(400):
        scene = shapes.sample_scene(5, index)
        text = scene.caption
        for shape in scene.shapes:
            assert shape.kind in text
            assert shape.color in text or shapes.SPACED[shape.color] in text
        assert scene.background.color in text or shapes.SPACED[scene.background.color] in text
        assert scene.background.pattern == "plain" or scene.background.pattern in text
        if scene.background.accent not in text and shapes.SPACED[scene.background.accent] not in text:
            assert scene.background.accent == shapes.default_accent(scene.background.color)
        forms.add(len(scene.shapes))
    assert forms == {1, 2, 3}


def test_fill50k_s_forms_occur():
    texts = [shapes.sample_scene(0, i, max_shapes=1).caption for i in range(600)]
    assert any(" circle with " in t and t.endswith(" background") and not t.startswith("a ") for t in texts)
    assert any("floral background" in t and " circle with " in t for t in texts)
    assert shapes.SPACED["palegoldenrod"] == "pale golden rod" and shapes.SPACED["oldlace"] == "old lace"


def test_limits_of_sampling():
    scenes = [shapes.sample_scene(2, i, max_shapes=1, patterns=("plain",)) for i in range(50)]
    assert all(len(s.shapes) == 1 and s.background.pattern == "plain" for s in scenes)
    assert {shapes.sample_scene(2, i, patterns=("dotted",)).background.pattern for i in range(20)} == {"dotted"}


def test_colours_are_css_s():
    assert len(shapes.COLORS) == 148
    assert shapes.COLORS["rebeccapurple"] == (102, 51, 153)


def test_write_dataset(tmp_path):
    folder = shapes.write_dataset(tmp_path, num=3, split="train", seed=4, size=64, condition="canny")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert folder == tmp_path / "train" and len(rows) == 3
    for row in rows:
        assert set(row) == {"file_name", "conditioning_image_file_name", "text", "shapes", "scene"}
        scene = Scene.from_dict(json.loads(row["scene"]))
        assert row["text"] == scene.caption
        picture = np.asarray(Image.open(folder / row["file_name"]))
        np.testing.assert_array_equal(picture, np.asarray(shapes.render(scene, 64)))
        condition = np.asarray(Image.open(folder / row["conditioning_image_file_name"]))
        np.testing.assert_array_equal(condition, np.asarray(shapes.condition(scene, 64, "canny")))


def test_splits_share_no_scene(tmp_path):
    scenes = {}
    for split in shapes.SPLITS:
        folder = shapes.write_dataset(tmp_path, num=20, split=split, size=32)
        rows = (folder / "metadata.jsonl").read_text().splitlines()
        scenes[split] = {json.loads(row)["scene"] for row in rows}
    assert not scenes["train"] & scenes["test"]


def test_write_refuses_unknown_options(tmp_path):
    with pytest.raises(UserError, match="validation"):
        shapes.write_dataset(tmp_path, num=1, split="validation")
    with pytest.raises(UserError, match="pose"):
        shapes.write_dataset(tmp_path, num=1, condition="pose")
    shapes.write_dataset(tmp_path, num=1, size=32)
    with pytest.raises(UserError, match="already"):
        shapes.write_dataset(tmp_path, num=1, size=32)
    shapes.write_dataset(tmp_path, num=2, size=32, overwrite=True)
