"""Measures what busy cores cost a small model, with libgomp's own waiting and with that of `t2i-adapter`.

    python benchmarks/busy_cores.py

One forward pass of nano's UNet (batch 8), with one thread a core, on cores that are free and on cores that other
programs use. A process a row, since libgomp reads its environment once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from statistics import median

from common import make_parser, write_result

from t2i_adapter.environment import set_defaults

CALLS = 12


def forward_ms() -> list[float]:
    """Milliseconds of each call but the first."""
    import torch

    from t2i_adapter.config.tree import NANO, BaseOptions
    from t2i_adapter.models.open import open_base

    unet = open_base(BaseOptions(name=NANO)).unet("cpu", torch.float32)
    size, width, extra = 8, unet.config.cross_attention_dim, unet.config.addition_time_embed_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * extra
    side = unet.config.sample_size
    sample = torch.randn(size, 4, side, side), torch.full((size,), 400), torch.randn(size, 77, width)
    added = {"text_embeds": torch.randn(size, pooled), "time_ids": torch.randn(size, 6)}
    found = []
    with torch.inference_mode():
        for _ in range(CALLS + 1):
            began = time.perf_counter()
            unet(*sample, added_cond_kwargs=added)
            found.append((time.perf_counter() - began) * 1000)
    return found[1:]


def spin() -> None:
    while True:
        pass


def measure(others: int, settings: dict[str, str]) -> list[float]:
    """The milliseconds of a new process beside so many others that never wait."""
    processes = [multiprocessing.Process(target=spin, daemon=True) for _ in range(others)]
    for process in processes:
        process.start()
    try:
        command = [sys.executable, __file__, "--one"]
        return json.loads(subprocess.run(command, env=settings, stdout=subprocess.PIPE, check=True, timeout=300).stdout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(median(values), 1), "lowest": round(min(values), 1), "highest": round(max(values), 1)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure here and print the milliseconds")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(forward_ms()))
        return
    cores = os.cpu_count() or 1
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    ours = dict(own)
    set_defaults(ours)
    arms = {"one thread": own | {"OMP_NUM_THREADS": "1"}, "libgomp's own": own, "t2i-adapter's": ours}
    rows = {(name, others): [] for others in (0, cores) for name in arms}
    for _ in range(options.rounds):
        for name, others in rows:
            rows[name, others] += measure(others, arms[name])
    found = [
        {"waiting": name, "other_programs": others, "forward_ms": summary(values)}
        for (name, others), values in rows.items()
    ]
    for row in found:
        print(f"{row['waiting']:16} {row['other_programs']} other programs: {row['forward_ms']['median']:8.1f} ms")
    write_result("busy_cores", {"rows": found}, options.out)


if __name__ == "__main__":
    main()
