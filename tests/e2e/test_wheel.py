"""The wheel holds the package, the pages of the studio and the weights of nano. It installs into an empty environment,
and trains there.

The empty environment takes the dependencies from the environment of the tests, through a path file, so that nothing is
downloaded. The package itself comes from the wheel alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from t2i_adapter import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")
HOOK = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
"""Calls a build hook of pyproject.toml's build backend: build_wheel or build_sdist, with the folder of its result."""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a program that finds neither the sources nor a folder of PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def build(hook: str, tree: Path, out: Path) -> Path:
    out.mkdir()
    run(sys.executable, "-c", HOOK, hook, out, cwd=tree)
    (result,) = out.iterdir()
    return result


def contents(wheel: Path) -> dict[str, int]:
    """{name: CRC-32} of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that it leaves no files in the working tree."""
    root = tmp_path_factory.mktemp("wheel") / "tree"
    root.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for leftover in [*root.rglob("__pycache__"), *root.rglob("*.egg-info")]:
        shutil.rmtree(leftover)
    return root


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build("build_wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def programs(wheel: Path) -> Path:
    """Folder of the programs of a new environment in which the wheel is installed."""
    place = wheel.parent.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=wheel.parent)
    folder = place / ("Scripts" if os.name == "nt" else "bin")
    install = ("install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", folder / "python", *install, wheel, cwd=wheel.parent)
    packages = Path(run(folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_the_package_its_pages_and_nano_alone(wheel: Path):
    assert wheel.name == f"sdxl_t2i_adapter-{__version__}-py3-none-any.whl"
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    package = ROOT / "src" / "t2i_adapter"
    nano = {path for path in (package / "models" / "nano").rglob("*") if path.is_file()}
    pages = {path for kind in ("css", "html", "js") for path in (package / "reports").glob(f"*.{kind}")}
    assert len(pages) == 4
    studio = {path for path in (package / "studio" / "web").rglob("*") if path.is_file()}
    assert {"app.js", "index.html", "ui.js", "LICENSES", "vendor.json"} <= {path.name for path in studio}
    known = package / "models" / "known.json"
    wanted = {*package.rglob("*.py"), *nano, *pages, *studio, known, package / "py.typed"}
    assert names == {path.relative_to(ROOT / "src").as_posix() for path in wanted if "__pycache__" not in path.parts}
    assert sum(name.endswith(".safetensors") for name in names) == 4


def test_the_sdist_builds_the_same_wheel(tree: Path, wheel: Path):
    sdist = build("build_sdist", tree, tree.parent / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree.parent / "unpacked", filter="data")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    again = build("build_wheel", unpacked, tree.parent / "wheel-of-sdist")
    assert contents(again) == contents(wheel)


def test_an_empty_environment_trains_with_the_wheel(programs: Path, tmp_path: Path):
    place = run(programs / "python", "-c", "import t2i_adapter; print(t2i_adapter.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(programs.parent)
    assert "train" in run(programs / "t2i-adapter", "--help", cwd=tmp_path)
    data = ("--data", "shapes:8", "--data.resolution", "128")
    length = ("--train.batch_size", "2", "--train.max_steps", "2")
    run(programs / "t2i-adapter", "train", *data, *length, "--output_dir", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "diffusion_pytorch_model.safetensors").is_file()
