"""Writes a ComfyUI workflow that uses an adapter, in the format that its editor saves and opens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from PIL.PngImagePlugin import PngInfo

CONDITIONING, IMAGE = "CONDITIONING", "IMAGE"
NODES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "CheckpointLoaderSimple": ({}, {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "ControlNetLoader": ({}, {"CONTROL_NET": "CONTROL_NET"}),
    "LoadImage": ({}, {"IMAGE": IMAGE, "MASK": "MASK"}),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"CONDITIONING": CONDITIONING}),
    "ControlNetApplyAdvanced": (
        {"positive": CONDITIONING, "negative": CONDITIONING, "control_net": "CONTROL_NET", "image": IMAGE},
        {"positive": CONDITIONING, "negative": CONDITIONING},
    ),
    "EmptyLatentImage": ({}, {"LATENT": "LATENT"}),
    "KSampler": (
        {"model": "MODEL", "positive": CONDITIONING, "negative": CONDITIONING, "latent_image": "LATENT"},
        {"LATENT": "LATENT"},
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": IMAGE}),
    "SaveImage": ({"images": IMAGE}, {}),
    "Note": ({}, {}),
}
"""Type of a node -> (name of each input -> type, name of each output -> type), in the order of their slots."""
_HEIGHTS = {"CLIPTextEncode": 160, "LoadImage": 320, "KSampler": 270, "SaveImage": 320, "Note": 200}
_WIDTH = 360  # pixels of a node in the editor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the workflow's nodes are set to.

    Attributes:
        checkpoint, adapter, condition: names of the files, as ComfyUI lists them.
        size: (width, height) of the picture in pixels.
        strength: weight of the adapter's features.
        start, end: shares of the steps between which the adapter acts.
        note: text that explains where the files go.
    """

    checkpoint: str
    adapter: str
    condition: str
    prompt: str
    size: tuple[int, int]
    negative: str = ""
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guidance: float = 5.0
    steps: int = 30
    seed: int = 0
    prefix: str = "t2i-adapter"
    note: str = ""


@dataclass
class _Graph:
    """Nodes and links while they are added."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)

    def add(
        self, kind: str, place: tuple[int, int], *widgets: Any, title: str | None = None, **sources: tuple[int, int]
    ) -> int:
        """Adds a node and links its inputs; returns its number.

        place: left and top in the editor. sources: input -> (node, slot) whose output it takes.
        """
        number, (inputs, outputs) = len(self.nodes) + 1, NODES[kind]
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": list(place),
                "size": [_WIDTH, _HEIGHTS.get(kind, 120)],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                **({"title": title} if title else {}),
                "inputs": [
                    {"name": name, "type": type_, "link": self._link(sources[name], number, slot, type_)}
                    for slot, (name, type_) in enumerate(inputs.items())
                ],
                "outputs": [
                    {"name": name, "type": type_, "links": [], "slot_index": slot}
                    for slot, (name, type_) in enumerate(outputs.items())
                ],
                "properties": {"Node name for S&R": kind} if outputs or inputs else {},
                "widgets_values": list(widgets),
            }
        )
        return number

    def _link(self, source: tuple[int, int], target: int, slot: int, type_: str) -> int:
        """Adds a link from an output of an earlier node; returns its number."""
        number = len(self.links) + 1
        self.links.append([number, *source, target, slot, type_])
        self.nodes[source[0] - 1]["outputs"][source[1]]["links"].append(number)
        return number


def make_workflow(settings: Settings) -> dict[str, Any]:
    """Returns the workflow: text to picture by Euler ancestral, with the adapter between prompts and sampler."""
    graph, (width, height) = _Graph(), settings.size
    base = graph.add("CheckpointLoaderSimple", (0, 0), settings.checkpoint)
    control = graph.add("ControlNetLoader", (0, 180), settings.adapter, title="T2I-Adapter")
    picture = graph.add("LoadImage", (0, 360), settings.condition, "image", title="Condition picture")
    latent = graph.add("EmptyLatentImage", (0, 740), width, height, 1)
    prompt = graph.add("CLIPTextEncode", (420, 0), settings.prompt, title="Prompt", clip=(base, 1))
    negative = graph.add("CLIPTextEncode", (420, 220), settings.negative, title="Negative prompt", clip=(base, 1))
    applied = graph.add(
        *("ControlNetApplyAdvanced", (420, 440), settings.strength, settings.start, settings.end),
        positive=(prompt, 0),
        negative=(negative, 0),
        control_net=(control, 0),
        image=(picture, 0),
    )
    sampled = graph.add(
        *("KSampler", (840, 0), settings.seed, "fixed", settings.steps, settings.guidance),
        *("euler_ancestral", "normal", 1.0),
        model=(base, 0),
        positive=(applied, 0),
        negative=(applied, 1),
        latent_image=(latent, 0),
    )
    decoded = graph.add("VAEDecode", (840, 330), samples=(sampled, 0), vae=(base, 2))
    graph.add("SaveImage", (840, 510), settings.prefix, images=(decoded, 0))
    if settings.note:
        graph.add("Note", (420, 640), settings.note)
    return {
        "last_node_id": len(graph.nodes),
        "last_link_id": len(graph.links),
        "nodes": graph.nodes,
        "links": graph.links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def example_info(workflow: dict[str, Any], parameters: str) -> PngInfo:
    """Returns the texts of a PNG that ComfyUI opens as this workflow. parameters: text for A1111; "" for none."""
    info = PngInfo()
    info.add_text("workflow", json.dumps(workflow, ensure_ascii=True))
    if parameters:
        info.add_text("parameters", parameters)
    return info
