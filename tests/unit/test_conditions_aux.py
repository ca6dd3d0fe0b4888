"""Detectors of controlnet_aux: their calls, and the errors if the package or the weights are missing."""

from __future__ import annotations

import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_adapter.annotators.pretrained import PINNED
from t2i_adapter.annotators.registry import annotate, open_annotator
from t2i_adapter.annotators.runtime import tensors_only
from t2i_adapter.errors import UserError

FILES = {
    "pidinet": ["table5_pidinet.pth"],
    "teed": ["5_model.pth"],
    "lineart-net": ["sk_model.pth", "sk_model2.pth"],
    "mlsd": ["mlsd_large_512_fp32.pth"],
    "normal-bae": ["scannet.pt"],
}
installed = pytest.mark.skipif(find_spec("controlnet_aux") is None, reason="needs sdxl-t2i-adapter[controlnet-aux]")
missing = pytest.mark.skipif(find_spec("controlnet_aux") is not None, reason="controlnet_aux is installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (name for names in FILES.values() for name in names):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@missing
@pytest.mark.parametrize("kind", list(FILES))
def test_without_the_package_the_error_names_what_to_install(kind: str, folder: Path):
    with pytest.raises(UserError, match=r"pip install 'sdxl-t2i-adapter\[controlnet-aux\]'") as caught:
        annotate(open_annotator(f"{kind},model={folder}"), Image.new("RGB", (8, 8)))
    assert str(caught.value).startswith(f"condition {kind}: needs the package of controlnet_aux")


@pytest.mark.parametrize("kind", list(FILES))
def test_a_folder_is_identified_by_the_weights_of_the_kind(kind: str, folder: Path):
    revision = open_annotator(f"{kind},model={folder}").options["revision"]
    (folder / "another.pth").write_bytes(b"of another kind")
    assert revision.startswith("sha256:")
    for name in FILES[kind]:
        (folder / "copy").mkdir(exist_ok=True)
        for each in FILES[kind]:
            (folder / "copy" / each).write_bytes(each.encode() + (b"!" if each == name else b""))
    assert open_annotator(f"{kind},model={folder / 'copy'}").options["revision"] != revision


@pytest.mark.parametrize("kind", sorted({*FILES} - {"teed"}))
def test_weights_of_the_hub_are_pinned(kind: str):
    options = open_annotator(kind).options
    assert options["revision"] == PINNED[options["model"]]


@pytest.mark.parametrize("kind", list(FILES))
def test_faults_are_one_line(kind: str, tmp_path: Path):
    with pytest.raises(UserError, match="resolution=32; allowed is 64 or more"):
        open_annotator(f"{kind},resolution=32")
    with pytest.raises(UserError, match="the folder has no weights"):
        open_annotator(f"{kind},model={tmp_path}")


def test_only_tensors_are_read(tmp_path: Path):
    """Also if a detector's own code would unpickle any object."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "bomb.pth")
    before = dict(os.environ)
    with pytest.raises(pickle.UnpicklingError), tensors_only():
        torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert not (tmp_path / "exploded").exists()
    assert dict(os.environ) == before
    torch.save({"weight": torch.ones(2)}, tmp_path / "fine.pth")
    with tensors_only():
        assert torch.load(tmp_path / "fine.pth")["weight"].sum() == 2


@installed
@pytest.mark.parametrize(("width", "height"), [(200, 130), (1, 1), (1, 300)])
def test_pidinet_with_random_weights_draws_a_map_of_any_image(width: int, height: int, tmp_path: Path):
    from controlnet_aux.pidi.model import pidinet

    torch.manual_seed(0)
    torch.save({"state_dict": pidinet().state_dict()}, tmp_path / "table5_pidinet.pth")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    annotator = open_annotator(f"pidinet,resolution=64,model={tmp_path}")
    first, second = (annotate(annotator, image) for _ in range(2))
    assert first.tobytes() == second.tobytes()
