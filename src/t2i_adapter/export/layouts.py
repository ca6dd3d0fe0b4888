"""Names of an adapter's weights in diffusers' layout and in the original one, and what the names say of the network.

The original layout is that of the first T2I-Adapter files, which ComfyUI and A1111 read. For stage i and block j:

| | diffusers | original |
|---|---|---|
| full, XL | adapter.body.i.resnets.j.block1 | body.(n i + j).block1, with n blocks a stage |
| full, XL | adapter.body.i.in_conv | body.(n i).in_conv |
| light | adapter.body.i.resnets.j.block1 | body.i.body.j.block1 |
| light | adapter.body.i.in_conv, out_conv | body.i.in_conv, out_conv |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from t2i_adapter.errors import UserError

if TYPE_CHECKING:
    from diffusers import T2IAdapter
    from torch import Tensor

FULL, XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
Kind = Literal["full_adapter", "full_adapter_xl", "light_adapter"]
DOWNSCALE = {FULL: 8, XL: 16, LIGHT: 8}
"""Kind -> PixelUnshuffle factor. In a file it is not written down: the first convolution reads channels * factor^2."""
INPUTS: dict[int, tuple[Kind, int]] = {64: (FULL, 1), 192: (FULL, 3), 256: (XL, 1), 768: (XL, 3)}
"""Channels that the first convolution of a full adapter reads -> kind and channels of the condition picture.

256 and 768 could also be 4 and 12 channels of an SD 1.5 adapter. Programs read them as XL, and so does this one.
"""
_PREFIXES = ("module.", "control_model.", "t2iadapter.", "adapter.")
_MOST = 64  # stages and blocks; a name with a larger number would build a network of any size
_BODY = re.compile(r"body\.(\d{1,3})\.(?:(resnets|body)\.(\d{1,3})\.)?(block1|block2|in_conv|out_conv)\.(weight|bias)")
_CONV_IN = re.compile(r"conv_in\.(weight|bias)")
_FOREIGN = (
    ("style_embedding", "a style adapter, which is another network"),
    ("skep.", "an adapter with convolutions in its skip connections, which diffusers does not have"),
    ("down_opt.", "an adapter with convolutions that halve the features, which diffusers does not have"),
    ("lora_", "a LoRA"),
    ("zero_convs.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("ip_adapter", "an IP-Adapter"),
)
"""(part of a name, what a file with such a name is)."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name of each weight -> its shape."""


@dataclass(frozen=True)
class Network:
    """The sizes of an adapter, as in diffusers' config.json."""

    adapter_type: Kind
    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    downscale_factor: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Network:
        """Returns the sizes in a T2IAdapter's config."""
        names = cls.__dataclass_fields__
        return cls(**{**{name: config[name] for name in names}, "channels": tuple(config["channels"])})

    def config(self) -> dict[str, Any]:
        """Returns the arguments of diffusers' T2IAdapter."""
        return {**asdict(self), "channels": list(self.channels)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the names in diffusers' layout and the shapes of all weights, from diffusers' own class."""
        import torch
        from diffusers import T2IAdapter

        with torch.device("meta"):  # allocates nothing
            return {name: tuple(tensor.shape) for name, tensor in T2IAdapter(**self.config()).state_dict().items()}


class _Part(NamedTuple):
    """One name of a file. inner: the word before the block's number, if the name has one."""

    stage: int
    inner: str | None
    block: int | None
    layer: str
    tensor: str


def make_adapter(network: Network, weights: Mapping[str, Tensor]) -> T2IAdapter:
    """Returns the adapter with these weights, which are named as in diffusers, in float32."""
    from diffusers import T2IAdapter

    adapter = T2IAdapter(**network.config())
    adapter.load_state_dict(weights)
    return adapter


def to_original(name: str, network: Network) -> str:
    """Returns the original layout's name of a weight that has `name` in diffusers' layout."""
    inside = name.removeprefix("adapter.")
    part = _parse(inside)
    if part is None:
        return inside
    if network.adapter_type == LIGHT:
        return inside.replace(".resnets.", ".body.")
    flat = part.stage * network.num_res_blocks + (part.block or 0)
    return f"body.{flat}.{part.layer}.{part.tensor}"


def find_network(shapes: Shapes, kind: Kind | None = None) -> tuple[Network, dict[str, str]]:
    """Finds out what adapter the weights of a file are, in either layout, with or without a prefix.

    Args:
        shapes: of all tensors of the file.
        kind: the adapter's kind, if the user knows it; None finds it by the channels that the first layer reads.

    Returns the network, and each of the file's names -> its name in diffusers' layout.

    Raises:
        UserError: if the file is something else, or lacks a weight or has one too many or of another shape.
    """
    if not shapes:
        raise UserError("it holds no weights, so it is no T2I-Adapter.")
    if foreign := next((what for part, what in _FOREIGN if any(part in name for name in shapes)), None):
        raise UserError(f"it holds {foreign}; allowed is a T2I-Adapter of kind {FULL}, {XL} or {LIGHT}.")
    prefix = _common_prefix(shapes)
    inside = {name.removeprefix(prefix): name for name in shapes}
    parts = {name: part for name in inside if (part := _parse(name))}
    of = {name: shapes[outer] for name, outer in inside.items()}
    if strange := sorted(name for name in inside if name not in parts and not _CONV_IN.fullmatch(name)):
        raise UserError(
            f"the weight {strange[0]!r} belongs to no T2I-Adapter ({len(strange)} such of {len(shapes)}); allowed are "
            "the layouts of diffusers and of the original files."
        )
    if not parts:
        raise UserError("it has no weights body.N.block1, so it is no T2I-Adapter.")
    is_light = "conv_in.weight" not in of
    if kind is not None and is_light != (kind == LIGHT):
        raise UserError(f"its names are {'' if is_light else 'not '}those of a {LIGHT}; omit the kind {kind}.")
    is_flat = not is_light and all(part.inner is None for part in parts.values())
    network = _light(parts, of) if is_light else _full(parts, of, kind, is_flat=is_flat)
    _check_sizes(network)
    names = {outer: _to_diffusers(name, parts.get(name), network, is_flat=is_flat) for name, outer in inside.items()}
    _check(network, [(target, shapes[source]) for source, target in names.items()])
    return network, names


def _parse(name: str) -> _Part | None:
    found = _BODY.fullmatch(name)
    if found is None:
        return None
    stage, inner, block, layer, tensor = found.groups()
    return _Part(int(stage), inner, None if block is None else int(block), layer, tensor)


def _common_prefix(shapes: Shapes) -> str:
    """Returns the prefixes that all names have in common, such as "module.adapter."."""
    prefix = ""
    while found := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in shapes)), None):
        prefix += found
    return prefix


def _light(parts: Mapping[str, _Part], of: Shapes) -> Network:
    stages, blocks = _count(parts.values())
    first = _channels(of, "body.0.in_conv.weight", 1)
    factor = DOWNSCALE[LIGHT] ** 2
    if first % factor or first // factor not in (1, 3):
        raise UserError(
            f"its first layer reads {first} channels; allowed are {factor} and {3 * factor}, which are condition "
            "pictures of 1 and 3 channels."
        )
    widths = [_channels(of, f"body.{stage}.out_conv.weight", 0) for stage in range(stages)]
    # The last stage has the width of the one before it, which diffusers does not list twice.
    return Network(LIGHT, first // factor, tuple(widths[:-1]), blocks, DOWNSCALE[LIGHT])


def _full(parts: Mapping[str, _Part], of: Shapes, kind: Kind | None, *, is_flat: bool) -> Network:
    stages, blocks = _count(parts.values())
    if is_flat:
        wider = sorted(part.stage for part in parts.values() if part.layer == "in_conv")
        blocks = wider[0] if wider else max(stages // 4, 1)
        if not blocks or stages % blocks:
            raise UserError(f"its {stages} blocks do not make stages of {blocks} blocks each, so it is damaged.")
        names = [f"body.{stage * blocks}.block1.weight" for stage in range(stages // blocks)]
    else:
        names = [f"body.{stage}.resnets.0.block1.weight" for stage in range(stages)]
    first = _channels(of, "conv_in.weight", 1)
    found, channels = _input(first, kind)
    return Network(found, channels, tuple(_channels(of, name, 0) for name in names), blocks, DOWNSCALE[found])


def _input(first: int, kind: Kind | None) -> tuple[Kind, int]:
    """Returns kind and condition channels of a full adapter whose first convolution reads `first` channels."""
    if kind is None:
        if first not in INPUTS:
            known = ", ".join(f"{count} ({what}, {channels} channels)" for count, (what, channels) in INPUTS.items())
            raise UserError(
                f"its first convolution reads {first} channels, which names no kind; known are {known}. Name the kind."
            )
        return INPUTS[first]
    factor = DOWNSCALE[kind] ** 2
    if first % factor:
        raise UserError(f"its first convolution reads {first} channels, and a {kind} reads a multiple of {factor}.")
    return kind, first // factor


def _count(parts: Iterable[_Part]) -> tuple[int, int]:
    """Returns the numbers of stages, and of blocks in a stage, that the names have. Raises UserError for huge ones."""
    numbers = [(part.stage, part.block or 0) for part in parts]
    stages, blocks = (1 + max(column) for column in zip(*numbers, strict=True))
    if stages > _MOST or blocks > _MOST:
        raise UserError(f"its names count {stages} stages and {blocks} blocks; allowed are up to {_MOST} of each.")
    return stages, blocks


def _channels(of: Shapes, name: str, axis: int) -> int:
    """Returns the size of a convolution's weight (out, in, k, k) along `axis`. Raises UserError if it is missing."""
    shape = of.get(name, ())
    if len(shape) != 4:
        raise UserError(f"the weight {name!r} is missing or is no convolution's, so the file is damaged.")
    return shape[axis]


def _to_diffusers(name: str, part: _Part | None, network: Network, *, is_flat: bool) -> str:
    """Returns diffusers' name of a weight. is_flat: the file numbers the blocks of all stages in one row."""
    if part is None:
        return f"adapter.{name}"
    stage, block = part.stage, part.block
    if is_flat:
        stage, block = divmod(part.stage, network.num_res_blocks)
        if part.layer == "in_conv":
            block = None if block == 0 else block  # it stands before a stage's first block only
    inner = "" if block is None else f"resnets.{block}."
    return f"adapter.body.{stage}.{inner}{part.layer}.{part.tensor}"


def _check_sizes(network: Network) -> None:
    """Raises UserError for sizes with which diffusers' class cannot be built, before it is."""
    least = 4 if network.adapter_type == LIGHT else 1  # a light adapter's blocks have a quarter of the channels
    if not 1 <= len(network.channels) <= 8 or not all(least <= size <= 8192 for size in network.channels):
        raise UserError(
            f"its stages have {list(network.channels)} channels; allowed are 1 to 8 stages of {least} to 8192 channels."
        )
    if not 1 <= network.in_channels <= 64:
        raise UserError(f"it takes pictures of {network.in_channels} channels; allowed are 1 to 64.")


def _check(network: Network, weights: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raises UserError unless the weights are exactly those of the network, each once."""
    wanted, found = network.shapes(), dict(weights)
    if len(found) < len(weights):
        raise UserError("two of its weights have one name in diffusers' layout, so it mixes layouts.")
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(found) if wanted[name] != found[name])
    for names, text in ((missing, "are missing"), (extra, "are too many"), (wrong, "have another shape")):
        if names:
            raise UserError(
                f"it looks like a {network.adapter_type} with channels {list(network.channels)} and "
                f"{network.num_res_blocks} blocks a stage, but {len(names)} weights {text}, such as {names[0]!r}."
            )
