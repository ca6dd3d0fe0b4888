"""The two text encoders of nano and their training: they learn to predict colours, shapes and places from a caption.

The UNet can then read the content of a picture linearly from the states and from the pooled vector. Trained with the
pictures alone, text encoders learn this last, after most of the training.
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

from nano_maker.captions import SLOTS, THUMBNAIL, Targets
from nano_maker.run import TrainingStage, device, rank, world
from nano_maker.words import END, START
from t2i_adapter.data import shapes
from t2i_adapter.types import CHUNK

WIDTHS = (96, 160)  # of the two encoders; their sum is the width of the UNet's cross attention
POOLED = 128
_LAYERS = 3  # SDXL uses the states of the second to last
_HEAD = 32  # width of an attention head
_BATCH = 64
_RATE = 2e-3
_COLOR_WEIGHT = 4.0  # relative to the cross entropies: colours have to be exact


@dataclass
class TextModels:
    """SDXL's two tokenizers and two text encoders."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def encode(self, captions: list[str], padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """Returns states (B,77,256) and pooled (B,128), joined as in StableDiffusionXLPipeline.encode_prompt.

        With padding "longest" the states end with the longest caption. The encoders are causal, so the states before
        that end are equal.
        """
        outputs = [
            encoder(self._ids(tokenizer, captions, padding), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, (self.first, self.second), strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def _ids(self, tokenizer: CLIPTokenizer, captions: list[str], padding: str) -> Tensor:
        """Returns token ids, (B,L) int64."""
        rows = tokenizer(captions, padding=padding, max_length=CHUNK, truncation=True, return_tensors="pt")
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
        max_position_embeddings=CHUNK,
        hidden_act="gelu",
        **ids,
    )


class Reader(nn.Module):
    """Predicts the targets of a caption twice: from the pooled vector, and by attention over the states.

    Both maps are linear, so that the UNet can read the same content linearly. Used in training only.
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
        """Returns two predictions, each {target: (B, size)}."""
        queries = self.queries.expand(states.shape[0], -1, -1)
        found = self.attention(queries, states, states, need_weights=False)[0].flatten(1)
        rows = (self.from_pooled(pooled), self.from_states(found))
        return [dict(zip(self.sizes, row.split(list(self.sizes.values()), dim=1), strict=True)) for row in rows]


def train(work: Path, minutes: float, seed: int, models: TextModels, sample: Callable[[int], Targets]) -> None:
    """Trains the encoders for `minutes`, resuming from the checkpoint. sample(i) returns training sample i."""
    torch.manual_seed(seed)
    modules = {
        "first": models.first.train(),
        "second": models.second.train(),
        "reader": Reader(len(shapes.KINDS), len(shapes.PATTERNS)).to(device()),
    }
    stage = TrainingStage(work, "text", minutes, _RATE, modules, trained=list(modules))
    for step in stage:
        targets = [sample(step * _BATCH + i) for i in range(rank(), _BATCH, world())]
        predictions = modules["reader"](*models.encode([t.caption for t in targets], "longest"))
        stage.update(sum((_loss(prediction, targets) for prediction in predictions), torch.zeros(())))


def _loss(prediction: dict[str, Tensor], targets: list[Targets]) -> Tensor:
    """Square error of colours and places, cross entropy of classes and counts; undefined targets are skipped."""

    def target(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(t, name) for t in targets])).to(prediction[name].device)

    loss = _COLOR_WEIGHT * _square_error(prediction["ground"], target("ground"))
    loss = loss + _COLOR_WEIGHT * _square_error(prediction["shapes"], target("shapes").flatten(1))
    loss = loss + _COLOR_WEIGHT * _square_error(prediction["thumbnail"], target("thumbnail"))
    loss = (
        loss
        + F.cross_entropy(prediction["pattern"], target("pattern"))
        + F.cross_entropy(prediction["count"], target("count"))
    )
    kinds = target("kinds").flatten()
    return loss + F.cross_entropy(prediction["kinds"].reshape(kinds.shape[0], -1), kinds, ignore_index=-1)


def _square_error(value: Tensor, target: Tensor) -> Tensor:
    """Mean over the entries whose target is not NaN."""
    known = ~target.isnan()
    return (value - target.nan_to_num()).square().mul(known).sum() / known.sum().clamp(min=1)
