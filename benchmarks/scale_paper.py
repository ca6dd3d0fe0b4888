"""Computes what 3 million and 300 million pairs take: bytes, files, seconds and money by step, from stated assumptions.

    python benchmarks/scale.py --paper [--card_tflops 989] [--efficiency 0.4] [--price 2.5] ...

What is counted: the operations of the networks at SDXL's true size (`count_flops`, on torch's meta device; in the
result file), the bytes of records (`cache/records.py`). What is measured: memory and start of a process by row, in the
result file. All else is assumed, and each assumption is a flag.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common import ROOT, newest

PAGE = ROOT / "docs" / "scale.md"
SIZES = (3_000_000, 300_000_000)
RESOLUTION = 1024
TIB, GIB, MIB, KIB = 2**40, 2**30, 2**20, 2**10
DAY = 86_400


@dataclass(frozen=True)
class Assumptions:
    """What the tables assume. Rates are of one card, dense; none of them was measured here."""

    card_tflops: float = 989.0  # bf16 matrix rate of an H100 SXM, by its data sheet
    vae_tflops: float = 494.0  # its TF32 rate: the VAE runs in float32
    efficiency: float = 0.4  # share of these rates that is reached
    price: float = 2.5  # US dollars a card and hour
    cards: int = 8  # of a machine
    picture_kib: float = 300.0  # a stored picture of 1024 px
    condition_kib: float = 128.0  # a stored condition: a line drawing, at most
    shard_mib: float = 1024.0  # a shard of pictures
    gb_per_s: float = 1.0  # that a machine downloads
    storage_price: float = 23.0  # US dollars a TB and month
    epochs: float = 1.0

    @classmethod
    def of(cls, options: argparse.Namespace) -> Assumptions:
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each assumption."""
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="assumed, for --paper")


# What is counted -----------------------------------------------------------------------------------------------------


def count_flops() -> dict[str, float]:
    """TFLOP of one sample of 1024 px through SDXL: VAE encoder, both text encoders, and a training step without
    recomputation. Needs no memory: the networks are on the meta device."""
    import torch
    from diffusers import AutoencoderKL, T2IAdapter, UNet2DConditionModel
    from sdxl import TEXT, UNET, VAE
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        picture, tokens = torch.zeros(1, 3, RESOLUTION, RESOLUTION), torch.zeros(1, 77, dtype=torch.long)
        vae = AutoencoderKL(**VAE).requires_grad_(False)
        with FlopCounterMode(display=False) as encoding, torch.no_grad():
            vae.encode(picture)
        one = CLIPTextModel(CLIPTextConfig(**TEXT["text_encoder"]))
        two = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT["text_encoder_2"]))
        with FlopCounterMode(display=False) as text, torch.no_grad():
            one(tokens)
            two(tokens)
        unet = UNet2DConditionModel(**UNET).requires_grad_(False)
        adapter = T2IAdapter(3, [320, 640, 1280, 1280], 2, 16, "full_adapter_xl")
        latents, states = torch.zeros(1, 4, RESOLUTION // 8, RESOLUTION // 8), torch.zeros(1, 77, 2048)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        with FlopCounterMode(display=False) as step:
            features = list(adapter(picture))
            found = unet(
                latents,
                torch.zeros(1),
                states,
                added_cond_kwargs=added,
                down_intrablock_additional_residuals=features,
            )
            found.sample.sum().backward()
    counts = {"vae_encoder": encoding, "text_encoders": text, "step": step}
    return {name: round(counter.get_total_flops() / 1e12, 4) for name, counter in counts.items()}


# The tables ----------------------------------------------------------------------------------------------------------


def tables(given: Assumptions, result: dict[str, Any] | None = None) -> str:
    """All tables of docs/scale.md in Markdown. result: the content of a result file; default is the newest."""
    result = result or newest_result()
    made = {
        "assumptions": assumption_table(given),
        "storage": storage_table(given),
        "time": time_table(given, result["flops"]),
        "start": start_table(result),
        "growth": growth_table(result),
        "memory": memory_table(given, result),
        "order": order_table(result["order"]),
    }
    return "\n\n".join(f"<!-- scale.py: {name} -->\n\n{text}\n\n<!-- end -->" for name, text in made.items())


def newest_result() -> dict[str, Any]:
    """The content of the newest result file."""
    file = newest("scale")
    assert file is not None, "there is no result file of scale.py: measure first"
    return json.loads(file.read_text(encoding="utf-8"))


def update_page(page: Path, text: str) -> None:
    """Replaces the tables of a page that stand between the marks of `tables`."""
    content = page.read_text(encoding="utf-8")
    for mark in re.findall(r"<!-- scale\.py: \w+ -->.*?<!-- end -->", text, flags=re.DOTALL):
        name = mark.partition(" -->")[0]
        parts = re.split(rf"{re.escape(name)} -->.*?<!-- end -->", content, flags=re.DOTALL)
        assert len(parts) == 2, f"{page}: the mark {name} --> stands there {len(parts) - 1} times"
        content = mark.join(parts)
    page.write_text(content, encoding="utf-8")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def assumption_table(given: Assumptions) -> str:
    rows = [
        ["`--card_tflops`", f"{given.card_tflops:g}", "TFLOP/s of a card in bf16, dense, by its data sheet"],
        ["`--vae_tflops`", f"{given.vae_tflops:g}", "the same in TF32, for the VAE, which runs in float32"],
        ["`--efficiency`", f"{given.efficiency:g}", "share of these rates that is reached; not measured"],
        ["`--price`", f"{given.price:g}", "dollars a card and hour"],
        ["`--cards`", f"{given.cards}", "cards of a machine"],
        ["`--picture_kib`", f"{given.picture_kib:g}", "KiB of a stored picture of 1024 px"],
        ["`--condition_kib`", f"{given.condition_kib:g}", "KiB of a condition in the cache: a line drawing, at most"],
        ["`--shard_mib`", f"{given.shard_mib:g}", "MiB of a shard of pictures"],
        ["`--gb_per_s`", f"{given.gb_per_s:g}", "GB a second that a machine downloads"],
        ["`--storage_price`", f"{given.storage_price:g}", "dollars a TB and month of object storage"],
        ["`--epochs`", f"{given.epochs:g}", "times that each pair is drawn"],
    ]
    return _table(["assumed", "value", "meaning"], rows)


def record_bytes(given: Assumptions) -> dict[str, float]:
    """Bytes of a pair in each store."""
    from t2i_adapter.cache.records import picture_bytes
    from t2i_adapter.cache.shard_file import INDEX
    from t2i_adapter.cache.stamps import ENTRY

    return {
        "pictures": given.picture_kib * KIB,
        "moments and conditions": picture_bytes(RESOLUTION) + given.condition_kib * KIB,
        "text states": 2.0 * (77 * 2048 + 1280),
        "index and stamps": float(INDEX.itemsize + ENTRY.itemsize),
    }


def storage_table(given: Assumptions) -> str:
    from t2i_adapter.cache.shards import SHARD_BYTES

    shard = {"pictures": given.shard_mib * MIB, "moments and conditions": SHARD_BYTES, "text states": SHARD_BYTES}
    rows = []
    for name, each in record_bytes(given).items():
        row = [name]
        for pairs in SIZES:
            total = pairs * each
            files = f"{-(-total // shard[name]):,.0f} files" if name in shard else "in these"
            row += [show_bytes(total), files, f"{total / 1e12 * given.storage_price:,.0f} $"]
        rows.append(row)
    heads = [f"{show_pairs(pairs)}: {what}" for pairs in SIZES for what in ("bytes", "files", "a month")]
    return _table(["what is stored", *heads], rows)


def time_table(given: Assumptions, flops: dict[str, float]) -> str:
    """Card-hours of each step; downloads by one machine."""
    rate = given.efficiency * given.card_tflops
    each = {
        "encode by the VAE": flops["vae_encoder"] / (given.efficiency * given.vae_tflops),
        "encode captions": flops["text_encoders"] / rate,
        "train": given.epochs * flops["step"] / rate,
        "train without a cache": given.epochs
        * (flops["step"] / rate + flops["vae_encoder"] / (given.efficiency * given.vae_tflops)
           + flops["text_encoders"] / rate),
    }  # fmt: skip
    counted = {
        "encode by the VAE": flops["vae_encoder"],
        "encode captions": flops["text_encoders"],
        "train": flops["step"],
        "train without a cache": sum(flops.values()),
    }
    rows = []
    seconds = given.picture_kib * KIB / (given.gb_per_s * 1e9)
    downloads = [cell for pairs in SIZES for cell in ("-", show_time(pairs * seconds), "-")]
    rows.append(["download, one machine", "-", *downloads])
    for name, value in each.items():
        row = [name, f"{counted[name]:.2f}"]
        for pairs in SIZES:
            hours = pairs * value / 3600
            row += [f"{hours:,.0f}", show_time(hours * 3600 / given.cards), f"{hours * given.price:,.0f} $"]
        rows.append(row)
    what = ("card-hours", f"on {given.cards} cards", "money")
    heads = [f"{show_pairs(pairs)}: {one}" for pairs in SIZES for one in what]
    return _table(["step", "TFLOP a pair", *heads], rows)


PARTS = {
    "live": "parquet, no cache",
    "cached": "parquet, everything cached",
    "table": "one .jsonl of paths, no cache",
    "tar": "tar shards, no cache",
}


def _parts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that were measured, with their titles."""
    return [(name, title) for name, title in PARTS.items() if name in result]


def _rows(part: dict[str, Any]) -> list[str]:
    return sorted((key for key in part if key.isdigit()), key=int)


def start_table(result: dict[str, Any]) -> str:
    rows = []
    for name, title in _parts(result):
        for count in _rows(result[name]):
            first, later = (value for key, value in result[name][count].items() if key.startswith("row "))
            rows.append(
                [
                    title,
                    f"{int(count):,}",
                    f"{first['first_batch_s']:.1f}",
                    f"{later['first_batch_s']:.1f}",
                    f"{first['rss_mib']:,.0f}",
                    f"{first['peak_mib']:,.0f}",
                    f"{first['worker_mib']:.0f}",
                ]
            )
    head = ["data", "rows", "s to the first batch", "s at row 0.9 N", "MiB", "peak MiB", "MiB of a worker"]
    return _table(head, rows)


def growth_table(result: dict[str, Any]) -> str:
    rows = []
    for name, title in _parts(result):
        growth = result[name]["growth"]
        rows.append(
            [
                title,
                f"{growth['rss_bytes_a_row']:.0f}",
                f"{growth['peak_bytes_a_row']:.0f}",
                f"{growth['worker_bytes_a_row']:.1f}",
                f"{growth['start_us_a_row']:.1f}",
            ]
        )
    head = ["data", "bytes a row", "bytes a row at the peak", "bytes a row of a worker", "µs a row at the start"]
    return _table(head, rows)


def memory_table(given: Assumptions, result: dict[str, Any]) -> str:
    """What the measured growth makes of the two sizes."""
    rows = []
    for name, title in _parts(result):
        growth, row = result[name]["growth"], [title]
        for pairs in SIZES:
            peak = pairs * growth["peak_bytes_a_row"]
            row += [show_bytes(peak), show_bytes(given.cards * peak), show_time(pairs * growth["start_us_a_row"] / 1e6)]
        rows.append(row)
    peaks = [pairs * result["missing"]["peak_bytes_a_pair"] for pairs in SIZES]
    cells = [cell for peak in peaks for cell in (show_bytes(peak), show_bytes(given.cards * peak), "-")]
    rows.append(["the first `prepare`: its list of missing records", *cells])
    what = ("a process", f"a machine of {given.cards} cards", "a start")
    return _table(["data", *(f"{show_pairs(pairs)}: {one}" for pairs in SIZES for one in what)], rows)


def order_table(order: dict[str, Any]) -> str:
    rows = []
    for name in ("one table", "100 shards", "1,000 shards"):
        one = order[name]
        rows.append(
            [
                name,
                "yes" if one["every_row_once"] else "no",
                f"{one['shards_a_batch']:g} ({one['shards_a_batch_any']:g})",
                f"{one['neighbours_a_batch']:g} ({one['neighbours_a_batch_any']:g})",
                f"{one['between_batches']:.0%} (2 %)".replace("%", " %", 1),
                f"{one['neighbours_apart']:.2%} (29 %)".replace("%", " %", 1),
                f"{one['next_epoch']:g} (± {one['next_epoch_chance']:g})",
            ]
        )
    head = ["stored as", "each row once", "shards a batch", "neighbours a batch", "variance between batches"]
    return _table([*head, "neighbours apart", "next epoch"], rows)


def show_pairs(pairs: int) -> str:
    return f"{pairs // 1_000_000} M"


def show_bytes(count: float) -> str:
    for size, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{count / KIB:.0f} KiB"


def show_time(seconds: float) -> str:
    if seconds >= 2 * DAY:
        return f"{seconds / DAY:,.0f} d" if seconds >= 10 * DAY else f"{seconds / DAY:.1f} d"
    if seconds >= 7200:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
