"""Every option of a run, each default beside its documentation. Importing this module loads no torch.

The tree is filled in one order: defaults <- YAML recipe (`recipe.py`) <- flags (`flags.py`), and nothing mutates it
afterwards. A check that needs only the values is in `__post_init__` and names the option to change. A check that needs
files or models is made when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from math import inf
from typing import Any, Literal, NamedTuple, get_args

from t2i_adapter.errors import UserError, flag, has_login, register_secret, require
from t2i_adapter.types import MaxTokens

NANO = "nano"
Layout = Literal["auto", "folder", "paired", "manifest", "tar", "parquet", "hub", "emoji", "shapes"]
"""Layouts of a dataset; `data.formats.LAYOUTS` has their readers."""
AdapterType = Literal["full_adapter_xl", "full_adapter", "light_adapter"]
"""Networks of diffusers' `T2IAdapter`; `models.adapter.KINDS` has their sizes."""
StopSignal = Literal["TERM", "INT", "USR1", "USR2", "HUP", "XCPU"]
"""Signals that can stop a run, without SIG in front; all but XCPU, a limit of CPU seconds, do so by default."""
RES_BLOCKS = {"light_adapter": 4}
"""Type -> residual blocks of each stage in official adapters; the others have 2."""
COLUMN, FOLDER = "column:", "folder:"
"""What an item of `data.conditions` begins with if it names a column or a folder, and not an annotator."""
SECRET = "secret"  # metadata key of fields that are never written to a file


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str, option: str = "train.max_time") -> int:
    """Seconds in `90m`, `1h30m`, `12:00:00`, `1-12:00:00` (days) or a plain number of seconds. Raises UserError, about
    the option at that path."""
    clock = re.fullmatch(r"(?:([0-9]{1,4})-)?([0-9]{1,4}):([0-9]{2}):([0-9]{2})", text)
    parts = zip("dhms", clock.groups(default="0"), strict=True) if clock else ()
    if re.fullmatch(r"[0-9]{1,9}", text):
        parts = (("s", text),)
    elif re.fullmatch(r"([0-9]{1,6}[dhms])+", text):
        parts = ((part[-1], part[:-1]) for part in re.findall(r"[0-9]+[dhms]", text))
    seconds = sum(_UNITS[unit] * int(count) for unit, count in parts)
    require(option, seconds > 0, repr(text), "write 90m, 1h30m, 12:00:00, 1-12:00:00 (days) or seconds")
    return seconds


class Part(NamedTuple):
    """Part `number` of `parts` of a dataset, from 1."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"


def part_of(text: str) -> Part:
    """The part in `3/64`. Raises UserError."""
    form = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    part = Part(int(form[1]), int(form[2])) if form else Part(0, 0)
    allowed = f"1/{part.parts} to {part.parts}/{part.parts}" if part.parts else "K/N, from 1/N to N/N, such as 3/64"
    require("data.part", 1 <= part.number <= part.parts, text, f"allowed is {allowed}")
    return part


def check_no_login(option: str, address: str) -> None:
    """Refuses an address with a password, which options, records and cards would keep. Raises UserError."""
    if has_login(address):
        raise UserError(
            f"{address}: an address may not hold a login, because the run writes its options down; "
            "put the login into ~/.netrc (http) or into the environment (s3)",
            option=option,
        )


@dataclass(frozen=True)
class BaseOptions:
    """The frozen text-to-image model."""

    name: str = NANO
    """Hub id, diffusers folder, single .safetensors file, or `nano`, the base inside the package."""
    config: str | None = None
    """Diffusers folder or hub id with the configs and tokenizers of a single-file base. None: diffusers recognises the
    model by the file's keys and fetches them from the hub."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the base, or of `config`."""
    variant: str | None = None
    """Weight file variant of the base, for example fp16."""
    vae: str | None = None
    """Another VAE: hub id or folder. SDXL's own overflows in fp16; madebyollin/sdxl-vae-fp16-fix does not."""
    cache_dir: str | None = None
    """Folder for downloads from the hub; None is the hub library's own."""
    quantize: Literal["none", "float8", "int8", "nf4"] = "none"
    """Quantise the matrices of the UNet's transformer blocks to 8 bits, or 4 (nf4), while training; docs/memory.md."""


@dataclass(frozen=True)
class AdapterOptions:
    """The network that is trained."""

    init_from: str | None = None
    """Adapter to continue from: hub id or folder. None starts from random weights, with the base's channels."""
    type: AdapterType | None = None
    """Network of the adapter. None is the base's own: `full_adapter_xl` for SDXL, `full_adapter` for Stable Diffusion
    1 and 2. These also take `light_adapter`, with a quarter of the weights."""
    in_channels: Literal[1, 3] = 3
    """Channels of the condition picture; the official SDXL adapters have 3."""
    num_res_blocks: int | None = None
    """Residual blocks of each stage. None is 2, and 4 in a light_adapter: ComfyUI and A1111 only open adapters with
    these."""
    init: Literal["default", "quiet", "zero"] = "default"
    """`default` is diffusers' random start. `quiet` scales all features to 1 % of that, so that step 0 hardly changes
    the base's output. `zero` scales them to 0: the weights of the first convolution are zeros."""
    compose: tuple[str, ...] = ()
    """Train these existing adapters together, folders or hub ids, for the sum of their features (docs/compose.md).
    Each is written to a folder of its own, adapter-0-NAME, adapter-1-NAME, ..."""

    def __post_init__(self) -> None:
        blocks = self.num_res_blocks
        require("adapter.num_res_blocks", blocks is None or blocks >= 1, blocks, "1 or more")
        count = len(self.compose)
        require("adapter.compose", count != 1, self.compose[0] if count else "", "name two adapters or more")
        alone = self.init_from is None or not count
        other = f"and {flag('adapter.compose')} names the adapters to continue from; omit one of them"
        require("adapter.init_from", alone, self.init_from, other)

    @property
    def res_blocks(self) -> int:
        """Residual blocks of each stage."""
        return self.num_res_blocks or RES_BLOCKS.get(self.type or "", 2)


@dataclass(frozen=True)
class DataOptions:
    """Pairs of pictures, their captions, and how each is cropped."""

    location: str | None = None
    """The dataset, written --data: a folder of pictures with captions beside them, a manifest (.jsonl, .csv,
    .parquet), tar or parquet shards by glob or braces, local or at http://, https://, s3://, a hub id, or `shapes`;
    docs/data.md lists the layouts."""
    dataset_config_name: str | None = None
    """Configuration of the hub dataset, if it has several."""
    dataset_revision: str | None = None
    """Hub revision (branch, tag or commit) of the dataset."""
    kind: Layout = "auto"
    """Layout of the dataset; `auto` recognises it by its name and content and prints what it found."""
    conditioning_dir: str | None = None
    """Folder of the condition pictures of a folder of pictures: each has the path and name of its picture, with any
    picture's ending. None takes a folder control/, conditioning/, cond/ or conditions/ in it."""
    captions: str = "auto"
    """Where captions come from. `auto`: the caption column, or the .txt or .caption beside a picture. `.ENDING`: the
    file beside a picture with this ending. `filename`: the picture's name. `none`: every caption is empty."""
    streaming: bool = False
    """Read a hub dataset's parquet shards one by one instead of downloading all of them first."""
    split: str = "train"
    """Split to train on."""
    cache_dir: str | None = None
    """Folder for downloaded datasets; None is the hub library's own."""
    image_column: str = "image"
    """Column of the target picture: decoded pictures, paths or bytes."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the condition picture: decoded pictures, paths or bytes."""
    caption_column: str = "text"
    """Column of the caption, or of a list of captions; each draw of a sample picks one of them."""
    condition: str | None = None
    """Make the condition from the image with this annotator (`t2i-adapter conditions` lists them), its options behind
    commas, for example canny,low=50. None reads the condition column."""
    conditions: tuple[str, ...] = ()
    """With adapter.compose, where the condition of each adapter comes from, in their order: an annotator as in
    `condition`, column:NAME, or folder:DIR. Without it each adapter's record says how its condition is made."""
    max_train_samples: int | None = None
    """Number of rows to use, chosen by the seed; None uses all."""
    skip: str | None = None
    """File of rows to skip, one key a line, as `doctor` writes it."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """`fail` stops at a row that cannot be read. `skip` skips it, lists it with its reason in the run's
    bad_samples.jsonl, and stops if there are more than max_bad_share."""
    max_bad_share: float = 0.01
    """Largest share of bad rows, 0 to 1, that on_bad_sample skip accepts."""
    resolution: int = 1024
    """Side of the training crop in pixels, and with buckets the square root of its area. Stable Diffusion 1.5 makes
    pictures of 512 pixels, 2.1 of 768."""
    buckets: Literal["none", "sdxl", "generated"] = "none"
    """`none` crops squares. `sdxl` picks the size of SDXL's own list that is nearest in aspect ratio, scaled to the
    resolution. `generated` picks from all sizes of about that area in multiples of bucket_step."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels; at least 32."""
    crop: Literal["center", "random"] = "center"
    """Position of the crop on the resized picture; `random` draws one for each view."""
    flip: bool = False
    """Mirror half of the draws left to right. Pose and normal maps exchange their left and right colours with it."""
    views: int = 1
    """Number of random crops (and mirrorings) that are cached of each picture; each draw picks one."""
    condition_kind: Literal["map", "labels", "pose", "normal"] = "map"
    """What the condition's colours mean, for scaling and mirroring: `labels` are never blended (nearest), `pose` has
    OpenPose's left and right colours, `normal` has directions, `map` has neither."""
    background: str = "white"
    """Colour behind transparent pixels: a colour's name or #rrggbb."""
    crops_coords_top_left_h: int = 0
    """Added to the true crop's top coordinate in SDXL's size conditioning, in pixels."""
    crops_coords_top_left_w: int = 0
    """Added to the true crop's left coordinate in SDXL's size conditioning, in pixels."""
    proportion_empty_prompts: float = 0.0
    """Share of draws, 0 to 1, whose caption is replaced by the empty one, chosen when a batch is built."""
    caption_prefix: str = ""
    """Text in front of every caption that is not empty, for example a trigger word."""
    shuffle_tags: bool = False
    """Read captions as tags between commas and shuffle them at each draw."""
    keep_tags: int = 0
    """Number of first tags that keep their place when tags are shuffled."""
    max_tokens: MaxTokens = 75
    """Tokens of a caption that the model reads; the rest is cut off. More than 75 are encoded in chunks of 75, whose
    states are joined, as ComfyUI and other programs do with a long prompt."""
    num_workers: int | None = None
    """Loader processes; 0 builds batches in the training process. The samples are the same for any number. None is 1,
    and 0 if training runs on a CPU, where a loader process slows the step as much as it helps, and takes memory."""
    cache: Literal["disk", "none"] = "disk"
    """`disk` encodes every picture once and caches the latents. `none` encodes at each step, for datasets too large to
    cache."""
    text_cache: Literal["auto", "disk", "live"] = "auto"
    """`disk` caches every caption's text states (308 KiB for SDXL; that for each 75 tokens if max_tokens is larger).
    `live` keeps the text encoders loaded. `auto` chooses by their size and prints its choice."""
    prepared_dir: str | None = None
    """Folder of cached latents and text states, keyed by content; None is $T2I_ADAPTER_CACHE, or
    ~/.cache/t2i_adapter/prepared. Or s3://BUCKET/PREFIX, which is read through local copies (docs/cache.md)."""
    local_gb: float = 64.0
    """With a prepared_dir on object storage: gigabytes of local disk for copies of its files."""
    part: str | None = None
    """`prepare` encodes part K of N, written K/N, from 1/N to N/N: N jobs that need nothing of each other."""
    on_missing: Literal["encode", "fail"] = "encode"
    """`encode` makes the records that are missing in the cache. `fail` lists them, by parts, and stops."""

    def __post_init__(self) -> None:
        check_no_login("data.location", self.location or "")
        check_no_login("data.prepared_dir", self.prepared_dir or "")
        scheme = (self.prepared_dir or "").partition("://")
        bucket = scheme[0] == "s3" and bool(scheme[2].strip("/"))
        require("data.prepared_dir", bucket or not scheme[1], self.prepared_dir, "a folder, or s3://BUCKET/PREFIX")
        require("data.local_gb", 0 < self.local_gb < inf, self.local_gb, "allowed is a number above 0")
        if self.part is not None:
            part_of(self.part)
        both = self.conditioning_dir is not None and self.condition is not None
        made = f"are conditions, and {flag('data.condition')} {self.condition} makes others; omit one of them"
        require("data.conditioning_dir", not both, self.conditioning_dir, made)
        single = self.condition or self.conditioning_dir
        made = f"{flag('data.conditions')} names the conditions of all adapters; omit this one"
        option = "data.condition" if self.condition else "data.conditioning_dir"
        require(option, not (single and self.conditions), single, made)
        known = self.captions in ("auto", "none", "filename") or re.fullmatch(r"\.[^./\\]+", self.captions)
        require(
            "data.captions", bool(known), self.captions, "allowed is auto, none, filename or an ending such as .txt"
        )
        share = self.proportion_empty_prompts
        require("data.proportion_empty_prompts", 0 <= share <= 1, share, "allowed is a share from 0 to 1")
        require("data.resolution", 1 <= self.resolution <= 8192, self.resolution, "allowed is 1 to 8192 pixels")
        workers = self.num_workers
        require("data.num_workers", workers is None or workers >= 0, workers, "0 or more")
        count = self.max_train_samples
        require("data.max_train_samples", count is None or count >= 1, count, "1 or more")
        bad = self.max_bad_share
        require("data.max_bad_share", 0 <= bad < 1, bad, "allowed is 0 up to, not including, 1")
        step = self.bucket_step
        require("data.bucket_step", step >= 32 and step % 32 == 0, step, "allowed are multiples of 32")
        require("data.views", 1 <= self.views <= 64, self.views, "allowed is 1 to 64")
        require("data.keep_tags", self.keep_tags >= 0, self.keep_tags, "0 or more")


@dataclass(frozen=True)
class ObjectiveOptions:
    """The training objective and its noise levels."""

    timesteps: Literal["cubic", "uniform", "logit_normal"] = "cubic"
    """`cubic` draws t = (1 - u^3) T (paper 2302.08453, section 3.4), more often high noise, which decides structure.
    `logit_normal` draws t = T / (1 + exp(-z)), z normal with logit_mean and logit_std."""
    logit_mean: float = 0.0
    """Mean of logit_normal's z: half of the draws lie above T / (1 + exp(-mean)), so above 0.73 T for 1."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal's z; the smaller, the closer the timesteps to their median."""
    stratify: bool = False
    """Spread each update's timesteps evenly over their distribution (stratified sampling): it is divided into as many
    equal parts as the global batch has draws, one draw in each. The distribution of a single draw does not change."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting (paper 2303.09556) with this gamma, 5 in the paper; None weights all timesteps equally."""
    noise_offset: float = 0.0
    """Standard deviation of a constant that is added to each channel's noise; 0 adds none."""

    def __post_init__(self) -> None:
        gamma = self.min_snr_gamma
        require("objective.min_snr_gamma", gamma is None or gamma > 0, gamma, "allowed is a number above 0")
        require("objective.logit_mean", abs(self.logit_mean) <= 10, self.logit_mean, "allowed is -10 to 10")
        require("objective.logit_std", 0 < self.logit_std <= 10, self.logit_std, "allowed is above 0, up to 10")
        require("objective.noise_offset", 0 <= self.noise_offset < inf, self.noise_offset, "allowed is 0 or more")


@dataclass(frozen=True)
class OptimOptions:
    """The optimiser and its learning rate."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`adamw8bit` needs bitsandbytes and a GPU: `pip install 'sdxl-t2i-adapter[adam8bit]'`. `muon` orthogonalises each
    weight matrix's update and takes about ten times AdamW's learning rate; docs/sample-efficiency.md."""
    lr: float = 1e-4
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply the learning rate by the global batch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments; muon uses them for the biases alone."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    schedule: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = "constant_with_warmup"
    """Shape of the learning rate over the run."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises from 0, for the schedules that have a warm-up."""
    schedule_from: int = 0
    """Update at which the schedule and its warm-up begin; before it the rate is the peak. To end a constant run by a
    cosine, resume it with the step that it has reached."""
    num_cycles: int = 1
    """Hard restarts of cosine_with_restarts."""
    power: float = 1.0
    """Power of the polynomial schedule."""
    step_rules: str = ""
    """Rules of piecewise_constant in diffusers' form: "1:10,0.1:20,0.01" multiplies by 1 for 10 updates, ..."""

    def __post_init__(self) -> None:
        require("optim.lr", 0 < self.lr < inf, self.lr, "allowed is a number above 0")
        for number, beta in enumerate(self.betas):
            require(f"optim.betas.{number}", 0 <= beta < 1, beta, "allowed is 0 up to, not including, 1")
        require("optim.weight_decay", 0 <= self.weight_decay < inf, self.weight_decay, "allowed is 0 or more")
        require("optim.eps", 0 < self.eps < inf, self.eps, "allowed is a number above 0")
        require("optim.max_grad_norm", self.max_grad_norm > 0, self.max_grad_norm, "allowed is a number above 0")
        require("optim.warmup_steps", self.warmup_steps >= 0, self.warmup_steps, "0 or more")
        require("optim.schedule_from", self.schedule_from >= 0, self.schedule_from, "0 or more")
        require("optim.num_cycles", self.num_cycles >= 1, self.num_cycles, "1 or more")
        if self.schedule == "piecewise_constant":
            form = re.fullmatch(r"([\d.e+-]+:\d+,)*[\d.e+-]+", self.step_rules)
            require("optim.step_rules", bool(form), repr(self.step_rules), 'needs the form "1:10,0.1:20,0.01"')


@dataclass(frozen=True)
class TrainOptions:
    """Length of the run, batch size, precision and speed."""

    batch_size: int = 4
    """Samples of each device and micro-step."""
    gradient_accumulation_steps: int = 1
    """Micro-steps of each update; the global batch is batch_size x this x processes."""
    global_batch: int | None = None
    """Samples of each update over all processes. It sets gradient_accumulation_steps by the number of processes, so
    that a run may resume on another number of them; batch_size is then the most samples of a micro-step."""
    noise_draws: int = 1
    """Noise samples (with a timestep each) of every sample of a batch. The adapter computes the sample's features once
    for all of them; the UNet computes each."""
    max_steps: int | None = None
    """Updates of the whole run; None derives them from epochs."""
    epochs: int = 1
    """Passes over the dataset, if max_steps is not given."""
    stop_when: Literal["done", "plateau"] = "done"
    """`plateau` ends the run, as if max_steps were reached, when held-out pairs show that more training brings less
    than 2 % of what is left to gain (docs/control.md). `done` makes all updates."""
    device: str = "auto"
    """Device to train and encode on: cpu, cuda, cuda:1, xpu, mps, or auto, the first GPU that is found, else the CPU.
    Of several processes each takes the GPU of its own number."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen base, and of autocast for the adapter, whose weights stay fp32. None takes accelerate's
    configuration, or else bf16 on a GPU that has it, and fp32 on other devices."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, more time."""
    checkpoint_blocks: Literal["all", "large"] = "all"
    """What gradient_checkpointing recomputes: every block, or only those of the two highest resolutions, which hold
    most of the memory and cost less of the time."""
    seed: int | None = None
    """Every random choice is a function of the seed and of the draw's number; None draws a seed and prints it."""
    allow_tf32: bool = False
    """TF32 matrix products on NVIDIA Ampere and newer."""
    deterministic: bool = False
    """Use only operations that add in one order, so that a run repeats to the bit on one kind of GPU too; slower there.
    A CPU repeats to the bit without it."""
    profile: bool = False
    """Profile some updates: a trace, and a table of where the time went, in profile/ in the run's folder."""
    xformers: bool = False
    """xFormers' attention instead of torch's scaled dot product attention."""
    compile: Literal["off", "on", "graphs"] = "off"
    """Compile the UNet with torch.compile (on a GPU its repeated blocks): minutes at first, cached for later runs.
    `graphs` adds CUDA graphs (mode="reduce-overhead"). On a CPU it is slower than `off`; on a GPU it is not measured.
    If compiling fails, the run prints that and continues without."""
    channels_last: bool = False
    """Use the channels_last memory format for the UNet: no difference on a CPU, not measured on a GPU."""
    cpu_threads: int | None = None
    """On a CPU, the number of threads that share each micro-batch; each has an equal part of the cores. None is one a
    core, at most one a sample. Another number changes only the last bits of a run's numbers."""
    ema_decay: float = 0.0
    """Decay of the EMA (exponential moving average) of the adapter, which is then what is saved; 0 is no EMA."""
    max_time: str | None = None
    """Save and stop after this time: 90m, 1h30m, 12:00:00, 1-12:00:00 (days) or seconds. Leave time for one update and
    one save before the scheduler's own limit."""
    stop_signals: tuple[StopSignal, ...] = get_args(StopSignal)[:5]
    """Signals at which the run finishes its update, saves and stops. A signal that is not named keeps its effect."""
    stop_code: int | None = None
    """Exit code of a run that a signal or max_time stopped, 0 to 255. None is 143 for TERM, 130 for INT, 129 for HUP,
    and for max_time and the other signals 75, which means: start the same command again."""
    patience: str = "30m"
    """Most time that a process waits for the others in an update, after which they count as lost; a time as in
    max_time. While the main process validates, it sends a sign of life, so that may take longer."""
    exchange: Literal["fp32", "bf16"] = "fp32"
    """Number format in which several processes exchange gradients. bf16 halves the bytes and rounds each process's
    gradients to 8 bits of mantissa; gains not measured."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if the gradient of an update holds NaN or inf. `stop` ends the run; `skip` continues with the next
    update. The gradient does not reach the optimiser in either case."""
    max_nonfinite: int = 10
    """Number of updates of the whole run that on_nonfinite skip may skip; one more stops the run."""

    def __post_init__(self) -> None:
        require("train.batch_size", self.batch_size >= 1, self.batch_size, "1 or more")
        accumulate = self.gradient_accumulation_steps
        require("train.gradient_accumulation_steps", accumulate >= 1, accumulate, "1 or more")
        require("train.noise_draws", 1 <= self.noise_draws <= 64, self.noise_draws, "allowed is 1 to 64")
        require("train.max_steps", self.max_steps is None or self.max_steps >= 1, self.max_steps, "1 or more")
        require("train.epochs", self.epochs >= 1, self.epochs, "1 or more")
        require("train.seed", self.seed is None or 0 <= self.seed < 2**63, self.seed, "allowed is 0 to 2^63 - 1")
        threads = self.cpu_threads
        require("train.cpu_threads", threads is None or threads >= 1, threads, "1 or more")
        require("train.ema_decay", 0 <= self.ema_decay < 1, self.ema_decay, "allowed is 0 up to, not including, 1")
        require("train.max_nonfinite", self.max_nonfinite >= 0, self.max_nonfinite, "0 or more")
        total = self.global_batch
        require("train.global_batch", total is None or total >= 1, total, "1 or more")
        if self.max_time is not None:
            seconds_of(self.max_time)
        seconds_of(self.patience, "train.patience")
        code = self.stop_code
        require("train.stop_code", code is None or 0 <= code <= 255, code, "allowed is 0 to 255")


@dataclass(frozen=True)
class CheckpointOptions:
    """Saving and resuming."""

    every: int = 500
    """Updates between checkpoints."""
    keep: int | None = 3
    """Number of newest checkpoints to keep; the oldest is deleted after the newest is complete. None keeps all."""
    keep_every: int | None = None
    """Also keep every checkpoint whose update is a multiple of this."""
    keep_best: bool = False
    """Save and keep the checkpoint whose validation pictures follow their conditions best, by validation.judge."""
    resume: str | None = None
    """`auto` (or `latest`) starts the run, resumes it from the newest complete checkpoint, or finds it finished: one
    command for a job that is restarted. Or a checkpoint's folder."""
    allow_changed: bool = False
    """Resume although options have changed that make it another run."""

    def __post_init__(self) -> None:
        require("checkpoint.every", self.every >= 1, self.every, "1 or more")
        require("checkpoint.keep", self.keep is None or self.keep >= 1, self.keep, "1 or more")
        each = self.keep_every
        require("checkpoint.keep_every", each is None or each >= 1, each, "1 or more")


@dataclass(frozen=True)
class ValidationOptions:
    """Pictures generated while training, always from the same noise."""

    prompts: tuple[str, ...] = ()
    """Prompts: as many as images, or one for all images."""
    images: tuple[str, ...] = ()
    """Condition picture files: as many as prompts, or one for all prompts."""
    num_images: int = 4
    """Pictures of each prompt."""
    every: int = 100
    """Updates between validations; there is also one at step 0 and one at the end."""
    steps: int = 20
    """Denoising steps of each picture."""
    guidance: float = 5.0
    """Classifier-free guidance scale."""
    judge: str | None = None
    """Annotator that makes a condition of each validation picture, which is compared with the row's own condition. The
    score, how well the adapter controls, is logged. None is the annotator of data.condition; `none` turns it off."""
    budget: float = 0.05
    """Share of the training time, 0 up to 0.5, for measuring control on held-out pairs; 0 measures nothing."""
    held_out: int = 32
    """Held-out pairs that control is measured on: of `split`, or left out of training."""
    split: str | None = None
    """Split of the held-out pairs. None is the dataset's split validation, val or test, if it is a local folder that
    has one; otherwise pairs are left out of training. `none` leaves none out and measures on pairs of the training."""

    def __post_init__(self) -> None:
        prompts, images = len(self.prompts), len(self.images)
        if bool(prompts) != bool(images):
            given, missing = ("validation.prompts", "validation.images")[:: 1 if prompts else -1]
            raise UserError(f"is given without {flag(missing)}: give both, or neither.", option=given)
        if prompts != images and 1 not in (prompts, images):
            raise UserError(
                f"has {prompts} entries and {flag('validation.images')} {images}: "
                "give as many of one as of the other, or a single one of either.",
                option="validation.prompts",
            )
        require("validation.num_images", self.num_images >= 1, self.num_images, "1 or more")
        require("validation.every", self.every >= 1, self.every, "1 or more")
        require("validation.steps", self.steps >= 1, self.steps, "1 or more")
        require("validation.guidance", 0 <= self.guidance < inf, self.guidance, "allowed is 0 or more")
        require("validation.budget", 0 <= self.budget <= 0.5, self.budget, "allowed is a share from 0 to 0.5")
        require("validation.held_out", 8 <= self.held_out <= 1024, self.held_out, "allowed is 8 to 1024 pairs")

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, image file) of each row of pictures, a single one repeated."""
        count = max(len(self.prompts), len(self.images))
        prompts = self.prompts * count if len(self.prompts) == 1 else self.prompts
        images = self.images * count if len(self.images) == 1 else self.images
        return list(zip(prompts, images, strict=True))


@dataclass(frozen=True)
class TrackingOptions:
    """Where metrics and pictures are logged."""

    report_to: str = "tensorboard"
    """Any tracker accelerate has (tensorboard, wandb, trackio, comet_ml, mlflow, ...), `all`, or `none`."""
    project: str = "sd_xl_train_t2iadapter"
    """Name of the project in the tracker."""
    logging_dir: str = "logs"
    """Folder of the tracker's files, inside the output folder."""
    log_every: int = 10
    """Updates between log entries."""

    def __post_init__(self) -> None:
        require("tracking.log_every", self.log_every >= 1, self.log_every, "1 or more")


@dataclass(frozen=True)
class HubOptions:
    """Publishing the result."""

    push: bool = False
    """Upload the adapter, its card and its pictures at the end, and nothing else."""
    model_id: str | None = None
    """Repository; None takes the output folder's name under your account."""
    token: str | None = field(default=None, metadata={SECRET: True})
    """Access token; None uses the one that `hf auth login` stored. It is never written to a file."""
    private: bool = True
    """Make the repository private, if it is created."""
    license: str | None = None
    """Licence of the adapter by its name on the hub, for example apache-2.0, for the card; None omits it."""
    license_name: str | None = None
    """Name of a licence that the hub does not know, if `license` is `other`."""
    license_link: str | None = None
    """Address of that licence's text, or the file LICENSE of the repository."""

    def __post_init__(self) -> None:
        register_secret(self.token)
        licence_of(self.license, self.license_name, self.license_link, "hub.")

    @property
    def licence(self) -> dict[str, str]:
        """The card's keys of the licence."""
        return licence_of(self.license, self.license_name, self.license_link, "hub.")


def licence_of(license: str | None, name: str | None, link: str | None, prefix: str = "") -> dict[str, str]:
    """The keys license, license_name and license_link of a card, as far as they are given.

    Raises UserError, with the option's path after `prefix`, unless `other` has a name and a link and no other licence
    has them.
    """
    for key, value in (("license_name", name), ("license_link", link)):
        if license == "other" and not value:
            raise UserError(f"is needed, because the licence is `other`: set {flag(prefix + key)}", option=prefix + key)
        if value and license != "other":
            text = f"{value}: only the licence `other` has it; set {flag(prefix + 'license')} other, or omit it"
            raise UserError(text, option=prefix + key)
    given = {"license": license, "license_name": name, "license_link": link}
    return {key: value for key, value in given.items() if value}


@dataclass(frozen=True)
class Config:
    """One run."""

    output_dir: str = "t2iadapter-model"
    """Folder of everything that the run writes, with the finished adapter at its top."""
    base: BaseOptions = BaseOptions()
    adapter: AdapterOptions = AdapterOptions()
    data: DataOptions = DataOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    validation: ValidationOptions = ValidationOptions()
    tracking: TrackingOptions = TrackingOptions()
    hub: HubOptions = HubOptions()


def to_dict(options: Any) -> dict[str, Any]:
    """The tree as plain JSON types, without secrets."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value) if not f.metadata.get(SECRET)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(options)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every option of a tree as `to_dict` returns it."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
