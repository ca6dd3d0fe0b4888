"""Downloading from a hub on loopback: which files come, what is refused, and what is printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import save
from support.hub_verbs import run_verbs
from support.push_hub import TOKEN, Hub, running_hub

from t2i_adapter.config.tree import AdapterOptions, BaseOptions
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import write_card
from t2i_adapter.flags import parse_flags
from t2i_adapter.models.adapter import build_adapter, load_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import Metadata
from t2i_adapter.verbs.generate import GenerateOptions

WEIGHTS, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an adapter as `push` uploads them, with a pickle and a script beside them."""
    folder = tmp_path_factory.mktemp("pull")
    torch.manual_seed(0)
    metadata = Metadata(
        base={"name": "owner/base"},
        condition={"name": "canny", "options": {"low": 50.0}, "polarity": "white on black", "channels": 3},
        resolution=64,
        steps=7,
        sampling={"scale": 0.8},
    )
    adapter = build_adapter(AdapterOptions(), open_base(BaseOptions(name=str(tiny_base))).unet_config)
    save_adapter(adapter, folder, metadata=metadata)
    write_card(folder, metadata=metadata, repo_id="others/canny")
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    extra = {
        "diffusion_pytorch_model.bin": b"a pickle",
        "run_me.py": b"raise SystemExit",
        "images/sample_00.png": b"p",
        "images/../up.png": b"p",
        "images/a b.png": b"p",
        "unet/config.json": b"{}",
    }
    return {**found, **extra, "evaluation.json": b"{}", "recipe.yaml": b"train: {}\n"}


def test_an_adapter_comes_with_its_files_and_no_others(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("others/canny", files)
    done, again = run_verbs(hub, ["pull", "others/canny"], ["pull", "others/canny"], cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "canny"
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    own = {"config.json", WEIGHTS, FP16, "t2i_adapter.json", "README.md", "evaluation.json", "recipe.yaml"}
    assert found == {name: files[name] for name in (*own, "images/sample_00.png")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canny"], "no temporary folder stays"
    load_adapter(str(out))
    assert "canny: exists and is not an empty folder" in again.error
    lines = " ".join(done.out.split())
    assert "full_adapter_xl for SDXL" in lines and "owner/base" in lines and "at 64 px, 7 updates" in lines
    assert "canny; low 50.0; white on black; 3 channels" in lines and "scale 0.8" in lines
    assert "not downloaded: 1 pickled files, such as diffusion_pytorch_model.bin" in lines
    assert not [line for line in hub.requests if ".bin" in line or ".py" in line]
    words = shlex.split(done.out.splitlines()[-1])
    assert words[:4] == ["t2i-adapter", "generate", "--adapter", "canny"] and "--photo" in words
    monkeypatch.chdir(tmp_path)
    assert parse_flags(GenerateOptions, words[2:], "t2i-adapter").adapter == ("canny",), "the command parses"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    model = hub.add("others/canny", files)
    later = {**files, "README.md": b"---\n---\nsecond"}
    first, second = model.branches["main"], model.add(later, "second")
    model.branches["next"], model.tags["v1"] = second, first
    revisions = ["next", "v1", second]
    words = [["pull", "others/canny", "--revision", name, "--out", str(n)] for n, name in enumerate(revisions)]
    *done, missing = run_verbs(hub, *words, ["pull", "others/canny", "--revision", "v9"], cwd=tmp_path)
    assert [each.code for each in done] == [0, 0, 0]
    cards = [(tmp_path / str(n) / "README.md").read_bytes() for n in range(3)]
    assert cards == [later["README.md"], files["README.md"], later["README.md"]]
    assert second in done[0].out
    assert "Name a branch, tag or commit" in missing.error and not (tmp_path / "canny").exists()


def test_an_adapter_of_another_trainer(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """It has no record, and here only the fp16 weights."""
    hub.add("others/plain", {name: files[name] for name in ("config.json", FP16)})
    record = b'{"base": {"name": "a/b"}, "condition": {"name": "drawn-by-hand"}}'
    hub.add("others/own", {**{name: files[name] for name in ("config.json", WEIGHTS)}, "t2i_adapter.json": record})
    done, own = run_verbs(hub, ["pull", "others/plain"], ["pull", "others/own"], cwd=tmp_path)
    assert own.code == 0 and "drawn-by-hand" in own.out and "--photo" not in own.out and "--base" not in own.out
    assert done.code == 0, done.err
    assert "not recorded" in done.out and "--base BASE" in done.out and "--image" in done.out
    full, half = load_adapter(str(tmp_path / "plain")), T2IAdapter.from_pretrained(tmp_path / "plain", variant="fp16")
    for name, tensor in full.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, half.state_dict()[name].float())


def changed_config(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    return {**files, "config.json": json.dumps({**json.loads(files["config.json"]), **changes}).encode()}


def other_weights(files: dict[str, bytes], change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, bytes]:
    from safetensors.torch import load

    tensors = load(files[WEIGHTS])
    change(tensors)
    return {**files, WEIGHTS: save(tensors)}


def test_what_is_no_adapter_is_refused_in_one_line(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.popitem()

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["evil"] = torch.zeros(1)

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name][:1].clone()

    no_weights = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    faults = {
        "pickled": (no_weights, "its weights are pickled (diffusion_pytorch_model.bin)"),
        "model": ({"model_index.json": b"{}"}, "holds no adapter"),
        "empty": ({}, "it holds nothing"),
        "unet": (changed_config(files, _class_name="UNet2DConditionModel"), "is that of UNet2DConditionModel"),
        "huge": (changed_config(files, channels=[10**9]), "channels[0] is 1000000000"),
        "layers": (changed_config(files, num_res_blocks=3), "weights are missing"),
        "kind": (changed_config(files, adapter_type="evil"), "adapter_type is evil"),
        "json": ({**files, "config.json": b"["}, "cannot be read as JSON"),
        "cut": ({**files, WEIGHTS: files[WEIGHTS][:1000]}, "is not a complete safetensors file"),
        "pickle-inside": ({**files, WEIGHTS: b"\x80\x04" + bytes(1000)}, "is not a complete safetensors file"),
        "bomb": ({**files, WEIGHTS: files[WEIGHTS] + bytes(9 * 2**20)}, "describes"),
        "text-bomb": ({**files, "README.md": bytes(21 * 2**20)}, "README.md has 22.0 MB"),
        "missing": (other_weights(files, drop), "1 weights are missing"),
        "more": (other_weights(files, add), "it has other weights too, such as evil"),
        "shape": (other_weights(files, reshape), "has the shape"),
        "record": ({**files, "t2i_adapter.json": b'{"base": {}}'}, "base.name"),
    }
    for name, (content, _) in faults.items():
        hub.add(f"others/{name}", content)
    found = run_verbs(hub, *(["pull", f"others/{name}"] for name in faults), cwd=tmp_path)
    for (name, (_, text)), done in zip(faults.items(), found, strict=True):
        assert text in done.error, name
        assert "/tmp" not in done.error.replace(str(tmp_path), ""), done.error
    assert list(tmp_path.iterdir()) == [], "nothing of a refused adapter stays"


def test_missing_private_gated_and_offline(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("others/gated", files, gated=True)
    hub.add("someone/private", files, private=True)
    gone, gated, hidden, odd, own = run_verbs(
        hub,
        ["pull", "others/gone"],
        ["pull", "others/gated", "--token", TOKEN],
        ["pull", "someone/private"],
        ["pull", "a b/c"],
        ["pull", "someone/private", "--token", TOKEN, "--out", "mine"],
        cwd=tmp_path,
    )
    assert "RepositoryNotFoundError" in gone.error and "Check the name" in gone.error
    assert "Accept the repository's conditions" in gated.error and "Check the name" in hidden.error
    assert "ACCOUNT/NAME" in odd.error
    assert own.code == 0 and (tmp_path / "mine" / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert TOKEN not in "".join(part for done in (gone, gated, hidden, own) for part in done[1:])
    [offline] = run_verbs(hub, ["pull", "others/gone"], cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "Unset HF_HUB_OFFLINE" in offline.error
    [unreachable] = run_verbs(Hub(address="http://127.0.0.1:9"), ["pull", "others/gone"], cwd=tmp_path)
    assert "Check the connection" in unreachable.error


def test_what_push_uploads_pull_brings_back(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("config.json", WEIGHTS, FP16, "t2i_adapter.json", "README.md"):
        (folder / name).write_bytes(files[name])
    sent, got = run_verbs(
        hub,
        ["push", "--folder", folder, "--token", TOKEN, "--tag", "v1"],
        ["pull", "someone/made", "--token", TOKEN, "--revision", "v1", "--out", "back"],
        cwd=tmp_path,
    )
    assert sent.code == got.code == 0, sent.err + got.err
    for name in ("config.json", WEIGHTS, FP16):
        assert (tmp_path / "back" / name).read_bytes() == files[name]
