"""Writes the model card: README.md with YAML front matter, pictures, results, and code that runs.

Sections whose content can change later stand between two comment lines, by which they are found and written anew. The
rest of the card belongs to its reader: what somebody wrote there stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from t2i_adapter.errors import UserError
from t2i_adapter.export import card_results, card_text
from t2i_adapter.export.card_head import make_head, read_widget, yaml_block
from t2i_adapter.export.card_pictures import PICTURES, CardSample, Shown, save_samples
from t2i_adapter.export.card_text import Facts
from t2i_adapter.export.measured import Measured
from t2i_adapter.files import parse_json, write_atomic
from t2i_adapter.models.record import CONFIG, Metadata, read_metadata

CARD = "README.md"
SECTIONS = ("gallery", "use", "condition", "sampling", "programs", "evaluation", "limits")
"""Sections between comment lines, in the order of a new card."""
_LOADED = re.compile(r"^(adapter = T2IAdapter\.from_pretrained\()['\"](.+?)['\"], ", re.MULTILINE)
"""The line of the card's code that names the adapter."""


def write_card(
    folder: str | Path,
    *,
    metadata: Metadata,
    repo_id: str,
    samples: Sequence[CardSample] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
) -> Path:
    """Writes README.md and its pictures (in images/) into an adapter's folder; returns the card's path.

    Args:
        metadata: the adapter's record; local paths are shortened to their last part.
        repo_id: hub id or folder from which the code in the card loads the adapter.
        hyperparameters: rows of a table, plain values; None takes the record's optim and training.
        licence: license, license_name and license_link by the hub's names; None omits it.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    shown = save_samples(root, samples)
    facts = Facts(metadata.without_local_paths(), read_config(root), repo_id)
    text = new_card(facts, samples=samples, shown=shown, hyperparameters=hyperparameters, licence=licence)
    (root / CARD).write_text(text, encoding="utf-8")
    return root / CARD


def new_card(
    facts: Facts,
    *,
    samples: Sequence[CardSample] = (),
    shown: Sequence[Shown] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
) -> str:
    """Returns the text of a card. Arguments as of `write_card`; shown: the pictures of the gallery."""
    metadata = facts.metadata
    if hyperparameters is None:
        hyperparameters = {**metadata.optim, **metadata.training, "steps": metadata.steps, "seed": metadata.seed}
    parts = [
        card_text.introduction(facts),
        *(_marked(name, "") for name in SECTIONS),
        card_text.samples_section(samples),
        card_text.hyperparameters(hyperparameters),
        card_text.versions(metadata),
    ]
    head = make_head({}, facts, shown=shown, licence=licence)
    text = yaml_block(head) + "\n" + "\n\n".join(part for part in parts if part) + "\n"
    return complete_card(text, facts)


def complete_card(
    text: str,
    facts: Facts,
    *,
    measured: Measured | None = None,
    licence: Mapping[str, str] | None = None,
    place: str = CARD,
) -> str:
    """Returns the card with its front matter and its marked sections made anew; the evaluation only if there is one.

    A section whose comment lines are missing is skipped; `missing_sections` lists these. The code's prompt is that of
    the gallery's first picture.

    Raises UserError, which begins with `place`, if the card has no front matter.
    """
    old, body = _split(text, place)
    shown = None
    if measured:
        earlier = [one for one in read_widget(old) if "/pair_" not in one.path]
        pairs = [
            Shown(pair.prompt, f"{PICTURES}/{card_results.pair_file(number, 'adapter')}")
            for number, pair in enumerate(measured.pairs)
        ]
        shown = [*earlier, *pairs]
    head = make_head(old, facts, shown=shown, measured=measured, licence=licence)
    pictures = read_widget(head)
    facts = replace(facts, prompt=pictures[0].prompt if pictures else facts.prompt)
    sections = {
        "gallery": card_text.gallery(bool(pictures)),
        "use": card_text.use(facts),
        "condition": card_text.condition(facts),
        "sampling": card_text.sampling(facts),
        "programs": card_text.programs(facts),
    }
    if measured:
        sections["evaluation"] = card_results.evaluation(measured)
    if measured or not _section(body, "evaluation"):
        sections["limits"] = card_results.limits(facts, measured)
    for name, section in sections.items():
        if (found := _pattern(name).search(body)) is not None:
            body = body[: found.start()] + _marked(name, section) + body[found.end() :]
    if not _pattern("use").search(body):  # a local folder must not be published, whatever became of the comment lines
        body = _LOADED.sub(lambda line: f"{line[1]}{facts.repo_id!r}, ", body)
    return yaml_block(head) + body


def missing_sections(text: str) -> list[str]:
    """Returns the sections whose comment lines a card does not have."""
    return [name for name in SECTIONS if not _pattern(name).search(text)]


def refresh_card(folder: str | Path) -> None:
    """Writes what the folder's record says into its card, if it has both. Raises UserError for a malformed card."""
    root = Path(folder)
    metadata = read_metadata(root)
    if metadata is None or not (root / CARD).is_file():
        return
    text = read_card(root)
    facts = Facts(metadata.without_local_paths(), read_config(root), _loaded_from(text) or str(folder))
    write_atomic(root / CARD, [complete_card(text, facts, place=str(root / CARD)).encode()])


def read_card(folder: Path) -> str:
    """Returns the text of a folder's card. Raises UserError if it cannot be read."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError) as fault:
        raise UserError(f"{folder / CARD}: no model card with YAML front matter found.") from fault


def read_config(folder: Path) -> Mapping[str, Any]:
    """Returns config.json; {} if it is missing or malformed, which loading the adapter reports."""
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _loaded_from(text: str) -> str | None:
    """The hub id or folder from which a card's code loads the adapter."""
    found = _LOADED.search(text)
    return found[2] if found else None


def _marked(name: str, section: str) -> str:
    """Returns a section between two lines, by which it is found and replaced."""
    begin, end = _marks(name)
    return "\n\n".join([begin, *([section] if section else []), end])


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _pattern(name: str) -> re.Pattern[str]:
    """A section with its two lines. Text of users is never a whole line like these."""
    begin, end = map(re.escape, _marks(name))
    return re.compile(f"^{begin}$(.*?)^{end}$", re.MULTILINE | re.DOTALL)


def _section(body: str, name: str) -> str:
    found = _pattern(name).search(body)
    return found[1].strip() if found else ""


def _split(text: str, place: str) -> tuple[dict[str, Any], str]:
    """Returns the front matter and the body of a card. Raises UserError if there is none."""
    try:
        lines = iter(text.splitlines(keepends=True))
        if next(lines, "").rstrip() != "---":
            raise ValueError("no front matter")
        content = yaml.safe_load("".join(_until_end(lines))) or {}
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        yaml_block(content)  # raises if it cannot be written back
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as fault:
        raise UserError(
            f"{place}: no model card with YAML front matter found. Correct it, or remove the file to get a new one."
        ) from fault
    return content, "".join(lines)


def _until_end(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.rstrip() == "---":
            return
        yield line
    raise ValueError("the front matter has no end")
