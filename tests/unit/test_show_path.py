"""Paths and commands that are printed can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from t2i_adapter.files import show_command, show_path

NAMES = [
    "plain/file.png",
    "a b",
    "it's",
    '"',
    "$HOME",
    "`id`",
    "*",
    "x\ny",
    "\t",
    "a\\n'\n",
    "絵本",
    "é\udce9",
    "!1",
    "#a",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_back_the_path(name: str):
    done = subprocess.run(["bash", "-c", f"printf %s {show_path(name)}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(name)
    assert show_path(name).isprintable()


def test_an_ordinary_path_is_not_quoted():
    assert show_path("runs/demo/adapter-1_a.png") == "runs/demo/adapter-1_a.png"


def test_a_leading_dash_is_no_flag_and_a_home_folder_stays_one():
    assert show_path("-rf") == "./-rf"
    assert show_path("~/my runs") == "~/'my runs'"
    assert show_path("~") == "'~'"  # a folder of that name: the home folder is never printed so


def test_a_command_has_the_words_that_it_was_made_of():
    words = ["t2i-adapter", "push", "--folder", Path("my run"), "--model_id", "me/it's"]
    assert shlex.split(show_command(*words)) == [str(word) for word in words]
