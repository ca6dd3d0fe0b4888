"""Compares an adapter's features in other programs with those in diffusers, at official sizes and random weights.

The adapter is exported by `t2i-adapter export --dtype fp32`, and the file is read by tests/support/programs.py, which
states the rules of the programs. A figure is the norm of the difference of a feature over its norm in diffusers: 0 is
equal to the bit. It does not depend on the machine.

    python benchmarks/export_parity.py
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, make_parser, write_result
from diffusers import T2IAdapter
from safetensors.torch import load_file

sys.path.append(str(ROOT / "tests"))
from support import programs as rules

from t2i_adapter.cli import main as t2i_adapter
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.layouts import DOWNSCALE, FULL, LIGHT, XL, Kind, Network

ADAPTERS: dict[Kind, tuple[tuple[int, ...], int]] = {
    XL: ((320, 640, 1280, 1280), 2),
    FULL: ((320, 640, 1280, 1280), 2),
    LIGHT: ((320, 640, 1280), 4),
}
"""Kind -> channels and residual blocks of the official adapters."""
SIZES: dict[Kind, tuple[tuple[int, int], ...]] = {
    XL: ((1024, 1024), (832, 1216), (1008, 1008), (1040, 1040)),
    FULL: ((512, 512), (448, 704), (544, 544)),
    LIGHT: ((512, 512), (448, 704), (544, 544)),
}
"""Kind -> heights and widths, the last of which are no multiples of what programs agree on."""
PROGRAMS = (rules.COMFYUI, rules.A1111)


def measure(kind: Kind, folder: Path) -> list[dict[str, Any]]:
    """Exports a random adapter of one kind; returns a row for each size and program."""
    torch.manual_seed(0)
    channels, blocks = ADAPTERS[kind]
    adapter = T2IAdapter(**Network(kind, 3, channels, blocks, DOWNSCALE[kind]).config())
    save_adapter(adapter, folder / "adapter", metadata={"base": {"name": "none"}}, fp16=False)
    words = ["export", str(folder / "adapter"), "--to", "comfyui", "--dtype", "fp32", "--out", str(folder / "out")]
    assert t2i_adapter(words) == 0
    file = load_file(next((folder / "out").glob("*.safetensors")))
    rows = []
    for height, width in SIZES[kind]:
        picture = torch.rand(1, 3, height, width)
        with torch.no_grad():
            ours = adapter(picture)
        for program in PROGRAMS:
            built = rules.read({name: tuple(tensor.shape) for name, tensor in file.items()}, program)
            assert built is not None and built.is_exact
            theirs = rules.features(file, built, picture, program.pool)
            apart = [rules.difference(a, b) for a, b in zip(ours, theirs, strict=True)]
            rows.append({"kind": kind, "height": height, "width": width, "program": program.name, "difference": apart})
            print(kind, f"{height}x{width}", program.name, *(f"{share:.2f}" for share in apart), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as docs/export.md shows them: one line a size, "0" for features that are equal to the bit."""
    lines = ["| adapter | height x width | ComfyUI, features 1 to 4 | A1111, features 1 to 4 |", "|---|---|---|---|"]
    of = {(row["kind"], row["height"], row["width"], row["program"]): row["difference"] for row in rows}
    for kind, height, width in dict.fromkeys(key[:3] for key in of):
        shown = [
            ", ".join(f"{share:.2f}" if share else "0" for share in of[kind, height, width, program.name])
            for program in PROGRAMS
        ]
        lines.append(f"| {kind} | {height} x {width} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    options = make_parser(__doc__).parse_args()
    rows = []
    for kind in ADAPTERS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(kind, Path(folder))
    command = shlex.join(["python", *sys.argv])
    write_result("export_parity", {"command": command, "rows": rows}, options.out, threads=torch.get_num_threads())
    print(table(rows))


if __name__ == "__main__":
    main()
