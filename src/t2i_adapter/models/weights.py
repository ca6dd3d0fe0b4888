"""Loads a network of diffusers or transformers from safetensors files, whole or not at all."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from t2i_adapter.errors import first_line


class WeightsError(Exception):
    """The files are missing or damaged, or do not have all weights of the network; the text is one line."""


def load_weights(kind: Any, source: str, dtype: torch.dtype, **arguments: Any) -> Any:
    """Returns `kind.from_pretrained(source)` in `dtype`. Raises WeightsError.

    The libraries themselves give random values to weights that the files do not have.

    Args:
        kind: class of diffusers or transformers.
        source: folder or hub id.
    """
    try:
        model, info = kind.from_pretrained(
            source, use_safetensors=True, dtype=dtype, output_loading_info=True, **arguments
        )
    # transformers raises RuntimeError if a shape differs from the config's
    except (OSError, ValueError, RuntimeError, SafetensorError) as fault:
        raise WeightsError(first_line(fault)) from fault
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model
