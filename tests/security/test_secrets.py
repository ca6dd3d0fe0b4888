"""Plants tokens and passwords, and searches all files and all output for them."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.push_hub import TOKEN, running_hub
from support.runs import train_words

from t2i_adapter.cli import main
from t2i_adapter.config.tree import DataOptions
from t2i_adapter.data.source import open_source
from t2i_adapter.errors import UserError, redact, register_secret

ENVIRONMENT = {
    "HF_TOKEN": "hf_planted-in-the-environment",
    "WANDB_API_KEY": "planted0wandb0key0" + "0" * 22,
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-key",
}
LOGIN, PASSWORD = "planted-user", "planted-password"


def run(*words: str, cwd: Path, **environment: str) -> str:
    """Runs a program that may fail; returns its output."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.stdout


def carriers(folder: Path, *secrets: str) -> list[str]:
    """Files that contain a secret, as plain text or in base64."""
    needles = [form for one in secrets for form in (one.encode(), base64.b64encode(one.encode())[:-4])]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [f"{path}: {needle!r}" for path in files for needle in needles if needle in path.read_bytes()]


def test_no_secret_is_in_the_files_or_output_of_a_published_run(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    """A run with checkpoints, trackers, card and upload."""
    with running_hub() as hub:
        output = run(
            *("-m", "t2i_adapter", "train", "--base.name", str(tiny_base), "--data", str(tiny_data)),
            *("--data.resolution", "64", "--train.batch_size", "2", "--train.max_steps", "2", "--train.seed", "0"),
            *("--checkpoint.every", "1", "--output_dir", "run", "--data.prepared_dir", "cache"),
            *("--tracking.report_to", "tensorboard,wandb", "--hub.push", "--hub.token", TOKEN),
            *("--validation.prompts", "a", "--validation.images", str(tiny_data / "train" / "00000_outline.png")),
            *("--validation.steps", "1", "--validation.num_images", "1"),
            cwd=tmp_path,
            HF_ENDPOINT=hub.address,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
        assert "Published" in output, output
        planted = (TOKEN, *ENVIRONMENT.values())
        assert [one for one in planted if one in output] == []
        assert carriers(tmp_path, *planted) == []
        assert [name for name, content in hub.files.items() if any(one.encode() in content for one in planted)] == []
        assert any(path.name.startswith("checkpoint-") for path in (tmp_path / "run").iterdir())
        assert any("tfevents" in path.name for path in (tmp_path / "run").rglob("*")), "no tracker has written"


def test_a_traceback_is_shown_without_secrets(tmp_path: Path):
    """An error that is not the user's keeps its traceback, in which libraries may quote their arguments."""
    program = (
        "import os\nfrom t2i_adapter.cli import guarded\nfrom t2i_adapter.config.tree import HubOptions\n"
        f"HubOptions(token={TOKEN!r})\n"
        "def crash():\n"
        "    raise RuntimeError('401 for ' + os.environ['HF_TOKEN'] + ' at https://u:planted-password@h/x, "
        f"{TOKEN}')\n"
        "guarded(crash)\n"
    )
    (tmp_path / "crash.py").write_text(program.replace(repr(TOKEN), "os.environ['PLANTED']").replace(TOKEN, "x"))
    output = run(str(tmp_path / "crash.py"), cwd=tmp_path, PLANTED=TOKEN)
    assert "Traceback" in output and "RuntimeError: 401 for [secret] at https://h/x" in output
    assert ENVIRONMENT["HF_TOKEN"] not in output and "u:planted" not in output.splitlines()[-1]


def test_a_registered_secret_is_removed_from_every_message():
    register_secret("planted-in-this-test")
    assert str(UserError("the hub says: planted-in-this-test is wrong")) == "the hub says: [secret] is wrong"
    assert redact("s3://key:word@bucket/x and https://h/a.tar?X-Amz-Signature=ab12 fail") == (
        "s3://bucket/x and https://h/a.tar?... fail"
    )


@pytest.mark.parametrize("flag", ["--hub.tokn=", "--hub_tokens=", "--token=", "--hub.token-="])
def test_a_misspelt_flag_does_not_show_its_token(flag: str, capsys: pytest.CaptureFixture[str]):
    secret = f"hf_planted{abs(hash(flag))}"
    assert main(["train", f"{flag}{secret}"]) == 2
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err


def test_a_token_in_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hub:\n  token: hf_planted-in-a-recipe\n")
    assert main(["train", "--recipe", str(recipe)]) == 2
    output = capsys.readouterr().err
    assert "is a secret, which a recipe may not hold" in output and "hf_planted-in-a-recipe" not in output


ADDRESS = f"https://{LOGIN}:{PASSWORD}@127.0.0.1:9/{{000..003}}.tar"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", ADDRESS, "--output_dir", "run"],
        ["prepare", "--data", ADDRESS],
        ["doctor", ADDRESS],
        ["annotate", "canny", "--data", ADDRESS, "--out", "out"],
        ["train", "--data", f"s3://{LOGIN}:{PASSWORD}@bucket/0.tar", "--output_dir", "run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_an_address_with_a_password_is_refused_without_showing_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "may not hold a login" in captured.err and "~/.netrc" in captured.err
    assert PASSWORD not in captured.err + captured.out and LOGIN not in captured.err + captured.out
    assert carriers(tmp_path, PASSWORD) == []


def test_an_address_with_a_password_in_a_row_is_refused_and_not_logged(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [
        {"image": str(path), "conditioning_image": str(path), "text": "a"}
        for path in sorted((tiny_data / "train").glob("0000?.png"))
    ]
    address = f"http://{LOGIN}:{PASSWORD}@127.0.0.1:9/x.png"
    rows.append({"image": address, "conditioning_image": address, "text": "a"})
    table = tiny_data / "train" / "rows.jsonl"
    table.write_text("".join(json.dumps({**row}) + "\n" for row in rows))
    out = tmp_path / "run"
    try:
        skip = ["--data.on_bad_sample", "skip", "--data.max_bad_share", "0.5"]
        assert main(train_words(tiny_base, table, out, "--train.batch_size", 1, *skip)) == 0
    finally:
        table.unlink()
    captured = capsys.readouterr()
    assert "x.png" in (out / "bad_samples.jsonl").read_text()
    assert PASSWORD not in captured.err + captured.out
    assert carriers(tmp_path, PASSWORD) == []


@pytest.fixture
def locked() -> Iterator[str]:
    """URL of a web server that requires a login."""
    wanted = "Basic " + base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers.get("Authorization") == wanted
            body = b'{"image": "x.png", "conditioning_image": "x.png", "text": "a"}\n' if is_known else b""
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    finally:
        server.shutdown()
        server.server_close()


def test_a_login_comes_from_netrc(locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error about an address with a password advises this."""
    options = DataOptions(location=locked, prepared_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="401"):
        open_source(options, seed=0)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {LOGIN} password {PASSWORD}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert len(open_source(options, seed=0)) == 1
    assert carriers(tmp_path / "cache", PASSWORD) == []


def test_an_endless_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server may send a picture without end; the disk must not fill up."""
    from t2i_adapter.data import store

    monkeypatch.setattr(store, "_UNKNOWN_BYTES", 2**20)
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(1_000):
                    self.wfile.write(bytes(2**20))
                    sent.append(1)
            except OSError:
                pass

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        folder = tmp_path / "data"
        folder.mkdir()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        row = {"image": address, "conditioning_image": address, "text": "a"}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        options = DataOptions(location=str(folder / "rows.jsonl"), prepared_dir=str(tmp_path / "cache"))
        with pytest.raises(UserError, match="sends more than 1,048,576 bytes"):
            open_source(options, seed=0)[0]
    finally:
        server.shutdown()
        server.server_close()
    assert len(sent) < 500
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) == 0
