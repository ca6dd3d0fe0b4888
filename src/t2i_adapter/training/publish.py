"""The end of a run: writes the adapter and its model card into the output folder, and pushes them to the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2i_adapter.annotators.registry import kinds, open_annotator
from t2i_adapter.config import recipe
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.data.formats import is_hub_dataset
from t2i_adapter.data.joined import Part
from t2i_adapter.errors import UserError
from t2i_adapter.export import hub
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import read_config, write_card
from t2i_adapter.export.release import OPTIONS, make_release
from t2i_adapter.files import show_path
from t2i_adapter.models.adapter import load_adapter
from t2i_adapter.models.base import Base
from t2i_adapter.models.joint import adapters_in
from t2i_adapter.models.open import downloaded_commit
from t2i_adapter.models.record import Metadata, read_metadata
from t2i_adapter.training import checkpoint
from t2i_adapter.training.compose import adapter_folders, joint_record
from t2i_adapter.training.loop import Trainer
from t2i_adapter.training.resume import versions
from t2i_adapter.training.saving import read_best
from t2i_adapter.training.validation import Validator


def find_repository(config: Config) -> hub.Place | None:
    """The hub repository to push to, or None. Raises UserError if it cannot be written, before hours of training."""
    if not config.hub.push:
        return None
    options = config.hub
    return hub.check_access(config.output_dir, model_id=options.model_id, token=options.token, private=options.private)


def publish(trainer: Trainer, base: Base, place: hub.Place | None, parts: Sequence[Part] = ()) -> bool:
    """Writes the adapter and its card into the output folder, then pushes them if `place` is not None.

    parts: the conditions of several adapters, each of which is written to a folder of its own and not pushed.

    Returns whether they were pushed.

    Everything is on the disk before the push. If the push fails, a line with the command that pushes later is printed.
    """
    config, folder = trainer.config, trainer.output_dir
    samples = trainer.validate.latest if isinstance(trainer.validate, Validator) else ()
    repo_id = place.repo_id if place else None
    networks, records = adapters_in(trainer.update.ema_or_adapter), metadata(trainer, base, parts)
    for network, record, own in zip(networks, records, adapter_folders(config), strict=True):
        save_adapter(network, own, metadata=record)
        write_card(own, metadata=record, repo_id=repo_id or str(own), samples=samples, licence=config.hub.licence)
    if place is None:
        return False
    try:
        release = make_release(folder, place.repo_id)
        print(f"Published: {hub.push(release, place, token=config.hub.token)}", flush=True)
    except UserError as fault:
        print(
            f"{fault}\nThe adapter is safe in {show_path(folder)}; to push it later: "
            f"{hub.push_command(folder, place.repo_id)}",
            flush=True,
        )
        return False
    return True


def metadata(trainer: Trainer, base: Base, parts: Sequence[Part] = ()) -> list[Metadata]:
    """The content of t2i_adapter.json: how the adapter was trained; or that of each of several."""
    config, channels = trainer.config, trainer.update.adapter.config["in_channels"]
    found = make_record(config, trainer.plan.to_dict(), channels, trainer.step, versions())
    commit = downloaded_commit(base)
    found = replace(found, base={**found.base, **({"commit": commit} if commit else {})})
    if not parts:
        return [found]
    return [
        replace(
            found,
            condition={**condition_record(part.options(config.data)), "channels": part.channels},
            training={**found.training, **joint_record(config.adapter.compose, number)},
        )
        for number, part in enumerate(parts)
    ]


def make_record(
    config: Config, plan: Mapping[str, Any], channels: int, step: int, libraries: Mapping[str, str]
) -> Metadata:
    """Returns the record of an adapter after `step` updates. plan: `Plan.to_dict`; libraries: their versions."""
    named, data, train = config.base, config.data, config.train
    return Metadata(
        base={key: getattr(named, key) for key in ("name", "config", "revision", "variant", "vae")},
        condition={**condition_record(data), "channels": channels},
        resolution=data.resolution,
        data={"name": data.location, "split": data.split, "is_on_hub": is_hub_dataset(data)},
        optim={"name": config.optim.name, "learning_rate": plan["lr"], "schedule": config.optim.schedule},
        training={
            "global_batch": plan["global_batch"],
            "precision": plan["precision"],
            "timesteps": config.objective.timesteps,
            "proportion_empty_prompts": data.proportion_empty_prompts,
            "max_tokens": data.max_tokens,
            "ema_decay": train.ema_decay,
        },
        steps=step,
        seed=plan["seed"],
        versions=libraries,
    )


def save_checkpoint(run: Path, name: str, out: Path) -> None:
    """Writes the adapter of a run's checkpoint, with its record, into the folder `out`.

    Args:
        name: of the checkpoint's folder, such as checkpoint-500; `best` is the one with the highest validation score.

    Raises UserError if there is no such checkpoint, it is damaged, or the run's options cannot be read.
    """
    folder = run / _checkpoint_name(run, name)
    known = ", ".join([path.name for _, path in checkpoint.list_checkpoints(run)]) or "none"
    if not folder.is_dir():
        raise UserError(f"{name}: no such checkpoint in {run}; there are: {known}.", option="checkpoint")
    if (fault := checkpoint.damage(folder)) is not None:
        raise UserError(f"{name}: {fault}; there are: {known}.", option="checkpoint")
    state, adapter = checkpoint.read_state(folder), folder / checkpoint.ADAPTER
    record = read_metadata(run)
    if record is not None:  # of a finished run; its recommended options were measured on the last weights
        record = replace(record, steps=state["step"], sampling={})
    else:
        config = recipe.load(run / OPTIONS, Config())
        channels = read_config(adapter).get("in_channels", 3)
        record = make_record(config, state["plan"], channels, state["step"], state.get("versions", {}))
    save_adapter(load_adapter(str(adapter)), out, metadata=record)
    if (run / OPTIONS).is_file():
        (out / OPTIONS).write_bytes((run / OPTIONS).read_bytes())


def _checkpoint_name(run: Path, name: str) -> str:
    if name != "best":
        return name
    if (best := read_best(run)) is None:
        raise UserError(f"{run} has no checkpoint with a score; name one by its folder.", option="checkpoint")
    return f"{checkpoint.PREFIX}{best[0]}"


def condition_record(options: DataOptions) -> dict[str, Any]:
    """How the run's conditions were made, so that later ones are made alike; or the column they came from."""
    spec = options.condition
    if spec is None:
        return {"column": options.conditioning_image_column, "kind": options.condition_kind}
    if spec.partition(",")[0].strip() in kinds() or ":" in spec:
        return open_annotator(spec).record()
    return {"name": spec, "kind": options.condition_kind}  # a map of the dataset's own generator
