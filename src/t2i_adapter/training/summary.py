"""What a finished run prints: what it reached, where its files are, and the commands that come next."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

import torch

from t2i_adapter.cache.records import add_prefix
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.data.source import Source
from t2i_adapter.errors import UserError
from t2i_adapter.files import parse_json, show_bytes, show_command, show_path, show_seconds
from t2i_adapter.runs.page import FILE as REPORT
from t2i_adapter.training import checkpoint
from t2i_adapter.training.compose import adapter_folders
from t2i_adapter.training.loop import METRICS, Trainer
from t2i_adapter.training.meter import peak_memory
from t2i_adapter.training.validation import FOLDER

WINDOW = 100
"""Updates whose losses are averaged."""
PROMPT_LETTERS = 80
_LAYOUT = {"kind": "layout"}
"""Option of a run's dataset -> what verbs that do not train call it."""
_DATASET_OPTIONS = (
    *("kind", "image_column", "conditioning_image_column", "caption_column"),
    *("conditioning_dir", "captions", "background"),
)
"""Options of a run's dataset that `evaluate` needs if they are not the default."""


def describe_end(trainer: Trainer, source: Source, *, is_published: bool) -> str:
    """The summary of a finished run, at most 15 lines, each of whose commands can be pasted into a shell."""
    rows = "\n".join(f"  {name:<15}{value}" for name, value in _rows(trainer).items() if value)
    commands = next_commands(trainer.config, source, is_published=is_published)
    return "\n".join(["Done", rows, "Next", *(f"  {command}" for command in commands)])


def _rows(trainer: Trainer) -> dict[str, str]:
    folder, plan, made = trainer.output_dir, trainer.plan, trainer.step - trainer.first_step
    samples, entries = made * plan.global_batch, _entries(folder)
    saved = [path for _, path in checkpoint.list_checkpoints(folder)]
    return {
        "updates": f"{trainer.step:,} of {plan.steps:,}"
        + (f", {made:,} of them after the resume" if trainer.first_step else "")
        + f"; {samples:,} sample{'s' * (samples != 1)} in {show_seconds(trainer.seconds)}"
        + f" ({samples / max(trainer.seconds, 1e-9):.3g} a second)",
        "loss": _loss(entries, trainer.step),
        "control": _gain(entries),
        "score": _control(entries),
        "compute": _rate(entries),
        "peak memory": _peak_memory(trainer.accelerator.device),
        "adapter": ", ".join(show_path(place) for place in adapter_folders(trainer.config)),
        "checkpoints": f"{show_path(saved[-1])}{f' and {len(saved) - 1} before it' if len(saved) > 1 else ''}"
        if saved
        else "",
        "pictures": show_path(folder / FOLDER) if (folder / FOLDER).is_dir() else "",
        "log": show_path(folder / METRICS),
        "page": show_path(folder / REPORT),  # written when the run has ended
    }


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl; none if it cannot be read."""
    try:
        return [parse_json(line) for line in (folder / METRICS).read_bytes().splitlines()]
    except (OSError, ValueError):
        return []


def _loss(entries: list[dict[str, Any]], step: int) -> str:
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    last = [loss for at, loss in losses if at > step - WINDOW]
    first = [loss for at, loss in losses if at <= WINDOW]
    if not last:
        return ""
    words = f"{sum(last) / len(last):.4f} over the last {min(WINDOW, step):,} updates"
    return words + (f", {sum(first) / len(first):.4f} over the first {WINDOW}" if first and step >= 2 * WINDOW else "")


def _gain(entries: list[dict[str, Any]]) -> str:
    """What the last look at held-out pairs found, and what the looks said."""
    looks = [(entry["step"], entry["gain"]) for entry in entries if "gain" in entry]
    if not looks:
        return ""
    step, gain = looks[-1]
    benefit = gain["benefit"]
    numbers = f"{benefit['mean']:.0%} ({benefit['low']:.0%} to {benefit['high']:.0%})"
    words = f"the condition lowers the loss of {gain['pairs']} {_PAIRS[gain['on']]} by {numbers} at step {step:,}"
    said = [f"{_SAID[kind]} at step {entry['step']:,}" for entry in entries if (kind := _kind(entry)) in _SAID]
    return "; ".join([words, *said])


_PAIRS = {"held-out": "held-out pairs", "training": "pairs of the training"}
_SAID = {
    "read": "read",
    "not_read": "NOT read",
    "plateau": "no gain left",
    "plateau_over": "gain came back",
    "overfitting": "overfitting",
    "harm": "does HARM",
}
"""Kind of advice -> its short form."""


def _kind(entry: dict[str, Any]) -> str:
    return entry["advice"]["kind"] if "advice" in entry else ""


def _control(entries: list[dict[str, Any]]) -> str:
    scores = [(entry["control"], entry["step"]) for entry in entries if "control" in entry]
    scores += [(entry["score"]["adapter"]["mean"], entry["step"]) for entry in entries if "score" in entry]
    if not scores:
        return ""
    best, at = max(scores)
    return f"{scores[-1][0]:.3f} at step {scores[-1][1]:,}; the best {best:.3f} at step {at:,}"


def _peak_memory(device: torch.device) -> str:
    found = {name: show_bytes(size * 2**30) for name, size in peak_memory(device).items()}
    if device.type == "cuda":
        return f"{found['peak_memory_gib']} of the GPU, {found['peak_reserved_gib']} with the allocator's reserve"
    return f"{found['peak_memory_gib']} of the main process"


def _rate(entries: list[dict[str, Any]]) -> str:
    """Operations a second of a process, in the middle of the log's entries."""
    rates = [entry["tflop_per_s"] for entry in entries if "tflop_per_s" in entry]
    if not rates:
        return ""
    shares = [entry["peak_share"] for entry in entries if "peak_share" in entry]
    share = f", {statistics.median(shares):.0%} of the card's peak" if shares else ""
    return f"{statistics.median(rates):.3g} TFLOP/s a process{share}"


def next_commands(config: Config, source: Source, *, is_published: bool) -> list[str]:
    """Command lines that generate, measure and publish. What the run cannot know is a word in capital letters."""
    folders = adapter_folders(config)
    if config.adapter.compose:
        found: list[list[str | Path]] = []
        for part, folder in zip(source.parts, folders, strict=True):
            made = ["--condition", part.annotate] if part.annotate else []
            data, out = _held_out(part.options(config.data)), ["--out", folder / "evaluation"]
            found.append(["evaluate", "--adapter", folder, *data, *made, *out])
        found += [["push", "--folder", folder] for folder in folders]
        return [show_command("t2i-adapter", *words) for words in found]
    [folder] = folders
    prompt, kind, picture = _example(config, source)
    generate = ["generate", "--adapter", folder, "--prompt", prompt, kind, picture]
    evaluate = ["evaluate", "--adapter", folder, *_held_out(config.data)]
    push = [] if is_published else [["push", "--folder", folder]]
    return [show_command("t2i-adapter", *words) for words in (generate, evaluate, *push)]


def _example(config: Config, source: Source) -> tuple[str, str, str | Path]:
    """Prompt, flag and picture of a command that generates: of the validation, otherwise of the first pair."""
    if config.validation.prompts:
        prompt, image = config.validation.pairs()[0]
        return prompt, "--image", Path(image)
    flag, place = ("--photo", 0) if source.annotate else ("--image", 1)
    try:
        caption, file = source.identify(0, "").captions[0], source.files(0)[place]
    except UserError:  # a row that the run skipped
        return "PROMPT", flag, "PICTURE"
    prompt = textwrap.shorten(add_prefix(caption, config.data.caption_prefix), PROMPT_LETTERS, placeholder="")
    return prompt or "PROMPT", flag, Path(file) if file else "PICTURE"


def _held_out(data: DataOptions) -> list[str | Path]:
    """Flags that name the dataset of an evaluation: that of the run, if it may have a split for tests."""
    place = str(data.location)
    if Path(place).exists() and not (Path(place) / "test").is_dir():
        return ["--data", "HELD_OUT_PAIRS"]
    default = DataOptions()
    changed = [name for name in _DATASET_OPTIONS if getattr(data, name) != getattr(default, name)]
    more = [word for name in changed for word in (f"--{_LAYOUT.get(name, name)}", str(getattr(data, name)))]
    return ["--data", Path(place) if Path(place).exists() else place, *more]
