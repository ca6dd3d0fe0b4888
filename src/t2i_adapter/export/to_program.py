"""Exports an adapter for a program: one file or a folder, with what belongs beside it. Files are read again."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_adapter.errors import UserError
from t2i_adapter.export import layouts, programs
from t2i_adapter.export.adapter import adapter_config, save_adapter
from t2i_adapter.export.civitai import write_civitai
from t2i_adapter.export.layouts import make_adapter
from t2i_adapter.export.modelspec import Description, metadata, preprocessor, usage
from t2i_adapter.export.samples import Sample, read_samples
from t2i_adapter.export.space import SpaceText, space_base, write_space
from t2i_adapter.export.weights_file import read_tensors
from t2i_adapter.export.workflow import Settings, example_info, make_workflow
from t2i_adapter.files import atomic_path, move_atomic, user_path
from t2i_adapter.generation.options import RequestedSampling
from t2i_adapter.models.adapter import load_adapter
from t2i_adapter.models.record import CONFIG, FILE_NAME, WEIGHTS, read_metadata
from t2i_adapter.tensors import write_tensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHECKPOINTS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sd_xl_base_1.0.safetensors",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "v1-5-pruned-emaonly.safetensors",
}
"""Base on the hub -> name of its single file, as ComfyUI lists it."""


@dataclass(frozen=True)
class Bundle:
    """An adapter with all that its exports say of it.

    Attributes:
        folder: the adapter's folder; it does not exist for one of the hub.
        weights: in diffusers' layout, float32, on the CPU.
        stem: begins the names of all files.
        size: side of pictures in pixels, the training's if it is known.
    """

    folder: Path
    config: str
    network: layouts.Network
    weights: Mapping[str, Tensor]
    description: Description
    samples: Sequence[Sample]
    stem: str
    size: int


def open_bundle(
    adapter: str, *, name: str | None, license: str | None, author: str | None, pictures: str | None
) -> Bundle:
    """Loads an adapter and finds its record and pictures. The arguments are options of `export`. Raises UserError."""
    folder = user_path(adapter)
    network = load_adapter(str(folder) if folder.is_dir() else adapter)
    sizes = layouts.Network.from_config(network.config)
    record = read_metadata(adapter)
    public = record.without_local_paths() if record else None
    card = _card_head(folder)
    samples = read_samples(folder, pictures, _prompts(card))
    title = name or folder.resolve().name
    condition = _word(preprocessor(public).partition(",")[0].rpartition(":")[2])
    description = Description(
        title=title,
        condition=condition,
        record=public,
        sampling=RequestedSampling().settle(public.sampling if public else {}),
        license=license or (found if isinstance(found := card.get("license"), str) else None),
        author=author,
        thumbnail=samples[0].picture if samples else None,
    )
    family = "sdxl" if sizes.adapter_type == layouts.XL else "sd15"
    return Bundle(
        folder=folder,
        config=adapter_config(network),
        network=sizes,
        weights={key: tensor.detach() for key, tensor in network.state_dict().items()},
        description=description,
        samples=samples,
        stem=file_stem(title, family, condition),
        size=(record.resolution if record else None) or (1024 if sizes.adapter_type == layouts.XL else 512),
    )


def file_stem(title: str, family: str, condition: str) -> str:
    """Returns NAME-sdxl-canny-t2i-adapter, without those words that the name has already."""
    name = _word(title) or "adapter"
    has = name.lower()
    return "-".join([name, *(word for word in (family, condition, "t2i-adapter") if word and word.lower() not in has)])


def export(bundle: Bundle, program: str, dtype: str | None, out: Path, base: str | None = None) -> list[Path]:
    """Writes what `program` takes into the folder `out`; returns the files and folders that a user needs there.

    Args:
        program: a key of `programs.PROGRAMS`; `programs.check` has accepted it.
        dtype: a key of `DTYPES`. None is fp16 for single files and Spaces, and fp32 with the fp16 variant for folders.
        base: the base that a Space loads; None takes the record's.

    Raises UserError if something cannot be written, or a folder of that name exists.
    """
    try:
        if program in ("diffusers", "invoke"):
            return [_write_folder(bundle, dtype, out / bundle.stem)]
        if program == "space":
            return [_write_space(bundle, dtype or "fp16", out / f"{bundle.stem}-space", base)]
        precision = dtype or "fp16"
        if program != "civitai":
            file = _write_file(bundle, precision, out)
            return [file, *(_write_workflow(bundle, file.name, out) if program == "comfyui" else ())]
        archive = out / f"{bundle.stem}_{precision}-civitai.zip"
        with tempfile.TemporaryDirectory(dir=out) as temporary:
            file = _write_file(bundle, precision, Path(temporary))
            write_civitai(archive, file, bundle.network, bundle.description, bundle.samples, precision)
        return [archive]
    except OSError as fault:
        raise UserError(
            f"{out}: cannot be written ({fault.strerror}); free space or name another folder.", option="out"
        ) from fault


def _write_file(bundle: Bundle, dtype: str, out: Path) -> Path:
    """Writes the adapter as one file in the original layout, and reads it again."""
    cast = _cast(bundle, dtype)
    weights = {layouts.to_original(name, bundle.network): tensor for name, tensor in cast.items()}
    target = out / f"{bundle.stem}_{dtype}.safetensors"
    header = metadata(weights, bundle.network, bundle.description, "original")
    with atomic_path(target) as temporary:
        write_tensors(temporary, weights, header)
    _read_again(target, bundle.network, cast)
    return target


def _read_again(file: Path, network: layouts.Network, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError unless `import` finds the same network and the same bits in a file."""
    tensors, _ = read_tensors(file)
    found, names = layouts.find_network({name: tuple(tensor.shape) for name, tensor in tensors.items()}, _kind(network))
    if found != network or any(not torch.equal(tensors[name], weights[target]) for name, target in names.items()):
        raise UserError(f"{file}: what is read from the disk is not what was written; check the disk.")


def _kind(network: layouts.Network) -> layouts.Kind | None:
    return None if network.adapter_type == layouts.LIGHT else network.adapter_type


def _cast(bundle: Bundle, dtype: str) -> dict[str, Tensor]:
    """Returns the weights in another precision. Raises UserError if one becomes inf."""
    cast = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in bundle.weights.items()}
    for name, tensor in cast.items():
        if not torch.isfinite(tensor).all() and torch.isfinite(bundle.weights[name]).all():
            raise UserError(f"{dtype}: {name} has weights beyond its range; use fp32 or bf16.", option="dtype")
    return cast


def _write_folder(bundle: Bundle, dtype: str | None, target: Path) -> Path:
    """Writes a folder of diffusers, with the record if there is one. The card belongs to `push`."""
    with _new_folder(target) as temporary:
        _write_diffusers(bundle, dtype, temporary)
    return target


def _write_diffusers(bundle: Bundle, dtype: str | None, folder: Path) -> None:
    if dtype is None:
        save_adapter(make_adapter(bundle.network, bundle.weights), folder, metadata=bundle.description.record)
        return
    weights = _cast(bundle, dtype)
    (folder / CONFIG).write_text(bundle.config, encoding="utf-8")
    write_tensors(folder / WEIGHTS, weights, metadata(weights, bundle.network, bundle.description, "diffusers"))
    if record := bundle.description.record:
        text = json.dumps(record.to_dict(), indent=2, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _write_space(bundle: Bundle, dtype: str, target: Path, named: str | None) -> Path:
    record = bundle.description.record
    base = space_base(record.base if record else None, named)
    sampling = bundle.description.sampling
    text = SpaceText(
        title=bundle.description.title,
        made_by=preprocessor(record),
        license=bundle.description.license,
        strength=sampling.scale,
        end=sampling.condition_factor,
        guidance=sampling.guidance,
    )
    with _new_folder(target) as temporary:
        write_space(temporary, bundle.network, base, bundle.size, text)
        (temporary / "adapter").mkdir()
        _write_diffusers(bundle, dtype, temporary / "adapter")
    return target


def _write_workflow(bundle: Bundle, file: str, out: Path) -> list[Path]:
    """Writes the workflow and, if there is a sample, its condition and an example picture with the workflow inside."""
    record, multiple = bundle.description.record, programs.size_multiple(bundle.network)
    sample = next(iter(bundle.samples), None)
    sampling = bundle.description.sampling
    side = max(bundle.size // multiple, 1) * multiple
    condition = f"{bundle.stem}-condition.png"
    name = record.base["name"] if record else next(iter(CHECKPOINTS))
    workflow = make_workflow(
        Settings(
            checkpoint=CHECKPOINTS.get(name, name.rpartition("/")[2].removesuffix(".safetensors") + ".safetensors"),
            adapter=file,
            condition=condition,
            prompt=(sample.prompt if sample else None) or "what the picture shows",
            size=(side, side),
            strength=sampling.scale,
            end=sampling.condition_factor,
            guidance=sampling.guidance,
            steps=sampling.steps,
            prefix=bundle.stem,
            note=f"Put {file} into ComfyUI/models/controlnet and the condition picture into ComfyUI/input. "
            f"{usage(bundle.description, bundle.network)}",
        )
    )
    target = out / f"{bundle.stem}-workflow.json"
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")
    written = [target]
    if sample and sample.condition:
        written += [out / condition, out / f"{bundle.stem}-example.png"]
        with atomic_path(written[1]) as temporary:
            sample.condition.save(temporary, "PNG")
        with atomic_path(written[2]) as temporary:
            sample.picture.save(temporary, "PNG", pnginfo=example_info(workflow, sample.parameters))
    return written


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `target` when the block ends. Raises UserError if that exists."""
    if target.exists():
        raise UserError(f"{target}: exists already; remove it or name another folder.", option="out")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as holder:
        folder = Path(holder) / target.name
        folder.mkdir()
        yield folder
        move_atomic(folder, target)


def _word(text: str) -> str:
    """Returns the text as a part of a file's name that every system and program accepts."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")


def _card_head(folder: Path) -> dict[str, Any]:
    """Returns the front matter of the folder's card; empty if there is none that can be read."""
    import yaml

    try:
        head = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1])
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}


def _prompts(card: Mapping[str, Any]) -> dict[str, str]:
    """Returns path of a picture in the card's gallery -> its prompt."""
    found = {}
    widget = card.get("widget")
    for entry in widget if isinstance(widget, list) else ():
        try:
            found[entry["output"]["url"]] = " ".join(entry["text"].split())
        except (LookupError, TypeError, AttributeError):
            continue  # an entry that somebody wrote by hand
    return found
