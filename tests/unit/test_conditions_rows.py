"""Rules for every kind without weights: size, mode, levels, polarity, determinism, options; any picture file."""

from __future__ import annotations

import pickle
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_adapter.annotators.registry import TABLE, annotate, find_plugin, open_annotator, open_recorded
from t2i_adapter.data.shapes import render, sample_scene
from t2i_adapter.errors import UserError
from t2i_adapter.verbs.annotate import AnnotateOptions, run

LOCAL = [name for name in TABLE if not find_plugin(name).facts.weights and not find_plugin(name).facts.needs]
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (33, 65), (640, 16)]


def scene(size: int = 128, number: int = 25) -> Image.Image:
    return render(sample_scene(0, number), size)


def noise(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def test_there_are_the_kinds_that_need_no_weights():
    assert {*LOCAL} >= {
        *("canny", "lineart", "sketch", "scribble", "lines", "palette", "grey", "tile", "blur", "mask", "normal")
    }


@pytest.mark.parametrize("name", LOCAL)
def test_declares_all_facts_that_are_printed(name: str):
    plugin = find_plugin(name)
    assert (
        plugin.facts.licence and plugin.__doc__ and all(f"`{field.name}`" in plugin.__doc__ for field in fields(plugin))
    )
    assert isinstance(plugin.facts.version, int) and plugin.facts.version >= 1


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_map_has_the_declared_mode_and_the_pictures_size(name: str, size: tuple[int, int]):
    annotator = open_annotator(name)
    for picture in (noise(size), Image.new("RGB", size, "teal"), Image.new("RGB", size)):
        condition = annotate(annotator, picture, "a")
        assert (condition.size, condition.mode) == (size, "L" if annotator.facts.channels == 1 else "RGB")
        assert np.asarray(condition).dtype == np.uint8


@pytest.mark.parametrize("name", LOCAL)
def test_the_map_is_deterministic_and_the_picture_unchanged(name: str):
    picture = scene()
    before = picture.tobytes()
    first = annotate(open_annotator(name), picture, "row 7")
    annotate(open_annotator(name), noise((64, 64)), "row 8")
    again = annotate(pickle.loads(pickle.dumps(open_annotator(name))), picture, "row 7")
    assert first.tobytes() == again.tobytes() and picture.tobytes() == before
    assert np.unique(np.asarray(first)).size > 1, "the map is not empty"


@pytest.mark.parametrize("name", LOCAL)
def test_levels_and_polarity_are_as_declared(name: str):
    annotator = open_annotator(name)
    values = np.asarray(annotate(annotator, scene(256), "a"))
    assert (np.unique(values).size == 2) == (annotator.facts.levels == 2)
    if annotator.facts.polarity == "white on black":
        assert values.mean() < 128, "most of the map is background"
        assert not np.asarray(annotate(annotator, Image.new("RGB", (64, 64), "white"), "a")).any(), (
            "a white picture has an empty map"
        )


@pytest.mark.parametrize("name", LOCAL)
def test_every_option_goes_into_the_specification_and_the_record_and_back(name: str):
    plugin = find_plugin(name)
    defaults = asdict(plugin())
    settings = ",".join(f"{key}={value}" for key, value in defaults.items())
    full = open_annotator(f"{name},{settings}" if settings else name)
    plain = open_annotator(name)
    assert full.fingerprint == plain.fingerprint and full.options == defaults
    again = open_recorded(plain.record())
    assert (again.fingerprint, again.options, again.name) == (plain.fingerprint, plain.options, name)


@pytest.mark.parametrize(
    "changed", ["canny,low=50", "canny,vary=1", "sketch,random_threshold=true", "palette,cell=32", "normal,relief=1"]
)
def test_other_options_are_other_conditions(changed: str):
    plain, other = open_annotator(changed.split(",")[0]), open_annotator(changed)
    assert other.fingerprint != plain.fingerprint
    assert open_recorded(other.record()).fingerprint == other.fingerprint


def test_a_record_of_another_version_is_refused():
    with pytest.raises(UserError, match="canny: version 99 made the adapter's conditions, and version 1 is installed"):
        open_recorded({**open_annotator("canny").record(), "version": 99})


WRONG = (
    *("canny,low=300", "canny,vary=-1", "lineart,sigma=0", "sketch,threshold=1", "sketch,sigma=0", "sketch,gain=0"),
    *("scribble,pen=2", "lines,shortest=-1", "palette,cell=0", "tile,factor=0.5", "blur,sigma=0", "mask,margin=0.5"),
    *("normal,relief=0", "normal,smooth=-1"),
)


@pytest.mark.parametrize("spec", WRONG)
def test_an_error_names_the_value_and_what_is_allowed(spec: str):
    name, _, setting = spec.partition(",")
    with pytest.raises(UserError, match=f"{name}: .*{setting.split('=')[0]}=.*(allowed|needed) is"):
        open_annotator(spec)


def test_the_facts_of_a_plug_in_are_checked(tmp_path: Path):
    body = """
from dataclasses import dataclass
from t2i_adapter.annotators.registry import Facts
@dataclass(frozen=True)
class Wrong:
    facts = Facts({declared})
    def __call__(self, image, rng): return image.convert("L")
"""
    file = tmp_path / "wrong.py"
    for declared, message in {
        "channels=2, levels=256": r"channels = 2; allowed is one of 1, 3",
        'polarity="white"': r"polarity = 'white'; allowed is one of white on black",
        "version=None": r"version = None; allowed is a whole number",
    }.items():
        file.write_text(body.format(declared=declared))
        with pytest.raises(UserError, match=message):
            open_annotator(f"{file}:Wrong")
    file.write_text(body.format(declared="levels=2"))
    with pytest.raises(UserError, match="returned greys, but its facts declare 2 levels"):
        annotate(open_annotator(f"{file}:Wrong"), noise((8, 8)))
    file.write_text(body.format(declared="channels=3"))
    with pytest.raises(UserError, match="returned L, 8x8, for an image of 8x8; needed is RGB"):
        annotate(open_annotator(f"{file}:Wrong"), noise((8, 8)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (31, 17)], ids=str)
def test_any_picture_file_is_annotated(tmp_path: Path, mode: str, size: tuple[int, int]):
    grey = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(255 - grey))
    file = tmp_path / f"photo.{'tiff' if mode == 'CMYK' else 'png'}"
    picture.save(file)
    for name in ("grey", "palette", "canny"):
        run(AnnotateOptions(kind=name, photo=file, out=tmp_path / "map.png"))
        assert Image.open(tmp_path / "map.png").size == size
    run(AnnotateOptions(kind="grey", photo=file, out=tmp_path / "map.png"))
    values = np.asarray(Image.open(tmp_path / "map.png")).astype(int)
    white = grey.astype(float) * (255 - grey) / 255 + grey if mode == "RGBA" else grey  # laid over white
    if mode != "1":  # which is dithered
        assert np.abs(values - white).max() <= 1
