"""How other programs read an adapter's file, stated independently of the package, as functions of names and shapes.

ComfyUI, and A1111 with its ControlNet extension, read no config: names and shapes decide which network they build. Each
`Program` here returns the network that the program builds for a file, and which of the file's weights it lacks or has
too many. `features` then computes that network's features, with the program's own rounding of odd sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
Pool = Literal["ceil", "pad", "floor"]


@dataclass(frozen=True)
class Built:
    """The network that a program builds.

    Attributes:
        family: "xl", "sd" or "light".
        inputs: channels of the picture that it expects.
        wanted: name of each weight -> its shape.
        names: the program's name of each weight -> the file's.
        missing, extra, misshapen: the program's names of weights that the file lacks, has too many, or has in another
            shape.
    """

    family: str
    inputs: float
    wanted: Mapping[str, Shape]
    names: Mapping[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        pool: how it halves an odd size.
        is_strict: it refuses a file with missing weights or too many; else it leaves the missing ones random.
        light_first: it looks for a light adapter before a full one.
        grey: how it makes an RGB picture grey for a full adapter of one channel.
        grey_for_light: whether it makes it grey for a light one too.
    """

    name: str
    pool: Pool
    is_strict: bool
    light_first: bool
    grey: Literal["mean", "first"]
    grey_for_light: bool


COMFYUI = Program("ComfyUI", "pad", True, True, "mean", True)
A1111 = Program("A1111", "floor", False, False, "first", False)
DIFFUSERS: Pool = "ceil"
UNSHUFFLE = {"xl": 16, "sd": 8, "light": 8}
POOLED = {"xl": {2}, "sd": {1, 2, 3}, "light": {1, 2, 3}}
"""Family -> stages that begin by halving the size."""


def read(shapes: Mapping[str, Shape], program: Program) -> Built | None:
    """Returns what the program makes of a file's weights; None if it does not recognise an adapter."""
    names = {_without_diffusers(name, shapes): name for name in shapes}
    kinds = [_light, _full] if program.light_first else [_full, _light]
    of = {inner: shapes[outer] for inner, outer in names.items()}
    for kind in kinds:
        if (built := kind(of)) is not None:
            family, inputs, wanted = built
            both = wanted.keys() & of.keys()
            return Built(
                *(family, inputs, wanted, names),
                missing=tuple(sorted(wanted.keys() - of.keys())),
                extra=tuple(sorted(of.keys() - wanted.keys())),
                misshapen=tuple(sorted(name for name in both if wanted[name] != of[name])),
            )
    return None


def works(built: Built | None, channels: int, program: Program) -> bool:
    """Whether the program computes what the adapter learnt, for an RGB picture. channels: of the adapter's pictures."""
    if built is None or not built.is_exact or built.inputs != channels:
        return False
    reduces = built.inputs == 1 and (built.family != "light" or program.grey_for_light)
    return built.inputs == 3 or reduces


def _without_diffusers(name: str, shapes: Mapping[str, Shape]) -> str:
    """The programs rename diffusers' names if one of them is there; they know two blocks in each of four stages."""
    if "adapter.body.0.resnets.0.block1.weight" not in shapes:
        return name
    for stage in range(4):
        head = f"adapter.body.{stage}."
        if not name.startswith(head):
            continue
        rest = name.removeprefix(head)
        for block in range(2):
            if rest.startswith(f"resnets.{block}."):
                return f"body.{2 * stage + block}." + rest.removeprefix(f"resnets.{block}.")
        return f"body.{2 * stage}.{rest}"
    return name.removeprefix("adapter.")


def _light(of: Mapping[str, Shape]) -> tuple[str, float, dict[str, Shape]] | None:
    if "body.0.in_conv.weight" not in of:
        return None
    inputs = of["body.0.in_conv.weight"][1]
    wanted: dict[str, Shape] = {}
    widths = [inputs, 320, 640, 1280, 1280]
    for stage, (before, after) in enumerate(pairwise(widths)):
        middle = after // 4
        _conv(wanted, f"body.{stage}.in_conv", before, middle, 1)
        for block in range(4):
            for layer in ("block1", "block2"):
                _conv(wanted, f"body.{stage}.body.{block}.{layer}", middle, middle, 3)
        _conv(wanted, f"body.{stage}.out_conv", middle, after, 1)
    return "light", inputs / 64, wanted


def _full(of: Mapping[str, Shape]) -> tuple[str, float, dict[str, Shape]] | None:
    if "conv_in.weight" not in of or "body.0.block2.weight" not in of:
        return None
    first, inputs = of["conv_in.weight"][:2]
    kernel = of["body.0.block2.weight"][2]
    family = "xl" if inputs in (16 * 16, 3 * 16 * 16) else "sd"
    wanted: dict[str, Shape] = {}
    _conv(wanted, "conv_in", inputs, first, 3)
    widths = [first, first, 2 * first, 4 * first, 4 * first]
    for stage in range(4):
        before, after = widths[stage], widths[stage + 1]
        if before != after:
            _conv(wanted, f"body.{2 * stage}.in_conv", before, after, kernel)
        for block in range(2):
            _conv(wanted, f"body.{2 * stage + block}.block1", after, after, 3)
            _conv(wanted, f"body.{2 * stage + block}.block2", after, after, kernel)
    return family, inputs / UNSHUFFLE[family] ** 2, wanted


def _conv(wanted: dict[str, Shape], name: str, before: int, after: int, kernel: int) -> None:
    wanted[f"{name}.weight"] = (after, before, kernel, kernel)
    wanted[f"{name}.bias"] = (after,)


def to_inputs(picture: Tensor, built: Built, program: Program) -> Tensor:
    """What the program feeds to the network for an RGB picture (1, 3, H, W) in [0, 1]."""
    if built.inputs != 1:
        return picture
    return picture.mean(dim=1, keepdim=True) if program.grey == "mean" else picture[:, :1]


@torch.no_grad()
def features(file: Mapping[str, Tensor], built: Built, picture: Tensor, pool: Pool) -> list[Tensor]:
    """Returns the four features of the network that a program has built. picture: (1, C, H, W) in [0, 1]."""
    weights = {name: file[outer] for name, outer in built.names.items() if name in built.wanted}

    def conv(name: str, x: Tensor) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def block(name: str, x: Tensor) -> Tensor:
        return conv(f"{name}.block2", F.relu(conv(f"{name}.block1", x))) + x

    x = F.pixel_unshuffle(picture, UNSHUFFLE[built.family])
    if built.family != "light":
        x = conv("conv_in", x)
    found = []
    for stage in range(4):
        if stage in POOLED[built.family]:
            x = halve(x, pool)
        if built.family == "light":
            x = conv(f"body.{stage}.in_conv", x)
            for number in range(4):
                x = block(f"body.{stage}.body.{number}", x)
            x = conv(f"body.{stage}.out_conv", x)
        else:
            if f"body.{2 * stage}.in_conv.weight" in weights:
                x = conv(f"body.{2 * stage}.in_conv", x)
            for number in range(2):
                x = block(f"body.{2 * stage + number}", x)
        found.append(x)
    return found


def halve(x: Tensor, pool: Pool) -> Tensor:
    """Means of 2 x 2 cells. An odd side: "ceil" averages what is there, "pad" adds zeros on both sides, "floor" drops
    the last line."""
    if pool == "ceil":
        return F.avg_pool2d(x, 2, ceil_mode=True)
    return F.avg_pool2d(x, 2, padding=(x.shape[2] % 2, x.shape[3] % 2) if pool == "pad" else 0)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference of two features over the norm of the first; a smaller one is scaled up as programs do."""
    if ours.shape != theirs.shape:
        theirs = F.interpolate(theirs, ours.shape[-2:], mode="nearest")
    norm = torch.linalg.vector_norm(ours.double()).item()
    return torch.linalg.vector_norm((ours - theirs).double()).item() / max(norm, math.ulp(0.0))
