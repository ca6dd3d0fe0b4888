"""Collects what is published of an adapter's folder, in memory: nothing in the folder is changed.

config.json, diffusion_pytorch_model[.fp16].safetensors    the adapter, as it is
t2i_adapter.json                                           its record, without local paths
README.md, images/                                         the card, completed for the repository, and its pictures
evaluation.json                                            the numbers of the evaluation, without names and captions
recipe.yaml                                                the run's options, without secrets and local paths
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2i_adapter.config.recipe import load
from t2i_adapter.config.tree import Config, to_dict
from t2i_adapter.data.formats import is_hub_dataset
from t2i_adapter.errors import UserError
from t2i_adapter.export import measured
from t2i_adapter.export.card import CARD, complete_card, missing_sections, new_card, read_card, read_config
from t2i_adapter.export.card_pictures import PICTURE_NAME, PICTURES, SHEET, encode_singles
from t2i_adapter.export.card_results import pair_file
from t2i_adapter.export.card_text import Facts
from t2i_adapter.export.measured import Measured, read_evaluation
from t2i_adapter.files import output_folder, user_path, write_atomic
from t2i_adapter.models.record import CONFIG, FILE_NAME, WEIGHTS, WEIGHTS_FP16, Metadata, read_metadata, without_paths

OPTIONS = "options.yaml"
"""In a run's folder: its resolved options and seed, a recipe that repeats or resumes the run."""
RECIPE = "recipe.yaml"
"""The run's options as they are published."""
_PLACES = (
    *("output_dir", "base.cache_dir", "data.cache_dir", "data.prepared_dir", "data.conditioning_dir", "data.skip"),
    *("data.location", "validation.images", "tracking.logging_dir", "checkpoint.resume"),
)
"""Options that name files or folders: of these the last part is published."""
_TEXTS = ("validation.prompts", "data.caption_prefix")
"""Options that are words, whatever is in them."""


@dataclass(frozen=True)
class File:
    """A file to publish. name: its path in the repository. content: its bytes, or the file that holds them."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Release:
    """What is published. notes: lines for the user on what is not as expected."""

    files: tuple[File, ...]
    notes: tuple[str, ...] = ()


def make_release(
    folder: str | Path,
    repo_id: str,
    *,
    licence: Mapping[str, str] | None = None,
    evaluation: str | Path | None = None,
) -> Release:
    """Returns what is published of an adapter's folder as `repo_id`.

    Args:
        licence: license, license_name and license_link for the card; None leaves the card's.
        evaluation: folder of `evaluate`, whose numbers and pictures the card gets.

    Raises:
        UserError: if the folder has no finished adapter, a file in it is a link, the card is malformed, or the
            evaluation measured other weights.
    """
    root = Path(folder)
    metadata = read_metadata(root)
    if metadata is None or not (root / WEIGHTS).is_file() or not (root / CONFIG).is_file():
        raise UserError(f"{root}: no finished adapter found; its files are {CONFIG}, {WEIGHTS} and {FILE_NAME}.")
    public = metadata.without_local_paths()
    found = read_evaluation(user_path(evaluation)) if evaluation else None
    if found:
        _check_weights(root, found, str(evaluation))
    files = [File(name, _no_link(root / name)) for name in (CONFIG, WEIGHTS, WEIGHTS_FP16) if (root / name).is_file()]
    files.append(File(FILE_NAME, _json(public.to_dict())))
    card, notes = _card(root, public, repo_id, found, licence)
    files.append(File(CARD, card.encode()))
    files += _pictures(root, found)
    if found:
        files.append(File(measured.FILE_NAME, _json(found.content)))
    if (root / OPTIONS).is_file():
        options = _no_link(root / OPTIONS)
        try:
            files.append(File(RECIPE, public_recipe(options).encode()))
        except UserError as fault:
            notes.append(f"{RECIPE} is not published: {fault}")
    return Release(tuple(sorted(files, key=lambda file: file.name)), tuple(notes))


def write_release(release: Release, out: str) -> None:
    """Writes the files into an empty or new folder. Raises UserError."""
    folder = output_folder(out)
    if any(folder.iterdir()):
        raise UserError(f"{out}: the folder is not empty; name a new one.", option="out")
    for file in release.files:
        target = folder / file.name
        target.parent.mkdir(exist_ok=True)
        write_atomic(target, [file.content if isinstance(file.content, bytes) else file.content.read_bytes()])


def public_recipe(file: Path) -> str:
    """Returns a run's options as a recipe without secrets, local paths and addresses' signatures. `train --recipe`
    reads it; the dataset's folder is named by its last part.

    Raises UserError if the options cannot be read.
    """
    config = load(file, Config())
    stays = ("data.location",) if is_hub_dataset(config.data) else ()

    def clean(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, f"{path}.{key}" if path else key) for key, item in value.items()}
        if path in stays or path in _TEXTS:
            return value
        if path in _PLACES and value:
            return [Path(item).name for item in value] if isinstance(value, list) else _last_part(value)
        return without_paths(value)

    return yaml.safe_dump(clean(to_dict(config), ""), sort_keys=False, allow_unicode=True, width=120)


def _last_part(value: str) -> str:
    return Path(value.partition("?")[0] if "://" in value else value).name


def _card(
    root: Path, metadata: Metadata, repo_id: str, found: Measured | None, licence: Mapping[str, str] | None
) -> tuple[str, list[str]]:
    """Returns the card's text, and lines on what could not be written into it."""
    facts = Facts(metadata, read_config(root), repo_id)
    text, place = new_card(facts), CARD
    if (root / CARD).is_file():
        text, place = read_card(_no_link(root / CARD).parent), str(root / CARD)
    card = complete_card(text, facts, measured=found, licence=licence, place=place)
    missing = missing_sections(text)
    notes = []
    if missing:
        notes.append(
            f"{place}: the comment lines of the sections {', '.join(missing)} are missing, so these are not written. "
            "Remove the file to publish a new card."
        )
    return card, notes


def _pictures(root: Path, found: Measured | None) -> Iterator[File]:
    """The card's pictures; those of an evaluation replace earlier ones."""
    made: dict[str, bytes] = {}
    if found:
        for number, pair in enumerate(found.pairs):
            made |= encode_singles({pair_file(number, column): picture for column, picture in pair.pictures.items()})
        made |= encode_singles({SHEET: found.sheet}, largest=None)
    for picture in sorted((root / PICTURES).glob("*")):
        is_replaced = picture.name in made or (found is not None and picture.name.startswith("pair_"))
        if PICTURE_NAME.fullmatch(picture.name) and picture.is_file() and not is_replaced:
            yield File(f"{PICTURES}/{picture.name}", _no_link(picture))
    for name, content in made.items():
        yield File(f"{PICTURES}/{name}", content)


def _check_weights(root: Path, found: Measured, evaluation: str) -> None:
    """Raises UserError if the evaluation names other weights than the folder's."""
    if found.digest is None:
        return
    from t2i_adapter.generation.pipeline import weights_digest
    from t2i_adapter.models.adapter import load_adapter

    if weights_digest(load_adapter(str(root))) != found.digest:
        raise UserError(
            f"{evaluation}: measured other weights than those of {root}; evaluate this adapter.", option="evaluation"
        )


def _no_link(path: Path) -> Path:
    """Refuses links: in a folder from somebody else they could point to any file of this machine."""
    if path.is_symlink() or path.parent.is_symlink():
        raise UserError(f"{path}: is a link, and links are not uploaded; replace it by the file itself.")
    return path


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
