"""What `export` writes beside the weights: metadata, workflow, CivitAI's zip, a Space; and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import runpy
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import T2IAdapter
from PIL import Image
from support.tiny import write_adapter

from t2i_adapter.cli import main
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.to_program import file_stem
from t2i_adapter.models import nano
from t2i_adapter.models.record import Metadata

CANNY = {"name": "canny", "options": {"low": 100, "high": 200}, "polarity": "white on black", "channels": 3}
PROMPT = "a house, red"
RECORD = {
    "base": {"name": "stabilityai/stable-diffusion-xl-base-1.0"},
    "condition": CANNY,
    "resolution": 1024,
    "sampling": {"scale": 0.8, "condition_factor": 0.7, "guidance": 6.0},
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small adapter with a record and a card, as a run leaves it in its folder."""
    torch.manual_seed(0)
    network = T2IAdapter(3, [16, 32, 64, 64], 2, 16, "full_adapter_xl")
    folder = tmp_path / "my house"
    save_adapter(network, folder, metadata=Metadata.from_dict(RECORD))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# card\n")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder as `generate` writes it: a picture with parameters, its record, its condition."""
    from t2i_adapter.generation.png_text import parameters, png_info

    folder = tmp_path / "pictures"
    folder.mkdir()
    text = parameters(PROMPT, None, {"Steps": 30, "Seed": 7})
    Image.new("RGB", (64, 64), "red").save(folder / "00000.png", pnginfo=png_info(text))
    Image.new("RGB", (64, 64), "white").save(folder / "00000_condition.png")
    (folder / "00000.json").write_text(json.dumps({"options": {"prompt": [PROMPT], "image": []}}))
    return folder


def export(folder: Path, to: str, out: Path, *words: str) -> int:
    return main(["export", str(folder), "--to", to, "--out", str(out), *words])


def header(file: Path) -> tuple[dict[str, str], bytes]:
    """Metadata of a safetensors file, and the bytes after its header, read without the library."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"], content[8 + length :]


def test_the_file_says_what_it_is(adapter: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(adapter, "comfyui", out, "--pictures", str(pictures), "--author", "me") == 0
    (file,) = out.glob("*.safetensors")
    assert file.name == "my-house-sdxl-canny-t2i-adapter_fp16.safetensors"
    found, tensors = header(file)
    spec = {key.removeprefix("modelspec."): value for key, value in found.items() if key.startswith("modelspec.")}
    assert spec["sai_model_spec"] == "1.0.0"
    assert spec["architecture"] == "stable-diffusion-xl-v1-base/t2i-adapter"
    assert (spec["title"], spec["author"], spec["license"]) == ("my house", "me", "apache-2.0")
    assert spec["preprocessor"] == "canny,low=100,high=200"
    assert spec["resolution"] == "1024x1024"
    assert spec["hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert "Strength 0.8, end 0.7" in spec["usage_hint"] and "multiples of 32" in spec["usage_hint"]
    assert "white on black" in spec["usage_hint"]
    kind, _, picture = spec["thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(picture))) as shown:
        assert shown.format == "JPEG" and max(shown.size) <= 256
    assert all(isinstance(value, str) for value in found.values())
    assert Metadata.from_dict(json.loads(found["t2i_adapter.record"])) == Metadata.from_dict(RECORD)


def test_the_hash_does_not_depend_on_the_metadata(adapter: Path, tmp_path: Path) -> None:
    hashes = set()
    for number, title in enumerate("ab"):
        assert export(adapter, "a1111", tmp_path / str(number), "--name", title) == 0
        found, _ = header(next((tmp_path / str(number)).glob("*.safetensors")))
        hashes.add(found["modelspec.hash_sha256"])
    assert len(hashes) == 1


def test_no_folder_of_this_machine_is_in_the_file(adapter: Path, tmp_path: Path) -> None:
    record = {**RECORD, "base": {"name": str(tmp_path / "base.safetensors")}, "data": {"name": str(tmp_path / "data")}}
    (adapter / "t2i_adapter.json").write_text(json.dumps({"schema": 1, **record}))
    for to in ("comfyui", "diffusers", "civitai"):
        assert export(adapter, to, tmp_path / "out" / to) == 0
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("title", "stem"),
    [
        ("lake", "lake-sdxl-canny-t2i-adapter"),
        ("t2i-adapter-canny-sdxl-1.0", "t2i-adapter-canny-sdxl-1.0"),
        ("Mein See, groß", "Mein-See-gro-sdxl-canny-t2i-adapter"),
        ("../..", "adapter-sdxl-canny-t2i-adapter"),
    ],
)
def test_names_of_files(title: str, stem: str) -> None:
    assert file_stem(title, "sdxl", "canny") == stem


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_precision_of_a_file_and_of_a_folder(dtype: str, stored: str, adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, "a1111", tmp_path / "file", "--dtype", dtype) == 0
    assert export(adapter, "diffusers", tmp_path / "folder", "--dtype", dtype) == 0
    (file,) = (tmp_path / "file").glob(f"*_{dtype}.safetensors")
    (folder,) = (tmp_path / "folder").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "t2i_adapter.json",
    ]
    for path in (file, folder / "diffusion_pytorch_model.safetensors"):
        content = path.read_bytes()
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert {item["dtype"] for name, item in head.items() if name != "__metadata__"} == {stored}
    loaded = T2IAdapter.from_pretrained(folder, dtype=torch.float32)
    ours = T2IAdapter.from_pretrained(adapter)
    assert all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-6) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True)
    )


def test_a_folder_for_invoke_has_both_precisions(adapter: Path, tmp_path: Path) -> None:
    assert export(adapter, "invoke", tmp_path / "out") == 0
    (folder,) = (tmp_path / "out").iterdir()
    full, half = T2IAdapter.from_pretrained(folder), T2IAdapter.from_pretrained(folder, variant="fp16")
    ours = T2IAdapter.from_pretrained(adapter).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in full.state_dict().items())
    assert all(torch.equal(tensor.half(), ours[name].half()) for name, tensor in half.state_dict().items())
    umask = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    assert stat.S_IMODE(folder.stat().st_mode) == umask, "others can read the folder as the umask says"


# Workflow: the editor's format, restated ------------------------------------------------------------------------------

SLOTS: dict[str, tuple[list[str], list[str], list[type]]] = {
    "CheckpointLoaderSimple": ([], ["MODEL", "CLIP", "VAE"], [str]),
    "ControlNetLoader": ([], ["CONTROL_NET"], [str]),
    "LoadImage": ([], ["IMAGE", "MASK"], [str, str]),
    "CLIPTextEncode": (["CLIP"], ["CONDITIONING"], [str]),
    "ControlNetApplyAdvanced": (
        ["CONDITIONING", "CONDITIONING", "CONTROL_NET", "IMAGE"],
        ["CONDITIONING", "CONDITIONING"],
        [float, float, float],
    ),
    "EmptyLatentImage": ([], ["LATENT"], [int, int, int]),
    "KSampler": (
        ["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"],
        ["LATENT"],
        [int, str, int, float, str, str, float],
    ),
    "VAEDecode": (["LATENT", "VAE"], ["IMAGE"], []),
    "SaveImage": (["IMAGE"], [], [str]),
    "Note": ([], [], [str]),
}
"""Type of a node -> types of its inputs, its outputs and its widgets, as ComfyUI 0.3 has them."""


def check_workflow(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Asserts that each node has its slots and each link's ends exist and agree; returns the nodes by title or type."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(links)
    assert workflow["version"] == 0.4
    for node in nodes.values():
        inputs, outputs, widgets = SLOTS[node["type"]]
        assert [slot["type"] for slot in node["inputs"]] == inputs
        assert [slot["type"] for slot in node["outputs"]] == outputs
        assert [type(value) for value in node["widgets_values"]] == widgets
        for slot, item in enumerate(node["inputs"]):
            assert links[item["link"]][3:] == [node["id"], slot, item["type"]], "every input is linked"
        for slot, item in enumerate(node["outputs"]):
            ends = {number for number, link in links.items() if link[1:3] == [node["id"], slot]}
            assert set(item["links"]) == ends
    for _, source, slot, target, into, kind in links.values():
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][into]["type"] == kind
        assert nodes[source]["order"] < nodes[target]["order"], "a node runs after those that feed it"
    boxes = [(*node["pos"], *node["size"]) for node in nodes.values()]
    for number, (x, y, w, h) in enumerate(boxes):
        assert all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in boxes[:number]), (
            "none overlap"
        )
    return {node.get("title", node["type"]): node for node in nodes.values()}


def test_the_workflow_and_the_example_open(adapter: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(adapter, "comfyui", out, "--pictures", str(pictures)) == 0
    stem = "my-house-sdxl-canny-t2i-adapter"
    workflow = json.loads((out / f"{stem}-workflow.json").read_text())
    nodes = check_workflow(workflow)
    assert nodes["T2I-Adapter"]["widgets_values"] == [f"{stem}_fp16.safetensors"]
    assert nodes["CheckpointLoaderSimple"]["widgets_values"] == ["sd_xl_base_1.0.safetensors"]
    assert nodes["ControlNetApplyAdvanced"]["widgets_values"] == [0.8, 0.0, 0.7]
    assert nodes["KSampler"]["widgets_values"][3:5] == [6.0, "euler_ancestral"]
    assert nodes["EmptyLatentImage"]["widgets_values"] == [1024, 1024, 1]
    assert nodes["Prompt"]["widgets_values"] == [PROMPT]
    links = {link[0]: link for link in workflow["links"]}
    inputs = [links[slot["link"]] for slot in nodes["KSampler"]["inputs"]]
    apply = nodes["ControlNetApplyAdvanced"]
    assert [link[1:3] for link in inputs[1:3]] == [[apply["id"], 0], [apply["id"], 1]], "positive, then negative"
    first, second = (links[slot["link"]][1] for slot in apply["inputs"][:2])
    assert (first, second) == (nodes["Prompt"]["id"], nodes["Negative prompt"]["id"])
    assert (out / nodes["Condition picture"]["widgets_values"][0]).is_file()
    with Image.open(out / f"{stem}-example.png") as example:
        assert json.loads(example.info["workflow"]) == workflow
        assert example.info["parameters"].startswith(PROMPT)
        assert example.getpixel((0, 0)) == (255, 0, 0)


def test_without_pictures_the_workflow_stands_alone(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter, "comfyui", tmp_path / "out") == 0
    assert "warning: no pictures of the adapter were found; --pictures names" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    check_workflow(json.loads(next((tmp_path / "out").glob("*.json")).read_text()))


def test_the_sample_pictures_of_a_run_are_shown(adapter: Path, tmp_path: Path) -> None:
    """A card's strip holds square cells: the condition, then the pictures."""
    strip = Image.new("RGB", (96, 32), "white")
    strip.paste((0, 0, 255), (32, 0, 64, 32))
    (adapter / "images").mkdir()
    strip.save(adapter / "images" / "sample_00.png")
    Image.new("RGB", (50, 32)).save(adapter / "images" / "sample_01.png")  # no strip of squares
    assert export(adapter, "comfyui", tmp_path / "out") == 0
    with Image.open(next((tmp_path / "out").glob("*-example.png"))) as example:
        assert example.size == (32, 32) and example.getpixel((5, 5)) == (0, 0, 255)
    with Image.open(next((tmp_path / "out").glob("*-condition.png"))) as condition:
        assert condition.getpixel((5, 5)) == (255, 255, 255)


def test_single_sample_pictures_are_taken_before_the_strip(adapter: Path, tmp_path: Path) -> None:
    (adapter / "images").mkdir()
    for name, colour in (("sample_00", "white"), ("sample_00_00", "red"), ("sample_00_condition", "blue")):
        Image.new("RGB", (96, 32), colour).save(adapter / "images" / f"{name}.png")
    head = {"license": "mit", "widget": [{"text": PROMPT, "output": {"url": "images/sample_00_00.png"}}, "by hand"]}
    (adapter / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n\n# card\n")
    assert export(adapter, "comfyui", tmp_path / "out") == 0
    for part, colour in (("example", (255, 0, 0)), ("condition", (0, 0, 255))):
        with Image.open(next((tmp_path / "out").glob(f"*-{part}.png"))) as shown:
            assert shown.getpixel((5, 5)) == colour
    workflow = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert check_workflow(workflow)["Prompt"]["widgets_values"] == [PROMPT]


# CivitAI and Spaces ---------------------------------------------------------------------------------------------------


def test_the_zip_for_civitai(adapter: Path, pictures: Path, tmp_path: Path) -> None:
    assert export(adapter, "civitai", tmp_path / "out", "--pictures", str(pictures), "--dtype", "fp32") == 0
    (archive,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        file = "my-house-sdxl-canny-t2i-adapter_fp32.safetensors"
        assert set(opened.namelist()) == {
            *(file, "description.md", "metadata.json"),
            *("pictures/00.png", "pictures/00_condition.png"),
        }
        form = json.loads(opened.read("metadata.json"))
        with Image.open(io.BytesIO(opened.read("pictures/00.png"))) as picture:
            assert picture.info["parameters"].startswith(PROMPT)
        text = opened.read("description.md").decode()
    assert (form["type"], form["baseModel"], form["license"]) == ("Controlnet", "SDXL 1.0", "apache-2.0")
    assert form["files"] == [{"name": file, "type": "Model", "metadata": {"format": "SafeTensor", "fp": "fp32"}}]
    assert "canny,low=100,high=200" in text and "models/controlnet" in text


def test_the_app_of_a_space_makes_pictures_with_the_adapter(tmp_path: Path) -> None:
    """The program is run as it is written; only its page, which needs gradio, is not built."""
    folder = write_adapter(tmp_path / "a", nano.path())
    assert export(folder, "space", tmp_path / "out", "--base", str(nano.path())) == 0
    (space,) = (tmp_path / "out").iterdir()
    head = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert (head["sdk"], head["app_file"]) == ("gradio", "app.py") and head["sdk_version"].count(".") == 2
    assert "diffusers==" in (space / "requirements.txt").read_text()
    app = runpy.run_path(str(space / "app.py"))
    condition = Image.new("RGB", (100, 80), "white")
    made = [app["make_picture"](condition, "a circle", "", strength, 1.0, 5.0, 2, 0) for strength in (0.0, 1.0)]
    assert made[0].size == (64, 64), "the size of the training"
    assert made[0].tobytes() != made[1].tobytes(), "the adapter acts"
    assert len((space / "app.py").read_text().splitlines()) < 80
    with pytest.raises(ValueError, match="condition picture"):
        app["make_picture"](None, "a circle", "", 1.0, 1.0, 5.0, 2, 0)


def test_a_space_warns_of_a_base_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_adapter(tmp_path / "a", nano.path())
    assert export(folder, "space", tmp_path / "out", "--base", str(nano.path())) == 0
    assert "is on this machine" in capsys.readouterr().out


def test_texts_of_a_record_cannot_leave_their_place(adapter: Path, tmp_path: Path) -> None:
    """A record may come from anyone; its texts are no code in app.py, no Markdown, no path."""
    evil = '"""\nimport os\nos.mkdir("mark")\n"""'
    record = {
        **RECORD,
        "base": {"name": f"a/b{evil}"},
        "condition": {"name": f"../x{evil}](http://y)<b>", "options": {}},
    }
    (adapter / "t2i_adapter.json").write_text(json.dumps({"schema": 1, **record}))
    for to in ("space", "civitai", "comfyui"):
        assert export(adapter, to, tmp_path / "out") == 0
    assert all(path.parent == tmp_path / "out" for path in (tmp_path / "out").glob("*"))
    app = runpy.run_path(str(next((tmp_path / "out").glob("*-space")) / "app.py"))
    assert app["BASE"] == f"a/b{evil}" and not Path("mark").exists()
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.zip"))) as opened:
        text = opened.read("description.md").decode()
    assert "<b>" not in text and "](" not in text


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--to", "forge"], "--to 'forge': allowed is one of diffusers, comfyui, a1111"),
        (["--to", "comfyui", "--base", "x/y"], "--base x/y: only --to space needs it"),
        (["--to", "comfyui", "--dtype", "int8"], "--dtype 'int8': allowed is one of fp32, fp16, bf16"),
        (["--to", "comfyui", "--pictures", "nowhere"], "--pictures nowhere: no pictures found"),
        (["--to", "space", "--base", "nano"], "--base nano: this base is inside the package"),
    ],
)
def test_wrong_options(words: list[str], error: str, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(adapter), *words, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and error in shown[0], shown


def test_what_is_refused_says_why_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_adapter(T2IAdapter(3, [48, 96, 128, 128], 2, 16, "full_adapter_xl"), tmp_path / "a", metadata=None)
    assert export(tmp_path / "a", "comfyui", tmp_path / "out") == 2
    assert "[48, 96, 128, 128], and the program builds [c, 2c, 4c, 4c]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert export(tmp_path / "nothing", "comfyui", tmp_path / "out") == 2
    assert "no adapter found" in capsys.readouterr().err
    assert export(tmp_path / "a", "space", tmp_path / "out") == 2
    assert "--base is needed: the adapter has no record" in capsys.readouterr().err


def test_a_malformed_record_is_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sampling, error in (({"scale": "much"}, "sampling.scale is 'much'"), ({"scale": -1}, "-1")):
        (adapter / "t2i_adapter.json").write_text(json.dumps({"schema": 1, **RECORD, "sampling": sampling}))
        assert export(adapter, "comfyui", tmp_path / "out") == 2
        shown = capsys.readouterr().err
        assert len(shown.splitlines()) == 1 and error in shown


def test_weights_beyond_fp16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = T2IAdapter(3, [16, 32, 64, 64], 2, 16, "full_adapter_xl")
    with torch.no_grad():
        network.get_parameter("adapter.conv_in.bias")[0] = 1e6
    save_adapter(network, tmp_path / "a", metadata=None, fp16=False)
    assert export(tmp_path / "a", "comfyui", tmp_path / "out") == 2
    assert (
        "--dtype fp16: adapter.conv_in.bias has weights beyond its range; use fp32 or bf16" in capsys.readouterr().err
    )
    assert not list((tmp_path / "out").iterdir())
    assert export(tmp_path / "a", "comfyui", tmp_path / "out", "--dtype", "bf16") == 0


def test_an_existing_folder_is_not_overwritten(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(adapter, "diffusers", tmp_path / "out") == 0
    assert export(adapter, "diffusers", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my-house-sdxl-canny-t2i-adapter"]
