"""Names and captions in Japanese work with any encoding of the output: each verb ends well."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import train_words
from support.tiny import write_circles

from t2i_adapter.cli import main


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset データ, whose pictures and captions have Japanese names."""
    folder = tmp_path_factory.mktemp("絵本")
    data = write_circles(folder / "データ", num=4)
    write_circles(data, num=2, split="test", seed=1)
    for split in (data / "train", data / "test"):
        rows = [json.loads(line) for line in (split / "metadata.jsonl").read_text().splitlines()]
        for row in rows:
            for column in ("file_name", "conditioning_image_file_name"):
                name = f"絵{row[column]}"
                (split / row[column]).rename(split / name)
                row[column] = name
            row["text"] = f"赤い円 {row['text']}"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def said(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a verb in `work` with both outputs in an encoding; returns the exit code and what was printed."""
    monkeypatch.chdir(work)

    def run(encoding: str, *words: str) -> tuple[int, str]:
        raw = io.BytesIO()
        streams = [io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        try:
            code = main(words)
        finally:
            for stream in streams:
                stream.flush()
                stream.detach()
            monkeypatch.undo()
            os.chdir(work)
        return code, raw.getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16-le"])
def test_every_verb(tiny_base: Path, work: Path, said: Callable[..., tuple[int, str]], encoding: str):
    data, out = "データ", f"出力-{encoding}"
    picture, test_picture = f"{data}/train/絵00000.png", f"{data}/test/絵00000_outline.png"
    training = train_words(tiny_base, data, f"{out}/走", "--tracking.report_to=tensorboard")[1:]
    validation = ["--validation.prompts=赤い円", f"--validation.images={test_picture}", "--validation.steps=1"]
    generating = ["--prompt=赤い円", f"--image={test_picture}", "--steps=1", f"--out={out}/絵"]
    verbs = (
        (["doctor", data, "--measure=0", "--workers=0", f"--html={out}.html"], (0, 1)),
        (["plan", *training, "--no-probe"], (0,)),
        (["prepare", *training], (0,)),
        (["train", *training, *validation, "--validation.num_images=1"], (0,)),
        (["train", *training], (2,)),
        (["generate", "--adapter", f"{out}/走", *generating], (0,)),
        (["evaluate", "--adapter", f"{out}/走", "--data", data, "--num=2", "--steps=1", f"--out={out}/評"], (0,)),
        (["annotate", "canny", picture, f"--out={out}/一.png"], (0,)),
        (["annotate", "canny", "--data", data, f"--out={out}/線", "--workers=0"], (0,)),
        (["make-data", "shapes", f"--out={out}/作", "--num=2", "--num_test=1", "--size=64"], (0,)),
        (["cache", "ls"], (0,)),
        (["cache", "verify"], (0,)),
        (["conditions"], (0,)),
        (["push", "--folder=無い"], (2,)),
        (["verify-resume", *training, "--steps=2"], (0,)),
        (["間違い"], (2,)),
    )  # fmt: skip
    printed = ""
    for words, codes in verbs:
        code, text = said(encoding, *words)
        assert code in codes, (words, text)
        printed += text
    assert ("出力" if encoding == "utf-16-le" else "\\u51fa\\u529b") in printed
    text = next(iter((work / out / "絵").glob("*.json"))).read_text(encoding="utf-8")
    assert "赤い円" in text


def test_a_name_that_is_not_utf8_is_printed_as_an_escape(said: Callable[..., tuple[int, str]]):
    code, text = said("utf-8", "make-data", "shapes", f"--out={os.fsdecode(bytes([0xE9]))}", "--num=2", "--num_test=1")
    assert code == 0 and "\\udce9" in text


def in_process(work: Path, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "t2i_adapter", *words]
    return subprocess.run(command, cwd=work, env={**os.environ, **env}, capture_output=True, timeout=200)


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_a_process_of_its_own(work: Path, env: dict[str, str]):
    done = in_process(work, "make-data", "shapes", "--out=作" + "".join(env), "--num=2", "--num_test=1", **env)
    assert (done.returncode, done.stderr) == (0, b"")
    done = in_process(work, "make-data", "shapes", "--out=無", "--num=無い", **env)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_error(work: Path, closed: str):
    command = (
        f'"{sys.executable}" -m t2i_adapter make-data shapes --out="closed {closed}" --num=2 --num_test=1 {closed}'
    )
    done = subprocess.run(["bash", "-c", command], cwd=work, capture_output=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (work / f"closed {closed}" / "train" / "metadata.jsonl").is_file()


def test_a_line_about_an_error_that_nobody_reads_still_exits_with_2(work: Path):
    command = f'exec "{sys.executable}" -m t2i_adapter make-data shapes --num x 2>/dev/full'
    assert subprocess.run(["bash", "-c", command], cwd=work, capture_output=True, timeout=200).returncode == 2
