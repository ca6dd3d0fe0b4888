"""Exported files, read by the rules of other programs, which tests/support/programs.py states independently."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file
from support import programs as rules

from t2i_adapter.cli import main
from t2i_adapter.errors import UserError
from t2i_adapter.export import programs
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.layouts import (
    DOWNSCALE,
    FULL,
    LIGHT,
    XL,
    Kind,
    Network,
    find_network,
    make_adapter,
    to_original,
)
from t2i_adapter.models.record import Metadata

TINY = {XL: (16, 32, 64, 64), FULL: (16, 32, 64, 64), LIGHT: (320, 640, 1280)}
"""Kind -> small channels, as far as programs accept other ones than the official."""
OFFICIAL = {XL: (320, 640, 1280, 1280), FULL: (320, 640, 1280, 1280), LIGHT: (320, 640, 1280)}
BLOCKS = {XL: 2, FULL: 2, LIGHT: 4}
PROGRAMS = {"comfyui": rules.COMFYUI, "a1111": rules.A1111}
KINDS: tuple[Kind, ...] = (XL, FULL, LIGHT)


def network(
    kind: Kind, channels: int = 3, *, widths: tuple[int, ...] | None = None, blocks: int | None = None
) -> Network:
    return Network(kind, channels, widths or TINY[kind], blocks or BLOCKS[kind], DOWNSCALE[kind])


def write(folder: Path, sizes: Network, *, seed: int = 0, **record: object) -> T2IAdapter:
    """Writes a random adapter with a record into `folder`."""
    torch.manual_seed(seed)
    adapter = T2IAdapter(**sizes.config())
    save_adapter(adapter, folder, metadata=Metadata.from_dict({"base": {"name": "someone/base"}, **record}))
    return adapter


def export(folder: Path, out: Path, to: str = "comfyui", *words: str) -> Path:
    """Exports an adapter; returns the one file that ends in .safetensors."""
    assert main(["export", str(folder), "--to", to, "--out", str(out), *words]) == 0
    return next(out.glob("*.safetensors"))


def original(sizes: Network) -> dict[str, tuple[int, ...]]:
    return {to_original(name, sizes): shape for name, shape in sizes.shapes().items()}


@pytest.mark.parametrize(("kind", "channels"), [*itertools.product(KINDS, (1, 3))])
def test_export_and_import_return_every_bit(kind: Kind, channels: int, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", network(kind, channels), resolution=64)
    file = export(tmp_path / "a", tmp_path / "out", "comfyui", "--dtype", "fp32")
    assert not any(name.startswith("adapter.") for name in load_file(file))
    assert main(["import", str(file), "--out", str(tmp_path / "b")]) == 0
    back = T2IAdapter.from_pretrained(tmp_path / "b")
    assert back.config["adapter_type"] == kind and back.config["in_channels"] == channels
    assert back.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    first, second = (json.loads((tmp_path / x / "t2i_adapter.json").read_text()) for x in "ab")
    assert second == {**first, "condition": {"channels": channels}}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("kind", "channels"), [*itertools.product(KINDS, (1, 3))])
def test_a_program_builds_the_exported_network(kind: Kind, channels: int, program: str, tmp_path: Path) -> None:
    write(tmp_path / "a", network(kind, channels))
    if (program, kind, channels) == ("a1111", LIGHT, 1):
        assert main(["export", str(tmp_path / "a"), "--to", program, "--out", str(tmp_path / "out")]) == 2
        return
    tensors = load_file(export(tmp_path / "a", tmp_path / "out", program))
    built = rules.read({name: tuple(tensor.shape) for name, tensor in tensors.items()}, PROGRAMS[program])
    assert built is not None
    assert (built.missing, built.extra, built.misshapen) == ((), (), ())
    assert (built.family, built.inputs) == ({XL: "xl", FULL: "sd", LIGHT: "light"}[kind], channels)


WIDTHS: dict[Kind, tuple[tuple[int, ...], ...]] = {
    LIGHT: ((320, 640, 1280), (320, 640), (160, 320, 640), (320, 640, 1280, 1280)),
    FULL: ((16, 32, 64, 64), (16, 32, 64), (16, 32, 32, 64), (48, 96, 128, 128), (16, 32, 64, 64, 64)),
    XL: ((16, 32, 64, 64), (16, 32, 64), (16, 16, 64, 64), (48, 96, 128, 128), (16, 32, 64, 64, 64)),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_program_would_misread_is_refused_and_nothing_else(kind: Kind, program: str) -> None:
    """Every combination of sizes: the package refuses it exactly if the program's rules build another network."""
    seen = set()
    for channels, widths, blocks in itertools.product((1, 2, 3, 4, 12), WIDTHS[kind], (1, 2, 3, 4)):
        sizes = network(kind, channels, widths=widths, blocks=blocks)
        built = rules.read(original(sizes), PROGRAMS[program])
        works = rules.works(built, channels, PROGRAMS[program])
        if works:
            programs.check(sizes, program)
        else:
            with pytest.raises(UserError, match=r"diffusers exports it as it is|comfyui exports a file"):
                programs.check(sizes, program)
        seen.add(works)
    assert seen == {True, False}


def test_another_downscale_factor_is_refused() -> None:
    with pytest.raises(UserError, match="downscale_factor is 8"):
        programs.check(Network(XL, 3, TINY[XL], 2, 8), "comfyui")


def test_an_sd15_adapter_of_4_or_12_channels_looks_like_one_of_sdxl() -> None:
    for channels, seems in ((4, 1), (12, 3)):
        sizes = network(FULL, channels)
        built = rules.read(original(sizes), rules.COMFYUI)
        assert built is not None and (built.family, built.inputs) == ("xl", seems)
        with pytest.raises(UserError, match=f"takes this one for an SDXL adapter of {seems}"):
            programs.check(sizes, "comfyui")


def test_why_a_light_adapter_needs_the_original_layout() -> None:
    """In diffusers' layout programs know two of its four blocks: ComfyUI refuses it, A1111 leaves random weights."""
    sizes = network(LIGHT)
    for program in PROGRAMS.values():
        built = rules.read(sizes.shapes(), program)
        assert built is None or (built.extra and built.missing)
        assert rules.works(rules.read(original(sizes), program), 3, program)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a1111_would_leave_weights_random_without_an_error(blocks: int) -> None:
    """In diffusers' layout, which that program renames, no shape disagrees; so nothing is reported there."""
    sizes = network(XL, blocks=blocks)
    built = rules.read(sizes.shapes(), rules.A1111)
    assert built is not None and not built.is_exact and not built.misshapen
    with pytest.raises(UserError, match=f"{blocks} residual blocks a stage"):
        programs.check(sizes, "a1111")


def picture(height: int, width: int, channels: int) -> torch.Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "sizes"), [(XL, ((1024, 1024), (832, 1216))), (FULL, ((512, 512), (448, 704)))])
def test_features_are_equal_to_the_bit_at_allowed_sizes(
    kind: Kind, sizes: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    adapter = write(tmp_path / "a", network(kind))
    tensors = load_file(export(tmp_path / "a", tmp_path / "out", "comfyui", "--dtype", "fp32"))
    built = rules.read({name: tuple(tensor.shape) for name, tensor in tensors.items()}, rules.COMFYUI)
    assert built is not None
    for height, width in sizes:
        assert height % programs.size_multiple(network(kind)) == width % programs.size_multiple(network(kind)) == 0
        with torch.no_grad():
            ours = adapter(picture(height, width, 3))
        for pool in ("ceil", "pad", "floor"):
            theirs = rules.features(tensors, built, picture(height, width, 3), pool)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_deep_features_differ_at_other_sizes(tmp_path: Path) -> None:
    """At 1008 the pooled size is 31.5: diffusers' rule is "ceil", so 32 is what sides must be multiples of."""
    adapter = write(tmp_path / "a", network(XL))
    tensors = load_file(export(tmp_path / "a", tmp_path / "out", "comfyui", "--dtype", "fp32"))
    built = rules.read({name: tuple(tensor.shape) for name, tensor in tensors.items()}, rules.COMFYUI)
    assert built is not None
    with torch.no_grad():
        ours = adapter(picture(1008, 1008, 3))
    for pool in ("ceil", "pad", "floor"):
        theirs = rules.features(tensors, built, picture(1008, 1008, 3), pool)
        apart = [rules.difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        assert apart[:2] == [0, 0]
        assert apart[2:] == [0, 0] if pool == "ceil" else min(apart[2:]) > 0.01


@pytest.mark.parametrize(("kind", "millions"), [(XL, 79.0), (FULL, 77.4), (LIGHT, 18.7)])
def test_the_official_sizes_make_a_file_that_programs_read(kind: Kind, millions: float, tmp_path: Path) -> None:
    sizes = network(kind, widths=OFFICIAL[kind])
    adapter = write(tmp_path / "a", sizes)
    assert sum(p.numel() for p in adapter.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    file = export(tmp_path / "a", tmp_path / "out", "a1111")
    assert file.stat().st_size < 160e6
    tensors = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for program in PROGRAMS.values():
        assert rules.works(rules.read(shapes, program), 3, program)
    found, names = find_network(shapes)
    assert found == sizes
    weights = adapter.state_dict()
    assert all(torch.equal(tensors[name], weights[target].half()) for name, target in names.items())
    whole = make_adapter(found, {target: tensors[name].float() for name, target in names.items()})
    built = rules.read(shapes, rules.COMFYUI)
    assert built is not None
    condition = picture(128, 192, 3)
    with torch.no_grad():
        ours = whole(condition)
    theirs = rules.features({name: tensor.float() for name, tensor in tensors.items()}, built, condition, "pad")
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_coloured_condition_is_made_grey_in_three_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So an adapter of one channel is exported with a warning; a picture that is grey already is the same for all."""
    write(tmp_path / "a", network(XL, 1))
    tensors = load_file(export(tmp_path / "a", tmp_path / "out", "comfyui", "--dtype", "fp32"))
    assert "warning: the adapter takes pictures of one channel" in capsys.readouterr().out
    built = rules.read({name: tuple(tensor.shape) for name, tensor in tensors.items()}, rules.COMFYUI)
    assert built is not None
    coloured, grey = picture(64, 64, 3), picture(64, 64, 1).expand(1, 3, 64, 64)
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    for hint, most in ((coloured, None), (grey, 1e-6)):
        seen = [
            rules.to_inputs(hint, built, rules.COMFYUI),
            rules.to_inputs(hint, built, rules.A1111),
            (hint * luminance).sum(1, keepdim=True),
        ]
        apart = [(a - b).abs().max().item() for a, b in itertools.combinations(seen, 2)]
        assert min(apart) > 0.1 if most is None else max(apart) < most


def test_sides_that_are_no_multiples_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, is_warned in ((1008, True), (1024, False)):
        write(tmp_path / str(side), network(XL), resolution=side)
        export(tmp_path / str(side), tmp_path / f"out{side}")
        shown = capsys.readouterr().out
        assert ("multiples of 32 only" in shown) is is_warned
        assert "sides of multiples of 32 pixels" in shown


def test_recommended_options_that_programs_lack_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", network(XL), sampling={"scale": 0.8, "control_guidance": 2.0})
    export(tmp_path / "a", tmp_path / "out")
    assert "control_guidance 2.0, which ComfyUI does not have" in capsys.readouterr().out
