"""Publishing to a hub on loopback: which files are uploaded, where to, and what an error prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.hub_verbs import Done, run_verbs
from support.push_hub import TOKEN, Hub, Repository, running_hub
from support.runs import train_words

from t2i_adapter.cli import main
from t2i_adapter.config.recipe import dump, load
from t2i_adapter.config.tree import AdapterOptions, BaseOptions, Config, DataOptions, ValidationOptions
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import write_card
from t2i_adapter.export.hub import push_command
from t2i_adapter.models.adapter import build_adapter
from t2i_adapter.models.open import open_base
from t2i_adapter.models.record import Metadata

FILES = {
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "t2i_adapter.json",
    "recipe.yaml",
    "images/sample_00.png",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder as training writes it, with private files beside the adapter. Read only."""
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
    data = DataOptions(location=f"{folder.parent}/secret-project/photos")
    prompts = ValidationOptions(prompts=("a sign: yes/no",), images=(f"{folder.parent}/a.png",))
    options = Config(output_dir=str(folder), data=data, validation=prompts)
    (folder / "options.yaml").write_text(dump(options))
    return folder


def push(hub: Hub, folder: Path, *more: str, token: str = TOKEN, **environment: str) -> Done:
    words = ["push", "--folder", str(folder), "--token", token, *more]
    return run_verbs(hub, words, cwd=folder.parent, **environment)[0]


def test_only_the_adapter_and_what_describes_it_are_uploaded(hub: Hub, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done, again = run_verbs(
        hub,
        ["push", "--folder", finished, "--token", TOKEN, "--license", "mit"],
        ["push", "--folder", finished, "--token", TOKEN, "--model_id", "someone/my-adapter"],
        cwd=finished.parent,
    )
    assert done.code == 0, done.err
    assert done.out.startswith(f"{hub.address}/someone/my-adapter/commit/")
    assert again.code == 0, "to the repository that exists now, by its full name"
    assert hub.repositories == {"someone/my-adapter": True}, "named by the folder, private"
    model = hub.models["someone/my-adapter"]
    uploaded = model.commits[done.out.strip().rpartition("/")[2]]
    assert set(uploaded) == FILES
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert uploaded[name] == (finished / name).read_bytes()
    assert b"license: mit" in uploaded["README.md"]
    assert b"T2IAdapter.from_pretrained('someone/my-adapter', " in uploaded["README.md"]
    assert str(finished.parent).encode() not in b"".join(uploaded.values()), "no local path is uploaded"
    assert b"secret-project" not in b"".join(uploaded.values())
    assert json.loads(uploaded["t2i_adapter.json"])["base"]["name"] == "tiny", "not its local path"
    for content in uploaded.values():
        assert TOKEN.encode() not in content
    assert TOKEN not in done.out + done.err + str(hub.requests)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_the_published_recipe_trains_and_has_no_folders(hub: Hub, finished: Path, tmp_path: Path) -> None:
    assert push(hub, finished, "--dry_run", "--out", str(tmp_path / "files")).code == 0
    config = load(tmp_path / "files" / "recipe.yaml", Config())
    assert config.data.location == "photos" and config.output_dir == "my-adapter"
    assert config.validation.prompts == ("a sign: yes/no",) and config.validation.images == ("a.png",)
    (tmp_path / "on-hub").mkdir()
    options = tmp_path / "on-hub" / "options.yaml"
    options.write_text(dump(Config(data=DataOptions(location="fusing/fill50k"), base=BaseOptions(name="me/base"))))
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.copy(options, copy)
    assert push(hub, copy, "--dry_run", "--out", str(tmp_path / "hub-files")).code == 0
    config = load(tmp_path / "hub-files" / "recipe.yaml", Config())
    assert (config.data.location, config.base.name) == ("fusing/fill50k", "me/base"), "ids of the hub stay"


def test_a_dry_run_lists_every_file_and_asks_nobody(finished: Path, tmp_path: Path) -> None:
    nobody = Hub(address="http://127.0.0.1:9")
    done = push(nobody, finished, "--dry_run", "--revision", "next", "--tag", "v1", "--message", "Second try")
    assert done.code == 0, done.err
    first, *rows, last = done.out.splitlines()
    assert first == 'my-adapter (under your account), branch next, tag v1: "Second try"'
    listed = {row.split()[1]: int(row.split()[0].replace(",", "")) for row in rows}
    assert set(listed) == FILES
    weights = finished / "diffusion_pytorch_model.safetensors"
    assert listed["diffusion_pytorch_model.safetensors"] == weights.stat().st_size
    assert last.split()[0] == f"{sum(listed.values()):,}" and last.endswith("7 files. Nothing was sent.")
    shown, full = run_verbs(
        nobody,
        ["push", "--folder", finished, "--dry_run", "--model_id", "me/x", "--pr", "--out", tmp_path / "files"],
        ["push", "--folder", finished, "--dry_run", "--out", tmp_path / "files"],
        cwd=tmp_path,
    )
    assert "me/x, as a pull request to main" in shown.out
    found = {str(path.relative_to(tmp_path / "files")) for path in (tmp_path / "files").rglob("*") if path.is_file()}
    assert found == FILES
    assert "not empty" in full.error, "nothing that is there is overwritten"


def test_a_commit_goes_to_a_branch_with_a_tag_or_to_a_pull_request(hub: Hub, finished: Path) -> None:
    theirs = hub.add("others/adapter", {"README.md": b"---\n---\n"})
    words = ["push", "--folder", finished, "--token", TOKEN]
    branch, again, taken, pull_request = run_verbs(
        hub,
        [*words, "--revision", "next", "--tag", "v1", "--message", "The first"],
        [*words, "--revision", "next", "--tag", "v2"],
        [*words, "--tag", "v1"],
        [*words, "--model_id", "others/adapter", "--pr"],
        cwd=finished.parent,
    )
    ours = hub.models["someone/my-adapter"]
    assert branch.code == again.code == 0, branch.err + again.err
    assert set(ours.commits[ours.branches["main"]]) == set(), "main is unchanged"
    assert set(ours.commits[ours.branches["next"]]) == FILES
    assert ours.titles[ours.tags["v1"]] == "The first" and ours.tags["v2"] == ours.branches["next"]
    assert "--tag v1: someone/my-adapter has this tag already" in taken.error
    assert pull_request.out.strip() == f"{hub.address}/others/adapter/discussions/1"
    assert len(theirs.pull_requests) == 1 and theirs.commits[theirs.branches["main"]].keys() == {"README.md"}
    card = theirs.commits[theirs.pull_requests[0]]["README.md"]
    assert b"from_pretrained('others/adapter'" in card


def test_the_repository_is_added_to_a_collection_that_exists(hub: Hub, finished: Path) -> None:
    hub.collections["someone/adapters-1"] = []
    words = ["push", "--folder", finished, "--token", TOKEN, "--collection"]
    done, again, missing = run_verbs(
        hub,
        [*words, "someone/adapters-1"],
        [*words, "someone/adapters-1"],
        [*words, "someone/gone-2", "--model_id", "someone/unsent"],
        cwd=finished.parent,
    )
    assert done.code == again.code == 0, done.err + again.err
    assert hub.collections == {"someone/adapters-1": ["someone/my-adapter"]}
    assert "404" in missing.error and "someone/unsent" not in hub.models


def test_errors_are_one_line_without_the_token(hub: Hub, finished: Path) -> None:
    words = ["push", "--folder", finished, "--token"]
    hub.add("others/closed", {})
    wrong, odd, rights, name, missing, pr_and_tag, other = run_verbs(
        hub,
        [*words, "hf_wrong"],
        [*words, f"{TOKEN}\nX"],  # the client quotes a header it cannot send
        [*words, TOKEN, "--model_id", "others/x"],
        [*words, TOKEN, "--model_id", "a b/c"],
        [*words, TOKEN, "--model_id", "others/x", "--pr"],
        [*words, TOKEN, "--model_id", "others/closed", "--pr", "--tag", "v1"],
        [*words, TOKEN, "--license", "other", "--license_name", "mine"],
        cwd=finished.parent,
    )
    assert "Invalid user token" in wrong.error and "hf auth login" in wrong.error
    assert "the request to the hub failed" in odd.error
    assert "403" in rights.error and "write permission" in rights.error
    assert "a b/c" in name.error
    assert "others/x does not exist" in missing.error and "without --pr" in missing.error
    assert "--tag v1: a pull request goes to main" in pr_and_tag.error
    assert "--license_link is needed" in other.error
    hub.has_discussions = False
    closed = push(hub, finished, "--model_id", "others/closed", "--pr")
    assert "Discussions are disabled" in closed.error
    hub.fail_commits = True
    failed = push(hub, finished)
    assert "the hub is on fire" in failed.error
    hub.role = "read"
    read_only = push(hub, finished)
    assert "the token is read-only" in read_only.error
    assert not hub.files, "nothing was uploaded"
    for done in (wrong, odd, rights, name, missing, pr_and_tag, other, closed, failed, read_only):
        assert TOKEN not in done.err + done.out
    assert push_command(finished, "someone/x") == f"t2i-adapter push --folder {finished} --model_id someone/x"


def test_a_hub_that_cannot_be_reached(finished: Path) -> None:
    nobody = Hub(address="http://127.0.0.1:9")
    assert "the request to the hub failed" in push(nobody, finished).error
    assert "HF_HUB_OFFLINE" in push(nobody, finished, HF_HUB_OFFLINE="1").error


def test_the_hub_refuses_a_card_of_a_wrong_form_before_weights_are_sent(hub: Hub, finished: Path, tmp_path: Path):
    folder = shutil.copytree(finished, tmp_path / "wrong")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: other\n", 1))
    assert "license_name" in push(hub, folder).error
    assert not hub.blobs
    (folder / "README.md").write_text("no front matter")
    assert "no model card with YAML front matter" in push(hub, folder).error
    assert push(hub, folder, "--license", "mit").code == 2


def test_a_card_of_an_earlier_version_is_published_without_its_folder(hub: Hub, finished: Path, tmp_path: Path):
    folder = shutil.copytree(finished, tmp_path / "old")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("<!-- use -->", "").replace("<!-- limits -->", ""))
    done = push(hub, folder)
    assert done.code == 0 and "the comment lines of the sections use, limits are missing" in done.out
    uploaded = hub.files["someone/old/README.md"]
    assert b"T2IAdapter.from_pretrained('someone/old', " in uploaded
    assert str(tmp_path).encode() not in uploaded and str(finished.parent).encode() not in uploaded


def test_a_checkpoint_is_published_with_its_own_record(
    hub: Hub, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(train_words(tiny_base, tiny_data, run, "--train.max_steps", 2, "--checkpoint.every", 1)) == 0
    (run / "t2i_adapter.json").rename(tmp_path / "record.json")  # as in a run that has not ended
    words = ["push", "--folder", run, "--token", TOKEN, "--checkpoint"]
    done, missing, unscored = run_verbs(
        hub, [*words, "checkpoint-1"], [*words, "checkpoint-7"], [*words, "best"], cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "checkpoint-7: no such checkpoint" in missing.error and "checkpoint-1, checkpoint-2" in missing.error
    assert "no checkpoint with a score" in unscored.error
    model: Repository = hub.models["someone/run"]
    files = model.commits[model.branches["main"]]
    record, last = json.loads(files["t2i_adapter.json"]), json.loads((tmp_path / "record.json").read_text())
    assert record["steps"] == 1
    public = Metadata.from_dict(last).without_local_paths().to_dict()
    assert {**record, "steps": 2} == {**public, "steps": 2}, "otherwise as the run itself writes it"
    (tmp_path / "sent.safetensors").write_bytes(files["diffusion_pytorch_model.safetensors"])
    sent = load_file(tmp_path / "sent.safetensors")
    wanted = load_file(run / "checkpoint-1" / "t2iadapter" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(sent[name], wanted[name]) for name in wanted) and len(sent) == len(wanted)
    assert "diffusion_pytorch_model.fp16.safetensors" in files and "recipe.yaml" in files
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["library_name"] == "diffusers"
