"""Reads a base from one .safetensors file in the layout of its family's original release, as most descendants have.

The layouts of SDXL, of Stable Diffusion 1 (one CLIP) and of Stable Diffusion 2 (one OpenCLIP) are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from t2i_adapter.config.tree import BaseOptions
from t2i_adapter.diffusion.schedule import NoiseSchedule
from t2i_adapter.errors import UserError, first_line, flag
from t2i_adapter.files import sha256, user_path
from t2i_adapter.models.base import Base, freeze
from t2i_adapter.models.family import SD, SDXL, Family

diffusers_logging.disable_progress_bar()  # each part would show a bar of its own

CONFIG_FILES = ["model_index.json", *(f"{part}/*.{suffix}" for part in SDXL.parts for suffix in ("json", "txt"))]
"""Files of the hub with a base's configs; SDXL's parts include those of the other family."""
_UNET_NAMES = re.compile(
    r"model\.diffusion_model\.(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\..+\.(weight|bias)$"
)
_OPEN_CLIP_NAMES = (
    r"(transformer\.resblocks\..*\.(in_proj_)?(weight|bias)"
    r"|token_embedding\.weight|ln_final\.(weight|bias)|positional_embedding|text_projection|logit_scale)$"
)
_CLIP_NAMES = r"transformer\.text_model\..*\.(weight|bias|position_ids)$"


@dataclass(frozen=True)
class Layout:
    """The names of tensors in an original release.

    Other names in the UNet or the text encoders, such as `scale_weight` of quantised weights, change the numbers, and
    diffusers ignores them.

    Attributes:
        text: text encoder -> prefix of the names of its tensors; the UNet and the VAE have the same prefixes in all
            layouts.
        text_names: matches every allowed name of a text encoder's tensor.
        required: a further tensor that must be in the file.
    """

    family: Family
    text: Mapping[str, str]
    text_names: re.Pattern[str]
    required: str | None = None

    @property
    def prefixes(self) -> dict[str, tuple[str, ...]]:
        """Part -> prefixes of the names of its tensors, one of which must be in the file."""
        return {**_PREFIXES, **{part: (prefix,) for part, prefix in self.text.items()}}


_PREFIXES = {"unet": ("model.diffusion_model.",), "vae": ("first_stage_model.", "vae.")}
SDXL_LAYOUT = Layout(
    SDXL,
    {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.transformer.",
    },
    re.compile(rf"conditioner\.embedders\.(0\.{_CLIP_NAMES}|1\.model\.{_OPEN_CLIP_NAMES})"),
    required="conditioner.embedders.1.model.text_projection",
)
SD1_LAYOUT = Layout(
    SD,
    {"text_encoder": "cond_stage_model.transformer.text_model."},
    re.compile(rf"cond_stage_model\.{_CLIP_NAMES}"),
)
SD2_LAYOUT = Layout(
    SD,
    {"text_encoder": "cond_stage_model.model.transformer."},
    re.compile(rf"cond_stage_model\.model\.{_OPEN_CLIP_NAMES}"),
)
_PIPELINES = {SDXL.key: StableDiffusionXLPipeline, SD.key: StableDiffusionPipeline}
"""Family -> class of diffusers that reads its parts from a file."""
_OTHER_FILES = (
    (r"(^|[._])lora[._]", "It is a LoRA: merge it into a base first"),
    (r"^conditioner\.embedders\.0\.model\.", "It is SDXL's refiner"),
    (r"^(encoder|decoder)\.", "It is a VAE"),
    (r"^(down_blocks|input_blocks)\.", "It has the names of a UNet alone"),
)
"""Pattern in the names of a file's tensors -> what the file is."""
_SCHEDULES = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
"""Key that marks a file of another schedule than SDXL's own -> the scheduler's setting and value that it stands for."""
_EDM = ("edm_mean", "edm_std", "edm_vpred.")
"""Keys that mark a file of EDM's schedule."""
_SIGMAS = "denoiser.sigmas"
"""Key of the table of noise levels sigma_t / alpha_t that the training drew from."""
_NAME_CONFIG = f"Set {flag('base.config')} to a diffusers folder or hub id of the model that the file was made from"


class SingleFileBase(Base):
    """Weights in one file, configs and tokenizers in a diffusers folder.

    Each part is read from the file by itself, so no other part is in memory with it.
    """

    def __init__(self, options: BaseOptions, path: Path) -> None:
        self.path = path
        keys, layout = _read_keys(path, with_vae=options.vae is None)
        super().__init__(options, _find_configs(options, path))
        if self.family is not layout.family:
            raise UserError(
                f"{path} holds {layout.family.name}, and {self.folder} has the configs of {self.family.name}. "
                f"{_NAME_CONFIG}."
            )
        self._check_schedule(keys)
        if _SIGMAS in keys:
            self._check_sigmas()

    @cached_property
    def _file_sha256(self) -> str:
        return sha256(self.path)

    def _fingerprint(self, parts: Iterable[str]) -> str:
        """sha256 over the parts' configs and the whole file, because the header alone does not identify the weights."""
        configs = self._hash_files(parts, weights=False)
        return hashlib.sha256(f"{self._file_sha256}\n{configs}".encode()).hexdigest()

    def _load(self, kind: Any, part: str, device: torch.device | str, dtype: torch.dtype) -> Any:
        others: dict[str, Any] = {other: None for other in self.family.parts if other != part}
        try:
            pipeline = _PIPELINES[self.family.key].from_single_file(
                str(self.path), config=str(self.folder), local_files_only=True, **others, **self.family.fixed
            )
        except NotImplementedError as fault:  # raised if a weight is still on the meta device
            raise self._mismatch(part, "some of its weights are missing in the file") from fault
        except (OSError, ValueError, LookupError, AttributeError, SingleFileComponentError) as fault:
            raise self._mismatch(part, first_line(fault)) from fault
        model = getattr(pipeline, part)
        if not isinstance(model, kind):
            raise self._mismatch(part, f"model_index.json beside it names {type(model).__name__}")
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing:
            raise self._mismatch(part, f"{len(missing)} of its weights are missing in the file, such as {missing[0]}")
        return freeze(torch.nn.Module.to(model, dtype=dtype), device)

    def _mismatch(self, part: str, reason: str) -> UserError:
        config = self.folder / part / "config.json"
        return UserError(f"{self.path}: its {part} does not match {config} ({reason}). {_NAME_CONFIG}.")

    def _check_schedule(self, keys: set[str]) -> None:
        """Raises UserError if the file is marked for another schedule than its configs have; diffusers ignores this."""
        schedule = self.scheduler().config
        for key, (setting, value) in _SCHEDULES.items():
            if key in keys and schedule[setting] != value:
                raise UserError(
                    f"{self.path} has the key {key}, so it was trained with {setting} {value}, but "
                    f"{self.folder / 'scheduler' / 'scheduler_config.json'} has {schedule[setting]}. "
                    f"{_NAME_CONFIG}, with that setting in its scheduler."
                )

    def _check_sigmas(self) -> None:
        """Raises UserError if the noise levels of the training, which some files hold, are not those of the configs."""
        with safe_open(self.path, framework="pt") as file:
            theirs = file.get_tensor(_SIGMAS).double().flatten()
        theirs, schedule = theirs[theirs > 0].sort().values, NoiseSchedule.of(self.scheduler())
        ours = (schedule.sigmas.double() / schedule.alphas.double()).sort().values
        # The last level is infinite at zero terminal SNR, and files hold a finite number instead. 1 % is fp16 and more.
        if len(theirs) != len(ours) or not torch.allclose(theirs[:-1], ours[:-1], rtol=0.01, atol=0):
            raise UserError(
                f"{self.path}: its noise levels, the key {_SIGMAS}, are not those of "
                f"{self.folder / 'scheduler' / 'scheduler_config.json'}. {_NAME_CONFIG}.",
                kind="schedule",
            )


def _read_keys(path: Path, *, with_vae: bool) -> tuple[set[str], Layout]:
    """Returns the names of the file's tensors, from its header, and their layout. Raises UserError if a part of a base
    is missing."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a single-file base must be .safetensors; pickled weights (.ckpt, .bin) are not read.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path}: damaged safetensors file ({first_line(fault)}). Download it again.") from fault
    layout = _find_layout(keys)
    wanted = [prefixes for part, prefixes in layout.prefixes.items() if with_vae or part != "vae"]
    missing = [f"{prefixes[0]}*" for prefixes in wanted if not any(key.startswith(prefixes) for key in keys)]
    if not missing and layout.required and layout.required not in keys:
        missing = [layout.required]
    if missing:
        raise UserError(
            f"{path} is not a base of {layout.family.name} in the layout of the original release: missing weights "
            f"{', '.join(missing)}. {_advice(keys, missing, layout)}"
        )
    _check_keys(keys, path, layout)
    return keys, layout


def _find_layout(keys: set[str]) -> Layout:
    """Returns the layout of a file by the prefix of its text encoders; SDXL's if it has none."""
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        return SD2_LAYOUT
    return SD1_LAYOUT if any(key.startswith("cond_stage_model.") for key in keys) else SDXL_LAYOUT


def _advice(keys: set[str], missing: list[str], layout: Layout) -> str:
    """Returns what the file is, if its names show that, and what to do."""
    known = [what for pattern, what in _OTHER_FILES if any(re.search(pattern, key) for key in keys)]
    if not known and missing == [f"{_PREFIXES['vae'][0]}*"]:
        return f"Set {flag('base.vae')} to the folder or hub id of a VAE, or name a complete checkpoint."
    text = sorted(
        key
        for key in keys
        if re.match(r"conditioner\.|text_encoder|cond_stage_model\.", key) and not layout.text_names.match(key)
    )
    if not known and text:
        known = [f"Its text encoders have the names of another layout, such as {text[0]}"]
    return "".join(f"{what}. " for what in known[:1]) + "Name a complete checkpoint, or a diffusers folder."


def _check_keys(keys: set[str], path: Path, layout: Layout) -> None:
    """Raises UserError if a key means that the weights stand for other numbers, or for another process than DDPM."""
    if edm := sorted(key for key in keys if key.startswith(_EDM)):
        raise UserError(
            f"{path} has the key {edm[0]}, so it was trained with the noise schedule of EDM, as Playground v2.5 and "
            "CosXL were. Training follows DDPM's noise schedule only: use a base that was trained with it.",
            kind="schedule",
        )
    unet, text = _PREFIXES["unet"], tuple(layout.text.values())
    unknown = sorted(
        key
        for key in keys
        if (key.startswith(unet) and not _UNET_NAMES.match(key))
        or (key.startswith(text) and not layout.text_names.match(key))
    )
    if unknown:
        raise UserError(
            f"{path}: unknown key {unknown[0]}: the weights are quantised with scales, or of another network. "
            "Name a file whose weights are in fp8 without scales, fp16, bf16 or fp32."
        )


def _find_configs(options: BaseOptions, path: Path) -> Path:
    """Returns a diffusers folder with the base's configs: a local one, or the hub's files without their weights."""
    named = options.config or _guess_model(path)
    folder = user_path(named)
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                named, revision=options.revision, cache_dir=options.cache_dir, allow_patterns=CONFIG_FILES
            )
        )
    except (OSError, ValueError) as fault:
        place = f"{flag('base.config')} {named}" if options.config else f"{path} takes its configs from {named}"
        raise UserError(
            f"{place}: no such folder, and the hub has no such model ({first_line(fault)}). {_NAME_CONFIG}."
        ) from fault


def _guess_model(path: Path) -> str:
    """Returns the hub id whose configs fit the names and shapes of the file's tensors, by diffusers' own rules."""
    return fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
