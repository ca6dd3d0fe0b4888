"""The Containerfile: what it copies exists and is sent to the builder, and what it pins is what pyproject.toml allows.

No test builds the image: that needs a container engine and the network.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from t2i_adapter import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = re.sub(r"\\\n\s*", " ", (ROOT / "Containerfile").read_text(encoding="utf-8"))
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints-image.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)
WORDS = ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


def arguments(word: str) -> list[str]:
    return [rest for name, rest in STEPS if name == word]


def test_every_step_is_one_that_builders_know():
    assert {name for name, _ in STEPS} <= set(WORDS)
    assert STEPS[0][0] == "FROM"


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    sources = [source for line in arguments("COPY") for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} is not sent to the builder"
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}


def test_the_package_gets_what_its_build_reads():
    sources = " ".join(arguments("COPY"))
    assert PROJECT["readme"] in sources
    for pattern in PROJECT["license-files"]:
        assert any(fnmatch(source, pattern) for source in sources.split())


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["s3"]])
def test_each_dependency_is_pinned_within_its_bounds(text: str):
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[requirement.name]), requirement.name


def test_the_image_has_a_python_that_the_package_supports():
    [base] = arguments("FROM")
    found = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert found and Requirement(f"python{PROJECT['requires-python']}").specifier.contains(found[1])


def test_it_runs_as_any_user_but_root_with_folders_that_all_may_write():
    [user] = arguments("USER")
    assert user.split(":")[0] not in ("root", "0")
    names = dict(word.split("=", 1) for line in arguments("ENV") for word in shlex.split(line))
    run = next(line for line in arguments("RUN") if "chmod 1777" in line)
    assert all(names[name].startswith("/cache") for name in ("HOME", "HF_HOME", "T2I_ADAPTER_CACHE"))
    assert names["USER"] and "/cache" in run and "/work" in run and arguments("WORKDIR") == ["/work"]


def test_its_command_is_the_package_s_own():
    assert arguments("ENTRYPOINT") == [f'["{cli.PROG}"]'] and cli.PROG in PROJECT["scripts"]
    assert "[s3]" in TEXT and set(re.findall(r"/build\[([\w,]+)\]", TEXT)) <= set(PROJECT["optional-dependencies"])
