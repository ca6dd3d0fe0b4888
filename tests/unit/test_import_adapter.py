"""The verb `import`: what it finds in a file of another program, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import save_file
from torch import Tensor

from t2i_adapter.cli import main
from t2i_adapter.errors import UserError
from t2i_adapter.export.layouts import DOWNSCALE, FULL, LIGHT, XL, Kind, Network, find_network, to_original
from t2i_adapter.models.record import read_metadata

TINY: dict[Kind, tuple[int, ...]] = {XL: (16, 32, 64, 64), FULL: (16, 32, 64, 64), LIGHT: (32, 64, 128)}


def make(kind: Kind, channels: int = 3, blocks: int = 2, widths: tuple[int, ...] = ()) -> tuple[Network, T2IAdapter]:
    torch.manual_seed(0)
    network = Network(kind, channels, widths or TINY[kind], blocks, DOWNSCALE[kind])
    return network, T2IAdapter(**network.config())


def weights(adapter: T2IAdapter) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in adapter.state_dict().items()}


def original(network: Network, adapter: T2IAdapter) -> dict[str, Tensor]:
    return {to_original(name, network): tensor for name, tensor in weights(adapter).items()}


def run(source: Path, out: Path, *words: str) -> int:
    return main(["import", str(source), "--out", str(out), *words])


def assert_equal(folder: Path, adapter: T2IAdapter) -> None:
    back = T2IAdapter.from_pretrained(folder)
    assert {k: v for k, v in back.config.items() if not k.startswith("_")} == {
        k: v for k, v in adapter.config.items() if not k.startswith("_")
    }
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in weights(adapter).items())
    half = T2IAdapter.from_pretrained(folder, variant="fp16")
    assert all(torch.equal(tensor.half(), half.state_dict()[name].half()) for name, tensor in weights(adapter).items())


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [XL, FULL, LIGHT])
def test_kind_channels_and_blocks_are_found_in_both_layouts(kind: Kind, channels: int, blocks: int) -> None:
    network, _ = make(kind, channels, blocks)
    shapes = network.shapes()
    for prefix in ("", "module.", "control_model.module."):
        assert find_network({f"{prefix}{name}": shape for name, shape in shapes.items()})[0] == network
        renamed = {f"{prefix}{to_original(name, network)}": shape for name, shape in shapes.items()}
        found, names = find_network(renamed)
        assert found == network
        assert {name: shapes[target] for name, target in names.items()} == renamed
        assert all(to_original(target, network) == name.removeprefix(prefix) for name, target in names.items())


@pytest.mark.parametrize("nest", [None, "adapter", "state_dict"])
@pytest.mark.parametrize("kind", [XL, FULL, LIGHT])
def test_a_pth_file_as_the_official_ones_are(kind: Kind, nest: str | None, tmp_path: Path) -> None:
    """Tensors by name, alone or in a container beside other values."""
    network, adapter = make(kind)
    content: dict[str, Any] = original(network, adapter)
    torch.save({nest: content, "epoch": 3} if nest else content, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "out") == 0
    assert_equal(tmp_path / "out", adapter)


def test_a_file_in_half_precision(tmp_path: Path) -> None:
    network, adapter = make(XL)
    save_file({name: tensor.half() for name, tensor in original(network, adapter).items()}, tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "out") == 0
    back = T2IAdapter.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor.half().float(), back[name]) for name, tensor in weights(adapter).items())


def test_an_sd15_adapter_of_4_channels_needs_its_kind(tmp_path: Path) -> None:
    network, adapter = make(FULL, 4)
    save_file(original(network, adapter), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "guessed") == 0
    assert json.loads((tmp_path / "guessed" / "config.json").read_text())["adapter_type"] == XL
    assert run(tmp_path / "a.safetensors", tmp_path / "named", "--kind", "full_adapter") == 0
    assert_equal(tmp_path / "named", adapter)


def test_the_record_holds_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, adapter = make(XL)
    save_file(original(network, adapter), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "none") == 0
    assert "no record was written" in capsys.readouterr().out
    assert read_metadata(tmp_path / "none") is None
    words = ["--base", "someone/xl", "--condition", "canny,low=50", "--resolution", "1024"]
    assert run(tmp_path / "a.safetensors", tmp_path / "full", *words) == 0
    shown = capsys.readouterr().out
    assert "full_adapter_xl: conditions of 3 channels, features of 16, 32, 64, 64 channels, 2 blocks a stage" in shown
    record = read_metadata(tmp_path / "full")
    assert record is not None and record.base == {"name": "someone/xl"} and record.resolution == 1024
    assert (record.condition["name"], record.condition["options"]["low"]) == ("canny", 50)
    assert record.condition["channels"] == 3


def test_a_folder_of_diffusers_or_with_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, adapter = make(XL)
    adapter.save_pretrained(tmp_path / "theirs")
    assert run(tmp_path / "theirs", tmp_path / "out") == 0
    assert_equal(tmp_path / "out", adapter)
    assert run(tmp_path / "theirs", tmp_path / "other", "--kind", "full_adapter") == 2
    assert "config.json says full_adapter_xl" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    save_file(original(network, adapter), tmp_path / "one" / "a.safetensors")
    assert run(tmp_path / "one", tmp_path / "again") == 0
    save_file(original(network, adapter), tmp_path / "one" / "b.safetensors")
    assert run(tmp_path / "one", tmp_path / "third") == 2
    assert "found: a.safetensors, b.safetensors. Name the file." in capsys.readouterr().err


def changed(of: Mapping[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The weights with others; None removes one, and "__" in a keyword stands for a point."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**of, **named}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"body__3__block1__bias": None}, "1 weights are missing, such as 'adapter.body.1.resnets.1.block1.bias'"),
        ({"body__8__block1__weight": torch.zeros(64, 64, 3, 3)}, "9 blocks do not make stages of 2 blocks"),
        ({"body__2__out_conv__weight": torch.zeros(1)}, "1 weights are too many"),
        ({"body__0__block2__weight": torch.zeros(16, 16, 3, 3)}, "1 weights have another shape"),
        ({"body__0__skep__weight": torch.zeros(1)}, "convolutions in its skip connections"),
        ({"body__2__down_opt__op__weight": torch.zeros(1)}, "convolutions that halve the features"),
        ({"style_embedding": torch.zeros(1)}, "a style adapter"),
        ({"zero_convs__0__0__weight": torch.zeros(1)}, "a ControlNet"),
        ({"time_embed__0__weight": torch.zeros(1)}, "'time_embed.0.weight' belongs to no T2I-Adapter (1 such of 39)"),
        ({"conv_in__weight": torch.zeros(16, 512, 3, 3)}, "reads 512 channels, which names no kind; known are 64"),
        ({"conv_in__weight": torch.zeros(3)}, "'conv_in.weight' is missing or is no convolution's"),
        ({"body__999__block1__weight": torch.zeros(1)}, "count 1000 stages"),
        ({"body__0__resnets__0__block1__weight": torch.zeros(16, 16, 3, 3)}, ""),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(
    changes: dict[str, Tensor | None], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, adapter = make(XL)
    save_file(changed(original(network, adapter), **changes), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert (
        len(shown.splitlines()) == 1 and shown.startswith(f"error: {tmp_path / 'a.safetensors'}: ") and error in shown
    )
    assert not (tmp_path / "out").exists()


def test_any_names_and_shapes_are_an_adapter_or_a_user_error() -> None:
    """Real files with weights removed, renamed, resized and added: never another exception, never without end."""
    choices, starts = random.Random(1), []
    sizes: list[tuple[Kind, tuple[int, ...], int]] = [(XL, (4, 8, 16, 16), 2), (FULL, (4, 8, 8), 1), (LIGHT, (8,), 1)]
    for kind, widths, blocks in sizes:
        network = Network(kind, 3, widths, blocks, DOWNSCALE[kind])
        starts += [network.shapes(), {to_original(name, network): s for name, s in network.shapes().items()}]
    found = 0
    for _ in range(400):
        shapes = dict(choices.choice(starts))
        for _ in range(choices.choice((1, 2, 5))):
            name = choices.choice(list(shapes))
            change = choices.choice(("remove", "resize", "rename", "add", "remove stage"))
            if change == "remove stage":
                shapes = {k: v for k, v in shapes.items() if k.split(".")[:2] != name.split(".")[:2]} or shapes
            elif change == "add":
                shapes[f"{name}{choices.choice(('.x', '0'))}"] = choices.choice(((), (1,), (4, 4, 3, 3)))
            else:
                shape = shapes.pop(name)
                renamed = name.replace(choices.choice("0123"), choices.choice("01234567"))
                resized = tuple(choices.choice((size, 0, 3, 8192)) for size in shape)
                if change != "remove" or not shapes:
                    shapes[renamed if change == "rename" else name] = resized if change == "resize" else shape
        try:
            network, names = find_network(shapes, choices.choice((None, XL, FULL, LIGHT)))
        except UserError:
            continue
        found += 1
        assert {target: shapes[name] for name, target in names.items()} == network.shapes()
    assert found > 5


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--kind", "light_adapter"], "its names are not those of a light_adapter"),
        (["--kind", "full"], "--kind 'full': allowed is one of auto, full_adapter_xl"),
        (["--condition", "canny"], "--condition is for the record, which needs the base: set --base too"),
        (["--resolution", "512"], "--resolution is for the record"),
        (["--resolution", "0"], "--resolution 0: allowed is 1 to 8192 pixels"),
        (["--base", "x/y", "--condition", "cany"], "cany"),
    ],
)
def test_wrong_options(words: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, adapter = make(XL)
    save_file(original(network, adapter), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path / "out", *words) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and error in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("nothing.safetensors", None, "no such file"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "it holds no weights"),
        ("a.safetensors", b"abc", "damaged safetensors file"),
        ("a.pth", b"abc", "Only tensors are read"),
        ("a.pth", b"", "Only tensors are read"),
        ("a.onnx", b"abc", "allowed are files that end in .safetensors, .pth"),
    ],
)
def test_wrong_files(
    name: str, content: bytes | None, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and error in shown


def test_a_pth_without_named_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save([torch.zeros(1)], tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "out") == 2
    assert "holds no tensors by name" in capsys.readouterr().err


def test_a_folder_with_content_is_not_written_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, adapter = make(XL)
    save_file(original(network, adapter), tmp_path / "a.safetensors")
    assert run(tmp_path / "a.safetensors", tmp_path) == 2
    assert "--out" in capsys.readouterr().err


def test_a_malformed_record_in_the_metadata_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, adapter = make(XL)
    for content, error in (
        ("{", "cannot be read as JSON"),
        ('{"base": {"name": "x"}, "evil": 1}', "unknown key 'evil'"),
    ):
        save_file(original(network, adapter), tmp_path / "a.safetensors", {"t2i_adapter.record": content})
        assert run(tmp_path / "a.safetensors", tmp_path / "out") == 2
        assert error in capsys.readouterr().err
