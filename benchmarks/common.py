"""What all benchmarks share: the names and places of result files, and what each records about its measurement.

A result file is `benchmarks/results/NAME_HARDWARE_DATE.json`, for example `step_time_2cpu_2026-11-26.json`. Its key
`measured` holds date, hardware, machine and versions of libraries; the other keys belong to the benchmark. A new
measurement is a new file. A benchmark that measures some of its rows only copies the other rows from the newest file
of the same hardware; each row keeps its own `measured`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pyarrow")
LIBRARIES += ("Pillow", "opencv-python-headless", "starlette", "uvicorn", "sdxl-t2i-adapter")


def gpu() -> str | None:
    """Name of the CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def hardware(*, on_gpu: bool = False) -> str:
    """Short name for file names: "2cpu" for two CPU cores, or the GPU's name in small letters."""
    name = gpu() if on_gpu else None
    return re.sub("[^a-z0-9]+", "-", name.lower()) if name else f"{os.cpu_count()}cpu"


def processor() -> str:
    """The CPU's model name where Linux knows it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measured(*, on_gpu: bool = False, **machine: Any) -> dict[str, Any]:
    """The key `measured`. machine: what a benchmark adds to the description of the machine, such as its threads."""
    return {
        "date": today(),
        "hardware": hardware(on_gpu=on_gpu),
        "machine": {
            "cpu_cores": os.cpu_count(),
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "load_average": round(os.getloadavg()[0], 1),
            "gpu": gpu() if on_gpu else None,
            **machine,
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the file's docstring and has the flag --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/NAME_HARDWARE_DATE.json")
    return parser


def result_file(name: str, *, on_gpu: bool = False) -> Path:
    """Where a benchmark measured today on this machine writes."""
    return RESULTS / f"{name}_{hardware(on_gpu=on_gpu)}_{today()}.json"


def newest(name: str, hardware: str = "*") -> Path | None:
    """The newest result file of a benchmark, by the date in its name; None if there is none."""
    files = RESULTS.glob(f"{name}_{hardware}_[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].json")
    found = [file for file in files if file.name.count("_") == name.count("_") + 2]
    return max(found, key=lambda file: file.stem.rpartition("_")[2], default=None)


def read_earlier(name: str, out: Path | None, *, on_gpu: bool = False) -> dict[str, Any]:
    """What a benchmark that adds rows goes on from: the content of `out`, or of the newest file of this hardware."""
    file = out or newest(name, hardware(on_gpu=on_gpu))
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


def write_result(
    name: str, content: dict[str, Any], out: Path | None = None, *, on_gpu: bool = False, **machine: Any
) -> Path:
    """Writes a result file with `measured` in front, prints its path and returns it.

    out: the file to write, or None for `result_file`. machine: as in `measured`.
    """
    out = out or result_file(name, on_gpu=on_gpu)
    content = {key: value for key, value in content.items() if key != "measured"}
    write_json(out, {"measured": measured(on_gpu=on_gpu, **machine), **content})
    print(out)
    return out


def write_json(out: Path, content: dict[str, Any]) -> None:
    """Writes a result file so that a program that is killed leaves the former content or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)
