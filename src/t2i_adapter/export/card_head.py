"""The YAML front matter of a model card, by which the hub lists, links and searches an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from t2i_adapter.config.tree import NANO
from t2i_adapter.export.card_pictures import PICTURE_NAME, PICTURES, Shown
from t2i_adapter.export.card_text import Facts
from t2i_adapter.export.measured import ADAPTER, COLUMNS, FILE_NAME, FLOORS, QUALITY, Measured
from t2i_adapter.models.record import is_path

_TAGS = ("t2i-adapter", "text-to-image", "diffusers")
_FAMILY_TAGS = {
    True: ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    False: ("stable-diffusion", "stable-diffusion-diffusers"),
}
_KIND = re.compile(r"[a-z][a-z0-9-]{1,30}")


def make_head(
    old: Mapping[str, Any],
    facts: Facts,
    *,
    shown: Sequence[Shown] | None = None,
    measured: Measured | None = None,
    licence: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the front matter: what `old` has, with the keys that the facts decide.

    Tags and widget entries that somebody added stay, and so do the licence and the results if none are given.

    Args:
        shown: the pictures of the gallery; None leaves those of `old`.
        licence: license, license_name and license_link, as far as given.
    """
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    own = [*_TAGS, *_FAMILY_TAGS[facts.is_xl], *_kind_tag(facts)]
    listed = old.get("tags")
    added = [tag for tag in (listed if isinstance(listed, list) else []) if isinstance(tag, str)]
    head["tags"] = list(dict.fromkeys([*own, *added]))
    name = facts.metadata.base["name"]
    if name != NANO and _is_repository(name):
        head |= {"base_model": name, "base_model_relation": "adapter"}
    if facts.dataset:
        head["datasets"] = [facts.dataset]
    if licence:
        old = {key: value for key, value in old.items() if not key.startswith("license")}
        head |= licence
    if shown is not None:
        head["widget"] = [*_others(old), *({"text": one.prompt, "output": {"url": one.path}} for one in shown)]
    widget = read_widget({**old, **head})
    if widget and _is_repository(facts.repo_id):
        head["thumbnail"] = hf_hub_url(facts.repo_id, widget[0].path)
    if measured:
        head["model-index"] = _model_index(facts, measured)
    content = {**old, **head}
    if not content.get("widget"):
        content.pop("widget", None)
    return content


def read_widget(head: Mapping[str, Any]) -> list[Shown]:
    """Returns the gallery's pictures of a front matter, as far as they are pictures of the card's own folder."""
    found = []
    entries = head.get("widget")
    for entry in entries if isinstance(entries, list) else []:
        output = entry.get("output") if isinstance(entry, dict) else None
        path = output.get("url") if isinstance(output, dict) else None
        if isinstance(path, str) and _is_own(path) and isinstance(entry.get("text"), str):
            found.append(Shown(entry["text"], path))
    return found


def yaml_block(head: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n"


def _is_repository(name: str) -> bool:
    """Whether a name is that of a repository on the hub, and not of a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not is_path(name)


def _is_own(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder == PICTURES and PICTURE_NAME.fullmatch(name) is not None


def _others(head: Mapping[str, Any]) -> list[Any]:
    """Widget entries that somebody added to the card."""
    entries, own = head.get("widget"), {one.path for one in read_widget(head)}
    if not isinstance(entries, list):
        return []
    return [each for each in entries if not (isinstance(each, dict) and (each.get("output") or {}).get("url") in own)]


def _kind_tag(facts: Facts) -> list[str]:
    """The condition kind's name as a tag. `controlnet` would make the hub and programs take it for a ControlNet."""
    name = facts.metadata.condition.get("name")
    return [name] if isinstance(name, str) and _KIND.fullmatch(name) and name != "controlnet" else []


def _model_index(facts: Facts, measured: Measured) -> list[dict[str, Any]]:
    """Returns the results as the hub reads them: each control metric with the adapter, and with the two floors."""
    from t2i_adapter.evaluation.headline import METRICS

    metrics = []
    for key, columns in measured.content["metrics"].items():
        if key not in METRICS or key in QUALITY:
            continue
        for column in (ADAPTER, *FLOORS):
            if column in columns:
                low, high = columns[column]["ci95"]
                words = f"{METRICS[key].name}, {COLUMNS[column]} (95 % interval {low:.3f} to {high:.3f})"
                metrics.append({"type": key, "name": words, "value": round(columns[column]["mean"], 4)})
    if not metrics:
        return []
    settings = measured.content["settings"]
    data = facts.dataset or settings.get("data")
    data = data if isinstance(data, str) and data else "held-out pairs"
    dataset = {"name": f"{measured.content['num']} pairs of {data}", "type": facts.dataset or "other"}
    if isinstance(settings.get("split"), str):
        dataset["split"] = settings["split"]
    result: dict[str, Any] = {
        "task": {"type": "text-to-image", "name": "Text-to-Image"},
        "dataset": dataset,
        "metrics": metrics,
    }
    if _is_repository(facts.repo_id):
        result["source"] = {"name": FILE_NAME, "url": hf_hub_url(facts.repo_id, FILE_NAME)}
    return [{"name": facts.name, "results": [result]}]
