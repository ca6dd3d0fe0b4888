"""Which options of the verbs name files, folders, models or datasets. Importing this module loads no torch.

A program that shows options as a form offers a picker for them, and confines them to its own folder.
"""

from __future__ import annotations

from typing import Literal

PathKind = Literal["file", "folder", "output", "model", "dataset"]
"""file, folder: must exist. output: is written. model: a folder, a file or a hub id. dataset: as `data.location`."""

PATHS: dict[str, PathKind] = {
    **dict.fromkeys(("data.location", "data", "location"), "dataset"),
    **dict.fromkeys(("base.name", "base.config", "base.vae", "adapter.init_from", "adapter.compose"), "model"),
    **dict.fromkeys(("adapter", "base", "base_config", "base_vae", "controlnet", "lora", "clip", "source"), "model"),
    **dict.fromkeys(("data.skip", "skip", "validation.images", "recipe"), "file"),
    **dict.fromkeys(("image", "photo", "init_image", "mask", "controlnet_image", "prompt_file"), "file"),
    **dict.fromkeys(("data.conditioning_dir", "conditioning_dir", "folder", "folders", "evaluation"), "folder"),
    **dict.fromkeys(("pictures", "package"), "folder"),
    **dict.fromkeys(("output_dir", "out", "prepared_dir", "data.prepared_dir"), "output"),
    **dict.fromkeys(("html", "json", "skip_list", "sheet"), "output"),
    **dict.fromkeys(("base.cache_dir", "data.cache_dir"), "output"),
}
"""Path of an option -> what it names. An option of a verb that stands beside a run's options has its own name."""

CONDITIONS = (
    *("condition", "data.condition", "data.conditions", "kind", "kinds"),
    *("judge", "second_judge", "validation.judge"),
)
"""Options that name a condition kind; a kind may be a class in a Python file."""

NAMES = (
    *("split", "data.split", "validation.split", "data.dataset_config_name", "base.variant", "base_variant"),
    *("tracking.project", "tracking.logging_dir", "name", "checkpoint", "data.captions", "captions"),
)
"""Options that become a part of a path below a folder that another option names."""
