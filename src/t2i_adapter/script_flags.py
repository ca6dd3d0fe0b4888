"""The flags of diffusers' `train_t2i_adapter_sdxl.py`, a row each, and the options they set. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One flag of the diffusers script.

    Attributes:
        flag: its name without dashes.
        place: dotted path of the option that it sets ("optim.betas.0" is the first item of a tuple), or several paths
            with spaces between them; empty if the flag has no effect.
        type: type of its value; None for a switch.
        default, nargs, choices, required: as in the script.
        note: what it does here, for the help.
        given: the value that a switch sets.
    """

    flag: str
    place: str
    type: type[str] | type[int] | type[float] | None
    default: Any
    note: str
    nargs: str | None = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    given: Any = True

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.place.split())

    def values(self, value: Any) -> dict[str, Any]:
        """Path -> value of every option that the flag sets to `value`."""
        if self.nargs == "+":
            value = tuple(value or ())
        return dict.fromkeys(self.paths, value)


def _switch(flag: str, place: str, note: str, *, given: Any = True) -> Row:
    return Row(flag, place, None, False, note, given=given)


ROWS = (
    Row("pretrained_model_name_or_path", "base.name", str, None, "SDXL, or Stable Diffusion 1.5 or 2.1: hub id, "
        "folder or one .safetensors file; `nano` is the base inside the package.", required=True),
    Row("pretrained_vae_model_name_or_path", "base.vae", str, None, "Another VAE: hub id or folder."),
    Row("adapter_model_name_or_path", "adapter.init_from", str, None, "Adapter to continue from."),
    Row("revision", "base.revision", str, None, "Hub revision of the base."),
    Row("variant", "base.variant", str, None, "Weight file variant of the base, such as fp16."),
    Row("tokenizer_name", "", str, None, "The script never reads it; tokenizers come with the base."),
    Row("output_dir", "output_dir", str, "t2iadapter-model", "Folder of everything the run writes."),
    Row("cache_dir", "base.cache_dir data.cache_dir", str, None, "Folder for downloads of base and data."),
    Row("seed", "train.seed", int, None, "One seed for every choice; drawn and printed if it is not given."),
    Row("resolution", "data.resolution", int, 1024, "Side of the training crop; a multiple of 16 for a new "
        "adapter, of 8 with Stable Diffusion (512 for 1.5, 768 for 2.1)."),
    Row("detection_resolution", "", int, None, "The script never reads it; condition pictures come from the data."),
    Row("crops_coords_top_left_h", "data.crops_coords_top_left_h", int, 0,
        "Added to the top coordinate of each picture's own crop, which the script ignores."),
    Row("crops_coords_top_left_w", "data.crops_coords_top_left_w", int, 0,
        "Added to the left coordinate of each picture's own crop, which the script ignores."),
    Row("train_batch_size", "train.batch_size", int, 4, "Samples of each device and micro-step."),
    Row("num_train_epochs", "train.epochs", int, 1, "Passes over the dataset; --max_train_steps wins."),
    Row("max_train_steps", "train.max_steps", int, None, "Updates of the whole run."),
    Row("checkpointing_steps", "checkpoint.every", int, 500, "Updates between checkpoints."),
    Row("checkpoints_total_limit", "checkpoint.keep", int, 3, "Newest checkpoints to keep."),
    Row("resume_from_checkpoint", "checkpoint.resume", str, None,
        "`auto`, `latest` or a checkpoint's folder; continues where the run stopped (the script crashes)."),
    Row("gradient_accumulation_steps", "train.gradient_accumulation_steps", int, 1, "Micro-steps of each update."),
    _switch("gradient_checkpointing", "train.gradient_checkpointing", "Less memory, more time."),
    Row("learning_rate", "optim.lr", float, 5e-6, "Peak learning rate; our own default is higher."),
    _switch("scale_lr", "optim.scale_lr", "Multiply the learning rate by the global batch."),
    Row("lr_scheduler", "optim.schedule", str, "constant",
        "Any schedule of diffusers; counted in updates for any number of processes."),
    Row("lr_warmup_steps", "optim.warmup_steps", int, 500, "For schedules with a warm-up; `constant` has none."),
    Row("lr_num_cycles", "optim.num_cycles", int, 1, "Hard restarts of cosine_with_restarts."),
    Row("lr_power", "optim.power", float, 1.0, "Power of the polynomial schedule."),
    _switch("use_8bit_adam", "optim.name", "AdamW with 8-bit states; needs bitsandbytes.", given="adamw8bit"),
    Row("dataloader_num_workers", "data.num_workers", int, None, "Processes that build batches; 1, or 0 on a CPU."),
    Row("adam_beta1", "optim.betas.0", float, 0.9, "Decay of Adam's first moment."),
    Row("adam_beta2", "optim.betas.1", float, 0.999, "Decay of Adam's second moment."),
    Row("adam_weight_decay", "optim.weight_decay", float, 1e-2, "Decoupled weight decay."),
    Row("adam_epsilon", "optim.eps", float, 1e-8, "Added to Adam's denominator."),
    Row("max_grad_norm", "optim.max_grad_norm", float, 1.0, "Gradients with a larger norm are scaled down to it."),
    _switch("push_to_hub", "hub.push", "Upload adapter, card and pictures at the end, and nothing else."),
    Row("hub_token", "hub.token", str, None, "Access token; never written to a file."),
    Row("hub_model_id", "hub.model_id", str, None, "Repository; the output folder's name by default."),
    Row("logging_dir", "tracking.logging_dir", str, "logs", "Folder of the tracker's files, in the output folder."),
    _switch("allow_tf32", "train.allow_tf32", "TF32 matrix products on Ampere and newer."),
    Row("report_to", "tracking.report_to", str, "tensorboard", "A tracker of accelerate, `all` or `none`."),
    Row("mixed_precision", "train.mixed_precision", str, None, "accelerate's setting by default, else no.",
        choices=("no", "fp16", "bf16")),
    _switch("enable_xformers_memory_efficient_attention", "train.xformers", "xFormers' attention; SDPA otherwise."),
    _switch("set_grads_to_none", "", "Always so here."),
    Row("dataset_name", "data.location", str, None, "Hub id or folder of a dataset; or --train_data_dir."),
    Row("dataset_config_name", "data.dataset_config_name", str, None, "Configuration of the dataset."),
    Row("train_data_dir", "data.location", str, None, "Folder of pairs; or --dataset_name."),
    Row("image_column", "data.image_column", str, "image", "Column of the target picture."),
    Row("conditioning_image_column", "data.conditioning_image_column", str, "conditioning_image",
        "Column of the condition picture."),
    Row("caption_column", "data.caption_column", str, "text", "Column of the caption, or of a list of captions."),
    Row("max_train_samples", "data.max_train_samples", int, None, "Use only this many rows."),
    Row("proportion_empty_prompts", "data.proportion_empty_prompts", float, 0,
        "Share of empty captions, drawn anew whenever a batch is built (once for all in the script)."),
    Row("validation_prompt", "validation.prompts", str, None, "One or more prompts.", nargs="+"),
    Row("validation_image", "validation.images", str, None, "As many condition pictures, or one.", nargs="+"),
    Row("num_validation_images", "validation.num_images", int, 4, "Pictures of each prompt."),
    Row("validation_steps", "validation.every", int, 100, "Updates between validations."),
    Row("tracker_project_name", "tracking.project", str, "sd_xl_train_t2iadapter", "Project's name in the tracker."),
)  # fmt: skip


SCRIPT_WAYS = {
    "adapter.in_channels": 3,
    "adapter.type": None,
    "adapter.num_res_blocks": None,
    "adapter.init": "default",
    "objective.timesteps": "cubic",
    "objective.min_snr_gamma": None,
    "objective.noise_offset": 0.0,
    "objective.stratify": False,
    "optim.name": "adamw",
    "train.ema_decay": 0.0,
    "train.noise_draws": 1,
}
"""Settings of the script that have no flag there; our own defaults differ from some of them."""
