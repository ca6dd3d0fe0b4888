"""The two text encoders, taught to tell a picture's colours, shapes and places from its caption.

The UNet then finds in the states and in the pooled vector, linearly, what it has to draw. Learned from
the pictures alone, this comes last and takes most of the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nano_maker.captions import SLOTS, THUMBNAIL, PairDataset
from nano_maker.run import PairTransform, device, rank, world
from nano_maker.words import END, MAX_TOKENS, START
from t2i_adapter.data import shapes

WIDTHS = (96, 160)  # of the two encoders; their sum is the UNet's cross attention width
POOLED = 128
_LAYERS = 3  # SDXL reads the last but one
_HEAD = 32
_BATCH = 64
_RATE = 2e-3
_COLOR_WEIGHT = 4.0  # against the cross entropies: colours are to be exact, kinds only to be told apart


@dataclass
class TextModels:
    """SDXL's text side: (tokenizer, encoder) twice."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def encode(self, captions: list[str], padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """(B,77,256) states, (B,128) pooled, as StableDiffusionXLPipeline.encode_prompt joins them.

        With padding "longest" the states end with the longest caption. The encoders are causal: what comes
        before is the same.
        """
        outputs = [
            encoder(self._ids(tokenizer, captions, padding), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, (self.first, self.second), strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def _ids(self, tokenizer: CLIPTokenizer, captions: list[str], padding: str) -> Tensor:
        """(B,L) int64."""
        rows = tokenizer(captions, padding=padding, max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        return rows["input_ids"].to(self.first.device)


def build(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> TextModels:
    configs = [_config(tokenizer, width) for tokenizer, width in zip(tokenizers, WIDTHS, strict=True)]
    first, second = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
    return TextModels(tokenizers, first.to(device()), second.to(device()))  # pyright: ignore[reportArgumentType]


def _config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(START),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(str(tokenizer.pad_token)),
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=POOLED,
        num_hidden_layers=_LAYERS,
        num_attention_heads=width // _HEAD,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        **ids,
    )


class Reader(nn.Module):
    """Tells the facts from a text: once from the pooled vector, once by attention over the states. Thrown away after.

    Everything is read off linearly, so that it lies open for the UNet.
    """

    def __init__(self, kinds: int, patterns: int) -> None:
        super().__init__()
        self.sizes = {
            "ground": 6,
            "pattern": patterns,
            "count": SLOTS + 1,
            "kinds": SLOTS * kinds,
            "shapes": SLOTS * 6,
            "thumbnail": 4 * THUMBNAIL**2,
        }
        width = sum(WIDTHS)
        self.queries = nn.Parameter(torch.randn(1 + SLOTS, width) / width**0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.from_pooled = nn.Linear(POOLED, sum(self.sizes.values()))
        self.from_states = nn.Linear(width * (1 + SLOTS), sum(self.sizes.values()))

    def forward(self, states: Tensor, pooled: Tensor) -> list[dict[str, Tensor]]:
        """Two readings, each {fact: (B, size)}."""
        queries = self.queries.expand(states.shape[0], -1, -1)
        found = self.attention(queries, states, states, need_weights=False)[0].flatten(1)
        rows = (self.from_pooled(pooled), self.from_states(found))
        return [dict(zip(self.sizes, row.split(list(self.sizes.values()), dim=1), strict=True)) for row in rows]


def train(work: Path, minutes: float, seed: int, models: TextModels, draw: Callable[[int], PairDataset]) -> None:
    """Train within `minutes`; resumes from work/text. `draw(index)` gives the facts of a training caption."""
    torch.manual_seed(seed)
    modules = {
        "first": models.first.train(),
        "second": models.second.train(),
        "reader": Reader(len(shapes.KINDS), len(shapes.PATTERNS)).to(device()),
    }
    stage = PairTransform(work / "text", minutes, _RATE, modules, trained=list(modules))
    for step in stage:
        facts = [draw(step * _BATCH + i) for i in range(rank(), _BATCH, world())]
        readings = modules["reader"](*models.encode([f.caption for f in facts], "longest"))
        stage.update(sum((_loss(reading, facts) for reading in readings), torch.zeros(())))


def _loss(reading: dict[str, Tensor], facts: list[PairDataset]) -> Tensor:
    """Square error of what is measured, cross entropy of what is counted; what a caption has not got is left out."""

    def target(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(f, name) for f in facts])).to(reading[name].device)

    loss = _COLOR_WEIGHT * _square_error(reading["ground"], target("ground"))
    loss = loss + _COLOR_WEIGHT * _square_error(reading["shapes"], target("shapes").flatten(1))
    loss = loss + _COLOR_WEIGHT * _square_error(reading["thumbnail"], target("thumbnail"))
    loss = (
        loss
        + F.cross_entropy(reading["pattern"], target("pattern"))
        + F.cross_entropy(reading["count"], target("count"))
    )
    kinds = target("kinds").flatten()
    return loss + F.cross_entropy(reading["kinds"].reshape(kinds.shape[0], -1), kinds, ignore_index=-1)


def _square_error(value: Tensor, target: Tensor) -> Tensor:
    """Mean over the entries whose target is a number."""
    known = ~target.isnan()
    return (value - target.nan_to_num()).square().mul(known).sum() / known.sum().clamp(min=1)
