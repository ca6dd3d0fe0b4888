"""What each program takes: layout, place of the file, sizes of pictures; which adapters it would misread.

ComfyUI and A1111's ControlNet extension read no config. They decide by names and shapes of the weights what network a
file holds, so an adapter outside their pattern is built wrongly, sometimes without an error. `check` refuses those.
tests/support/programs.py states the programs' rules independently, and the tests compare both.
"""

from __future__ import annotations

from dataclasses import dataclass

from t2i_adapter.errors import UserError, flag
from t2i_adapter.export.layouts import DOWNSCALE, LIGHT, XL, Network
from t2i_adapter.generation.options import SamplingOptions

LIGHT_CHANNELS = (320, 640, 1280)
BLOCKS = {"full_adapter": 2, XL: 2, LIGHT: 4}
"""Kind -> residual blocks of a stage, which the programs' code fixes."""
BASE_CHANNELS = 320
"""Channels of the first feature for SD 1.5, SD 2 and SDXL."""


@dataclass(frozen=True)
class Program:
    """A program that uses adapters.

    Attributes:
        title: as people call it.
        by_names: it finds the network by the names of the weights, in one file of the original layout; else it takes a
            folder of diffusers.
        place: where the result goes, seen from the program's folder.
        grey: how it makes an RGB picture grey for an adapter with one channel; "" if that is not known.
    """

    title: str
    by_names: bool
    place: str
    grey: str = ""


PROGRAMS = {
    "diffusers": Program("diffusers", False, "any folder; T2IAdapter.from_pretrained reads it"),
    "comfyui": Program("ComfyUI", True, "models/controlnet", "by the mean of the three channels"),
    "a1111": Program(
        "A1111 and Forge", True, "models/ControlNet", "by channel 0 alone (A1111), or by the mean of the three (Forge)"
    ),
    "invoke": Program("InvokeAI and SD.Next", False, "any folder; InvokeAI's model manager installs from it"),
    "civitai": Program("CivitAI", True, "upload the zip's content", "by the mean or by channel 0"),
    "space": Program("a Hugging Face Space", False, "the root of a Space of kind gradio"),
}


def size_multiple(network: Network) -> int:
    """Returns the multiple in pixels that both sides of a picture must be so that all programs compute equal features.

    SDXL: 16 (PixelUnshuffle) times 2 (one pooling) = 32. SD 1.5: 8 times 2^3 (three poolings) = 64. At other sides the
    pooled size is odd: diffusers then rounds it up, ComfyUI pads with zeros, A1111 rounds it down.
    """
    return network.downscale_factor * (2 if network.adapter_type == XL else 2 ** (_stages(network) - 1))


def check(network: Network, name: str) -> None:
    """Raises UserError if the program `name` would refuse or misread an adapter of these sizes."""
    program = PROGRAMS[name]
    if program.by_names and (reason := _misread(network)):
        raise UserError(f"{name}: {reason} {flag('to')} diffusers exports it as it is.", option="to")
    if name == "a1111" and network.adapter_type == LIGHT and network.in_channels == 1:
        raise UserError(
            f"{name}: A1111 feeds RGB pictures to every {LIGHT}, and this one takes grey pictures. {flag('to')} "
            "comfyui exports a file that ComfyUI and Forge use.",
            option="to",
        )
    if name == "invoke" and network.in_channels not in (1, 3):
        raise UserError(
            f"{name}: the adapter takes pictures of {network.in_channels} channels, and {program.title} have pictures "
            f"of 1 or 3; {flag('to')} diffusers exports it as it is.",
            option="to",
        )


def _misread(network: Network) -> str:
    """Returns why programs that go by names and shapes would misread the adapter; "" if they read it correctly."""
    kind, channels, first = network.adapter_type, network.channels, network.channels[0]
    if network.downscale_factor != DOWNSCALE[kind]:
        return (
            f"downscale_factor is {network.downscale_factor}, and the program builds every {kind} with "
            f"{DOWNSCALE[kind]}."
        )
    if network.num_res_blocks != BLOCKS[kind]:
        return (
            f"the adapter has {network.num_res_blocks} residual blocks a stage, and the program builds every {kind} "
            f"with {BLOCKS[kind]} (A1111 without an error: the other weights stay random)."
        )
    if network.in_channels not in (1, 3):
        return (
            f"the adapter takes pictures of {network.in_channels} channels, and the program has pictures of 1 or 3"
            + _confusion(network)
        )
    if kind == LIGHT and channels != LIGHT_CHANNELS:
        return f"its channels are {list(channels)}, and the program builds every {kind} with {list(LIGHT_CHANNELS)}."
    if kind != LIGHT and channels != (first, 2 * first, 4 * first, 4 * first):
        return f"its channels are {list(channels)}, and the program builds [c, 2c, 4c, 4c] with the first one as c."
    return ""


def _confusion(network: Network) -> str:
    first = network.in_channels * network.downscale_factor**2
    wrong = first // DOWNSCALE[XL] ** 2
    if network.adapter_type == "full_adapter" and wrong in (1, 3) and first == wrong * DOWNSCALE[XL] ** 2:
        return f"; by its first convolution ({first} channels) it takes this one for an SDXL adapter of {wrong}."
    return "."


def warnings(network: Network, name: str, resolution: int | None, sampling: SamplingOptions) -> list[str]:
    """Returns sentences about what works, but not as somebody may expect.

    resolution: side of the training's crops in pixels, if known. sampling: what the adapter's record recommends.
    """
    program, multiple = PROGRAMS[name], size_multiple(network)
    found = []
    if resolution and resolution % multiple:
        found.append(
            f"the training's crops have sides of {resolution} pixels. Programs compute equal features at sides "
            f"of multiples of {multiple} only, so choose such a size there."
        )
    if network.in_channels == 1 and program.grey:
        found.append(
            f"the adapter takes pictures of one channel. {program.title} makes an RGB picture grey {program.grey}, and "
            "this package by luminance. A picture that is grey already (R = G = B) is the same for all."
        )
    if network.channels[0] != BASE_CHANNELS and program.by_names:
        found.append(
            f"its first feature has {network.channels[0]} channels, and those of SD 1.5 and SDXL have {BASE_CHANNELS}: "
            "the file opens, but it fits only the base of its training."
        )
    if program.by_names and (unknown := _unknown_steering(sampling)):
        found.append(
            f"the record recommends {unknown}, which {program.title} does not have. The recommended strength was "
            "measured together with it, so compare a few strengths there."
        )
    return found


def _unknown_steering(sampling: SamplingOptions) -> str:
    """Returns the recommended options of sampling that only this package has, as text; "" if there are none."""
    names, plain = ("control_guidance", "control_passes", "scale_schedule"), SamplingOptions()
    changed = {name: value for name in names if (value := getattr(sampling, name)) != getattr(plain, name)}
    return ", ".join(f"{name} {value}" for name, value in changed.items())


def _stages(network: Network) -> int:
    return len(network.channels) + (network.adapter_type == LIGHT)
