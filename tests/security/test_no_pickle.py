"""No file is unpickled and no code in a file is run: the source has no such call, and planted poison stays unused."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.runs import train_words

from t2i_adapter.cli import main
from t2i_adapter.errors import UserError
from t2i_adapter.generation.condition import find_annotator
from t2i_adapter.models.record import Metadata

SRC = Path(__file__).parents[2] / "src" / "t2i_adapter"
MODULES = sorted(SRC.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "subprocess.getoutput"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (f"imports {name}" for name in modules if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"calls {name}"
            for word in node.keywords:
                on = isinstance(word.value, ast.Constant) and word.value.value is not False
                if word.arg in ("trust_remote_code", "allow_pickle", "shell") and (on or not _constant(word.value)):
                    yield f"calls {name} with {word.arg}"
                if word.arg in ("use_safetensors", "weights_only") and not (on and _constant(word.value)):
                    yield f"calls {name} with {word.arg} that may be off"


def _constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SRC)))
def test_the_package_has_no_call_that_unpickles_or_runs_text(file: Path):
    assert not list(offences(ast.parse(file.read_text())))


def test_the_search_finds_forbidden_calls():
    bad = "import pickle\nimport torch\ntorch.load('x')\neval('1')\nf(trust_remote_code=True)\ng(use_safetensors=False)"
    assert len(list(offences(ast.parse(bad)))) == 5


class Poison:
    """An object whose pickle makes the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o700)


TWO_STEPS = ("--train.max_steps", "2", "--checkpoint.every", "1")
WEIGHT_NAMES = (
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin", "model.ckpt"),
    *("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training.pt", "model.pth", "facts.npy", "model.pkl"),
)


def poison(folder: Path, mark: Path) -> None:
    """Writes a poisoned pickle under every name that some trainer reads, in a folder and its subfolders."""
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in WEIGHT_NAMES:
            torch.save(Poison(mark), inner / name)


def test_the_poison_works(tmp_path: Path):
    torch.save(Poison(tmp_path / "mark"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "mark").is_dir()


def test_poison_beside_every_file_that_is_read_is_never_run(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    """Poison lies beside base, data, cache, initial adapter and checkpoint of a run, a resumed run and a generation."""
    mark, out, base, data = tmp_path / "mark", tmp_path / "run", tmp_path / "base", tmp_path / "data"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tiny_data, data)
    poison(base, mark)
    poison(data, mark)
    cache = ["--data.prepared_dir", str(tmp_path / "cache"), *TWO_STEPS]
    assert main(train_words(base, data, out, *cache)) == 0
    poison(tmp_path / "cache", mark)
    poison(out, mark)
    assert main(train_words(base, data, out, *cache, "--checkpoint.resume", "latest", "--train.max_steps", "3")) == 0
    again = train_words(base, data, tmp_path / "again", *cache, "--adapter.init_from", str(out))
    assert main(again) == 0
    condition = str(data / "train" / "00000_outline.png")
    words = ["generate", "--adapter", str(out), "--prompt", "a", "--image", condition, "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "pictures")]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_base_whose_weights_are_pickled_is_refused(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
):
    base, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(tiny_base, base)
    for weights in (base / part).glob("*.safetensors"):
        weights.unlink()
    poison(base / part, mark)
    assert main(train_words(base, tiny_data, tmp_path / "run", "--data.prepared_dir", str(tmp_path / "cache"))) == 2
    error = capsys.readouterr().err
    assert (
        f"no complete safetensors weights for {part}" in error and "Pickled weights (.bin, .ckpt) are not read" in error
    )
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickled_single_file_base_is_refused(
    tiny_data: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
):
    file, mark = tmp_path / f"base{suffix}", tmp_path / "mark"
    torch.save(Poison(mark), file)
    assert main(train_words(file, tiny_data, tmp_path / "run")) == 2
    assert "must be .safetensors; pickled weights (.ckpt, .bin) are not read" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("is_beside_tensors", [True, False])
def test_import_runs_no_code_of_a_file(
    tmp_path: Path, suffix: str, is_beside_tensors: bool, capsys: pytest.CaptureFixture[str]
):
    file, mark = tmp_path / f"adapter{suffix}", tmp_path / "mark"
    torch.save({"conv_in.weight": torch.zeros(1), "x": Poison(mark)} if is_beside_tensors else Poison(mark), file)
    assert main(["import", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "damaged safetensors file" in error or "Only tensors are read" in error
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_pickle_named_safetensors_is_refused(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mark = tmp_path / "mark"
    file = tmp_path / "base.safetensors"
    torch.save(Poison(mark), file)
    assert main(train_words(file, tiny_data, tmp_path / "run")) == 2
    assert "damaged safetensors file" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(Poison(mark), adapter / "diffusion_pytorch_model.safetensors")
    (adapter / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter"}))
    assert main(train_words(tiny_base, tiny_data, tmp_path / "run", "--adapter.init_from", str(adapter))) == 2
    assert "no adapter found" in capsys.readouterr().err
    assert not mark.exists()


def test_code_beside_a_model_is_never_imported(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    """Code that `trust_remote_code` would run: modules that a config names, a custom pipeline, a loading script."""
    mark, base, data = tmp_path / "mark", tmp_path / "base", tmp_path / "data"
    shutil.copytree(tiny_base, base)
    shutil.copytree(tiny_data, data)
    script = f"import os\nos.mkdir({str(mark)!r})\n"
    for folder in [base, data, *(path for path in base.iterdir() if path.is_dir())]:
        for name in ("pipeline.py", "modeling.py", "tokenizer.py", f"{folder.name}.py", "__init__.py"):
            (folder / name).write_text(script)
    for config in base.rglob("config.json"):
        content = json.loads(config.read_text())
        content["auto_map"] = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
        content["_diffusers_version"] = content.get("_diffusers_version", "0.36.0")
        config.write_text(json.dumps(content))
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Pipeline"]
    (base / "model_index.json").write_text(json.dumps(index))
    main(train_words(base, data, tmp_path / "run", "--data.prepared_dir", str(tmp_path / "cache")))
    assert not mark.exists()


def test_a_run_writes_only_safetensors_text_and_pictures(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert main(train_words(tiny_base, tiny_data, out, *TWO_STEPS)) == 0
    for path in out.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert file.keys()
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.is_file():
            assert "\x00" not in path.read_text(encoding="utf-8")


def test_metadata_in_a_safetensors_header_is_ignored(tiny_base: Path, tiny_data: Path, tmp_path: Path):
    """A header may contain anything; none of it is run or used as a path."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter", "channels": [1, 1, 1, 1]}))
    save_file({"x": torch.zeros(1)}, adapter / "diffusion_pytorch_model.safetensors", {"format": "__import__('os')"})
    assert main(train_words(tiny_base, tiny_data, tmp_path / "run", "--adapter.init_from", str(adapter))) == 2


@pytest.mark.parametrize("name", ["{file}:Class", "os:system", "evil:Class", "canny:x", ["canny"], None])
def test_an_adapters_record_names_no_code(
    tiny_data: Path, tmp_path: Path, name: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The record of somebody's adapter may name a code file of its own as the annotator; the file is not run."""
    mark, adapter = tmp_path / "mark", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(str(adapter))
    annotator = name.format(file=adapter / "evil.py") if isinstance(name, str) else name
    record = Metadata.from_dict({"base": {"name": "nano"}, "condition": {"name": annotator, "options": {}}})
    with pytest.raises(UserError):
        find_annotator(None, record, str(adapter))
    (adapter / "t2i_adapter.json").write_text(json.dumps(record.to_dict()))
    words = ["evaluate", "--adapter", str(adapter), "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()
