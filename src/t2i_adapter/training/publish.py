"""The end of a run: writes the adapter and its model card into the output folder, and pushes them to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from t2i_adapter.annotators.registry import kinds, open_annotator
from t2i_adapter.config.tree import Config, DataOptions
from t2i_adapter.data.joined import Part
from t2i_adapter.errors import UserError
from t2i_adapter.export import hub
from t2i_adapter.export.adapter import save_adapter
from t2i_adapter.export.card import write_card
from t2i_adapter.files import show_path
from t2i_adapter.models.base import Base
from t2i_adapter.models.joint import adapters_in
from t2i_adapter.models.record import Metadata
from t2i_adapter.training.compose import adapter_folders, joint_record
from t2i_adapter.training.loop import Trainer
from t2i_adapter.training.resume import versions
from t2i_adapter.training.validation import Validator


def find_repository(config: Config) -> str | None:
    """The hub repository to push to, or None. Raises UserError if it cannot be written, before hours of training."""
    if not config.hub.push:
        return None
    options = config.hub
    return hub.check_access(config.output_dir, model_id=options.model_id, token=options.token, private=options.private)


def publish(trainer: Trainer, base: Base, repo_id: str | None, parts: Sequence[Part] = ()) -> bool:
    """Writes the adapter and its card into the output folder, then pushes them if `repo_id` is not None.

    parts: the conditions of several adapters, each of which is written to a folder of its own and not pushed.

    Returns whether they were pushed.

    Everything is on the disk before the push. If the push fails, a line with the command that pushes later is printed.
    """
    config, folder = trainer.config, trainer.output_dir
    samples = trainer.validate.latest if isinstance(trainer.validate, Validator) else ()
    networks, records = adapters_in(trainer.update.ema_or_adapter), metadata(trainer, base, parts)
    for network, record, place in zip(networks, records, adapter_folders(config), strict=True):
        save_adapter(network, place, metadata=record)
        write_card(
            place,
            metadata=record,
            repo_id=repo_id or str(place),
            channels=network.config["in_channels"],
            samples=samples,
            license=config.hub.license,
        )
    if repo_id is None:
        return False
    try:
        print(f"Published: {hub.push(folder, repo_id, token=config.hub.token)}", flush=True)
    except UserError as fault:
        print(
            f"{fault}\nThe adapter is safe in {show_path(folder)}; to push it later: "
            f"{hub.push_command(folder, repo_id)}",
            flush=True,
        )
        return False
    return True


def metadata(trainer: Trainer, base: Base, parts: Sequence[Part] = ()) -> list[Metadata]:
    """The content of t2i_adapter.json: how the adapter was trained; or that of each of several."""
    options, channels = trainer.config, trainer.update.adapter.config["in_channels"]
    record = _metadata(trainer, base)
    if not parts:
        return [replace(record, condition={**condition_record(options.data), "channels": channels})]
    return [
        replace(
            record,
            condition={**condition_record(part.options(options.data)), "channels": part.channels},
            training={**record.training, **joint_record(options.adapter.compose, number)},
        )
        for number, part in enumerate(parts)
    ]


def _metadata(trainer: Trainer, base: Base) -> Metadata:
    """The record without the condition."""
    options, train = trainer.config, trainer.config.train
    named = options.base
    return Metadata(
        base={
            "name": base.name,
            "config": named.config,
            "revision": named.revision,
            "variant": named.variant,
            "vae": named.vae,
        },
        resolution=options.data.resolution,
        data={"name": options.data.location, "split": options.data.split},
        optim={"name": options.optim.name, "learning_rate": trainer.plan.lr, "schedule": options.optim.schedule},
        training={
            "global_batch": trainer.plan.global_batch,
            "precision": trainer.plan.precision,
            "timesteps": options.objective.timesteps,
            "proportion_empty_prompts": options.data.proportion_empty_prompts,
            "max_tokens": options.data.max_tokens,
            "ema_decay": train.ema_decay,
        },
        steps=trainer.step,
        seed=trainer.plan.seed,
        versions=versions(),
    )


def condition_record(options: DataOptions) -> dict[str, Any]:
    """How the run's conditions were made, so that later ones are made alike; or the column they came from."""
    spec = options.condition
    if spec is None:
        return {"column": options.conditioning_image_column, "kind": options.condition_kind}
    if spec.partition(",")[0].strip() in kinds() or ":" in spec:
        return open_annotator(spec).record()
    return {"name": spec, "kind": options.condition_kind}  # a map of the dataset's own generator
