"""What a finished run prints: what it reached, where its files are, and commands that work when they are pasted."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from support.runs import tiny_config, train_words
from support.tiny import write_circles

from t2i_adapter.cli import main
from t2i_adapter.errors import Stopped, UserError
from t2i_adapter.runs.read import read_run
from t2i_adapter.verbs import train


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs `train` and returns the lines of its summary, the first of which is "Done"."""

    def run(*words: str) -> list[str]:
        capsys.readouterr()
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        return lines[lines.index("Done") :]

    return run


def value(lines: list[str], name: str) -> str:
    """What the row `name` of a summary says."""
    (row,) = [line for line in lines if line.startswith(f"  {name} ")]
    return row.removeprefix(f"  {name}").strip()


def commands(lines: list[str]) -> list[list[str]]:
    """The words of each command below "Next", as a shell reads them, without `t2i-adapter`."""
    found = [shlex.split(line) for line in lines[lines.index("Next") + 1 :]]
    assert {words[0] for words in found} == {"t2i-adapter"}
    return [words[1:] for words in found]


def test_the_summary_has_what_was_reached_and_commands_that_work(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, end: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    out, data = Path("my 'run' $1"), tmp_path / "my data"
    shutil.copytree(tiny_data, data)
    picture = str(data / "test" / "00000_outline.png")
    validation = ["--validation.prompts=red circle", f"--validation.images={picture}", "--validation.steps=1"]
    words = train_words(tiny_base, data, out, *validation, "--validation.judge=canny", "--validation.num_images=1")
    lines = end(*words, "--train.max_steps=2", "--checkpoint.every=1", "--tracking.log_every=1")
    assert len(lines) <= 15
    assert value(lines, "updates").startswith("2 of 2; 4 samples in ")
    assert value(lines, "loss").endswith(" over the last 2 updates")
    assert "the best" in value(lines, "score") and value(lines, "peak memory").endswith("of the main process")
    files = {"adapter": "", "pictures": "validation", "log": "metrics.jsonl", "page": "report.html"}
    for name, place in ((name, out / file) for name, file in files.items()):
        assert shlex.split(value(lines, name)) == [str(place)] and place.exists()
    assert shlex.split(value(lines, "checkpoints"))[0] == str(out / "checkpoint-2")
    assert value(lines, "checkpoints").endswith(" and 1 before it")
    generate, evaluate, push = commands(lines)
    assert generate[-4:] == ["--prompt", "red circle", "--image", picture]
    assert main([*generate, "--steps=1", "--out=pictures"]) == 0
    assert main([*evaluate, "--steps=1", "--num=2", "--out=evaluation"]) == 0
    assert push == ["push", "--folder", str(out)]


def test_without_validation_the_first_pair_is_the_example(
    tiny_base: Path, tmp_path: Path, end: Callable[..., list[str]]
):
    data = write_circles(tmp_path / "data", num=3)
    generate, evaluate, _ = commands(end(*train_words(tiny_base, data, tmp_path / "run")))
    assert generate[-2:] == ["--image", str(data / "train" / "00000_outline.png")]
    assert generate[4].endswith("background") and evaluate[-2:] == ["--data", "HELD_OUT_PAIRS"]
    assert main([*generate, "--steps=1", f"--out={tmp_path / 'pictures'}"]) == 0


def test_conditions_of_an_annotator_are_made_of_a_photo(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, end: Callable[..., list[str]]
):
    words = train_words(tiny_base, tiny_data, tmp_path / "run", "--data.condition=canny", "--data.background=black")
    generate, evaluate, _ = commands(end(*words))
    assert generate[-2:] == ["--photo", str(tiny_data / "train" / "00000.png")]
    assert evaluate[-4:] == ["--data", str(tiny_data), "--background", "black"]
    assert main([*generate, "--steps=1", f"--out={tmp_path / 'pictures'}"]) == 0
    assert main([*evaluate, "--steps=1", "--num=2", f"--out={tmp_path / 'evaluation'}"]) == 0


def test_rendered_pairs_have_no_files(tiny_base: Path, tmp_path: Path, end: Callable[..., list[str]]):
    generate, evaluate, _ = commands(end(*train_words(tiny_base, "shapes:4", tmp_path / "run")))
    assert generate[-2:] == ["--image", "PICTURE"] and evaluate[-2:] == ["--data", "shapes:4"]


def test_a_resumed_run_counts_its_own_updates(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, end: Callable[..., list[str]]
):
    words = train_words(tiny_base, tiny_data, tmp_path / "run", "--checkpoint.resume=auto")
    end(*words)
    lines = end(*words, "--train.max_steps=3")
    assert value(lines, "updates").startswith("3 of 3, 2 of them after the resume; 4 samples in ")


def test_a_run_leaves_a_record_and_a_page_when_it_stops_and_when_it_ends(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    config = tiny_config(tiny_base, tiny_data, out, {"train.max_steps": 2, "checkpoint.resume": "auto"})
    with pytest.raises(Stopped):
        train.run(config, stop_after=1)
    run = read_run(out)
    assert (run.state, run.step, run.steps) == ("stopped", 1, 2)
    assert run.reason == "Stopped after step 1 of 2: stop_after is reached."
    page = (out / "report.html").read_text()
    assert "<h1>Stopped at step 1 of 2:" in page and run.resume_command in unescape(page)
    command = shlex.split(run.resume_command)
    assert command[0] == "t2i-adapter" and main([*command[1:], "--train.max_steps=3"]) == 0
    resumed = read_run(out)
    assert (resumed.state, resumed.step, resumed.steps, resumed.started) == ("finished", 3, 3, run.started)
    assert resumed.record["first_step"] == 1 and resumed.record["global_batch"] == 2
    assert "<h1>Finished after 3 updates:" in (out / "report.html").read_text()
    with pytest.raises(UserError, match="has checkpoint-"):
        train.run(tiny_config(tiny_base, tiny_data, out))
    assert read_run(out).state == "finished", "a refused run changes nothing"
