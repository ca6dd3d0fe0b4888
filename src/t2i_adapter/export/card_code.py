"""The programs of a model card: they generate with an adapter by diffusers alone."""

from __future__ import annotations

import string

from t2i_adapter.config.tree import NANO
from t2i_adapter.generation.options import SamplingOptions, parse_schedule
from t2i_adapter.models.record import Metadata

_CODE = string.Template("""\
import torch
from diffusers import $imports  # 0.40 or newer
from diffusers.utils import load_image

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
$base
adapter = T2IAdapter.from_pretrained($adapter, dtype=dtype, variant="fp16" if device == "cuda" else None)
pipeline = $pipeline.$load(base, adapter=adapter, ${vae_argument}\
dtype=dtype$arguments)
pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
pipeline.to(device)

prompt, condition = $prompt, load_image("condition.png")$convert$resize
image = pipeline(prompt, image=condition, num_inference_steps=30, guidance_scale=5.0).images[0]
image.save("picture.png")
""")

_STEERING_CODE = string.Template("""\
guidance, control_guidance = $guidance, $control  # control_guidance: from 1 (no effect) to guidance
share = (guidance - control_guidance) / (guidance - 1)


def steer(unet, args, kwargs):
    for feature in kwargs["down_intrablock_additional_residuals"] or []:$schedule
        feature[: len(feature) // 2] *= share  # the first half of the batch is the negative branch


hook = pipeline.unet.register_forward_pre_hook(steer, with_kwargs=True)
image = pipeline(
    prompt, image=condition, num_inference_steps=30, guidance_scale=guidance,
    adapter_conditioning_scale=$scale$factor,
).images[0]
hook.remove()
image.save("steered.png")
""")


def usage_code(metadata: Metadata, adapter: str, *, prompt: str, channels: int = 3, is_xl: bool = True) -> str:
    """Returns a Python program that generates a picture from condition.png with the adapter, with diffusers alone.

    is_xl: the adapter is for SDXL; False: for Stable Diffusion 1 or 2.
    """
    base, vae = metadata.base, metadata.base.get("vae")
    pipeline = "StableDiffusionXLAdapterPipeline" if is_xl else "StableDiffusionAdapterPipeline"
    classes = ["EulerAncestralDiscreteScheduler", pipeline, "T2IAdapter"]
    lines = [_base_line(base["name"])]
    if vae:
        classes.insert(0, "AutoencoderKL")
        lines.append(f"vae = AutoencoderKL.from_pretrained({vae!r}, dtype=dtype)")
    single = base["name"].endswith(".safetensors")
    arguments = {key: base[key] for key in ("config" if single else "variant", "revision") if base.get(key)}
    size = (metadata.resolution, metadata.resolution)
    return _CODE.substitute(
        imports=", ".join(classes),
        base="\n".join(lines),
        adapter=repr(adapter),
        pipeline=pipeline,
        load="from_single_file" if single else "from_pretrained",
        vae_argument="vae=vae, " if vae else "",
        arguments="".join(f", {key}={value!r}" for key, value in arguments.items()),
        convert='.convert("L")' if channels == 1 else "",
        resize=f".resize({size})" if metadata.resolution else "",
        prompt=repr(prompt),
    )


def steering_code(sampling: SamplingOptions, *, is_xl: bool = True) -> str:
    """Returns lines that follow `usage_code`: they generate with control guidance of two passes, with diffusers alone.

    `sampling` has guidance above 1. Stable Diffusion's pipeline gives the adapter's features to every step, whatever
    `sampling` says.
    """
    schedule = parse_schedule(sampling.scale_schedule)
    timesteps, factors = [t for t, _ in schedule], [factor for _, factor in schedule]
    return ("import numpy\n\n" if schedule else "") + _STEERING_CODE.substitute(
        guidance=sampling.guidance,
        control=min(sampling.control_guidance, sampling.guidance),
        scale=sampling.scale,
        factor=f", adapter_conditioning_factor={sampling.condition_factor}" if is_xl else "",
        schedule=f"\n        feature *= numpy.interp(float(args[1]), {timesteps}, {factors})" if schedule else "",
    )


def _base_line(name: str) -> str:
    if name == NANO:
        return "from t2i_adapter.models import nano  # the base that comes with sdxl-t2i-adapter\n\nbase = nano.path()"
    return f"base = {name!r}"
