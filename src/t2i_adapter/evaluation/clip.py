"""The CLIP score of a picture and its prompt (Hessel et al. 2021), by a CLIP model that the user names."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import Image

from t2i_adapter.errors import UserError, first_line


def clip_score(model: str, image: Image.Image, prompt: str) -> float:
    """Returns 100 times the cosine of the two embeddings, and 0 if it is negative.

    Args:
        model: folder or hub id of a CLIP model of `transformers`, with weights in safetensors. It is loaded once.
        prompt: the tokens that the model has no place for are cut off.

    Raises UserError if the model cannot be loaded.
    """
    import torch

    network, processor = _open(model)
    length = network.config.text_config.max_position_embeddings
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=length)
    with torch.inference_mode():
        found = network(**inputs)
    cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    return max(0.0, 100 * float(cosine))


@cache
def _open(model: str) -> tuple[Any, Any]:
    """Returns the network, float32 on the CPU, and its processor (the Pillow version)."""
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        processor = CLIPProcessor.from_pretrained(model, backend="pil")
        network = CLIPModel.from_pretrained(model, use_safetensors=True, dtype="float32")
    except (OSError, ValueError, ImportError) as fault:
        raise UserError(
            f"{model}: is no CLIP model that can be loaded ({first_line(fault)}). Needed is a folder or hub id with "
            "config, processor, tokenizer, and weights in safetensors.",
            option="clip",
        ) from fault
    return network.eval(), processor
