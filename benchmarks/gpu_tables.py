"""The tables of the documentation from a result of `gpu.py`. Importing this module loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]
NOT_MEASURED = "not measured"
Form = Callable[[Figures], str]


def speed(found: Figures) -> str:
    least, most = found["least_samples_per_s"], found["most_samples_per_s"]
    text = f"{found['samples_per_s']:.3g} samples/s ({least:.3g} to {most:.3g}) at batch {found['batch']}"
    if "share_of_matmul" in found:
        text += f"; {found['tflop_per_s']:.0f} TFLOP/s, {found['share_of_matmul']:.0%} of the matrix rate"
    if "peak_allocated_mib" in found:
        text += f"; {found['peak_allocated_mib']:,.0f} MiB"
    return text


def memory(found: Figures) -> str:
    if "peak_allocated_mib" not in found:
        return NOT_MEASURED
    off = found["plan_over_peak"] - 1
    held = f"{found['peak_reserved_mib']:,.0f} held by the allocator"
    return f"{found['peak_allocated_mib']:,.0f} MiB ({held}); plan {found['plan_mib']:,.0f}, {off:+.1%}"


def recipe(found: Figures) -> str:
    return f"{speed(found)}; largest batch {found['largest_batch']}, {found['optimizer']}"


def tests(found: Figures) -> str:
    counts = [f"{found[f'{state}_tests']} {state}" for state in ("passed", "failed", "skipped")]
    return f"{', '.join(counts)} in {found['seconds']:.0f} s"


def seconds(found: Figures) -> str:
    return f"{found['seconds']:.3g} s, {found['peak_mib']:,.0f} MiB"


def scripts(found: Figures) -> str:
    sides = {side: found[side]["samples_per_s"] for side in ("script", "ours")}
    text = f"{sides['script']:.3g} and {sides['ours']:.3g} samples/s: {sides['ours'] / sides['script']:.2f} times"
    if "gpu_mib" in found["ours"]:
        text += f"; {found['script']['gpu_mib']:,.0f} and {found['ours']['gpu_mib']:,.0f} MiB of the card"
    return text


def command(found: Figures) -> str:
    return f"{found['samples_per_s']:.3g} samples/s at batch {found['batch']}; {found['wall_s']:.0f} s in all"


def cosines(found: Figures) -> str:
    return ", ".join(f"{kind} {value:.4f}" for kind, value in found.items())


def curve(found: Figures) -> str:
    of_20, of_all = f"{found['means_of_20_differ_by']:.1%}", f"{found['means_differ_by']:.2%}"
    return f"means of 20 losses differ by at most {of_20}, the mean of all {found['updates']} by {of_all}"


LINES: dict[str, tuple[tuple[str, str, Form], ...]] = {
    "tests": (("all", "`tests/gpu`", tests),),
    "speed": (
        *((f"bf16-{size}", f"bf16, batch {size}", speed) for size in (1, 4, 8, 16)),
        ("best", "bf16, the fastest batch size", speed),
        ("compiled", "bf16, compiled", speed),
        ("graphs", "bf16, compiled, CUDA graphs", speed),
        ("graphs-1", "bf16, compiled, CUDA graphs, batch 1", speed),
        ("float8", "float8 base", speed),
        ("float8-compiled", "float8 base, compiled", speed),
        ("recompute", "bf16, all blocks checkpointed", speed),
        ("unfrozen", "bf16, with the base's weight gradients, as the diffusers script computes them", speed),
    ),
    "memory": (
        ("plain-1", "bf16, batch 1", memory),
        ("plain-8", "bf16, batch 8", memory),
        ("all-1", "all blocks checkpointed, batch 1", memory),
        ("all-16", "all blocks checkpointed, batch 16", memory),
        ("large-4", "large blocks checkpointed, batch 4", memory),
        ("int8-all-1", "int8 base, all blocks checkpointed, batch 1", memory),
        ("float8-4", "float8 base, batch 4", memory),
        ("nf4-all-1", "nf4 base, all blocks checkpointed, batch 1", memory),
    ),
    "recipes": (
        ("8gib", "int8 base, all blocks checkpointed, held to 8 GiB", recipe),
        ("24gib", "bf16, large blocks checkpointed, held to 24 GiB", recipe),
        ("24gib-float8", "the same with a float8 base", recipe),
    ),
    "script": tuple(
        (f"batch-{size}", f"the diffusers script and this one, fp16, batch {size}", scripts) for size in (1, 4, 8, 16)
    ),
    "inference": (
        ("unet", "UNet, one pass of one sample, fp16", seconds),
        ("adapter", "adapter", seconds),
        ("controlnet", "ControlNet", seconds),
        ("picture-base", "a picture of 30 steps with guidance: the base alone", seconds),
        ("picture-adapter", "with the adapter", seconds),
        ("picture-controlnet", "with a ControlNet", seconds),
    ),
    "train": (
        ("train", "`t2i-adapter train`, bf16", command),
        ("train-deterministic", "the same with train.deterministic", command),
    ),
    "quantised": (
        ("cosine", "cosine of the adapter's gradient and the plain base's", cosines),
        ("none-4", "plain base, batch 4", speed),
        ("float8-4", "float8, batch 4", speed),
        ("int8-4", "int8, batch 4", speed),
        ("nf4-4", "nf4, batch 4", speed),
        ("8gib-curve", "losses over 200 updates on the int8 base beside the plain one, both checkpointed", curve),
    ),
}
"""Part -> (row of the result, what the table calls it, its figures as text)."""


def tables(result: Figures) -> str:
    """All lines as Markdown tables, one a part. A row that the result does not have is "not measured"."""
    parts = result.get("parts", {})
    blocks = []
    for part, lines in LINES.items():
        rows = dict(parts.get(part, {}).get("rows", {}))
        if part == "speed" and (best := _best(rows)):
            rows["best"] = rows[best]
        body = [f"| {label} | {_cell(rows.get(name), form)} |" for name, label, form in lines]
        blocks.append("\n".join([f"| {part} | measured |", "|---|---|", *body]))
    return "\n\n".join(blocks)


def _cell(found: Figures | None, form: Form) -> str:
    if found is None:
        return NOT_MEASURED
    if found.get("out_of_memory"):
        return "does not fit"
    for state in ("failed", "skipped"):
        if reason := found.get(state):
            return f"{NOT_MEASURED} ({state}: {reason})"
    return form(found)


def best_batch(result: Figures) -> int | None:
    """The batch size with the most samples a second in plain bf16; None if none was measured."""
    rows = result["parts"].get("speed", {}).get("rows", {})
    best = _best(rows)
    return rows[best]["batch"] if best else None


def _best(rows: Figures) -> str | None:
    found = [name for name, row in rows.items() if name.startswith("bf16-") and "samples_per_s" in row]
    return max(found, key=lambda name: rows[name]["samples_per_s"], default=None)
