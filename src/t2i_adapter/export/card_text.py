"""The sections of a model card that say what an adapter is and how it is used, as Markdown.

All text from users and data is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from t2i_adapter.annotators.registry import TABLE, find_plugin
from t2i_adapter.errors import UserError
from t2i_adapter.export.card_code import steering_code, usage_code
from t2i_adapter.export.card_pictures import PICTURES, CardSample
from t2i_adapter.files import show_command
from t2i_adapter.generation.options import POINT, RequestedSampling, SamplingOptions
from t2i_adapter.models.record import WEIGHTS_FP16, Metadata, describe_measurement
from t2i_adapter.types import CHUNK_TOKENS

PAPER = "https://arxiv.org/abs/2302.08453"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:])")
_EXAMPLE = {"control_guidance": 1.5}
"""Options of the card's program if the record recommends none."""
_POLARITIES = {
    "white on black": "drawn in white on black",
    "black on white": "drawn in black on white",
    "near is white": "with near parts white and far parts black",
}
_KINDS = {"labels": "colours name classes", "pose": "colours name joints", "normal": "colours are directions"}
MULTIPLES = {True: 32, False: 64}
"""is_xl -> pixels; at other sides programs round the adapter's deepest features in different ways."""


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        metadata: the adapter's record, without local paths.
        config: the adapter's config.json.
        repo_id: hub id or folder from which the card's code loads the adapter.
        prompt: of the card's code.
    """

    metadata: Metadata
    config: Mapping[str, Any]
    repo_id: str
    prompt: str = "a prompt"

    @property
    def name(self) -> str:
        return self.repo_id.rstrip("/").rpartition("/")[2] or "adapter"

    @property
    def channels(self) -> int:
        """Channels of the condition picture, 1 or 3."""
        return 1 if self.config.get("in_channels") == 1 else 3

    @property
    def is_xl(self) -> bool:
        """Whether the adapter is for SDXL; else it is for Stable Diffusion 1 or 2."""
        return self.config.get("adapter_type", "full_adapter_xl") == "full_adapter_xl"

    @property
    def family(self) -> str:
        return "Stable Diffusion XL" if self.is_xl else "Stable Diffusion"

    @property
    def dataset(self) -> str | None:
        """Hub id of the dataset, if it is one of the hub."""
        data = self.metadata.data
        return str(data["name"]) if data.get("is_on_hub") is True and data.get("name") else None

    @property
    def sampling(self) -> SamplingOptions:
        """The recommended options of sampling, else the plain ones."""
        return RequestedSampling().settle(self.metadata.sampling)


def markdown(text: str) -> str:
    """Returns the text as one line, escaped so that Markdown and HTML show it literally."""
    return _MARKDOWN.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def introduction(facts: Facts) -> str:
    size = f" at {facts.metadata.resolution} x {facts.metadata.resolution} pixels" if facts.metadata.resolution else ""
    base, commit = facts.metadata.base["name"], facts.metadata.base.get("commit")
    at = f" (commit {markdown(str(commit))})" if commit else ""
    data = f", on the pairs of {markdown(facts.dataset)}" if facts.dataset else ""
    return (
        f"# {markdown(facts.name)}\n\n"
        f"A [T2I-Adapter]({PAPER}) for {facts.family}, trained{size} on the frozen base {markdown(base)}{at}{data}. "
        f"It steers the base by a condition picture{_condition_name(facts)}; the base's own weights are unchanged."
        f"{_together(facts.metadata)}"
    )


def _together(metadata: Metadata) -> str:
    """Returns how to use an adapter that was trained together with others."""
    others = metadata.training.get("composed_with")
    if not isinstance(others, list | tuple) or not others:
        return ""
    return (
        f"\n\nIt was trained together with {markdown(', '.join(map(str, others)))}, so that the features of all can be "
        "added. Give each a weight of 1, or 0.5 to 1.5: the default of `MultiAdapter` in diffusers is less."
    )


def _condition_name(facts: Facts) -> str:
    name = facts.metadata.condition.get("name")
    return f" of the kind {markdown(str(name))}" if name else ""


def gallery(has_pictures: bool) -> str:
    """The hub shows the widget's pictures in place of this line."""
    return "<Gallery />" if has_pictures else ""


def use(facts: Facts) -> str:
    metadata = facts.metadata
    tokens = ""
    if metadata.max_tokens != CHUNK_TOKENS:
        tokens = (
            f"The training read captions of up to {metadata.max_tokens} tokens, in chunks of {CHUNK_TOKENS}. "
            f"`t2i-adapter generate` and ComfyUI read such prompts in the same way; this program cuts them off after "
            f"{CHUNK_TOKENS} tokens.\n\n"
        )
    code = usage_code(metadata, facts.repo_id, prompt=facts.prompt, channels=facts.channels, is_xl=facts.is_xl)
    return (
        '## Use with diffusers\n\nThe snippet that the hub shows under "Use this model" does not load adapters; this '
        f"program does. `condition.png` is the condition picture ([below](#the-condition-picture)).\n\n{tokens}"
        f"```python\n{code}```"
    )


def condition(facts: Facts) -> str:
    """Says what the condition picture is, and how to make one of a photo."""
    record = facts.metadata.condition
    name = record.get("name")
    kinds = [_POLARITIES.get(str(record.get("polarity")), ""), _KINDS.get(str(record.get("kind")), "")]
    channels = "one channel (grey)" if facts.channels == 1 else "three channels (RGB)"
    words = ", ".join([channels, *filter(None, kinds)])
    if not name:
        column = record.get("column")
        source = f" (column {markdown(str(column))})" if column else ""
        text = (
            f"The condition pictures came with the dataset{source}: {words}. How they were made is not recorded; use "
            "pictures that were made in the same way as the dataset's."
        )
        return f"## The condition picture\n\n{text}"
    options = record.get("options")
    settings = options if isinstance(options, Mapping) else {}
    text = f"The condition is a map of the kind {markdown(str(name))}: {words}. {_describe(str(name))}".rstrip()
    if settings:
        text += f" Options: {markdown(', '.join(f'{key} {value}' for key, value in settings.items()))}."
    if name not in TABLE:
        text += " This package does not make such maps; use pictures that were made in the same way as the dataset's."
        return f"## The condition picture\n\n{text}"
    spec = ",".join([str(name), *(f"{key}={value}" for key, value in settings.items())])
    commands = [
        show_command("t2i-adapter", "annotate", spec, "photo.png", "--out", "condition.png"),
        show_command(
            *("t2i-adapter", "generate", "--adapter", facts.repo_id, "--prompt", facts.prompt, "--photo", "photo.png")
        ),
    ]
    shown = "\n".join(commands)
    return (
        f"## The condition picture\n\n{text}\n\nThe first command makes it of a photo. The second does the same and "
        f"generates with it. Crop the photo to the picture's size first.\n\n```sh\n{shown}\n```"
    )


def _describe(name: str) -> str:
    """The first paragraph of a kind's documentation, for kinds of this package."""
    if name not in TABLE:
        return ""
    try:
        paragraph = (find_plugin(name).__doc__ or "").split("\n\n")[0]
    except UserError:  # the kind needs a package that is not installed
        return ""
    return markdown(paragraph)


def sampling(facts: Facts) -> str:
    """Says how strong the adapter should be, and in which steps, and how guidance can amplify its condition."""
    metadata, chosen = facts.metadata, facts.sampling
    example = chosen if metadata.sampling else RequestedSampling().settle(_EXAMPLE)
    program = f"\n\n```python\n{steering_code(example, is_xl=facts.is_xl)}```" if example.guidance > 1 else ""
    notes = []
    if metadata.sampling:
        values = ", ".join(f"{name} {getattr(chosen, name)}" for name in POINT if name in metadata.sampling)
        notes.append(
            f"Recommended for this adapter: {markdown(values)}. `t2i-adapter generate` takes these values by default."
        )
        if measured := describe_measurement(metadata.sampling):
            notes.append(markdown(measured))
    else:
        notes.append("The best strength was not measured. Strength 1 in all steps is as in training.")
    strength = f"In diffusers the strength is `adapter_conditioning_scale` ({chosen.scale:g})"
    share = "the share of the steps in which the adapter acts, from the first,"
    notes.append(
        f"{strength}, and {share} is `adapter_conditioning_factor` ({chosen.condition_factor:g})."
        if facts.is_xl
        else f"{strength}. Its pipeline has no option for {share} of which this is {chosen.condition_factor:g}."
    )
    steering = [
        "Guidance amplifies the prompt, and not the condition, because both of its branches carry the adapter. With "
        "control guidance the negative branch carries less of it, so that the condition is amplified, too."
    ]
    if not metadata.sampling:
        steering.append("`t2i-adapter generate` has the options `control_guidance` and `control_passes` for it.")
    if chosen.control_passes == 3:
        steering.append("They were measured with a third pass of the UNet, which only `t2i-adapter generate` makes.")
    if program:
        steering.append("The lines below follow the program above and do it with diffusers alone.")
    return f"## Strength and control guidance\n\n{' '.join(notes)}\n\n{' '.join(steering)}{program}"


def programs(facts: Facts) -> str:
    """Says for each program where the files go and what to set there."""
    chosen, multiple = facts.sampling, MULTIPLES[facts.is_xl]
    file = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', facts.name)}.safetensors"
    strength, end, percent = f"{chosen.scale:g}", f"{chosen.condition_factor:g}", f"{100 * chosen.condition_factor:g} %"
    grey = {"comfy": "", "a1111": ""}
    if facts.channels == 1:
        grey = {
            "comfy": " The adapter has one channel, for which ComfyUI takes the mean of red, green and blue.",
            "a1111": " The adapter has one channel, for which the extension takes the red one.",
        }
    if facts.config.get("adapter_type") == "light_adapter":
        return ""
    advice = (
        "Give each program the finished condition picture, and pictures whose sides are multiples of "
        f"{multiple} pixels: at other sides programs round the deepest features in different ways. Guidance 5 and the "
        "sampler Euler ancestral are those of the program above."
    )
    comfy = (
        f"Save `{WEIGHTS_FP16}` as `models/controlnet/{file}`. *Load ControlNet Model* opens it; in *Apply ControlNet* "
        f"set `strength` {strength}, `start_percent` 0 and `end_percent` {end}.{grey['comfy']}"
    )
    a1111 = (
        f"Save `{WEIGHTS_FP16}` as `{file}` in `extensions/sd-webui-controlnet/models` (A1111) or `models/ControlNet` "
        f"(Forge). In the ControlNet unit set the preprocessor *none*, *Control Weight* {strength}, *Ending Control "
        f"Step* {end} and the control mode *Balanced*.{grey['a1111']}"
    )
    invoke = (
        f"Add the model by this repository's id, `{_plain(facts.repo_id)}`, or by a folder with `config.json` and the "
        f"weights. In the control layer set the weight {strength}, and begin and end 0 % and {percent}."
    )
    sdnext = (
        "Its list of T2I-Adapters is fixed, so this adapter cannot be chosen there. This was read in its source "
        "(commit 6f7fd09), and not tried."
    )
    parts = {"ComfyUI": comfy, "A1111 and Forge": a1111, "InvokeAI": invoke, "SD.Next": sdnext}
    return "\n\n".join(["## Use in other programs", advice, *(f"### {name}\n\n{text}" for name, text in parts.items())])


def _plain(text: str) -> str:
    """Text for a code span: without backticks, line breaks and markup."""
    return escape(re.sub(r"[`\s]+", " ", text))


def samples_section(samples: Sequence[CardSample]) -> str:
    if not samples:
        return ""
    shown = [
        f"{markdown(sample.prompt)}\n\n![condition, then pictures]({PICTURES}/sample_{number:02d}.png)"
        for number, sample in enumerate(samples)
    ]
    return "## Samples\n\nThe condition, then pictures generated from it.\n\n" + "\n\n".join(shown)


def hyperparameters(values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {markdown(str(key))} | {markdown(str(value))} |" for key, value in values.items())
    return f"## Training\n\n| option | value |\n|---|---|\n{rows}" if rows else ""


def versions(metadata: Metadata) -> str:
    listed = ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in metadata.versions.items())
    return f"Trained with {listed}." if listed else ""
