"""Downloads an adapter from the hub: only files that an adapter consists of, each checked before it gets its name.

Weights come from safetensors files; pickled files are not downloaded.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from t2i_adapter.errors import UserError, first_line
from t2i_adapter.export.card import CARD
from t2i_adapter.export.card_pictures import PICTURES
from t2i_adapter.export.hub import hub_errors
from t2i_adapter.export.measured import FILE_NAME as EVALUATION
from t2i_adapter.export.release import RECIPE
from t2i_adapter.files import move_atomic, parse_json, show_bytes
from t2i_adapter.models.adapter import check_sizes
from t2i_adapter.models.record import CONFIG, FILE_NAME, WEIGHTS, WEIGHTS_FP16, Metadata, read_metadata
from t2i_adapter.tensors import write_tensors

LARGEST_TEXT = 20 * 2**20
"""Most bytes of a file that holds no weights."""
MOST_PICTURES = 200
_PICTURE = re.compile(rf"{PICTURES}/[\w-]{{1,100}}\.(png|jpg|jpeg|webp)")
_PICKLED = (".bin", ".pth", ".pt", ".ckpt")
_HEADER = 8 * 2**20
"""Most bytes that a safetensors file is larger than its tensors."""
_PREFIX = ".pulling-"


@dataclass(frozen=True)
class Pulled:
    """An adapter that was downloaded.

    Attributes:
        commit: of the repository.
        files: names of the files.
        config: its config.json.
        metadata: its record; None without t2i_adapter.json, as adapters of other trainers.
        parameters: number of its weights.
        skipped: names of pickled files, which were not downloaded.
    """

    commit: str
    files: tuple[str, ...]
    config: dict[str, Any]
    metadata: Metadata | None
    parameters: int
    skipped: tuple[str, ...]


def pull(repo_id: str, out: Path, *, revision: str | None = None, token: str | None = None) -> Pulled:
    """Downloads the adapter into the folder `out`, which must be missing or empty.

    revision: branch, tag or commit; None is main.

    Raises:
        UserError: if the repository or revision is missing or gated, holds no adapter in safetensors, or a file is not
            what it should be. `out` does not hold anything of it then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; name a new one.", option="out")
    with hub_errors(f"pull {repo_id}", token):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    commit = info.sha or revision or "main"
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    skipped = tuple(name for name in sizes if name.endswith(_PICKLED))
    _check_listed(repo_id, sizes, skipped)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=out.parent) as name:
            stage = Path(name) / "adapter"

            def fetch(file: str) -> None:
                with hub_errors(f"pull {repo_id}", token):
                    hf_hub_download(repo_id, file, revision=commit, local_dir=stage, token=token)

            pulled = _fill(repo_id, stage, sizes, fetch)
            shutil.rmtree(stage / ".cache", ignore_errors=True)  # the client's own notes on a download
            if out.exists():
                out.rmdir()
            move_atomic(stage, out)
    except OSError as fault:
        raise UserError(
            f"{out}: cannot be written ({fault.strerror or fault}); free some space or name another folder.",
            option="out",
        ) from fault
    config, metadata, parameters, files = pulled
    return Pulled(commit, tuple(files), config, metadata, parameters, skipped)


def _fill(repo_id: str, stage: Path, sizes: dict[str, int | None], fetch: Any) -> tuple[Any, ...]:
    """Downloads config, record, weights and the rest in this order, and checks each before the next."""
    small = [CONFIG, *(name for name in (FILE_NAME, CARD, EVALUATION, RECIPE) if name in sizes)]
    small += sorted(name for name in sizes if _PICTURE.fullmatch(name))[:MOST_PICTURES]
    for name in small:
        if (size := sizes[name] or 0) > LARGEST_TEXT:
            raise UserError(f"{repo_id}: {name} has {show_bytes(size)}, which is no such file.")
    fetch(CONFIG)
    config = _read_config(stage / CONFIG, repo_id)
    tensors = _expected_tensors(config, repo_id)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    weights = [name for name in (WEIGHTS, WEIGHTS_FP16) if name in sizes]
    for name in weights:
        size, most = sizes[name] or 0, 4 * parameters + _HEADER
        if size > most:
            raise UserError(
                f"{repo_id}: {name} has {show_bytes(size)}, and its {CONFIG} describes {show_bytes(most)} at most."
            )
    for name in small[1:]:
        fetch(name)
    metadata = read_metadata(stage)
    for name in weights:
        fetch(name)
        check_weights(stage / name, tensors, f"{repo_id}: {name}")
    if WEIGHTS not in weights:  # which loaders read if no variant is named
        full = {name: tensor.float() for name, tensor in load_file(stage / WEIGHTS_FP16).items()}
        write_tensors(stage / WEIGHTS, full, {"format": "pt"})
        weights.append(WEIGHTS)
    return config, metadata, parameters, [*small, *weights]


def _check_listed(repo_id: str, names: Iterable[str], pickled: tuple[str, ...]) -> None:
    """Raises UserError unless the repository has the files of an adapter."""
    found = set(names)
    if CONFIG in found and found & {WEIGHTS, WEIGHTS_FP16}:
        return
    if pickled:
        raise UserError(
            f"{repo_id}: its weights are pickled ({pickled[0]}), which could run code and are not downloaded. Ask its "
            f"author for {WEIGHTS}, or name another adapter."
        )
    shown = ", ".join(sorted(found)[:5]) or "nothing"
    raise UserError(
        f"{repo_id}: holds no adapter, which is {CONFIG} and {WEIGHTS} at its top; it holds {shown}. Name another "
        "repository or revision."
    )


def _read_config(path: Path, repo_id: str) -> dict[str, Any]:
    """Returns config.json of a T2IAdapter of a reasonable size. Raises UserError."""
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise UserError(f"{repo_id}: {CONFIG} cannot be read as JSON ({fault}).") from fault
    if not isinstance(config, dict) or config.get("_class_name", "T2IAdapter") != "T2IAdapter":
        kind = config.get("_class_name") if isinstance(config, dict) else None
        raise UserError(
            f"{repo_id}: {CONFIG} is that of {str(kind)[:40]}, not of a T2IAdapter; name another repository."
        )
    check_sizes(config, repo_id)
    return config


def _expected_tensors(config: dict[str, Any], repo_id: str) -> dict[str, torch.Tensor]:
    """Returns name -> tensor without memory, of the network that a config describes. Raises UserError."""
    try:
        with torch.device("meta"):
            adapter: Any = T2IAdapter.from_config(config)
    except (TypeError, ValueError, RuntimeError, LookupError) as fault:
        raise UserError(f"{repo_id}: {CONFIG} describes no T2IAdapter ({first_line(fault)}).") from fault
    return adapter.state_dict()


def check_weights(file: Path, tensors: dict[str, torch.Tensor], place: str) -> None:
    """Raises UserError unless a safetensors file has exactly these tensors, by names and shapes. No tensor is read."""
    try:
        with safe_open(file, "pt") as content:
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{place} is not a complete safetensors file ({first_line(fault)}).") from fault
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if missing := sorted(set(wanted) - set(shapes)):
        raise UserError(f"{place} does not fit {CONFIG}: {len(missing)} weights are missing, such as {missing[0]}.")
    if unknown := sorted(set(shapes) - set(wanted)):
        raise UserError(f"{place} does not fit {CONFIG}: it has other weights too, such as {unknown[0][:80]}.")
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise UserError(f"{place} does not fit {CONFIG}: {name} has the shape {shape}, needed is {wanted[name]}.")
