"""`runs ls`, `runs compare` and `runs report`: what they print and write, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.run_folders import advice, entries_of, gain_entry, write_pictures, write_run

from t2i_adapter.cli import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three runs in `runs`, which is the present folder."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "late", entries_of(400), record={"outcome": "finished", "started": 1.75e9}, steps=400)
    notes = [advice(200, "read"), advice(400, "not_read")]
    stopped = {"outcome": "stopped", "reason": "SIGTERM", "started": 1.7e9}
    write_run(tmp_path / "runs" / "early one", [*entries_of(400), *notes], record=stopped)
    write_run(tmp_path / "runs" / "deep" / "killed", record={"started": 1.72e9})
    return tmp_path


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_ls_prints_a_line_for_each_run_by_its_start(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *rows = lines_of(capsys, "ls")
    assert head.split() == ["run", "state", "step", "loss", "benefit", "score", "samples/s", "time", "advice"]
    assert [row[: head.index("state")].strip() for row in rows] == ["'runs/early one'", "runs/deep/killed", "runs/late"]
    assert [row[head.index("state") : head.index("step")].strip() for row in rows] == ["stopped", "killed", "finished"]
    assert rows[0].endswith("the condition is not read, step 400") and "400/1,000" in rows[0]
    assert "16 % (14 to 18 %)" in rows[2] and " 0.43 (0.41 to 0.45) " in rows[2] and "\033" not in head + rows[2]
    assert len(lines_of(capsys, "ls", "runs/deep", "runs/deep/killed")) == 2, "a run that is found twice has one line"


def test_the_score_of_validation_pictures_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1, "control": 0.5}, {"step": 2, "control": 0.75}])
    assert (
        " 0.75 " in lines_of(capsys, "ls", str(tmp_path))[1] and "0.5" not in lines_of(capsys, "ls", str(tmp_path))[1]
    )
    assert main(["runs", "report", str(folder)]) == 0
    assert "<title>score: 0.75 at 2</title>" in (folder / "report.html").read_text()


def test_ls_json_has_plain_values(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(runs / "runs" / "first look", [gain_entry(1, 0.1, benefit={"mean": 0.1, "low": float("-inf")})])
    listed = json.loads("\n".join(lines_of(capsys, "ls", "--json")), parse_constant=pytest.fail)
    by_name = {Path(run["folder"]).name: run for run in listed}
    assert set(by_name) == {"late", "early one", "killed", "first look"}
    assert by_name["late"]["state"] == "finished" and by_name["late"]["gain"]["step"] == 400
    assert by_name["early one"]["resume"].startswith("t2i-adapter train") and by_name["late"]["resume"] == ""
    assert by_name["first look"]["gain"]["benefit"] == {"mean": 0.1, "low": None, "high": None}
    assert by_name["first look"]["folder"] == str(folder.relative_to(runs))


def test_ls_has_colours_on_a_terminal_only(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    plain = lines_of(capsys, "ls")
    monkeypatch.setattr("t2i_adapter.verbs.runs._is_terminal", lambda: True)
    coloured = lines_of(capsys, "ls")
    assert "\033[31m  killed\033[0m" in coloured[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert lines_of(capsys, "ls") == [line[:60] for line in plain]


def test_ls_without_runs_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines_of(capsys, "ls") == ["No run was found in runs and ., up to 3 folders deep."]
    assert lines_of(capsys, "ls", "--json") == ["[]"]
    assert main(["runs", "ls", "nowhere"]) == 2
    assert "error: nowhere: No such file or directory; name a folder" in capsys.readouterr().err


def test_hostile_names_and_texts_do_not_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [*entries_of(200), advice(200, "\033[2J\u202ex\ny")]
    write_run(tmp_path / "a\033[31m\nb", entries, record={})
    shown = lines_of(capsys, "ls", str(tmp_path))
    assert len(shown) == 2 and "\033" not in "".join(shown) and "\u202e" not in "".join(shown)


def test_compare_prints_the_differences_and_writes_the_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "runs" / "late" / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries_of(2000)))
    write_pictures(runs / "runs" / "late", [0, 400], side=8)
    shown = lines_of(capsys, "compare", "runs/late", "runs/early one", "--out", "out")
    text = "\n".join(shown)
    assert "At step 400 early one is not shown to differ from late in benefit" in text
    assert "At the last steps, 400 and 2,000, early one is worse than late in benefit: 16 %" in text
    assert text.count("the two intervals are compared") == 1
    assert ["train.max_steps", "400", "1000"] in [line.split() for line in shown]
    assert shown[-1] == "The page is out/compare.html" and "early one" in (runs / "out" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "runs/late"], "FOLDERS 1 runs are given; allowed are 2 to 8"),
        (["compare", *["runs/late"] * 9], "FOLDERS 9 runs are given; allowed are 2 to 8"),
        (["compare", "runs/late", "runs"], "runs: no run was found in this folder"),
        (["compare", "runs/late", "nowhere"], "nowhere: No such file"),
        (["report", "runs"], "runs: no run was found in this folder"),
    ],
)
def test_what_is_no_run_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["runs", *words]) == 2
    assert message in capsys.readouterr().err


def test_report_writes_the_page_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines_of(capsys, "report", "runs/late")
    assert shown == [
        "Finished after 400 updates: not yet decided, after 2 looks, whether the condition is read.",
        "The page is runs/late/report.html",
    ]
    assert "<h1>Finished after 400 updates" in (runs / "runs" / "late" / "report.html").read_text()


def test_lists_load_no_torch_and_no_pictures(runs: Path) -> None:
    code = "import sys; from t2i_adapter.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    heavy = {"torch", "diffusers", "transformers", "accelerate", "datasets", "cv2"}
    for words in (["ls"], ["compare", "runs/late", "runs/early one"], ["report", "runs/late"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "runs", *words],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=runs,
            check=True,
        )
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "t2i_adapter.runs.read" in loaded and not loaded & heavy
        if words == ["ls"]:
            assert "PIL" not in loaded
