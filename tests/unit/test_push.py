"""Publishing to a hub on loopback: which files are uploaded, and what an error prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.push_hub import TOKEN, Hub, running_hub

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import write_card
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import Metadata

PROGRAM = """
import sys
from t2i_adapter.errors import UserError
from t2i_adapter.export.hub import push_command
from t2i_adapter.verbs.push import PushOptions, run
folder, token, model_id, license = sys.argv[1:]
try:
    run(PushOptions(folder=folder, token=token or None, model_id=model_id or None, license=license or None))
except UserError as error:
    print(error, file=sys.stderr)
    print(push_command(folder, "someone/x"), file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder as training writes it, with private files beside the adapter."""
    folder = tmp_path_factory.mktemp("run") / "my-adapter"
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    metadata = Metadata.from_dict({"base": {"name": str(tiny_base)}, "resolution": 64})
    save_adapter(adapter, folder, metadata=metadata)
    write_card(folder, metadata=metadata, repo_id=str(folder))
    for name in ("checkpoint-10/optimizer.safetensors", "logs/events", "images/private.png", "notes.txt", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    (folder / "images" / "sample_00.png").write_bytes(b"a picture")
    return folder


def publish(
    hub: Hub, folder: Path, token: str = TOKEN, model_id: str = "", license: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE")
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), token, model_id, license],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_only_the_adapter_its_record_card_and_pictures_are_uploaded(hub: Hub, finished: Path) -> None:
    done = publish(hub, finished, license="mit")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/someone/my-adapter/commit/1" in done.stdout
    assert hub.repositories == {"someone/my-adapter": True}, "named by the folder, private"
    uploaded = {name.removeprefix("someone/my-adapter/"): content for name, content in hub.files.items()}
    assert set(uploaded) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "t2i_adapter.json",
        "images/sample_00.png",
    }
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "README.md"):
        assert uploaded[name] == (finished / name).read_bytes()
    assert b"license: mit" in uploaded["README.md"]
    assert b"T2IAdapter.from_pretrained('someone/my-adapter', " in uploaded["README.md"]
    assert str(finished.parent).encode() not in b"".join(uploaded.values()), "no local path is uploaded"
    assert json.loads(uploaded["t2i_adapter.json"])["base"]["name"] == "tiny", "not its local path"
    for content in uploaded.values():
        assert TOKEN.encode() not in content
    assert TOKEN not in done.stdout + done.stderr + str(hub.requests)
    # Again, to the repository that exists now, by its full name.
    assert publish(hub, finished, model_id="someone/my-adapter").returncode == 0


def test_errors_are_one_line_without_the_token(hub: Hub, finished: Path) -> None:
    def refused(**how: str) -> str:
        done = publish(hub, finished, **how)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr + done.stdout
        line, again = done.stderr.strip().splitlines()[-2:]
        assert again == f"t2i-adapter push --folder {finished} --model_id someone/x"
        return line

    assert "Invalid user token" in refused(token="hf_wrong")
    assert "the request to the hub failed" in refused(token=f"{TOKEN}\nX")  # the client quotes a header it cannot send
    assert "403" in refused(model_id="others/x")
    assert "a b/c" in refused(model_id="a b/c")
    hub.fail_commits = True
    assert "the hub is on fire" in refused()
    hub.role = "read"
    assert "the token is read-only" in refused()
    assert not hub.files, "nothing was uploaded"


def test_a_hub_that_cannot_be_reached(finished: Path) -> None:
    done = publish(Hub(address="http://127.0.0.1:9"), finished)
    assert done.returncode == 2
    assert "the request to the hub failed" in done.stderr
    assert "Traceback" not in done.stderr
